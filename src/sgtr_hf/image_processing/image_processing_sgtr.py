"""Image processors: pictures and annotations become model inputs, outputs become results."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor
from transformers.image_processing_backends import PilBackend, TorchvisionBackend
from transformers.image_processing_utils import BatchFeature
from transformers.image_transforms import group_images_by_shape, reorder_images
from transformers.image_utils import (
    IMAGENET_DEFAULT_MEAN,
    IMAGENET_DEFAULT_STD,
    PILImageResampling,
    SizeDict,
)
from transformers.processing_utils import ImagesKwargs
from transformers.utils.import_utils import is_torchvision_available

from ..post_processing import DUPLICATE_IOU, LegacyRules, detect_objects, find_scene_graphs
from ..scene_graph import SceneGraph
from .annotation_labels import make_labels
from .picture_reading import check_pixels, read_image
from .processor_settings import CheckedSettings


class SgtrImageProcessorKwargs(ImagesKwargs, total=False):  # type: ignore[call-arg]
    """Settings beyond those of all image processors.

    channel_order (`Literal["rgb", "bgr"]`):
        Order in which the model gets the channels; mean and standard deviation are in it too.
    legacy_box_offset (`float`), legacy_open_border, legacy_self_overlap, legacy_duplicate_ranking
    and legacy_single_predicate (`bool`):
        Rules of the originals for results, see `sgtr_hf.post_processing.LegacyRules`.
    legacy_round_sides (`bool`):
        Round the sides of a resized image to the nearest pixel, as the released SGTR does, instead
        of down, as DETR does.
    """

    channel_order: Literal["rgb", "bgr"] | None
    legacy_box_offset: float | None
    legacy_open_border: bool | None
    legacy_self_overlap: bool | None
    legacy_duplicate_ranking: bool | None
    legacy_single_predicate: bool | None
    legacy_round_sides: bool | None


class _SgtrImageProcessing(CheckedSettings):
    """What both backends share; boxes are relative to the image without its padding.

    (The DETR processor of transformers relates boxes to the padded image instead, so that they
    mean other things in other batches.)
    """

    valid_kwargs = SgtrImageProcessorKwargs
    model_input_names = ["pixel_values", "pixel_mask"]  # noqa: RUF012 - transformers' contract
    resample = PILImageResampling.BILINEAR
    image_mean = IMAGENET_DEFAULT_MEAN
    image_std = IMAGENET_DEFAULT_STD
    size = {"shortest_edge": 800, "longest_edge": 1333}  # noqa: RUF012 - transformers' contract
    default_to_square = False
    do_resize = True
    do_rescale = True
    do_normalize = True
    do_pad = True
    channel_order = "rgb"
    legacy_box_offset = 0.0
    legacy_open_border = False
    legacy_self_overlap = False
    legacy_duplicate_ranking = False
    legacy_single_predicate = False
    legacy_round_sides = False

    def preprocess(
        self,
        images: Any,
        annotations: Mapping[str, Any] | Sequence[Mapping[str, Any]] | None = None,
        **kwargs: Any,
    ) -> BatchFeature:
        """Prepare images, and annotations where they are given.

        Args:
            images: One picture or several, as PIL images of any mode, arrays, tensors or paths.
            annotations: COCO style, one an image: "image_id", "annotations" (each with "bbox" as
                x, y, width, height in pixels and "category_id"), and "relations": rows of subject
                and object, as positions in "annotations", and predicate.
            **kwargs: Settings for this call.

        Returns:
            pixel_values (B, 3, H, W), pixel_mask (B, H, W) with 1 on the image, and with
            annotations `labels`: for each image class_labels (T,), boxes (T, 4) as cxcywh relative
            to the image, relations (R, 3), image_id, orig_size and size (height, width).

        Raises:
            ValueError: If a picture cannot be read, or an annotation points outside or holds
                something else than numbers.
            TypeError: If something is not a picture, an annotation or of a setting's type.
        """
        pictures = images if isinstance(images, (list, tuple)) else [images]
        if not pictures:
            raise ValueError("`images` must hold at least one picture, got none.")
        pictures = [read_image(picture) for picture in pictures]
        if isinstance(annotations, Mapping):
            annotations = [annotations]
        if annotations is not None:
            _check_annotations(annotations, len(pictures))
        return super().preprocess(pictures, annotations, **kwargs)  # type: ignore[misc]

    def _preprocess(  # noqa: PLR0913 - transformers passes every setting by name
        self,
        images: list[Any],
        annotations: Sequence[Mapping[str, Any]] | None,
        do_resize: bool,
        size: SizeDict,
        resample: Any,
        do_rescale: bool,
        rescale_factor: float,
        do_normalize: bool,
        image_mean: Any,
        image_std: Any,
        do_pad: bool,
        pad_size: SizeDict | None,
        channel_order: str,
        legacy_round_sides: bool,
        return_tensors: Any,
        **_: Any,
    ) -> BatchFeature:
        for wanted in (size if do_resize else None, pad_size):
            _check_size(wanted)
        original_sizes = [tuple(image.shape[-2:]) for image in images]
        normalization = (do_rescale, rescale_factor, do_normalize, image_mean, image_std)

        def target_size(shape: tuple[int, ...]) -> SizeDict | None:
            if do_resize:
                _check_shape(size, shape)
            if do_resize and legacy_round_sides and size.shortest_edge:
                return _rounded_size(size, shape)
            return size if do_resize else None

        # Of the backend.
        resized = self._transform(  # type: ignore[attr-defined]
            images, target_size, resample, channel_order, normalization
        )
        pixel_values, pixel_mask = _pad(resized, pad_size, do_pad=do_pad)
        features = BatchFeature(
            {"pixel_values": pixel_values, "pixel_mask": pixel_mask}, tensor_type=return_tensors
        )
        if annotations is not None:
            features["labels"] = [
                BatchFeature(
                    make_labels(annotation, original, tuple(image.shape[-2:])),
                    tensor_type=return_tensors,
                )
                for annotation, original, image in zip(
                    annotations, original_sizes, resized, strict=True
                )
            ]
        return features

    def post_process_object_detection(
        self,
        outputs: Any,
        threshold: float = 0.5,
        target_sizes: Tensor | Sequence[tuple[int, int]] | None = None,
        top_k: int | None = None,
    ) -> list[dict[str, Tensor]]:
        """Turn outputs into detections, best first.

        Args:
            outputs: Of a detection or scene graph model.
            threshold: Least score, in [0, 1].
            target_sizes: (B, 2) height and width to scale boxes to; normalised boxes if None.
            top_k: Likeliest pairs of query and class, so that a box may have several classes, as
                detectors with a sigmoid head are evaluated; each query has its best class if None.

        Returns:
            For each image "scores" (E,), "labels" (E,) and "boxes" (E, 4) as x1, y1, x2, y2.

        Raises:
            ValueError: If outputs are not finite, sizes do not fit, or an argument is out of range.
            TypeError: If an argument is of the wrong type.
        """
        return detect_objects(
            outputs["entity_probabilities"],
            outputs["pred_boxes"],
            threshold,
            target_sizes,
            self._legacy_rules,
            top_k,
        )

    def post_process_scene_graph(  # noqa: PLR0913 - an argument for each choice
        self,
        outputs: Any,
        threshold: float = 0.0,
        top_k: int = 100,
        target_sizes: Tensor | Sequence[tuple[int, int]] | None = None,
        graph_constraint: bool = False,
        duplicate_threshold: float = DUPLICATE_IOU,
        labels_per_entity: int = 1,
        id2label: Mapping[int, str] | None = None,
        id2predicate: Mapping[int, str] | None = None,
    ) -> list[SceneGraph]:
        """Turn outputs into scene graphs.

        Args:
            outputs: Of a scene graph model.
            threshold: Least score of a relation, in [0, 1].
            top_k: Most relations a graph.
            target_sizes: (B, 2) height and width of the pictures; boxes are scaled to them.
            graph_constraint: Keep only the best predicate of an ordered pair of entities.
            duplicate_threshold: Overlap of both boxes above which two triplets of the same classes
                and predicate say the same; 1 keeps all but those of the very same entities.
            labels_per_entity: Classes of an entity that may each be a node of the graph; 2 finds
                more of what is annotated, 1 gives a thing one name.
            id2label: Names of classes for the results.
            id2predicate: Names of predicates for the results.

        Raises:
            ValueError: If outputs are not finite or an argument is out of range.
            TypeError: If an argument is of the wrong type.
        """
        return find_scene_graphs(
            outputs,
            target_sizes,
            threshold=threshold,
            top_k=top_k,
            graph_constraint=graph_constraint,
            duplicate_threshold=duplicate_threshold,
            labels_per_entity=labels_per_entity,
            names=(id2label, id2predicate),
            legacy=self._legacy_rules,
        )

    @property
    def _legacy_rules(self) -> LegacyRules:
        return LegacyRules(
            self.legacy_box_offset,
            self.legacy_open_border,
            self.legacy_self_overlap,
            self.legacy_duplicate_ranking,
            self.legacy_single_predicate,
        )


class SgtrImageProcessorPil(_SgtrImageProcessing, PilBackend):
    """The image processor on PIL and numpy alone."""

    def _transform(
        self,
        images: list[Any],
        target_size: Callable[[tuple[int, ...]], SizeDict | None],
        resample: Any,
        channel_order: str,
        normalization: tuple[Any, ...],
    ) -> list[Tensor]:
        do_rescale, rescale_factor, do_normalize, image_mean, image_std = normalization
        transformed = []
        for image in images:
            size = target_size(image.shape[-2:])
            array = image if size is None else self.resize(image, size=size, resample=resample)
            if channel_order == "bgr":
                array = array[::-1]
            if do_rescale:
                array = self.rescale(array, rescale_factor)
            if do_normalize:
                array = self.normalize(array, image_mean, image_std)
            transformed.append(torch.from_numpy(np.ascontiguousarray(array, dtype=np.float32)))
        return transformed


if is_torchvision_available():

    class SgtrImageProcessor(_SgtrImageProcessing, TorchvisionBackend):
        """The image processor on torchvision; images of one size go through together."""

        def _transform(
            self,
            images: list[Any],
            target_size: Callable[[tuple[int, ...]], SizeDict | None],
            resample: Any,
            channel_order: str,
            normalization: tuple[Any, ...],
        ) -> list[Tensor]:
            groups, positions = group_images_by_shape(images, disable_grouping=False)
            for shape, group in groups.items():
                size = target_size(group.shape[-2:])
                if size is not None and tuple(group.shape[-2:]) != (size.height, size.width):
                    group = self.resize(group, size=size, resample=resample)
                if channel_order == "bgr":
                    group = group.flip(-3)
                # Floats even where neither is done.
                groups[shape] = self.rescale_and_normalize(group, *normalization).float()
            return list(reorder_images(groups, positions))


def _check_annotations(annotations: Any, num_images: int) -> None:
    """Reject what is not one dictionary an image."""
    if isinstance(annotations, str) or not isinstance(annotations, Sequence):
        raise TypeError(
            "`annotations` must be a dictionary, or a list of one for each image, got "
            f"{type(annotations).__name__}."
        )
    if len(annotations) != num_images:
        raise ValueError(
            f"`annotations` must have one entry an image, got {len(annotations)} for "
            f"{num_images} images."
        )
    for number, annotation in enumerate(annotations):
        if not isinstance(annotation, Mapping):
            raise TypeError(
                f'`annotations[{number}]` must be a dictionary with "image_id", "annotations" and '
                f'"relations", got {annotation!r:.80}.'
            )


def _check_size(size: SizeDict | None) -> None:
    """Reject a size whose pictures would not fit in memory."""
    if size is not None:
        height = size.height or size.longest_edge or size.shortest_edge or 0
        check_pixels(size.width or size.shortest_edge or height, height)


def _check_shape(size: SizeDict, shape: tuple[int, ...]) -> None:
    """Reject a picture so long that nothing, or far too much, would be left of it."""
    if not size.shortest_edge:
        return
    factor, (height, width) = size.shortest_edge / min(shape), shape
    if size.longest_edge:
        factor = min(factor, size.longest_edge / max(shape))
    if min(shape) * factor < 1:
        raise ValueError(
            f"A picture of {width} x {height} pixels is refused: with `size.longest_edge` "
            f"{size.longest_edge} its shorter side is less than a pixel; cut it first."
        )
    check_pixels(int(width * factor), int(height * factor))


def _rounded_size(size: SizeDict, shape: tuple[int, ...]) -> SizeDict:
    """Height and width of an image whose shortest side becomes `size.shortest_edge`.

    Unless its longest side would exceed `size.longest_edge`, which is then its size.
    """
    factor = size.shortest_edge / min(shape)
    if size.longest_edge:
        factor = min(factor, size.longest_edge / max(shape))
    height, width = (int(side * factor + 0.5) for side in shape)
    return SizeDict(height=height, width=width)


def _pad(images: list[Tensor], pad_size: SizeDict | None, *, do_pad: bool) -> tuple[Tensor, Tensor]:
    """Stack images, with zeros below and on the right, and say where the images are."""
    heights, widths = zip(*(image.shape[-2:] for image in images), strict=True)
    height, width = max(heights), max(widths)
    if pad_size is not None and pad_size.height and pad_size.width:
        if pad_size.height < height or pad_size.width < width:
            raise ValueError(
                f"`pad_size` {pad_size.height} x {pad_size.width} is smaller than an image of "
                f"{height} x {width}; choose a smaller `size`."
            )
        height, width = pad_size.height, pad_size.width
    if (min(heights), min(widths)) == (height, width):
        mask = torch.ones((len(images), height, width), dtype=torch.int64)
        return torch.stack(images), mask
    if not do_pad:
        raise ValueError("Images of different sizes need `do_pad=True` to be one batch.")
    pixel_values = images[0].new_zeros((len(images), images[0].shape[0], height, width))
    pixel_mask = torch.zeros((len(images), height, width), dtype=torch.int64)
    for index, image in enumerate(images):
        pixel_values[index, :, : image.shape[1], : image.shape[2]] = image
        pixel_mask[index, : image.shape[1], : image.shape[2]] = 1
    return pixel_values, pixel_mask
