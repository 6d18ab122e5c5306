"""Checks numbers, texts and collections that callers give, without JAX."""

import math
import numbers
from collections.abc import Collection
from typing import Any, TypeGuard

__all__ = [
    "MAX_INT32",
    "as_text",
    "as_tuple",
    "host_float",
    "is_integer",
    "is_number",
    "is_text",
    "raise_all",
]

MAX_INT32 = 2**31 - 1


def raise_all(what: str, reasons: Collection[str]) -> None:
    """Raises a ValueError that lists all reasons, if there are any."""
    if reasons:
        raise ValueError("\n  - ".join([f"{what}:", *reasons]))


def is_integer(value: Any) -> TypeGuard[int]:
    """Whether a value is an int of Python or NumPy; bools are none."""
    return isinstance(value, numbers.Integral) and not isinstance(value, bool)


def is_number(value: Any) -> TypeGuard[float]:
    """Whether a value is a number of Python or NumPy that a float can hold; bools are none.

    Infinities are numbers, NaN is not.
    """
    if not isinstance(value, numbers.Real) or isinstance(value, bool):
        return False
    try:
        return not math.isnan(float(value))
    except OverflowError:
        return False


def host_float(name: str, value: Any, low: float, high: float, wanted: str | None = None) -> float:
    """Converts a number of Python or NumPy to float.

    Args:
        name: what to call the value in an error, "pin: ttl".
        value: the argument.
        low: the smallest value allowed.
        high: the largest value allowed.
        wanted: describes what is allowed; None names the limits.

    Raises:
        ValueError: not a number, or out of range.
    """
    if not is_number(value) or not low <= float(value) <= high:
        wanted = wanted or f"a number from {low} to {high}"
        raise ValueError(f"{name}: wanted {wanted}, got {value!r}")
    return float(value)


def as_tuple(value: Any) -> Any:
    """Returns a collection as a tuple, None as an empty tuple, and any other value unchanged."""
    if value is None:
        return ()
    return tuple(value) if isinstance(value, (tuple, list, set, frozenset, range)) else value


def is_text(value: Any) -> TypeGuard[str]:
    """Whether a value is a str that UTF-8 can encode; a lone surrogate is not."""
    if not isinstance(value, str):
        return False
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True


def as_text(name: str, value: Any, wanted: str = "a str") -> str:
    """Returns a str that compiled code can take.

    Raises:
        ValueError: not a str, or one that UTF-8 cannot encode.
    """
    if is_text(value):
        return value
    if isinstance(value, str):
        raise ValueError(f"{name}: wanted text that UTF-8 can encode, got {value!r}")
    raise ValueError(f"{name}: wanted {wanted}, got {type(value).__name__} {value!r}")
