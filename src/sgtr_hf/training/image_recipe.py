"""Recipes of trainings on images without boxes: self-distillation and classification."""

from dataclasses import dataclass, field
from types import MappingProxyType

from ..image_processing.multi_crop import MultiCropSettings
from .recipe import DataSettings, Recipe, TrainingSettings
from .unused_settings import reject_unused


@dataclass
class ImageDataSettings(DataSettings):
    """Where images without boxes come from, and how they are varied.

    Of the settings of annotated images, those about boxes and relations have no use here.

    Args:
        train_split: Split, or sub-folder of a folder of images, to train on; null takes the whole.
        validation_split: Likewise to evaluate on; null has self-distillation measure entropies of
            training images, without neighbours.
        image_column: Column of the images; found if null.
        label_column: Column of the classes; found if null.
        cache_images: Decode all training images once and keep them in memory; for small images of
            one size.
        images_per_epoch: Images of an epoch of a stream, which has no length of its own.
    """

    train_split: str | None = "train"
    validation_split: str | None = "validation"
    image_column: str | None = None
    label_column: str | None = None
    cache_images: bool = False
    images_per_epoch: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        reject_unused("data", self, (
            "flip_swaps", "least_crop", "crop_probability", "resize_sides", "resize_longest_side",
            "repeat_threshold", "relation_drop_rate", "augmentation_seed",
        ))  # fmt: skip
        if self.streaming != (self.images_per_epoch is not None):
            raise ValueError(
                "`data.images_per_epoch` says how long an epoch of a stream is; give it with "
                f"`data.streaming` and only then, got {self.images_per_epoch}."
            )
        if self.images_per_epoch is not None and self.images_per_epoch < 1:
            raise ValueError(
                f"`data.images_per_epoch` must be at least 1, got {self.images_per_epoch}."
            )
        if self.streaming and self.validation_split is None:
            raise ValueError(
                "`data.validation_split` must be named for a stream, whose images have no place."
            )
        if self.streaming and self.cache_images:
            raise ValueError(
                "`data.cache_images` needs every image at hand; set `data.streaming` to false."
            )


@dataclass
class SelfDistillationData(ImageDataSettings):
    """Images for self-distillation.

    Args:
        crops: Which crops are made, and how they are changed.
        neighbour_images: Training images that the neighbours of evaluation are looked for in,
            spread over the split; those of a stream are its first.
    """

    crops: MultiCropSettings = field(default_factory=MultiCropSettings)
    neighbour_images: int = 10000

    def __post_init__(self) -> None:
        super().__post_init__()
        reject_unused("data", self, ("brightness", "saturation", "hue"), "set `data.crops`")
        if not self.crops.num_local_crops:
            remedy = "set `data.crops.num_local_crops` too, or remove it"
            reject_unused("data.crops", self.crops, ("local_size", "local_scale"), remedy)
        if self.neighbour_images < 1:
            raise ValueError(
                f"`data.neighbour_images` must be at least 1, got {self.neighbour_images}."
            )


@dataclass
class ClassificationData(ImageDataSettings):
    """Images with a class.

    Args:
        crop_scale: Least and largest share of the image's area in a training crop.
    """

    crop_scale: list[float] = field(default_factory=lambda: [0.08, 1.0])

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.validation_split is None:
            raise ValueError(
                "`data.validation_split` must be named: classifiers are measured on it."
            )
        if len(self.crop_scale) != 2 or not 0 < self.crop_scale[0] <= self.crop_scale[1] <= 1:  # noqa: PLR2004
            raise ValueError(
                "`data.crop_scale` must be a least and a largest share in (0, 1], got "
                f"{self.crop_scale}."
            )


@dataclass
class SelfDistillationTraining(TrainingSettings):
    """How a vision transformer is trained without labels; the defaults are DINO's.

    Args:
        learning_rate: Highest rate, for 256 images an update; it grows with the real number.
        final_learning_rate: Where its cosine leads, whatever the batch.
        warmup_epochs: Epochs over which the rate rises from 0.
        weight_decay: At the start; of matrices, tokens and positions.
        final_weight_decay: At the end, along a cosine.
        teacher_momentum: Share of the teacher that stays at an update, at the start; rises to 1
            along a cosine. Small batches want more: 0.9995 for 64 images; short runs less.
        teacher_temperature: Of the teacher's distributions.
        warmup_teacher_temperature: From where it rises.
        warmup_teacher_temperature_epochs: Epochs of this rise.
        frozen_prototype_epochs: Epochs at the start in which the prototypes do not move.
        gradient_clip_norm_per_tensor: Largest norm of a tensor's gradient; 0 does not clip.
        least_entropy_gap: Gap of the teacher's entropies, in nats, below which a warning says that
            it has collapsed.
        num_neighbours: Neighbours that vote in the evaluation.
    """

    learning_rate: float = 5e-4
    final_learning_rate: float = 1e-6
    warmup_epochs: float = 10.0
    weight_decay: float = 0.04
    final_weight_decay: float = 0.4
    teacher_momentum: float = 0.996
    teacher_temperature: float = 0.04
    warmup_teacher_temperature: float = 0.04
    warmup_teacher_temperature_epochs: int = 0
    frozen_prototype_epochs: int = 1
    gradient_clip_norm: float = 0.0
    gradient_clip_norm_per_tensor: float = 3.0
    least_entropy_gap: float = 0.5
    num_neighbours: int = 20

    def __post_init__(self) -> None:
        super().__post_init__()
        reject_unused("training", self, (
            "backbone_learning_rate", "warmup_steps", "schedule", "gradient_clip_norm", "ema_decay",
            "cached_epochs",
        ))  # fmt: skip
        for name in (
            "final_learning_rate", "warmup_epochs", "final_weight_decay", "least_entropy_gap",
            "warmup_teacher_temperature_epochs", "frozen_prototype_epochs",
        ):  # fmt: skip
            if not 0 <= getattr(self, name) < float("inf"):
                raise ValueError(
                    f"`training.{name}` must be at least 0, got {getattr(self, name)}."
                )
        for name in ("teacher_temperature", "warmup_teacher_temperature", "num_neighbours"):
            if not getattr(self, name) > 0:
                raise ValueError(f"`training.{name}` must be above 0, got {getattr(self, name)}.")
        if not 0 <= self.teacher_momentum <= 1:
            raise ValueError(
                f"`training.teacher_momentum` must be between 0 and 1, got {self.teacher_momentum}."
            )


@dataclass
class ClassificationTraining(TrainingSettings):
    """How a classifier is trained.

    Args:
        label_smoothing: Share of the target that is spread over all classes.
    """

    label_smoothing: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        reject_unused("training", self, ("backbone_learning_rate", "cached_epochs"))
        if not 0 <= self.label_smoothing < 1:
            raise ValueError(
                f"`training.label_smoothing` must be in [0, 1), got {self.label_smoothing}."
            )


@dataclass
class SelfDistillationRecipe(Recipe):
    """A run that trains `DinoVitForPreTraining`.

    Args:
        data: Where the images come from; classes are not needed, but measured by if there are any.
        training: How the model is optimised.
    """

    data: SelfDistillationData
    training: SelfDistillationTraining

    def __post_init__(self) -> None:
        super().__post_init__()
        reject_unused("", self, ("backbone_weights", "detector", "distillation"))


@dataclass
class ClassificationRecipe(Recipe):
    """A run that trains `DinoVitForImageClassification`.

    `pretrained_model` fine-tunes a classifier, or the teacher of a `DinoVitForPreTraining`.

    Args:
        data: Where the images come from.
        training: How the model is optimised.
    """

    data: ClassificationData
    training: ClassificationTraining

    def __post_init__(self) -> None:
        super().__post_init__()
        reject_unused("", self, ("backbone_weights", "detector"))
        reject_unused(
            "distillation", self.distillation, ("entity_confidence", "predicate_confidence")
        )


IMAGE_RECIPES: MappingProxyType[str, type[Recipe]] = MappingProxyType(
    {"self_distillation": SelfDistillationRecipe, "classification": ClassificationRecipe}
)
