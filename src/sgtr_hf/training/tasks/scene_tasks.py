"""Detection and scene graph generation on annotated images."""

from pathlib import Path
from typing import Any

from accelerate import Accelerator
from torch.utils.data import Subset
from transformers import PreTrainedModel

from ...data.streaming_dataset import SceneGraphStream
from ...data.training_dataset import Collator
from ...metrics.frequency_baseline import FrequencyBaseline
from ...modeling.modeling_sgtr import SgtrForSceneGraphGeneration
from ...modeling.modeling_sgtr_detr import SgtrDetrForObjectDetection
from ..batch_loaders import make_loader, make_stream_loader
from ..checkpoints import Progress
from ..detector_cache import CachedDetectorDataset, collate_cached
from ..evaluation import Evaluator, evaluate
from ..recipe import Recipe
from ..setup_run import (
    make_image_processor,
    make_model,
    make_splits,
    with_predicate_frequencies,
)
from ..sharding import check_shares
from .training_task import TrainingTask


class DetectionTask(TrainingTask):
    """Trains `SgtrDetrForObjectDetection`; what of it serves scene graphs too is here.

    Args:
        recipe: Of the run.
        accelerator: Knows device and processes.

    Raises:
        ValueError: If the recipe does not fit the data.
    """

    best_figure = "AP"
    baseline: FrequencyBaseline | None = None

    def __init__(self, recipe: Recipe, accelerator: Accelerator) -> None:
        super().__init__(recipe, accelerator)
        self.splits = make_splits(recipe.data, self.settings.seed)
        self.num_images = self.splits.train.num_images
        check_shares(accelerator, len(self.splits.validation))
        self.image_processor = make_image_processor(recipe)

    def make_model(self) -> PreTrainedModel:
        """Build the detector."""
        train = self.splits.train
        return make_model(self.recipe, train.id2label, train.id2predicate)

    def training_loader(self, model: PreTrainedModel) -> Any:  # noqa: ARG002
        """Read images, all of them or as a stream."""
        images, num_workers = self.splits.train, self.recipe.data.num_workers
        collator = Collator(self.image_processor, with_references=False)
        accelerator = self.accelerator
        if not isinstance(images, SceneGraphStream):
            self.train_images = images
            loader = make_loader(
                images, self.settings, collator, num_workers=num_workers, shuffle=True
            )
            return accelerator.prepare(loader)
        part = images.for_training(
            accelerator.process_index, accelerator.num_processes, self.settings.batch_size
        )
        self.train_images = part
        return make_stream_loader(
            part, self.settings, collator, num_workers=num_workers, accelerator=accelerator
        )

    def prepare_update(
        self, model: PreTrainedModel, batches: list[dict[str, Any]]
    ) -> dict[str, Any]:
        """Count the annotations of the update, which divide the losses of each of its batches."""
        if not isinstance(model, SgtrDetrForObjectDetection | SgtrForSceneGraphGeneration):
            raise TypeError(f"The losses of {type(model).__name__} are not known to be counted.")
        labels = [label for batch in batches for label in batch["labels"]]
        return {"loss_counts": model.loss_counts(labels, len(batches))}

    def image_ids(self, batch: dict[str, Any]) -> list[str]:
        """Name the images of a batch."""
        return [str(label["image_id"]) for label in batch["labels"]]

    def evaluate(
        self,
        model: PreTrainedModel,
        progress: Progress,  # noqa: ARG002
    ) -> dict[str, Any]:
        """Evaluate each process's share of the validation split, and gather."""
        validation = self.splits.validation
        shares = range(
            self.accelerator.process_index, len(validation), self.accelerator.num_processes
        )
        evaluator = Evaluator(
            self.image_processor, validation.id2label, validation.id2predicate, self.baseline
        )
        loader = make_loader(
            Subset(validation, list(shares)),
            self.settings,
            Collator(self.image_processor),
            num_workers=self.recipe.data.num_workers,
            shuffle=False,
        )
        evaluate(model, loader, evaluator)
        evaluator.gather()
        return evaluator.compute()


class SceneGraphTask(DetectionTask):
    """Trains a scene graph model.

    Args:
        recipe: Of the run.
        accelerator: Knows device and processes.
        model_class: Another class of the same configuration, to compare with.

    Raises:
        ValueError: If the recipe does not fit the data.
    """

    # The harmonic mean of R and mR.
    best_figure = "F@50"

    def __init__(
        self,
        recipe: Recipe,
        accelerator: Accelerator,
        model_class: type[SgtrForSceneGraphGeneration] = SgtrForSceneGraphGeneration,
    ) -> None:
        super().__init__(recipe, accelerator)
        self.model_class = model_class
        train = self.splits.train
        self.baseline = FrequencyBaseline(len(train.id2label), len(train.id2predicate))
        self.baseline.fit(train.references())

    def make_model(self) -> PreTrainedModel:
        """Build the scene graph model."""
        train = self.splits.train
        recipe = with_predicate_frequencies(self.recipe, train)
        return make_model(recipe, train.id2label, train.id2predicate, self.model_class)

    def training_loader(self, model: PreTrainedModel) -> Any:
        """Read images or, with a cache, what the detector made of them."""
        images = self.splits.train
        if not self.settings.cached_epochs or isinstance(images, SceneGraphStream):
            return super().training_loader(model)
        if not isinstance(model, SgtrForSceneGraphGeneration):
            raise TypeError(f"Only scene graph models have a cache, got {type(model).__name__}.")
        cache = CachedDetectorDataset(
            Path(self.settings.output_dir) / "detector-cache", images, self.settings.cached_epochs
        )
        cache.prepare(
            model.to(self.accelerator.device),
            Collator(self.image_processor, with_references=False),
            self.accelerator,
            self.recipe.data.num_workers,
        )
        self.train_images = cache
        loader = make_loader(cache, self.settings, collate_cached, num_workers=0, shuffle=True)
        return self.accelerator.prepare(loader)
