"""Recipes: a whole training run in one YAML file."""

import dataclasses
import math
import types
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal

import yaml

from .distillation_settings import DistillationSettings
from .unused_settings import reject_idle


@dataclass
class DataSettings:
    """Where the images come from and how they are varied.

    Args:
        path: What `sgtr_hf.data.load` opens, with splits train and validation (or val).
        flip_probability: Share of training images that are mirrored.
        flip_swaps: Pairs of predicates that change places in the mirror; null finds those with
            left and right in their names, and says which.
        brightness: Largest relative change of brightness and of contrast.
        least_crop: Least side of a random crop as a share of the image's; 1 does not crop.
        num_workers: Processes that read images.
        crop_probability: Share of training images that are cropped.
        saturation: Largest relative change of saturation.
        hue: Largest turn of the hue, as a share of the colour circle.
        resize_sides: Lengths in pixels of which the shorter side of a training image gets one;
            none leaves the size to the image processor, which evaluation always does.
        resize_longest_side: Limit of the longer side then.
        repeat_threshold: Share of relations below which images with a predicate come more often,
            see `sgtr_hf.data.resampling`; 0 shows each image once an epoch.
        relation_drop_rate: How strongly frequent predicates are left out of repeated images.
        streaming: Read the training split shard by shard, each process and worker its own.
        shuffle_buffer: Images among which a streaming worker chooses the next one.
        on_error: What follows a training picture that cannot be read: "raise" stops the run, "drop"
            takes the next image and says so in the log. Validation always stops, or its figures
            would be of other images each time.
        augmentation_seed: Of augmentation and resampling, if not `training.seed`: runs of several
            seeds can then read one cache of a frozen detector.
    """

    path: str
    flip_probability: float = 0.5
    flip_swaps: list[list[str]] | None = None
    brightness: float = 0.0
    least_crop: float = 1.0
    num_workers: int = 1
    crop_probability: float = 1.0
    saturation: float = 0.0
    hue: float = 0.0
    resize_sides: list[int] = field(default_factory=list)
    resize_longest_side: int = 1333
    repeat_threshold: float = 0.0
    relation_drop_rate: float = 0.0
    streaming: bool = False
    shuffle_buffer: int = 1000
    on_error: Literal["raise", "drop"] = "raise"
    augmentation_seed: int | None = None

    def __post_init__(self) -> None:
        for name in ("flip_probability", "brightness", "crop_probability", "saturation",
                     "repeat_threshold"):  # fmt: skip
            _check_range(f"data.{name}", getattr(self, name), 0, 1)
        # Smaller crops show single objects at best.
        _check_range("data.least_crop", self.least_crop, 0.1, 1)
        # Half of the circle is the whole of it, in both directions.
        _check_range("data.hue", self.hue, 0, 0.5)
        _check_range("data.relation_drop_rate", self.relation_drop_rate, 0)
        _check_range("data.num_workers", self.num_workers, 0)
        _check_range("data.shuffle_buffer", self.shuffle_buffer, 1)
        for side in self.resize_sides:
            # Below this, the coarsest feature level has no cell left.
            _check_range("data.resize_sides", side, 32, self.resize_longest_side - 1)
        reject_idle("data", self, {
            "least_crop": ("crop_probability",),
            "repeat_threshold": ("relation_drop_rate",),
            "resize_sides": ("resize_longest_side",),
            "streaming": ("shuffle_buffer",),
        })  # fmt: skip
        if self.streaming and self.repeat_threshold:
            raise ValueError(
                "`data.repeat_threshold` needs every image at hand; set `data.streaming` to false."
            )


@dataclass
class TrainingSettings:
    """How the model is optimised.

    Args:
        output_dir: Folder of log, curve, checkpoints and the final model.
        epochs: Passes over the training split; or give `max_steps`.
        max_steps: Updates of the whole run.
        seed: Of weights, order, augmentation and denoising.
        batch_size: Images a process and step.
        gradient_accumulation_steps: Batches whose gradients are averaged for an update. Batches
            that are left over at the end of an epoch are dropped, as images are that make no batch.
        learning_rate: Of everything but the backbone.
        backbone_learning_rate: Of the backbone's trainable part.
        weight_decay: Of matrices; norms, biases and embeddings have none.
        warmup_steps: Updates over which the rates rise from 0.
        schedule: How they fall: "cosine" to 0, "step" by 10 after 80 % of the run, or not at all.
        gradient_clip_norm: Largest norm of all gradients together; 0 does not clip.
        gradient_clip_norm_per_tensor: Largest norm of the gradient of each parameter, after that; 0
            does not clip.
        ema_decay: Decay of the moving average of weights that is evaluated and saved; 0 for none.
        mixed_precision: "bf16" computes products in bfloat16, which pays on processors with units
            for it; "fp16" in half precision with a scaled loss, on GPUs alone.
        gradient_checkpointing: Trade time for memory.
        compile_backend: Compiles the model by `torch.compile`; null does not. "eager" and
            "aot_eager" are for finding faults.
        num_threads: Threads of torch; its own choice if null.
        evaluate_every: Epochs between evaluations; 0.25 evaluates four times an epoch.
        checkpoint_every: Epochs between checkpoints, likewise.
        keep_checkpoints: Checkpoints that stay, besides the best model.
        best_figure: Name of the validation figure by which the best model is kept, as the log has
            it; null leaves it to the task.
        patience: The run ends after so many evaluations in a row without a better figure; null
            never ends it before its time.
        resume: "auto" goes on from the newest checkpoint in `output_dir`; or its path; or null.
        log_every: Updates between lines of the log.
        trackers: Services that get the lines of the log too.
        cached_epochs: Epochs whose detector outputs are computed once, kept in `output_dir` and
            seen again later, in half precision; 0 for none. Needs a frozen detector.
    """

    output_dir: str
    epochs: int | None = None
    max_steps: int | None = None
    seed: int = 0
    batch_size: int = 16
    gradient_accumulation_steps: int = 1
    learning_rate: float = 1e-4
    backbone_learning_rate: float = 1e-5
    weight_decay: float = 1e-4
    warmup_steps: int = 100
    schedule: Literal["cosine", "step", "constant"] = "cosine"
    gradient_clip_norm: float = 0.1
    gradient_clip_norm_per_tensor: float = 0.0
    ema_decay: float = 0.0
    mixed_precision: Literal["no", "bf16", "fp16"] = "no"
    gradient_checkpointing: bool = False
    compile_backend: Literal["inductor", "aot_eager", "eager"] | None = None
    num_threads: int | None = None
    evaluate_every: float = 1.0
    checkpoint_every: float = 1.0
    keep_checkpoints: int = 2
    best_figure: str | None = None
    patience: int | None = None
    resume: str | None = "auto"
    log_every: int = 20
    trackers: list[Literal["tensorboard", "wandb", "trackio"]] = field(default_factory=list)
    cached_epochs: int = 0

    def __post_init__(self) -> None:
        if (self.epochs is None) == (self.max_steps is None):
            raise ValueError(
                "Give either `training.epochs` or `training.max_steps`, the other null; got "
                f"{self.epochs} and {self.max_steps}."
            )
        for name in (
            "epochs", "max_steps", "num_threads", "batch_size", "log_every", "patience",
        ):  # fmt: skip
            if getattr(self, name) is not None:
                _check_range(f"training.{name}", getattr(self, name), 1)
        for name in ("gradient_accumulation_steps", "keep_checkpoints"):
            _check_range(f"training.{name}", getattr(self, name), 1)
        for name in ("evaluate_every", "checkpoint_every"):
            _check_positive(f"training.{name}", getattr(self, name))
        for name in (
            "learning_rate",
            "backbone_learning_rate",
            "weight_decay",
            "warmup_steps",
            "cached_epochs",
        ):
            _check_range(f"training.{name}", getattr(self, name), 0)
        for name in ("gradient_clip_norm", "gradient_clip_norm_per_tensor"):
            _check_range(f"training.{name}", getattr(self, name), 0)
        # With 1 the average would never move.
        _check_range("training.ema_decay", self.ema_decay, 0, 0.999999)


@dataclass
class Recipe:
    """One run.

    Args:
        task: "detection" trains `SgtrDetrForObjectDetection`, "scene_graph" the whole model; for
            "self_distillation" and "classification" see `image_recipe.py`.
        data: Where the images come from.
        training: How the model is optimised.
        model: Fields of the task's configuration; names of classes come from the data.
        image_processor: Arguments of `SgtrImageProcessor`.
        backbone_weights: Weights that the backbone starts from: "efficientnet_lite0", or the folder
            or Hub id of a model with such a backbone; null for random ones.
        detector: Folder or Hub id of the detector that a scene graph model starts from; its image
            processor serves unless the recipe has one.
        pretrained_model: Folder or Hub id of a model of this task that the run starts from, with
            its configuration, of which `model` changes fields, and its image processor. Heads
            for another number of classes start anew.
        distillation: A larger model to learn from.
    """

    task: Literal["detection", "scene_graph", "self_distillation", "classification"]
    data: DataSettings
    training: TrainingSettings
    model: dict[str, Any] = field(default_factory=dict)
    image_processor: dict[str, Any] = field(default_factory=dict)
    backbone_weights: str | None = None
    detector: str | None = None
    pretrained_model: str | None = None
    distillation: DistillationSettings = field(default_factory=DistillationSettings)

    def __post_init__(self) -> None:
        for name in ("detector", "backbone_weights"):
            if self.pretrained_model is not None and getattr(self, name) is not None:
                raise ValueError(
                    f"`{name}` has no use with `pretrained_model`, which brings its own; remove "
                    "one."
                )
        if self.training.cached_epochs:
            self._check_cache()
        if self.detector is not None and self.task == "detection":
            raise ValueError("`detector` has no use with `task: detection`; remove it.")
        if self.detector is not None and self.backbone_weights is not None:
            raise ValueError(
                "`backbone_weights` has no use with `detector`, which brings its own; remove one."
            )
        if self.detector is not None and "detector_config" in self.model:
            raise ValueError(
                "`model.detector_config` has no use with `detector`, which brings its own; remove "
                "one."
            )
        if self.model.get("freeze_detector") and not (self.detector or self.pretrained_model):
            raise ValueError(
                "`model.freeze_detector` needs `detector`: a random one would stay random."
            )

    def _check_cache(self) -> None:
        if self.distillation.teacher is not None:
            raise ValueError(
                "`training.cached_epochs` keeps no pictures, which `distillation.teacher` must "
                "see; set it to 0."
            )
        if not self.model.get("freeze_detector"):
            raise ValueError(
                "`training.cached_epochs` needs `model.freeze_detector`: outputs of a detector "
                "that trains are soon out of date."
            )
        if self.data.streaming:
            raise ValueError(
                "`training.cached_epochs` needs every image at hand; set `data.streaming` to false."
            )


def load_recipe(
    path: str | Path,
    overrides: Sequence[str] = (),
    kinds: Mapping[str, type[Recipe]] = MappingProxyType({}),
) -> Recipe:
    """Read a recipe.

    Args:
        path: A YAML file.
        overrides: Entries like "training.epochs=3", as from a command line.
        kinds: Classes of recipes by task, where it is not `Recipe`.

    Raises:
        ValueError: If an entry is unknown, missing, of a wrong type or out of range.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"There is no recipe {path}; recipes are YAML files, see recipes/.")
    try:
        entries = yaml.safe_load(path.read_text())
    except yaml.YAMLError as error:
        raise ValueError(f"The recipe {path} is not YAML: {error}") from error
    if not isinstance(entries, dict):
        raise ValueError(f"The recipe {path} must hold sections, got {type(entries).__name__}.")
    for override in overrides:
        _apply_override(entries, override)
    kind = kinds.get(str(entries.get("task")), Recipe)
    return typing.cast(Recipe, _build(kind, entries, prefix=""))


def _apply_override(entries: dict[str, Any], override: str) -> None:
    name, equals, value = override.partition("=")
    if not equals:
        raise ValueError(f"An override must look like training.epochs=3, got {override!r}.")
    *sections, last = name.split(".")
    target = entries
    for section in sections:
        if target.get(section) is None:
            target[section] = {}
        target = target[section]
        if not isinstance(target, dict):
            raise ValueError(f"`{section}` in the override {override!r} is not a section.")
    try:
        target[last] = yaml.safe_load(value)
    except yaml.YAMLError as error:
        raise ValueError(f"The value of the override {override!r} is not YAML: {error}") from error


def _build(kind: type, entries: dict[str, Any], prefix: str) -> Any:
    """Make a dataclass of a mapping, checking names and types."""
    hints = typing.get_type_hints(kind)
    unknown = sorted(set(entries) - set(hints))
    if unknown:
        raise ValueError(
            f"The recipe has no entry `{prefix}{unknown[0]}`; known are {', '.join(sorted(hints))}."
        )
    values = {}
    for entry in dataclasses.fields(kind):
        name = entry.name
        is_required = (
            entry.default is dataclasses.MISSING and entry.default_factory is dataclasses.MISSING
        )
        if name not in entries:
            if is_required:
                raise ValueError(f"The recipe lacks `{prefix}{name}`.")
            continue
        values[name] = _checked(hints[name], entries[name], f"{prefix}{name}")
    return kind(**values)


def _checked(hint: Any, value: Any, name: str) -> Any:
    if dataclasses.is_dataclass(hint) and isinstance(hint, type):
        if not isinstance(value, dict):
            raise ValueError(f"`{name}` must be a section with entries, got {value!r}.")
        return _build(hint, value, prefix=f"{name}.")
    if value is False and not _fits(hint, value) and _fits(hint, "no"):
        # What YAML makes of a plain no.
        return "no"
    if not _fits(hint, value):
        remedy = " YAML reads 1e-4 as text; write 1.0e-4." if _looks_like_number(value) else ""
        raise ValueError(f"`{name}` must be {_describe(hint)}, got {value!r}.{remedy}")
    return float(value) if hint is float else value


def _fits(hint: Any, value: Any) -> bool:
    origin = typing.get_origin(hint)
    if origin in (typing.Union, types.UnionType, Literal):
        return (
            value in typing.get_args(hint)
            if origin is Literal
            else any(_fits(option, value) for option in typing.get_args(hint))
        )
    if hint in (int, float):
        numbers = (int,) if hint is int else (int, float)
        # True is an int to Python, but not to the writer of a recipe.
        return isinstance(value, numbers) and not isinstance(value, bool)
    if not isinstance(value, origin or hint):
        return False
    # Mappings hold anything; they are checked where they are used.
    return origin is not list or all(_fits(typing.get_args(hint)[0], item) for item in value)


def _describe(hint: Any) -> str:
    if typing.get_origin(hint) is Literal:
        return "one of " + ", ".join(map(repr, typing.get_args(hint)))
    if typing.get_origin(hint) is None:
        return str(getattr(hint, "__name__", hint))
    return str(hint).replace("NoneType", "null").replace("None", "null")


def _looks_like_number(value: Any) -> bool:
    if not isinstance(value, str):
        return False
    try:
        float(value)
    except ValueError:
        return False
    return True


def _check_positive(name: str, value: float) -> None:
    if not (math.isfinite(value) and value > 0):
        raise ValueError(f"`{name}` must be a number above 0, got {value}.")


def _check_range(name: str, value: float, low: float, high: float | None = None) -> None:
    if not math.isfinite(value) or value < low or (high is not None and value > high):
        limits = f"at least {low}" if high is None else f"between {low} and {high}"
        raise ValueError(f"`{name}` must be {limits}, got {value}.")
