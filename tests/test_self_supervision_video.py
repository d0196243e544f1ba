import math

import numpy as np
import pytest
import torch
from PIL import Image

from sgtr_hf import DinoVitModel
from sgtr_hf.self_supervision.annotated_videos import (
    find_videos,
    object_masks,
    read_mask,
    write_masks,
)
from sgtr_hf.self_supervision.image_preparation import Normalization
from sgtr_hf.self_supervision.region_similarity import (
    boundary,
    boundary_accuracy,
    region_similarity,
    summarize_videos,
    video_accuracy,
)
from sgtr_hf.self_supervision.video_segmentation import (
    PropagationSettings,
    _MemoryFrame,
    propagate,
    segment_video,
)
from test_modeling_dino_vit import small_vit_config


def random_blob(generator, height=30, width=40):
    """A few rectangles, some of which touch the border."""
    mask = np.zeros((height, width), dtype=bool)
    for _ in range(3):
        top, left = generator.integers(0, height - 4), generator.integers(0, width - 4)
        mask[top : top + generator.integers(2, 15), left : left + generator.integers(2, 20)] = True
    return mask


def slow_boundary(mask):
    height, width = mask.shape
    edge = np.zeros_like(mask)
    for y in range(height):
        for x in range(width):
            neighbours = [(y, x + 1), (y + 1, x), (y + 1, x + 1)]
            if y == height - 1 or x == width - 1:
                neighbours = neighbours[:1] if y == height - 1 else neighbours[1:2]
            edge[y, x] = any(
                mask[y, x] != mask[j, i] for j, i in neighbours if j < height and i < width
            )
    return edge


def slow_boundary_accuracy(predicted, annotated, radius):
    """Every pair of boundary pixels."""
    found, wanted = (np.argwhere(slow_boundary(mask)) for mask in (predicted, annotated))

    def share(points, others):
        near = [any(math.dist(p, o) <= radius for o in others) for p in points]
        return sum(near) / len(near)

    precision, recall = share(found, wanted), share(wanted, found)
    return 2 * precision * recall / (precision + recall) if precision + recall else 0.0


@pytest.mark.parametrize("seed", range(6))
def test_j_and_f_follow_the_slow_definition(seed):
    generator = np.random.default_rng(seed)
    predicted, annotated = random_blob(generator), random_blob(generator)
    both = sum(p and a for p, a in zip(predicted.flat, annotated.flat, strict=True))
    either = sum(p or a for p, a in zip(predicted.flat, annotated.flat, strict=True))
    assert region_similarity(predicted, annotated) == pytest.approx(both / either)
    np.testing.assert_array_equal(boundary(predicted), slow_boundary(predicted))
    for tolerance in (2, 3):
        assert boundary_accuracy(predicted, annotated, tolerance) == pytest.approx(
            slow_boundary_accuracy(predicted, annotated, tolerance)
        )
    # .04 of a diagonal of 50 pixels.
    assert boundary_accuracy(predicted, annotated, 0.04) == boundary_accuracy(
        predicted, annotated, 2
    )


def test_empty_masks_have_their_conventions():
    empty, some = np.zeros((9, 9), dtype=bool), np.zeros((9, 9), dtype=bool)
    some[3:6, 3:6] = True
    assert region_similarity(empty, empty) == boundary_accuracy(empty, empty) == 1
    assert region_similarity(empty, some) == boundary_accuracy(empty, some) == 0
    assert boundary_accuracy(some, empty) == 0
    assert region_similarity(some, some) == boundary_accuracy(some, some) == 1


def test_a_video_counts_neither_the_given_frame_nor_the_last():
    annotated = np.zeros((4, 8, 8), dtype=np.uint8)
    annotated[:, :4], annotated[:, 6:] = 1, 2
    predicted = annotated.copy()
    predicted[0] = predicted[3] = 0
    predicted[1, :4] = 0
    figures = video_accuracy(predicted, annotated, [1, 2])
    np.testing.assert_allclose(figures, [[0.5, 0.5], [1, 1]])
    total = summarize_videos([figures, np.ones((2, 2))])
    assert (total.region_similarity, total.num_objects) == (0.875, 4)
    assert total.mean == 0.875
    # Of two frames, the second is all there is.
    np.testing.assert_allclose(video_accuracy(predicted[:2], annotated[:2], [1]), [[0, 0]])


def test_unknown_pixels_are_left_out():
    annotated = np.zeros((3, 8, 8), dtype=np.uint8)
    annotated[:, :4] = 1
    predicted = annotated.copy()
    predicted[1, 4:6] = 1
    annotated[1, 4:6] = 255
    np.testing.assert_allclose(video_accuracy(predicted, annotated, [1]), [[1, 1]])


def test_mistaken_videos_are_refused():
    with pytest.raises(ValueError, match="one shape"):
        video_accuracy(np.zeros((2, 3, 3), int), np.zeros((2, 3, 4), int), [1])
    with pytest.raises(ValueError, match="at least 2 annotated frames"):
        video_accuracy(np.zeros((1, 3, 3), int), np.zeros((1, 3, 3), int), [1])
    with pytest.raises(ValueError, match="No video has an object"):
        summarize_videos([])


def slow_propagation(features, memory, settings):
    """One patch after the other."""
    height, width, _ = features.shape
    labels = torch.zeros(height, width, memory[0].labels.shape[-1])
    for y in range(height):
        for x in range(width):
            found = []
            for frame in memory:
                for j in range(height):
                    for i in range(width):
                        if max(abs(j - y), abs(i - x)) <= settings.radius:
                            similarity = float(features[y, x] @ frame.features[j, i])
                            weight = math.exp(similarity / settings.temperature)
                            found.append((weight, frame.labels[j, i]))
            found = sorted(found, key=lambda pair: -pair[0])[: settings.num_neighbours]
            total = sum(weight for weight, _ in found)
            labels[y, x] = sum(weight * label for weight, label in found) / total
    return labels


@pytest.mark.parametrize("radius", [1, 2, 9])
@pytest.mark.parametrize("block", [1, 2**20])
def test_propagation_follows_the_slow_definition(radius, block, monkeypatch):
    monkeypatch.setattr("sgtr_hf.self_supervision.video_segmentation._BLOCK_ENTRIES", block)
    generator = torch.Generator().manual_seed(0)

    def frame():
        features = torch.randn(5, 6, 8, generator=generator)
        features = torch.nn.functional.normalize(features, dim=-1)
        return _MemoryFrame(features, torch.rand(5, 6, 3, generator=generator))

    memory, features = [frame(), frame()], frame().features
    settings = PropagationSettings(radius=radius, num_neighbours=3)
    torch.testing.assert_close(
        propagate(features, memory, settings), slow_propagation(features, memory, settings)
    )


def test_fewer_patches_than_neighbours_are_enough():
    features = torch.ones(1, 2, 4) / 2
    memory = [_MemoryFrame(features, torch.tensor([[[1.0, 0], [0, 1.0]]]))]
    labels = propagate(features, memory, PropagationSettings())
    torch.testing.assert_close(labels, torch.full((1, 2, 2), 0.5))
    # exp(1 / temperature) is no float32 any more.
    labels = propagate(features, memory, PropagationSettings(temperature=0.001))
    torch.testing.assert_close(labels, torch.full((1, 2, 2), 0.5))


class ColorModel(DinoVitModel):
    """Patches are told apart by their colour alone."""

    def forward(self, pixel_values, **kwargs):
        patches = torch.nn.functional.avg_pool2d(pixel_values, self.config.patch_size)
        tokens = patches.flatten(2).transpose(1, 2)
        tokens = torch.cat((tokens, torch.ones_like(tokens[..., :1]) * 0.1), dim=-1)
        output = super().forward(pixel_values)
        output.last_hidden_state = torch.cat((tokens[:, :1], tokens), dim=1)
        return output


NORMALIZATION = Normalization((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))


def moving_squares(count=5):
    """A red and a blue square on green, moving apart; their masks."""
    frames, masks = [], []
    for step in range(count):
        picture = np.zeros((64, 128, 3), dtype=np.uint8)
        picture[..., 1] = 255
        mask = np.zeros((64, 128), dtype=np.uint8)
        for number, color, left in (
            (3, (255, 0, 0), 48 - 8 * step),
            (7, (0, 0, 255), 72 + 8 * step),
        ):
            picture[16:40, left : left + 16] = color
            mask[16:40, left : left + 16] = number
        frames.append(Image.fromarray(picture))
        masks.append(mask)
    return frames, np.stack(masks)


def test_objects_are_followed():
    frames, masks = moving_squares()
    model = ColorModel(small_vit_config(patch_size=8)).eval()
    settings = PropagationSettings(short_side=64, num_frames=2, radius=3)
    found = np.stack(list(segment_video(model, iter(frames), masks[0], NORMALIZATION, settings)))
    np.testing.assert_array_equal(found[0], masks[0])
    assert set(np.unique(found)) == {0, 3, 7}
    figures = video_accuracy(found, masks, [3, 7])
    # Edges are as fine as patches.
    assert figures[:, 0].min() > 0.8
    assert figures[:, 1].min() > 0.8


def test_a_video_of_one_frame_and_no_object_goes_through():
    frames, masks = moving_squares(2)
    model = DinoVitModel(small_vit_config(patch_size=8)).eval()
    settings = PropagationSettings(short_side=32)
    assert len(list(segment_video(model, frames[:1], masks[0], NORMALIZATION, settings))) == 1
    nothing = np.zeros_like(masks[0])
    found = list(segment_video(model, frames, nothing, NORMALIZATION, settings))
    assert not np.stack(found).any()


def test_a_mask_of_another_size_is_refused():
    frames, masks = moving_squares(2)
    model = DinoVitModel(small_vit_config()).eval()
    settings = PropagationSettings(short_side=32)
    with pytest.raises(ValueError, match="size of each frame, 64 x 128"):
        list(segment_video(model, frames, masks[0][:10], NORMALIZATION, settings))
    with pytest.raises(ValueError, match="from 1 to 255"):
        list(segment_video(model, frames, masks[0].astype(int) * 100, NORMALIZATION))


def test_masks_are_read_written_and_paired(tmp_path):
    _, masks = moving_squares(3)
    picture = Image.fromarray(masks[0])
    picture.putpalette(list(range(256)) * 3)
    (tmp_path / "masks" / "run").mkdir(parents=True)
    (tmp_path / "frames" / "run").mkdir(parents=True)
    picture.save(tmp_path / "masks" / "run" / "00000.png")
    np.testing.assert_array_equal(read_mask(tmp_path / "masks" / "run" / "00000.png"), masks[0])
    [video] = find_videos(tmp_path / "frames", tmp_path / "masks")
    assert (video.name, len(video.masks)) == ("run", 1)
    written = list(write_masks(tmp_path / "out", ["a", "b"], iter(masks), video.masks[0]))
    assert len(written) == 3
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "00002.png", "a.png", "b.png",
    ]  # fmt: skip
    np.testing.assert_array_equal(read_mask(tmp_path / "out" / "b.png"), masks[1])
    objects, valid = object_masks(np.array([[0, 2], [255, 5]], dtype=np.uint8))
    assert objects.tolist() == [[[False, True], [False, False]], [[False, False], [False, True]]]
    assert valid.tolist() == [[True, True], [False, True]]


def test_mistakes_with_masks_are_named(tmp_path):
    Image.new("RGB", (4, 4)).save(tmp_path / "rgb.png")
    with pytest.raises(ValueError, match="mode RGB"):
        read_mask(tmp_path / "rgb.png")
    Image.fromarray(np.full((4, 4), 300, dtype=np.uint16)).save(tmp_path / "wide.png")
    with pytest.raises(ValueError, match="from 300 to 300"):
        read_mask(tmp_path / "wide.png")
    with pytest.raises(ValueError, match="There is no"):
        find_videos(tmp_path / "nowhere", tmp_path)
    (tmp_path / "frames").mkdir()
    (tmp_path / "masks").mkdir()
    with pytest.raises(ValueError, match="no video folders"):
        find_videos(tmp_path / "frames", tmp_path / "masks")
    (tmp_path / "frames" / "run").mkdir()
    with pytest.raises(ValueError, match="holds no mask"):
        find_videos(tmp_path / "frames", tmp_path / "masks")
    with pytest.raises(ValueError, match="has no video walk"):
        find_videos(tmp_path / "frames", tmp_path / "masks", ["walk"])
