import numpy as np
import pytest
import torch
from PIL import Image

from sgtr_hf.data.picture_source import Picture
from sgtr_hf.data.training_pictures import TrainingPictures
from sgtr_hf.image_processing.multi_crop import MultiCrop, MultiCropSettings, normalize_crops


PLAIN = {
    "jitter_probability": 0.0, "gray_probability": 0.0, "blur_probabilities": [0.0, 0.0, 0.0],
    "solarize_probability": 0.0,
}  # fmt: skip


def gradient_picture(size=32):
    rows, columns = np.mgrid[:size, :size] * (255 // size)
    return Image.fromarray(np.stack((rows, columns, rows * 0), axis=-1).astype(np.uint8))


def make(flip=0.0, **fields):
    sizes = {"global_size": 24, "local_size": 12, "num_local_crops": 3}
    return MultiCrop(MultiCropSettings(**(PLAIN | sizes | fields)), flip_probability=flip)


def test_crops_have_their_sizes_and_shares_of_the_area():
    torch.manual_seed(0)
    picture = gradient_picture()
    for _ in range(20):
        crops = make()(picture)
        assert crops.global_crops.shape == (2, 3, 24, 24)
        assert crops.local_crops.shape == (3, 3, 12, 12)
        assert crops.global_crops.dtype == torch.uint8
        for group, least, most in ((crops.global_crops, 0.4, 1.0), (crops.local_crops, 0.05, 0.4)):
            spans = (group.amax((2, 3)) - group.amin((2, 3)))[:, :2].float() / (31 * 7)
            shares = spans.prod(1)
            # Interpolation and whole pixels blur the limits.
            assert ((shares > least - 0.15) & (shares < most + 0.15)).all()


def test_no_local_crops_are_an_empty_tensor():
    crops = make(num_local_crops=0)(gradient_picture())
    assert crops.local_crops.shape == (0, 3, 12, 12)


@pytest.mark.parametrize(
    ("fields", "changes_first", "changes_second"),
    [
        ({"blur_probabilities": [1.0, 0.0, 0.0]}, True, False),
        ({"blur_probabilities": [0.0, 1.0, 0.0]}, False, True),
        ({"solarize_probability": 1.0}, False, True),
        ({"gray_probability": 1.0}, True, True),
        ({"jitter_probability": 1.0}, True, True),
    ],
)
def test_changes_reach_the_crops_that_they_should(fields, changes_first, changes_second):
    # The whole picture, so that chance lies in the change alone.
    whole = {"global_scale": [1.0, 1.0], "num_local_crops": 0, "global_size": 32}
    noise = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    picture = Image.fromarray(noise)
    for seed in range(8):
        torch.manual_seed(seed)
        crops = make(**whole, **fields)(picture).global_crops
        plain = torch.from_numpy(noise).permute(2, 0, 1)
        # Where the aspect ratio did not fit, the crop is another.
        changed = [not crop.equal(plain) for crop in crops]
        if changed == [changes_first, changes_second]:
            return
    pytest.fail("The change never came, or came where it should not.")


def test_gray_has_no_colour_and_flips_mirror():
    torch.manual_seed(0)
    gray = make(gray_probability=1.0)(gradient_picture()).global_crops
    assert gray[:, 0].equal(gray[:, 1])
    assert gray[:, 0].equal(gray[:, 2])
    mirrored = make(flip=1.0)(gradient_picture()).global_crops[0, 1].float()
    assert (mirrored[:, 0] > mirrored[:, -1]).all()


def test_crops_are_normalised():
    crops = torch.full((2, 3, 4, 4), 255, dtype=torch.uint8)
    found = normalize_crops(crops, [0.5, 0.4, 0.3], [0.25, 0.2, 0.1])
    expected = torch.tensor([2.0, 3.0, 7.0])[:, None, None].expand(2, 3, 4, 4)
    torch.testing.assert_close(found, expected)


def test_an_image_is_changed_by_seed_epoch_and_index_alone():
    pictures = [Picture(gradient_picture(), 0, "one")] * 2
    change = make(jitter_probability=1.0)
    first, second = (TrainingPictures(pictures, change, seed=3) for _ in range(2))
    torch.manual_seed(1)
    state = torch.get_rng_state()
    crops = first[0].pixels.global_crops
    # The model's own random numbers go on undisturbed.
    assert torch.get_rng_state().equal(state)
    torch.manual_seed(2)
    assert second[0].pixels.global_crops.equal(crops)
    assert not second[1].pixels.global_crops.equal(crops)
    second.epoch = 1
    assert not second[0].pixels.global_crops.equal(crops)


def test_a_broken_picture_stops_or_is_left_out(caplog):
    class Broken(list):
        def __getitem__(self, index):
            if index == 0:
                raise ValueError("bad.png: the picture cannot be decoded")
            return super().__getitem__(index)

    pictures = Broken([Picture(gradient_picture(), label, "one") for label in (0, 1)])
    with pytest.raises(ValueError, match=r"bad\.png"):
        TrainingPictures(pictures, make())[0]
    assert TrainingPictures(pictures, make(), on_error="drop")[0].label == 1
    assert "bad.png" in caplog.text
