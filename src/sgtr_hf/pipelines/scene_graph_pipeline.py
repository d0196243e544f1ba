"""`pipeline("scene-graph")`: pictures in, scene graphs out."""

from collections.abc import Sized
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import Pipeline
from transformers.pipelines.pt_utils import PipelineDataset, PipelineIterator

from ..image_processing.image_processing_sgtr import read_image
from ..scene_graph import SceneGraph


_OUTPUT_FIELDS = (
    "entity_probabilities",
    "pred_boxes",
    "predicate_probabilities",
    "subject_scores",
    "object_scores",
)
_PREPROCESS_ARGUMENTS = ("timeout",)
_POSTPROCESS_ARGUMENTS = ("threshold", "top_k", "graph_constraint")


class SceneGraphPipeline(Pipeline):
    """Finds the entities of pictures and the relations between them.

    Call it with one picture (path, URL, PIL image or array) or many (list, generator or data
    set). Batches may mix sizes; the padding that this needs changes scores a little, since the
    backbone sees it.

    Arguments of a call, or of the constructor as defaults:
        threshold: Least score of a relation, in [0, 1].
        top_k: Most relations a picture.
        graph_constraint: Keep only the best predicate of an ordered pair of entities.
        timeout: Seconds to wait for the download of a URL.
    """

    _load_processor = False
    _load_image_processor = True
    _load_feature_extractor = False
    _load_tokenizer = False
    # Left unset, transformers offers to run code of the repository for it.
    _load_video_processor = False

    def __call__(self, inputs: Any, **kwargs: Any) -> Any:
        """Return one `SceneGraph` for one picture, and as many as pictures otherwise.

        Raises:
            TypeError: If an argument is not known.
            ValueError: If a picture cannot be read.
        """
        if isinstance(inputs, tuple):
            inputs = list(inputs)
        return super().__call__(inputs, **kwargs)

    def _sanitize_parameters(
        self, **kwargs: Any
    ) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
        known = (*_PREPROCESS_ARGUMENTS, *_POSTPROCESS_ARGUMENTS)
        unknown = sorted(set(kwargs) - set(known))
        if unknown:
            raise TypeError(
                f"The scene graph pipeline has no argument {', '.join(unknown)}; "
                f"it takes {', '.join(known)}."
            )
        preprocess = {name: kwargs[name] for name in _PREPROCESS_ARGUMENTS if name in kwargs}
        postprocess = {name: kwargs[name] for name in _POSTPROCESS_ARGUMENTS if name in kwargs}
        return preprocess, {}, postprocess

    def preprocess(self, inputs: Any, timeout: float | None = None) -> dict[str, Tensor]:
        """Read a picture and make it model input, with its size as `target_sizes` (1, 2)."""
        image = read_image(inputs, timeout)
        features = self.image_processor(images=image, return_tensors="pt")
        features["target_sizes"] = torch.tensor([[image.height, image.width]])
        return dict(features)

    def _forward(self, model_inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        target_sizes = model_inputs.pop("target_sizes")
        pixel_values = model_inputs.pop("pixel_values").to(self.model.dtype)
        outputs = self.model(pixel_values, **model_inputs)
        fields = {name: outputs[name] for name in _OUTPUT_FIELDS}
        return fields | {"target_sizes": target_sizes}

    def postprocess(self, model_outputs: dict[str, Tensor], **arguments: Any) -> SceneGraph:
        """Turn the outputs of one picture into its graph, in pixels of the original picture."""
        outputs = dict(model_outputs)
        target_sizes = outputs.pop("target_sizes")
        graphs = self.image_processor.post_process_scene_graph(
            outputs,
            target_sizes=target_sizes,
            id2label=self.model.config.id2label,
            id2predicate=self.model.config.id2predicate,
            **arguments,
        )
        return graphs[0]

    def get_iterator(
        self,
        inputs: Any,
        num_workers: int,
        batch_size: int,
        preprocess_params: dict[str, Any],
        forward_params: dict[str, Any],
        postprocess_params: dict[str, Any],
    ) -> PipelineIterator:
        """Stream pictures through, padded to the largest of their batch.

        The collation of transformers cannot batch images of different sizes.
        """
        source = PipelineDataset if isinstance(inputs, Sized) else PipelineIterator
        loader = DataLoader(
            source(inputs, self.preprocess, preprocess_params),
            num_workers=num_workers if source is PipelineDataset else min(num_workers, 1),
            batch_size=batch_size,
            collate_fn=collate_padded,
        )
        outputs = PipelineIterator(
            loader, self.forward, forward_params, loader_batch_size=batch_size
        )
        return PipelineIterator(outputs, self.postprocess, postprocess_params)


def collate_padded(items: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Concatenate processed images, padding them at the bottom and on the right with zeros.

    Args:
        items: Each with `pixel_values` (1, 3, h, w), `pixel_mask` (1, h, w) and other tensors
            whose first dimension is 1.

    Returns:
        The same names, with `pixel_values` (B, 3, H, W) and `pixel_mask` (B, H, W).
    """
    if len(items) == 1:
        return items[0]
    height = max(item["pixel_values"].shape[-2] for item in items)
    width = max(item["pixel_values"].shape[-1] for item in items)
    padded = []
    for item in items:
        missing = (width - item["pixel_values"].shape[-1], height - item["pixel_values"].shape[-2])
        margins = (0, missing[0], 0, missing[1])
        images = {
            name: torch.nn.functional.pad(item[name], margins)
            for name in ("pixel_values", "pixel_mask")
        }
        padded.append(item | images)
    return {name: torch.cat([item[name] for item in padded]) for name in items[0]}
