"""Image processor of the vision transformer: resize, crop the centre, normalise."""

from transformers.image_processing_backends import PilBackend, TorchvisionBackend
from transformers.image_utils import (
    IMAGENET_DEFAULT_MEAN,
    IMAGENET_DEFAULT_STD,
    PILImageResampling,
)
from transformers.utils.import_utils import is_torchvision_available

from .processor_settings import CheckedSettings


class _DinoVitImageProcessing(CheckedSettings):
    """What DINO (Caron et al. 2021) evaluates with; both backends share it."""

    resample = PILImageResampling.BICUBIC
    image_mean = IMAGENET_DEFAULT_MEAN
    image_std = IMAGENET_DEFAULT_STD
    size = {"shortest_edge": 256}  # noqa: RUF012 - transformers' contract
    crop_size = {"height": 224, "width": 224}  # noqa: RUF012 - transformers' contract
    default_to_square = False
    do_resize = True
    do_center_crop = True
    do_rescale = True
    do_normalize = True
    do_convert_rgb = True


class DinoVitImageProcessorPil(_DinoVitImageProcessing, PilBackend):
    """The image processor on PIL and numpy alone."""


if is_torchvision_available():

    class DinoVitImageProcessor(_DinoVitImageProcessing, TorchvisionBackend):
        """The image processor on torchvision."""
