"""`pipeline("scene-graph")`: pictures in, scene graphs out."""

import operator
from collections.abc import Iterator, Sequence, Sized
from os import PathLike
from types import GeneratorType
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from transformers import Pipeline
from transformers.pipelines.pt_utils import PipelineDataset, PipelineIterator

from ..boxes import box_xyxy_to_cxcywh
from ..image_processing.picture_reading import read_image
from ..modeling.batch_norm_folding import FoldedInference
from ..post_processing import check_arguments
from ..scene_graph import SceneGraph


_OUTPUT_FIELDS = (
    "entity_probabilities",
    "triplet_class_probabilities",
    "given_entities",
    "pred_boxes",
    "predicate_probabilities",
    "subject_scores",
    "object_scores",
    # Of unified assembling.
    "subject_log_correspondence",
    "object_log_correspondence",
)
# Kinds of one picture; everything else holds several.
_PICTURE_KINDS = (str, bytes, bytearray, PathLike, Image.Image, np.ndarray, Tensor)
# Given entities differ in number from picture to picture, so they stay lists.
_LIST_FIELDS = ("entity_boxes", "entity_labels")
_PREPROCESS_ARGUMENTS = ("timeout", "boxes", "labels")
_POSTPROCESS_ARGUMENTS = (
    "threshold",
    "top_k",
    "graph_constraint",
    "duplicate_threshold",
    "labels_per_entity",
)


class _Pictures(Dataset[Any]):
    """What has a length and numbers, such as a column of a data set, for transformers to stream."""

    def __init__(self, pictures: Any) -> None:
        self.pictures = pictures

    def __len__(self) -> int:
        return len(self.pictures)

    def __getitem__(self, index: int) -> Any:
        return self.pictures[index]


def _is_sequence(inputs: Any) -> bool:
    if isinstance(inputs, (list, dict, Dataset)):
        return False
    return hasattr(inputs, "__len__") and hasattr(inputs, "__getitem__")


class SceneGraphPipeline(Pipeline):
    """Finds the entities of pictures and the relations between them.

    Call it with one picture (path, URL, PIL image or array) or many (list, generator or data
    set). Batches may mix sizes; the padding that this needs changes scores a little, since the
    backbone sees it.

    Entities that are known already are given as `boxes`, or `boxes` and `labels`; relations are
    then found among these. With many pictures each is a dictionary of "image", "boxes", "labels".

    Arguments of a call, or of the constructor as defaults:
        boxes: (E, 4) corners x1, y1, x2, y2 in pixels of the one picture.
        labels: E names of classes, or their numbers.
        threshold: Least score of a relation, in [0, 1].
        top_k: Most relations a picture.
        graph_constraint: Keep only the best predicate of an ordered pair of entities.
        duplicate_threshold: Overlap of both boxes above which two triplets of the same classes and
            predicate say the same.
        labels_per_entity: Classes of an entity that may each be a node of the graph.
        timeout: Seconds to wait for the download of a URL.
    """

    _load_processor = False
    _load_image_processor = True
    _load_feature_extractor = False
    _load_tokenizer = False
    # Left unset, transformers offers to run code of the repository for it.
    _load_video_processor = False

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._infer = FoldedInference()

    def __call__(self, inputs: Any, **kwargs: Any) -> Any:
        """Return one `SceneGraph` for one picture, and as many as pictures otherwise.

        Raises:
            TypeError: If an argument is not known.
            ValueError: If a picture cannot be read.
        """
        is_single = isinstance(inputs, _PICTURE_KINDS)
        if isinstance(inputs, tuple):
            inputs = list(inputs)
        elif isinstance(inputs, Iterator) and not isinstance(inputs, GeneratorType):
            # transformers streams generators alone.
            inputs = (picture for picture in inputs)
        elif _is_sequence(inputs) and not is_single:
            inputs = _Pictures(inputs)
        if isinstance(inputs, list) and not inputs:
            return []
        if not is_single and not isinstance(inputs, dict) and {"boxes", "labels"} & set(kwargs):
            raise ValueError(
                "`boxes` and `labels` belong to one picture; with many, give each as a dictionary "
                'with "image", "boxes" and "labels".'
            )
        return super().__call__(inputs, **kwargs)

    def get_inference_context(self) -> Any:
        """Spare what `no_grad` still does for gradients: there are thousands of small steps."""
        return torch.inference_mode

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
        check_arguments(**postprocess)
        return preprocess, {}, postprocess

    def preprocess(
        self,
        inputs: Any,
        timeout: float | None = None,
        boxes: Any = None,
        labels: Sequence[str | int] | None = None,
    ) -> dict[str, Any]:
        """Read a picture and make it model input, with its size as `target_sizes` (1, 2)."""
        if isinstance(inputs, dict):
            unknown = sorted(set(inputs) - {"image", "boxes", "labels"})
            if unknown or "image" not in inputs:
                raise ValueError(
                    'A picture given as a dictionary has "image" and may have "boxes" and '
                    f'"labels", got {sorted(inputs)}; of the rows of a data set give the column '
                    'of pictures, as in dataset["image"].'
                )
            boxes, labels = inputs.get("boxes", boxes), inputs.get("labels", labels)
            inputs = inputs["image"]
        image = read_image(inputs, timeout)
        features = dict(self.image_processor(images=image, return_tensors="pt"))
        features["target_sizes"] = torch.tensor([[image.height, image.width]])
        if boxes is not None:
            features["entity_boxes"] = [relative_boxes(boxes, image.width, image.height)]
        if labels is not None:
            if boxes is None:
                raise ValueError("`labels` are those of `boxes`, which must be given, too.")
            features["entity_labels"] = [self._label_numbers(labels)]
        return features

    def _label_numbers(self, labels: Sequence[str | int]) -> Tensor:
        known: dict[str, int] = self.model.config.label2id
        if isinstance(labels, (str, bytes)) or not hasattr(labels, "__iter__"):
            raise TypeError(f"`labels` must be a list of names or numbers, got {labels!r}.")
        numbers = []
        for label in labels:
            if isinstance(label, str):
                if label not in known:
                    raise ValueError(
                        f"`labels` has {label!r}, which this model does not know; it knows "
                        f"{', '.join(known)}."
                    )
                numbers.append(known[label])
            elif isinstance(label, bool) or not hasattr(label, "__index__"):
                raise TypeError(f"`labels` must hold names or whole numbers, got {label!r}.")
            else:
                numbers.append(operator.index(label))
        return torch.tensor(numbers, dtype=torch.int64)

    def _forward(self, model_inputs: dict[str, Any]) -> dict[str, Tensor]:
        target_sizes = model_inputs.pop("target_sizes")
        pixel_values = model_inputs.pop("pixel_values").to(self.model.dtype)
        outputs = self._infer(self.model, pixel_values, **model_inputs)
        fields = {name: outputs[name] for name in _OUTPUT_FIELDS if outputs.get(name) is not None}
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


def relative_boxes(boxes: Any, width: int, height: int) -> Tensor:
    """Turn corners in pixels into boxes relative to the picture.

    Args:
        boxes: (E, 4) as x1, y1, x2, y2.
        width: Of the picture.
        height: Of the picture.

    Returns:
        (E, 4) as cx, cy, w, h, cut off at the border.

    Raises:
        ValueError: If the shape is another, or a box has no area inside the picture.
    """
    try:
        table = np.asarray(boxes, dtype=np.float32)
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"`boxes` must be rows of the four numbers x1, y1, x2, y2, got {boxes!r}."
        ) from error
    if table.size and (table.ndim != 2 or table.shape[1] != 4):  # noqa: PLR2004
        raise ValueError(f"`boxes` must have shape (num_entities, 4), got {table.shape}.")
    corners = torch.from_numpy(table).reshape(-1, 4)
    corners = corners / corners.new_tensor([width, height, width, height])
    corners = corners.clamp(0, 1)
    is_wrong = ~(corners[:, 2:] > corners[:, :2]).all(-1)
    if is_wrong.any():
        row = int(is_wrong.nonzero()[0])
        raise ValueError(
            f"`boxes[{row}]` must be x1, y1, x2, y2 with an area inside the picture of "
            f"{width} x {height} pixels, got {table[row].tolist()}."
        )
    return box_xyxy_to_cxcywh(corners)


def collate_padded(items: list[dict[str, Any]]) -> dict[str, Any]:
    """Concatenate processed images, padding them at the bottom and on the right with zeros.

    Args:
        items: Each with `pixel_values` (1, 3, h, w), `pixel_mask` (1, h, w), other tensors whose
            first dimension is 1, and lists of one entry.

    Returns:
        The same names, with `pixel_values` (B, 3, H, W) and `pixel_mask` (B, H, W).

    Raises:
        ValueError: If entities are given for some of the pictures only.
    """
    if len(items) == 1:
        return items[0]
    if any(set(item) != set(items[0]) for item in items):
        raise ValueError(
            "Entities must be given for all pictures of a batch, or for none; use batch_size=1."
        )
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
    return {
        name: [item[name][0] for item in padded]
        if name in _LIST_FIELDS
        else torch.cat([item[name] for item in padded])
        for name in items[0]
    }
