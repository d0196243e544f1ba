"""Linear classification of frozen features, the second evaluation of DINO."""

from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import torch
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms import v2
from tqdm import tqdm
from transformers import BaseImageProcessor

from ..configuration.configuration_dino_vit import DinoVitConfig
from ..data.picture_source import Picture, PictureFolder, PictureRows
from ..data.training_pictures import ChangedPicture, TrainingPictures
from ..modeling.modeling_dino_vit import DinoVitForImageClassification, DinoVitModel
from .image_preparation import Normalization, ProcessorPreparation, seen_size


# The batch that the learning rate is said for.
_REFERENCE_BATCH = 256

LabelledPictures = PictureFolder | PictureRows
Batches = Iterable[tuple[Tensor, Tensor]]


class ProbeSettings(NamedTuple):
    """How the classifier is trained; the defaults are DINO's."""

    epochs: int = 100
    learning_rate: float = 1e-3
    """For 256 pictures at a time; it is scaled with `batch_size`."""
    batch_size: int = 1024
    """DINO has 128 on each of 8 processors."""
    momentum: float = 0.9
    is_augmented: bool = True
    """Random crops and flips; without, features are computed once for all epochs."""
    num_workers: int = 0
    seed: int = 0


class ProbeAccuracy(NamedTuple):
    """How often the class is right."""

    top1: float
    top5: float
    """The right class is among the five likeliest (or all, if there are fewer)."""


class ProbeEpoch(NamedTuple):
    """What an epoch came to."""

    epoch: int
    loss: float
    accuracy: ProbeAccuracy


def make_probe(
    model: DinoVitModel, num_labels: int, num_layers: int, *, patch_mean: bool, seed: int = 0
) -> DinoVitForImageClassification:
    """Put a new linear classifier on a frozen model.

    Args:
        model: Whose weights are copied.
        num_labels: Classes.
        num_layers: Last layers whose class tokens it reads: 4 for DINO's small models, 1 for base
            models.
        patch_mean: Also read the mean patch token: DINO's base models do.
        seed: Of its weights.

    Raises:
        ValueError: If the model has fewer layers.
    """
    fields = model.config.to_dict() | {
        "num_classification_layers": num_layers,
        "classify_patch_mean": patch_mean,
        "id2label": {number: str(number) for number in range(num_labels)},
    }
    fields.pop("label2id", None)
    if not 1 <= num_layers <= model.config.num_hidden_layers:
        raise ValueError(
            f"`num_layers` must be from 1 to the {model.config.num_hidden_layers} layers of the "
            f"model, got {num_layers}."
        )
    probe = DinoVitForImageClassification(DinoVitConfig(**fields))
    probe.model.load_state_dict(model.state_dict())
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        probe.classifier.weight.normal_(0, 0.01, generator=generator)
        probe.classifier.bias.zero_()
    probe.requires_grad_(False)
    probe.classifier.requires_grad_(True)
    return probe.eval()


def train_probe(
    probe: DinoVitForImageClassification,
    image_processor: BaseImageProcessor,
    training: LabelledPictures,
    validation: LabelledPictures,
    settings: ProbeSettings,
) -> Iterator[ProbeEpoch]:
    """Train the classifier, and give way after each epoch; its best weights are kept at the end.

    Args:
        probe: Of `make_probe`.
        image_processor: Of the model; validation pictures are prepared by it.
        training: Pictures with classes.
        validation: Likewise.
        settings: The recipe.

    Yields:
        Loss and accuracy of each epoch.

    Raises:
        ValueError: If a picture has no class, or one that the classifier has not.
        FloatingPointError: If the loss is not finite.

    Source:
        DINO's `eval_linear.py`: SGD without weight decay, the rate by a cosine to 0, a step an
        epoch; the figure is the best of all epochs.
    """
    for name, pictures in (("training", training), ("validation", validation)):
        _check_labels(name, pictures, probe.config.num_labels)
    optimizer = torch.optim.SGD(
        probe.classifier.parameters(),
        lr=settings.learning_rate * settings.batch_size / _REFERENCE_BATCH,
        momentum=settings.momentum,
    )
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, max(settings.epochs, 1))
    plain = _PlainCollator(image_processor)
    evaluation = _collect(probe, _loader(validation, plain, settings))
    cached = None
    if not settings.is_augmented:
        cached = _collect(probe, _loader(training, plain, settings))
    best: tuple[float, dict[str, Tensor]] = (-1.0, {})
    generator = torch.Generator().manual_seed(settings.seed)
    crops = TrainingPictures(training, _RandomCrop(image_processor), settings.seed)
    crop_loader = _loader(crops, _stack_crops, settings, generator)
    for epoch in range(1, settings.epochs + 1):
        crops.epoch = epoch
        batches = (
            _features_of(probe, tqdm(crop_loader, desc=f"epoch {epoch}", leave=False))
            if cached is None
            else _shuffled(cached, settings.batch_size, generator)
        )
        loss = _train_epoch(probe.classifier, optimizer, batches)
        schedule.step()
        with torch.no_grad():
            accuracy = measure(probe.classifier(evaluation[0]), evaluation[1])
        if accuracy.top1 > best[0]:
            weights = probe.classifier.state_dict()
            best = accuracy.top1, {name: value.clone() for name, value in weights.items()}
        yield ProbeEpoch(epoch, loss, accuracy)
    if best[1]:
        probe.classifier.load_state_dict(best[1])


@torch.inference_mode()
def evaluate_classifier(
    model: DinoVitForImageClassification,
    image_processor: BaseImageProcessor,
    pictures: LabelledPictures,
    settings: ProbeSettings,
) -> ProbeAccuracy:
    """Measure a trained classifier, such as a converted one.

    Raises:
        ValueError: If a picture has no class, or one that the classifier has not.
    """
    _check_labels("validation", pictures, model.config.num_labels)
    loader = _loader(pictures, _PlainCollator(image_processor), settings)
    features, labels = _collect(model, loader)
    return measure(model.classifier(features), labels)


def measure(logits: Tensor, labels: Tensor) -> ProbeAccuracy:
    """Compare logits (N, C) with classes (N,)."""
    is_right = logits.topk(min(5, logits.shape[1]), dim=1).indices == labels[:, None]
    return ProbeAccuracy(
        float(is_right[:, 0].float().mean()), float(is_right.any(1).float().mean())
    )


def _train_epoch(
    classifier: nn.Linear,
    optimizer: torch.optim.Optimizer,
    batches: Iterator[tuple[Tensor, Tensor]],
) -> float:
    total, count = 0.0, 0
    for features, labels in batches:
        loss = nn.functional.cross_entropy(classifier(features), labels)
        if not torch.isfinite(loss):
            raise FloatingPointError(
                "The loss of the classifier is not finite; lower the learning rate."
            )
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        total, count = total + loss.item() * len(labels), count + len(labels)
    return total / count


@torch.no_grad()
def _features_of(
    model: DinoVitForImageClassification, batches: Batches
) -> Iterator[tuple[Tensor, Tensor]]:
    for pixel_values, labels in batches:
        yield (
            model.features(pixel_values.to(model.device)),
            labels.to(model.device),
        )


def _collect(model: DinoVitForImageClassification, loader: Batches) -> tuple[Tensor, Tensor]:
    parts = list(_features_of(model, tqdm(loader, desc="features", leave=False)))
    features, labels = (torch.cat(values) for values in zip(*parts, strict=True))
    return features, labels


def _shuffled(
    data: tuple[Tensor, Tensor], batch_size: int, generator: torch.Generator
) -> Iterator[tuple[Tensor, Tensor]]:
    features, labels = data
    for rows in torch.randperm(len(labels), generator=generator).split(batch_size):
        yield features[rows], labels[rows]


class _PlainCollator:
    """Makes a batch of pictures as the model's image processor prepares them."""

    def __init__(self, image_processor: BaseImageProcessor) -> None:
        self.prepare = ProcessorPreparation(image_processor)

    def __call__(self, pictures: list[Picture]) -> tuple[Tensor, Tensor]:
        """Return pixel values (B, 3, H, W) and classes (B,)."""
        pixels = self.prepare([picture.image for picture in pictures])
        return torch.stack(pixels), torch.tensor([picture.label for picture in pictures])


class _RandomCrop:
    """A crop of any size, mirrored or not, in the size of the processor's crop."""

    def __init__(self, image_processor: BaseImageProcessor) -> None:
        # Bilinear, as DINO's recipe leaves it, while pictures to measure are resized bicubically.
        crop = v2.RandomResizedCrop(seen_size(image_processor))
        self.augment = v2.Compose([crop, v2.RandomHorizontalFlip()])
        self.normalization = Normalization.of(image_processor)

    def __call__(self, image: Image.Image) -> Tensor:
        return self.normalization.apply(self.augment(image))


def _stack_crops(pictures: list[ChangedPicture]) -> tuple[Tensor, Tensor]:
    labels = torch.tensor([picture.label for picture in pictures])
    return torch.stack([picture.pixels for picture in pictures]), labels


def _loader(
    pictures: Dataset[Any],
    collate: Callable[[list[Any]], tuple[Tensor, Tensor]],
    settings: ProbeSettings,
    generator: torch.Generator | None = None,
) -> Batches:
    """Batches in order or, with a generator, shuffled by it."""
    loader: DataLoader[Any] = DataLoader(
        pictures,
        batch_size=settings.batch_size,
        shuffle=generator is not None,
        num_workers=settings.num_workers,
        collate_fn=collate,
        generator=generator,
    )
    return loader


def _check_labels(name: str, pictures: LabelledPictures, num_labels: int) -> None:
    labels = pictures.labels
    if not len(labels):
        raise ValueError(f"There are no {name} pictures.")
    if min(labels) < 0 or max(labels) >= num_labels:
        raise ValueError(
            f"The {name} pictures need classes from 0 to {num_labels - 1}, got {min(labels)} to "
            f"{max(labels)} (-1 is a picture without a class)."
        )
