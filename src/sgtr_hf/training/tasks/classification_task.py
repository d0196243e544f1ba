"""Supervised classification of images, from scratch or from a pretrained vision transformer."""

from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor
from torch.nn.functional import cross_entropy
from torchvision.transforms import v2
from transformers import PreTrainedModel

from ...data.training_pictures import ChangedPicture
from ...modeling.modeling_dino_vit import DinoVitForImageClassification
from ...self_supervision.feature_extraction import extract_features
from ...self_supervision.image_preparation import ProcessorPreparation, seen_size
from ..checkpoints import Progress
from ..image_recipe import ClassificationRecipe
from ..recipe import Recipe
from .picture_task import PictureCollator, PictureTask


class ClassificationTask(PictureTask):
    """Trains `DinoVitForImageClassification`.

    Args:
        recipe: A `ClassificationRecipe`.
        accelerator: Knows device and processes.

    Raises:
        TypeError: If the recipe is of another kind.
        ValueError: If the recipe does not fit the data, or the data has no classes.
    """

    best_figure = "top1"
    unranked_figures = ("loss", "num_images")
    model_class = DinoVitForImageClassification

    def __init__(self, recipe: Recipe, accelerator: Accelerator) -> None:
        if not isinstance(recipe, ClassificationRecipe):
            raise TypeError(
                f"Classification needs a ClassificationRecipe, got {type(recipe).__name__}; "
                "`load_recipe` makes it with `kinds=IMAGE_RECIPES`."
            )
        super().__init__(recipe, accelerator, recipe.data)
        self.crop_scale, self.label_smoothing = (
            recipe.data.crop_scale,
            recipe.training.label_smoothing,
        )
        if self.label_names is None:
            raise ValueError(
                f"The images of `data.path` {recipe.data.path} have no classes: put them into "
                "one sub-folder a class, or name the column of ClassLabel in `data.label_column`."
            )
        self.check_same_classes()

    def make_model(self) -> PreTrainedModel:
        """Build the classifier; its head starts anew where the number of classes differs."""
        names = self.label_names or []
        return self.make_vision_transformer(
            id2label=dict(enumerate(names)),
            label2id={name: number for number, name in enumerate(names)},
        )

    def training_loader(self, model: PreTrainedModel) -> Any:  # noqa: ARG002
        """Read images as random crops of the size that the image processor gives."""
        change = v2.Compose(
            [
                v2.RandomResizedCrop(
                    seen_size(self.image_processor),
                    scale=tuple(self.crop_scale),
                    interpolation=v2.InterpolationMode.BICUBIC,
                ),
                v2.RandomHorizontalFlip(self.data.flip_probability),
                v2.ColorJitter(
                    self.data.brightness, self.data.brightness, self.data.saturation, self.data.hue
                ),
                v2.PILToTensor(),
            ]
        )
        return self.load_training_pictures(change, ClassificationCollator(self.image_processor))

    def compute_losses(
        self,
        model: torch.nn.Module,
        batch: dict[str, Any],
        progress: Progress,  # noqa: ARG002
    ) -> dict[str, Tensor]:
        """Compare the classes with the annotated ones."""
        logits = model(batch["pixel_values"]).logits.float()
        loss = cross_entropy(logits, batch["labels"], label_smoothing=self.label_smoothing)
        accuracy = (logits.argmax(-1) == batch["labels"]).float().mean()
        return {"loss": loss, "accuracy": accuracy}

    @torch.no_grad()
    def evaluate(
        self,
        model: PreTrainedModel,
        progress: Progress,  # noqa: ARG002
    ) -> dict[str, Any]:
        """Classify each process's share of the validation split, and add up."""
        model.eval()
        num_classes = len(self.label_names or ())
        sums = torch.zeros(4, dtype=torch.float64)
        for batch in extract_features(
            self.share_of(self.validation),
            ProcessorPreparation(self.image_processor),
            lambda pixel_values: model(pixel_values).logits,
            batch_size=self.settings.batch_size,
            num_workers=self.data.num_workers,
            device=self.accelerator.device,
        ):
            ranked = batch.vectors.topk(min(5, num_classes), dim=1).indices
            is_right = ranked == batch.labels[:, None]
            loss = cross_entropy(batch.vectors, batch.labels, reduction="sum")
            counts = (len(ranked), is_right[:, 0].sum(), is_right.any(1).sum(), loss)
            sums += torch.tensor([float(count) for count in counts], dtype=torch.float64)
        count, top1, top5, loss_sum = self.accelerator.reduce(
            sums.to(self.accelerator.device), reduction="sum"
        ).tolist()
        return {
            "top1": top1 / count,
            "top5": top5 / count,
            "loss": loss_sum / count,
            "num_images": int(count),
        }


class ClassificationCollator(PictureCollator):
    """Makes a batch of images and classes."""

    def __call__(self, items: list[ChangedPicture]) -> dict[str, Any]:
        """Return pixel_values (B, 3, H, W), labels (B,) and names.

        Raises:
            ValueError: If an image has no class.
        """
        for item in items:
            if item.label < 0:
                raise ValueError(f"Image {item.name} has no class.")
        pixels = torch.stack([item.pixels for item in items])
        return {
            "pixel_values": self.normalize(pixels),
            "labels": torch.tensor([item.label for item in items]),
            "names": [item.name for item in items],
        }
