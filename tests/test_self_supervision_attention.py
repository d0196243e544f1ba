import numpy as np
import pytest
import torch
from PIL import Image

from sgtr_hf import DinoVitModel
from sgtr_hf.self_supervision.class_attention import (
    attention_jaccard,
    class_attention,
    enlarge,
    most_attended,
)
from sgtr_hf.visualization.class_attention_drawing import draw_class_attention, overlay_heat
from sgtr_hf.visualization.video_files import read_frames, write_video
from test_modeling_dino_vit import images, small_vit_config


@pytest.mark.parametrize("backend", ["eager", "sdpa"])
@pytest.mark.parametrize("registers", [0, 2])
def test_the_row_of_the_class_token_is_that_of_the_whole_attention(backend, registers):
    torch.manual_seed(0)
    config = small_vit_config(num_registers=registers, initializer_range=0.5)
    model = DinoVitModel(config).eval()
    pixel_values = images(24, 40)
    model.set_attn_implementation("eager")
    with torch.no_grad():
        whole = model(pixel_values, output_attentions=True).attentions[-1]
    model.set_attn_implementation(backend)
    maps = class_attention(model, pixel_values)
    assert maps.shape == (2, 3, 3, 5)
    torch.testing.assert_close(maps.flatten(2), whole[:, :, 0, 1 + registers :])
    # Attention is far from even, or the comparison would say little.
    assert maps.amax() > 2 * maps.mean()


def slowly_most_attended(values, mass):
    """Add up from the smallest; what comes after 1 - mass stays."""
    total, kept = 0.0, set()
    for index in sorted(range(len(values)), key=lambda index: values[index]):
        total += values[index] / sum(values)
        if total > 1 - mass:
            kept.add(index)
    return kept


@pytest.mark.parametrize("mass", [0.1, 0.6, 0.95])
def test_the_marked_patches_hold_the_mass(mass):
    maps = torch.rand(2, 3, 4, 5, generator=torch.Generator().manual_seed(0)) ** 4
    marked = most_attended(maps, mass)
    for values, mask in zip(maps.view(6, 20), marked.view(6, 20), strict=True):
        chosen = set(mask.nonzero().flatten().tolist())
        assert chosen == slowly_most_attended(values.double().tolist(), mass)
        assert values[mask].sum() >= mass * values.sum()
        assert values[~mask].max() <= values[mask].min()


def test_no_mass_marks_nothing_and_all_of_it_everything():
    maps = torch.rand(1, 4, 4) + 0.1
    assert not most_attended(maps, 0.0).any()
    assert most_attended(maps, 1.0).all()
    with pytest.raises(ValueError, match="between 0 and 1"):
        most_attended(maps, 1.5)


def test_jaccard_takes_the_best_head_of_each_object():
    heads = torch.zeros(2, 4, 4, dtype=torch.bool)
    heads[0, :2] = True
    heads[1, 2:, :2] = True
    objects = torch.zeros(2, 4, 4, dtype=torch.bool)
    objects[0, :2] = True  # head 0 fits exactly
    objects[1, 2:] = True  # head 1 covers half of it
    assert attention_jaccard(heads, objects) == pytest.approx((1 + 0.5) / 2)
    # Unknown where head 1 misses the object: then it fits.
    valid = torch.ones(4, 4, dtype=torch.bool)
    valid[2:, 2:] = False
    assert attention_jaccard(heads, objects, valid) == 1.0
    assert attention_jaccard(heads, objects[:0]) is None


def test_patches_become_pixels():
    patches = torch.tensor([[[True, False], [False, True]]])
    large = enlarge(patches, (4, 6))
    assert large.dtype == torch.bool
    assert large[0, :2, :3].all()
    assert not large[0, :2, 3:].any()


def test_drawings_show_where_the_attention_is():
    picture = Image.new("RGB", (40, 40), (0, 0, 0))
    maps = np.zeros((2, 2, 2), dtype=np.float32)
    maps[:, 0, 0] = 1
    heat = np.asarray(overlay_heat(picture, maps[0])).astype(int).sum(-1)
    assert heat[:20, :20].min() > heat[20:, 20:].max()
    plain = draw_class_attention(picture, maps)
    marked = draw_class_attention(picture, maps, maps > 0)
    assert plain.size == marked.size
    assert plain.tobytes() != marked.tobytes()
    # Attention of nothing is drawn too.
    overlay_heat(picture, np.zeros((2, 2)))


@pytest.mark.parametrize("name", ["film.gif", "film.webp", "film.mp4"])
def test_videos_are_written_and_read_again(name, tmp_path):
    if name.endswith("mp4"):
        pytest.importorskip("av")
    colors = [(250, 0, 0), (0, 250, 0), (0, 0, 250)]
    frames = [Image.new("RGB", (33, 32), color) for color in colors]
    assert write_video(tmp_path / name, iter(frames), 5) == 3
    found = list(read_frames(tmp_path / name))
    assert len(found) == 3
    for frame, color in zip(found, colors, strict=True):
        # mp4 wants even sides; and compresses.
        assert frame.size in {(33, 32), (32, 32)}
        assert np.abs(np.asarray(frame)[10, 10].astype(int) - color).max() < 30


def test_a_folder_of_frames_is_a_video(tmp_path):
    for number in range(3):
        Image.new("L", (8, 8), number * 20).save(tmp_path / f"{number}.png")
    assert [frame.getpixel((0, 0))[0] for frame in read_frames(tmp_path)] == [0, 20, 40]


def test_mistakes_with_videos_are_named(tmp_path):
    with pytest.raises(ValueError, match="no video or folder"):
        list(read_frames(tmp_path / "missing.mp4"))
    with pytest.raises(ValueError, match="no image to be a frame"):
        list(read_frames(tmp_path))
    with pytest.raises(ValueError, match="must end in one of"):
        write_video(tmp_path / "film.xyz", [], 5)
    frames = [Image.new("RGB", (8, 8)), Image.new("RGB", (8, 9))]
    with pytest.raises(ValueError, match=r"frame 1 has \(8, 9\), the first \(8, 8\)"):
        write_video(tmp_path / "film.gif", frames, 5)
    with pytest.raises(ValueError, match="no frame to write"):
        write_video(tmp_path / "film.gif", [], 5)
    pytest.importorskip("av")
    (tmp_path / "broken.mp4").write_text("no video")
    with pytest.raises(ValueError, match=r"broken.mp4 cannot be read"):
        list(read_frames(tmp_path / "broken.mp4"))
