"""Reads the fields of a JSON body one by one; fields that were not read are refused."""

import json
import math
from typing import Any

from .errors import ApiError

__all__ = ["Fields", "check_text", "parse_object"]

_LARGEST = 2**31 - 1  # numbers are int32 on the device


def parse_object(body: bytes) -> dict[str, Any]:
    """Parses the JSON object in a request's body.

    Raises:
      ApiError: The body is not a JSON object.
    """
    try:
        values = json.loads(body)
    except (ValueError, RecursionError) as error:
        reason = "it is nested too deeply" if isinstance(error, RecursionError) else error
        raise ApiError(f"the body is not JSON in UTF-8: {reason}") from error
    if not isinstance(values, dict):
        raise ApiError("the body is not a JSON object")
    return values


def check_text(text: str, param: str) -> str:
    """Returns the text; raises ApiError for lone surrogates, which UTF-8 cannot encode."""
    if not text.isascii() and any("\ud800" <= letter <= "\udfff" for letter in text):
        raise ApiError(f"{param} has half of a surrogate pair: it is not text", param=param)
    return text


class Fields:
    """The fields of a body, or of an object in it. A null counts as an absent field.

    Args:
      values: The object.
      path: Prefix of field names in errors.
    """

    def __init__(self, values: dict[str, Any], path: str = "") -> None:
        self._left = {name: value for name, value in values.items() if value is not None}
        self._path = path

    def any(self, name: str) -> Any:
        """Reads a field of any type; None if it is absent."""
        return self._left.pop(name, None)

    def boolean(self, name: str) -> bool:
        """Reads a boolean; False if it is absent."""
        return bool(self._typed(name, bool, "a boolean") or False)

    def integer(
        self, name: str, default: int | None = None, low: int = 0, high: int = _LARGEST
    ) -> int | None:
        """Reads an integer from `low` to `high`."""
        value = self._typed(name, int, "an integer")
        if value is None:
            return default
        if not low <= value <= high:
            raise self.error(name, f"wanted {low} to {high}")
        return int(value)

    def number(self, name: str, default: float) -> float:
        """Reads a finite number."""
        value = self._typed(name, int | float, "a number")
        if value is None:
            return default
        try:
            value = float(value)
        except OverflowError:
            value = math.inf
        if not math.isfinite(value):
            raise self.error(name, "wanted a finite number")
        return float(value)

    def string(self, name: str) -> str | None:
        """Reads a text; None if it is absent."""
        value = self._typed(name, str, "a string")
        return None if value is None else check_text(value, self._path + name)

    def object(self, name: str) -> dict[str, Any]:
        """Reads an object; an empty one if it is absent."""
        return dict(self._typed(name, dict, "an object") or {})

    def expect(self, name: str, *neutral: Any) -> None:
        """Refuses a field, unless it has one of the values that have no effect."""
        value = self._left.pop(name, None)
        if value is not None and not any(
            type(value) is type(each) and value == each for each in neutral
        ):
            raise self.error(name, "this server does not support it", "unsupported_parameter")

    def finish(self) -> None:
        """Refuses fields that were not read."""
        for name in self._left:
            raise self.error(name, "this server does not support it", "unsupported_parameter")

    def error(self, name: str, reason: str, code: str = "invalid_value") -> ApiError:
        """Makes the error for a field."""
        path = self._path + name
        return ApiError(f"{path[:200]}: {reason}", param=path[:200], code=code)

    def _typed(self, name: str, kind: Any, wanted: str) -> Any:
        value = self._left.pop(name, None)
        if value is not None and (
            not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool)
        ):
            raise self.error(name, f"wanted {wanted}", "invalid_type")
        return value
