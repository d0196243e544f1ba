import torch

from sgtr_hf.losses.hungarian_matching import pad_annotations
from sgtr_hf.modeling.seeded_noise import draw_seeds, seeded_uniform


def test_numbers_follow_from_seed_group_entity_and_stream_alone():
    seeds = torch.tensor([3, 2**62 + 5, 3])
    numbers = seeded_uniform(seeds, 2, 4, 6)
    assert numbers.shape == (3, 8, 6)
    assert torch.equal(numbers[0], numbers[2])
    assert not torch.equal(numbers[0], numbers[1])
    # Fewer entities, another batch: the same numbers.
    fewer = seeded_uniform(seeds[1:2], 2, 3, 6)
    assert torch.equal(fewer.unflatten(1, (2, 3)), numbers[1:2].unflatten(1, (2, 4))[:, :, :3])
    assert not torch.equal(seeded_uniform(seeds, 2, 4, 6, stream=1), numbers)


def test_numbers_are_uniform_and_independent():
    numbers = seeded_uniform(torch.arange(200), 5, 10, 6)
    assert numbers.min() >= 0
    assert numbers.max() < 1
    counts = torch.histc(numbers, bins=20, min=0, max=1) / numbers.numel()
    # Four standard deviations of a share of 60,000.
    assert (counts - 0.05).abs().max() < 4 * (0.05 * 0.95 / numbers.numel()) ** 0.5
    correlations = torch.corrcoef(numbers.reshape(-1, 6).T)
    assert (correlations - torch.eye(6)).abs().max() < 0.04
    assert len(numbers.unique()) > 0.99 * numbers.numel()


def test_seeds_come_with_the_labels_or_from_torch():
    label = {"class_labels": torch.tensor([0]), "boxes": torch.rand(1, 4)}
    seeded = pad_annotations([label | {"noise_seed": torch.tensor(7)}] * 2, "cpu", num_classes=1)
    assert seeded.noise_seeds.tolist() == [7, 7]
    # An image without one leaves the whole batch to chance.
    mixed = pad_annotations([label, label | {"noise_seed": torch.tensor(7)}], "cpu", num_classes=1)
    assert mixed.noise_seeds is None
    torch.manual_seed(0)
    first = draw_seeds(3, torch.device("cpu"))
    assert not torch.equal(draw_seeds(3, torch.device("cpu")), first)
    torch.manual_seed(0)
    assert torch.equal(draw_seeds(3, torch.device("cpu")), first)
