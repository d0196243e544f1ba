"""What self-distillation and classification share: images without boxes."""

from collections.abc import Callable
from typing import Any, ClassVar

import torch
from accelerate import Accelerator
from torch import Tensor
from torch.utils.data import Dataset, Subset
from transformers import PreTrainedModel

from ...configuration.configuration_dino_vit import DinoVitConfig
from ...data.picture_source import Picture, PictureStream, open_pictures
from ...data.training_pictures import (
    ChangedPicture,
    DecodedPictures,
    TrainingPictures,
    TrainingPictureStream,
)
from ...image_processing.image_processing_dino_vit import DinoVitImageProcessor
from ...image_processing.multi_crop import normalize_crops
from ...modeling.modeling_dino_vit import DinoVitPreTrainedModel
from ..batch_loaders import make_loader, make_stream_loader
from ..image_recipe import ImageDataSettings
from ..recipe import Recipe
from ..setup_run import check_fields, check_names, make_config
from ..sharding import check_shares
from .training_task import TrainingTask


class PictureTask(TrainingTask):
    """Opens images, and builds vision transformers.

    Args:
        recipe: Of the run.
        accelerator: Knows device and processes.
        data: Section of the recipe.

    Raises:
        ValueError: If the recipe does not fit the data.
    """

    model_class: ClassVar[type[DinoVitPreTrainedModel]]

    def __init__(self, recipe: Recipe, accelerator: Accelerator, data: ImageDataSettings) -> None:
        super().__init__(recipe, accelerator)
        self.data = data
        self.image_processor = _make_image_processor(recipe)
        self.pictures = self._open(data.train_split, streaming=data.streaming)
        if data.streaming:
            if not isinstance(self.pictures, PictureStream):
                raise ValueError(
                    f"`data.streaming` is for rows of data sets; `data.path` {data.path} holds "
                    "image files, which are read one by one in any case. Set it to false."
                )
            self.pictures.on_error = data.on_error
        self.validation = self.pictures
        if data.validation_split is not None:
            self.validation = self._open(data.validation_split)
            check_shares(accelerator, len(self.validation))
        self.label_names: list[str] | None = self.pictures.label_names
        self.num_images = data.images_per_epoch or len(self.pictures)

    def make_vision_transformer(self, **given: Any) -> PreTrainedModel:
        """Build the model, or load it with the recipe's changes.

        Args:
            **given: Fields that come from the data, not from the recipe.
        """
        recipe, kind = self.recipe, self.model_class
        check_fields("model", recipe.model, DinoVitConfig, given=tuple(given))
        if recipe.pretrained_model is None:
            return kind(make_config(DinoVitConfig, recipe.model | given))
        try:
            trained = DinoVitConfig.from_pretrained(recipe.pretrained_model).to_dict()
        except (OSError, ValueError) as error:
            raise ValueError(
                f"`pretrained_model` {recipe.pretrained_model} is no folder or Hub id of a vision "
                f"transformer: {error}"
            ) from error
        config = make_config(DinoVitConfig, trained | recipe.model | given)
        # Weights are trained in float32, whatever they were stored in.
        model, report = kind.from_pretrained(
            recipe.pretrained_model,
            config=config,
            dtype=torch.float32,
            ignore_mismatched_sizes=True,
            output_loading_info=True,
        )
        for name, found, wanted in report["mismatched_keys"]:
            # A classifier of other classes starts anew; anything else would lose what was learned.
            if not name.startswith("classifier."):
                raise ValueError(
                    f"`pretrained_model` {recipe.pretrained_model} has `{name}` of shape "
                    f"{tuple(found)}, the recipe's `model` {tuple(wanted)}; leave out what changes "
                    "it (pictures may have another size than `model.image_size`)."
                )
        self.complete(model, set(report["missing_keys"]))
        return model

    def complete(
        self,
        model: PreTrainedModel,  # noqa: ARG002 - for tasks with a second network
        missing: set[str],
    ) -> None:
        """Fill what the loaded weights lack, by names; a new classifier may stay random.

        Raises:
            ValueError: If they are not of such a model.
        """
        lacking = sorted(name for name in missing if name.startswith("model."))
        if lacking:
            raise ValueError(
                f"`pretrained_model` {self.recipe.pretrained_model} lacks {len(lacking)} weights "
                f"of a vision transformer, {lacking[0]} among them."
            )

    def load_training_pictures(
        self,
        change: Callable[[Any], Any],
        collate: Callable[[list[ChangedPicture]], dict[str, Any]],
    ) -> Any:
        """Return the loader of training batches, each image changed at random."""
        data, seed = self.data, self.settings.seed
        if isinstance(self.pictures, PictureStream):
            stream = TrainingPictureStream(
                self.pictures, change, self.num_images, seed, data.shuffle_buffer
            ).for_training(
                self.accelerator.process_index,
                self.accelerator.num_processes,
                self.settings.batch_size,
            )
            self.train_images = stream
            return make_stream_loader(
                stream,
                self.settings,
                collate,
                num_workers=data.num_workers,
                accelerator=self.accelerator,
            )
        pictures: Dataset[Picture] = self.pictures
        if data.cache_images:
            self.pictures = pictures = DecodedPictures(pictures, data.on_error)
        self.train_images = TrainingPictures(pictures, change, seed, data.on_error)
        loader = make_loader(
            self.train_images, self.settings, collate, num_workers=data.num_workers, shuffle=True
        )
        return self.accelerator.prepare(loader)

    def count_images(self, batch: dict[str, Any]) -> int:
        """Return the number of images in a batch."""
        return len(batch["names"])

    def image_ids(self, batch: dict[str, Any]) -> list[str]:
        """Name the images of a batch in an error."""
        return list(batch["names"])

    def check_same_classes(self) -> None:
        """Reject splits whose numbers of classes mean different classes.

        Raises:
            ValueError: With the names of both.
        """
        if self.validation.label_names != self.label_names:
            raise ValueError(
                f"The splits of `data.path` {self.data.path} must have the same classes, got "
                f"{self.label_names} and {self.validation.label_names}."
            )

    def share_of(self, pictures: Any) -> Any:
        """Return the pictures that this process evaluates."""
        rank, num_processes = self.accelerator.process_index, self.accelerator.num_processes
        if isinstance(pictures, PictureStream):
            return pictures.share(rank, num_processes)
        return Subset(pictures, list(range(rank, len(pictures), num_processes)))

    def _open(self, split: str | None, *, streaming: bool = False) -> Any:
        data = self.data
        try:
            return open_pictures(
                data.path,
                split,
                image_column=data.image_column,
                label_column=data.label_column,
                streaming=streaming,
            )
        except ValueError as error:
            raise ValueError(
                f"`data.path`: {error} `data.train_split` and `data.validation_split` name the "
                "splits."
            ) from error


class PictureCollator:
    """What the collators of these tasks share.

    Args:
        image_processor: Gives mean and standard deviation.
    """

    def __init__(self, image_processor: Any) -> None:
        self.mean, self.std = image_processor.image_mean, image_processor.image_std

    def normalize(self, pixels: Tensor) -> Tensor | None:
        """Make model input of bytes (..., 3, H, W); None of no images."""
        return normalize_crops(pixels, self.mean, self.std) if len(pixels) else None


def _load_image_processor(source: str) -> DinoVitImageProcessor:
    try:
        return DinoVitImageProcessor.from_pretrained(source)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"`pretrained_model` {source} has no image processor that loads: {error}"
        ) from error


def _make_image_processor(recipe: Recipe) -> DinoVitImageProcessor:
    if not recipe.image_processor and recipe.pretrained_model is not None:
        return _load_image_processor(recipe.pretrained_model)
    known = {"size", "crop_size", "resample", "do_resize", "do_center_crop", "do_rescale",
             "rescale_factor", "do_normalize", "image_mean", "image_std",
             "do_convert_rgb"}  # fmt: skip
    check_names("image_processor", recipe.image_processor, known)
    return DinoVitImageProcessor(**recipe.image_processor)
