"""Settings of image processors, checked when they are made and whenever they are used."""

import math
from collections.abc import Mapping
from typing import Any

from transformers.image_utils import SizeDict


_SIZES = ("size", "crop_size", "pad_size")
_COLORS = ("image_mean", "image_std")
_NUM_CHANNELS = 3
_CHANNEL_ORDERS = ("rgb", "bgr")
# Of Pillow, counted from 0.
_NUM_FILTERS = 6
# Written by transformers; they mark settings from a file, which may be of another version.
_FILE_MARKS = {"image_processor_type", "feature_extractor_type", "processor_class", "auto_map"}


class CheckedSettings:
    """What the image processors of both backends share: wrong settings are errors."""

    def __init__(self, **kwargs: Any) -> None:
        self._check_names(kwargs)
        super().__init__(**kwargs)
        names = self.valid_kwargs.__annotations__  # type: ignore[attr-defined]
        check_settings({name: getattr(self, name, None) for name in names})

    def _check_names(self, kwargs: Mapping[str, Any]) -> None:
        """Reject unknown names, which transformers would keep as attributes without a use."""
        known = self.valid_kwargs.__annotations__  # type: ignore[attr-defined]
        unknown = [name for name in kwargs if name not in known and not hasattr(type(self), name)]
        if unknown and not _FILE_MARKS & set(kwargs):
            raise TypeError(
                f"`{type(self).__name__}` has no setting {', '.join(unknown)}; it has "
                f"{', '.join(sorted(known))}."
            )

    def _standardize_kwargs(self, **kwargs: Any) -> dict[str, Any]:
        """Spell one mean or deviation out for all channels; the backends differ in what they do."""
        for name in _COLORS:
            value = kwargs.get(name)
            if _is_number(value):
                kwargs[name] = (value,) * _NUM_CHANNELS
            elif isinstance(value, (list, tuple)) and len(value) == 1:
                kwargs[name] = tuple(value) * _NUM_CHANNELS
        return super()._standardize_kwargs(**kwargs)  # type: ignore[misc]

    def _validate_preprocess_kwargs(self, **kwargs: Any) -> None:
        check_settings(kwargs)
        super()._validate_preprocess_kwargs(**kwargs)  # type: ignore[misc]


def check_settings(settings: Mapping[str, Any]) -> None:
    """Check settings of an image processor; those that are None or missing are left alone.

    Args:
        settings: By name, in the form that transformers brings them to.

    Raises:
        ValueError: If a value is out of range.
        TypeError: If a value is of the wrong type.
    """
    for name, value in settings.items():
        if value is None:
            continue
        if name.startswith(("do_", "legacy_")) and name != "legacy_box_offset":
            if not isinstance(value, bool):
                raise TypeError(f"`{name}` must be True or False, got {value!r}.")
        elif name in _SIZES:
            _check_size(name, value)
        elif name in _COLORS:
            _check_colors(name, value)
        else:
            _check_single(name, value)


def _check_single(name: str, value: Any) -> None:
    if name == "channel_order" and value not in _CHANNEL_ORDERS:
        raise ValueError(f"`channel_order` must be one of {_CHANNEL_ORDERS}, got {value!r}.")
    if name in ("rescale_factor", "legacy_box_offset"):
        if not _is_number(value):
            raise TypeError(f"`{name}` must be a number, got {value!r}.")
        if not math.isfinite(value) or (name == "rescale_factor" and value <= 0):
            wanted = "above 0, such as 1 / 255" if name == "rescale_factor" else "finite"
            raise ValueError(f"`{name}` must be {wanted}, got {value!r}.")
    if name == "resample" and (
        isinstance(value, str) or (isinstance(value, int) and value not in range(_NUM_FILTERS))
    ):
        raise ValueError(f"`resample` must be one of `PIL.Image.Resampling`, got {value!r}.")


def _check_size(name: str, size: SizeDict) -> None:
    for side, pixels in dict(size).items():
        if isinstance(pixels, bool) or not isinstance(pixels, int) or pixels < 1:
            raise ValueError(
                f"`{name}` must have whole numbers of pixels above 0, got {pixels!r} as its {side}."
            )


def _check_colors(name: str, values: Any) -> None:
    is_right = (
        isinstance(values, tuple)
        and len(values) == _NUM_CHANNELS
        and all(_is_number(value) and math.isfinite(value) for value in values)
    )
    if not is_right or (name == "image_std" and min(values) <= 0):
        wanted = "numbers above 0" if name == "image_std" else "finite numbers"
        raise ValueError(
            f"`{name}` must be {_NUM_CHANNELS} {wanted}, one for each channel, or one for all, got "
            f"{values!r}."
        )


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)
