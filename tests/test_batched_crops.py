import pytest
import torch

from sgtr_hf.image_processing.batched_crops import BatchedMultiCrop, CropDraws, Draws
from sgtr_hf.image_processing.multi_crop import MultiCropSettings
from sgtr_hf.training.loop import Trainer
from test_multi_crop import PLAIN
from tiny_pictures import distillation_recipe, write_picture_rows
from tiny_training_run import losses_by_update


def crop(images, flip=0.0, numbers=None, **fields):
    sizes = {"global_size": 32, "local_size": 16, "num_local_crops": 1}
    settings = MultiCropSettings(**(PLAIN | sizes | fields))
    if numbers is None:
        numbers = torch.full((len(images), 2 + settings.num_local_crops, 12), 0.5)
    return BatchedMultiCrop(settings, flip)(images, numbers)


def noise(count=4, size=32):
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (count, 3, size, size), generator=generator, dtype=torch.uint8)


def test_the_whole_image_is_itself():
    images = noise()
    views, local = crop(images, global_scale=[1.0, 1.0])
    assert views.shape == (2, 4, 3, 32, 32)
    assert local.shape == (1, 4, 3, 16, 16)
    # An aspect of 1 is in the middle of the range.
    torch.testing.assert_close(views[0], images / 255, atol=1e-5, rtol=0)
    mirrored, _ = crop(images, flip=1.0, global_scale=[1.0, 1.0])
    torch.testing.assert_close(mirrored[1], images.flip(-1) / 255, atol=1e-5, rtol=0)


def test_a_crop_lies_where_it_was_drawn():
    rows, columns = torch.meshgrid(torch.arange(64), torch.arange(64), indexing="ij")
    image = torch.stack((rows, columns, rows * 0)).to(torch.uint8)[None]
    numbers = torch.full((1, 3, 12), 0.5)
    numbers[..., Draws._fields.index("left")] = 1.0
    numbers[..., Draws._fields.index("top")] = 0.0
    views, _ = crop(image, numbers=numbers, global_scale=[0.25, 0.25])
    # A quarter of the area in the upper right: rows 0 to 32, columns 32 to 64.
    down, across = views[0, 0, 0] * 255, views[0, 0, 1] * 255
    torch.testing.assert_close(down[:, 5], torch.arange(32.0), atol=0.01, rtol=0)
    torch.testing.assert_close(across[5], torch.arange(32.0, 64.0), atol=0.01, rtol=0)


def test_shares_of_the_area_keep_their_limits_in_wide_images():
    columns = torch.linspace(0, 255, 128).to(torch.uint8).expand(1, 3, 64, 128)
    numbers = torch.rand(200, 3, 12, generator=torch.Generator().manual_seed(0))
    views, _ = crop(columns.expand(200, -1, -1, -1), numbers=numbers, global_scale=[0.2, 0.2])
    spans = (views[0, :, 0].amax((1, 2)) - views[0, :, 0].amin((1, 2))) * 128
    # Widths of 20 % of the area at aspects from 3 / 4 to 4 / 3.
    assert 33 < spans.min() < 37
    assert 44 < spans.max() < 48


@pytest.mark.parametrize("name", ["brightness", "contrast", "saturation", "hue"])
def test_colours_change_by_what_was_drawn(name):
    images = noise(2)
    zero = dict.fromkeys(("brightness", "contrast", "saturation", "hue"), 0.0)
    fields = {"jitter_probability": 1.0, "global_scale": [1.0, 1.0]} | zero
    still, _ = crop(images, **fields)
    torch.testing.assert_close(still[0], images / 255, atol=1e-3, rtol=0)
    numbers = torch.full((2, 3, 12), 0.5)
    numbers[..., Draws._fields.index(name)] = 0.0
    changed, _ = crop(images, numbers=numbers, **(fields | {name: 0.25}))
    before, after = images[0] / 255, changed[0, 0]
    luma = torch.tensor([0.299, 0.587, 0.114])[:, None, None]
    gray = (before * luma).sum(0)
    if name == "brightness":
        torch.testing.assert_close(after, before * 0.75, atol=1e-3, rtol=0)
    elif name == "contrast":
        expected = 0.75 * before + 0.25 * gray.mean()
        torch.testing.assert_close(after, expected, atol=1e-3, rtol=0)
    elif name == "saturation":
        torch.testing.assert_close(after, 0.75 * before + 0.25 * gray, atol=1e-3, rtol=0)
    else:
        assert (after - before).abs().max() > 0.2
        inside = ((after > 0.01) & (after < 0.99)).all(0)
        # A turn of the hue leaves the luminance alone, but where a colour is clamped.
        torch.testing.assert_close((after * luma).sum(0)[inside], gray[inside], atol=2e-3, rtol=0)


def test_gray_and_inverted_crops():
    images = noise(2)
    gray, _ = crop(images, gray_probability=1.0)
    assert gray[0, :, 0].equal(gray[0, :, 1])
    views, _ = crop(images, solarize_probability=1.0, global_scale=[1.0, 1.0])
    plain = images / 255
    torch.testing.assert_close(views[0], plain, atol=1e-5, rtol=0)
    torch.testing.assert_close(
        views[1], torch.where(plain >= 0.5, 1 - plain, plain), atol=1e-5, rtol=0
    )


def test_without_local_crops_there_are_none():
    _, local = crop(noise(), num_local_crops=0)
    assert local.shape == (0, 4, 3, 16, 16)


def test_blur_needs_crops_one_by_one():
    with pytest.raises(ValueError, match=r"blur_probabilities.*`batched` to false"):
        CropDraws(MultiCropSettings())


@pytest.mark.usefixtures("without_drawing")
def test_batched_crops_train_and_need_one_size(tmp_path):
    data = write_picture_rows(tmp_path / "data")
    recipe = distillation_recipe(data, tmp_path / "run", max_steps=2, warmup_epochs=0.0)
    recipe.data.crops.batched = True
    recipe.data.crops.blur_probabilities = [0.0, 0.0, 0.0]
    trainer = Trainer(recipe)
    trainer.run()
    assert len(losses_by_update(tmp_path / "run")) == 2
    dataset = trainer.task.train_images
    one, two = dataset[3].pixels, dataset[3].pixels
    assert one.draws.equal(two.draws)
    wide = one._replace(pixels=torch.zeros(3, 8, 20, dtype=torch.uint8))
    items = [dataset[3], dataset[4]._replace(pixels=wide, name="wide.png")]
    with pytest.raises(ValueError, match=r"wide\.png has 20 x 8 pixels"):
        trainer.loader.collate_fn(items)
