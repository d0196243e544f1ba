"""What all configurations of this package have in common, and how fields are checked.

Comparisons ask for what is allowed, so that NaN, which is neither above nor below anything, fails.
"""

import warnings
from collections.abc import Iterable, Mapping
from dataclasses import fields
from difflib import get_close_matches
from typing import Any, cast

from transformers import PreTrainedConfig
from transformers.activations import ACT2FN

from .size_limits import check_num_labels


# Models compute with it: what is larger would be infinite in them.
_LARGEST_FLOAT32 = 3.4028234663852886e38


class CheckedConfig(PreTrainedConfig):
    """Base of the configurations, with the checks that all of them need."""

    activation_function: str
    layer_norm_eps: float
    initializer_range: float | int

    def __post_init__(self, **kwargs: Any) -> None:
        """Check the classes before transformers makes up names or turns keys into integers."""
        self._warn_of_misspelt(kwargs)
        check_num_labels(kwargs)
        self.validate_labels()
        super().__post_init__(**kwargs)

    def _warn_of_misspelt(self, others: Iterable[str]) -> None:
        """Warn of a name that is nearly one of a field.

        No error: transformers stores what it does not know, and its users rely on that.
        """
        known = [field.name for field in fields(self)]
        for name in others:
            if name in self.attribute_map or hasattr(type(self), name):
                continue
            alike = get_close_matches(name, known, n=1, cutoff=0.85)
            if alike:
                warnings.warn(
                    f"{type(self).__name__} has no field `{name}`; did you mean `{alike[0]}`?",
                    stacklevel=2,
                )

    def validate_activation(self) -> None:
        """Reject an activation that transformers does not know."""
        name = self.activation_function
        require(name in ACT2FN, "activation_function", name, f"one of {', '.join(sorted(ACT2FN))}")

    def validate_common_numbers(self) -> None:
        """Reject numbers that are not finite, and what no layer norm or new weight can have."""
        for field in fields(self):
            value = getattr(self, field.name)
            for number in value if isinstance(value, list) else (value,):
                if isinstance(number, float | int):
                    is_finite = abs(number) <= _LARGEST_FLOAT32
                    require(is_finite, field.name, value, "finite in 32-bit floating point")
        # Without it a row of equal numbers, such as queries that start from zeros, becomes NaN.
        check_above(self, ("layer_norm_eps",), 0)
        check_at_least(self, ("initializer_range",), 0)

    def validate_labels(self) -> None:
        """Reject class numbers with gaps.

        Names may repeat: those of COCO ("N/A") and ImageNet ("crane") do.
        """
        if self.id2label is not None:
            check_numbering("id2label", self.id2label)

    def names_ending_with(self, *endings: str) -> list[str]:
        """Names of the fields with one of the endings."""
        return [field.name for field in fields(self) if field.name.endswith(endings)]


def require(condition: bool, field: str, value: object, expected: str) -> None:
    """Reject the value of a field unless the condition holds.

    Raises:
        ValueError: With field, value and what it must be.
    """
    if not condition:
        raise ValueError(f"`{field}` must be {expected}, got {value!r}.")


def check_at_least(config: PreTrainedConfig, names: Iterable[str], least: float) -> None:
    """Reject fields below a bound."""
    for name in names:
        value = getattr(config, name)
        require(value >= least, name, value, f"at least {least}")


def check_above(config: PreTrainedConfig, names: Iterable[str], bound: float) -> None:
    """Reject fields that are at a bound or below."""
    for name in names:
        value = getattr(config, name)
        require(value > bound, name, value, f"above {bound}")


def check_shares(config: PreTrainedConfig, names: Iterable[str]) -> None:
    """Reject fields outside [0, 1]."""
    for name in names:
        value = getattr(config, name)
        require(0 <= value <= 1, name, value, "between 0 and 1")


def check_numbering(field: str, names: object) -> None:
    """Reject names whose keys, integers or strings of them, do not count from 0.

    Raises:
        ValueError: With field, value or keys, and what they must be.
    """
    expected = "a dictionary of at least one name, with keys that count from 0 without gaps"
    # transformers leaves the type of `id2label` unchecked.
    require(isinstance(names, Mapping) and bool(names), field, names, expected)
    keys = list(cast(Mapping[Any, str], names))
    are_numbers = all(str(key).isdecimal() for key in keys)
    is_counting = are_numbers and sorted(map(int, keys)) == list(range(len(keys)))
    require(is_counting, field, keys, expected)


def model_type_of(config: Mapping[str, Any] | PreTrainedConfig | None) -> object:
    """Model type that a configuration, made or still a dictionary, states; None if it does not."""
    if isinstance(config, Mapping):
        return config.get("model_type")
    return getattr(config, "model_type", None)
