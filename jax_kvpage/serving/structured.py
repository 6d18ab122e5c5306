"""Constraints on an output, named as in vLLM: a JSON schema, a regular expression, a grammar."""

import dataclasses
from typing import Any

from jax_kvpage._values import raise_all

__all__ = ["StructuredOutputsParams"]

_KINDS = ("json", "regex", "choice", "grammar", "json_object", "structural_tag")


@dataclasses.dataclass(frozen=True, kw_only=True)
class StructuredOutputsParams:
    """Constrains an output. Exactly one of the first six attributes must be set.

    Attributes:
        json: a JSON schema, as a dict or as text.
        regex: a regular expression that the whole output matches.
        choice: the output is one of these strings.
        grammar: a context-free grammar in Lark syntax (start rule `start`) or in GBNF (start rule
            `root`).
        json_object: whether the output is any JSON object.
        structural_tag: free text with embedded structures, as a dict or as JSON text: "triggers", a
            list of strings, and "structures", a list of {"begin", "schema", "end"}. After a
            trigger, the text must continue as one of the structures that begin with it.
        disable_any_whitespace: JSON without whitespace between tokens.
        disable_additional_properties: objects have only the properties that the schema names.
        whitespace_pattern: a regular expression for the whitespace between JSON tokens.

    Raises:
        ValueError: not exactly one is given, or a value has the wrong type; one error lists all
            reasons.
    """

    json: str | dict[str, Any] | None = None
    regex: str | None = None
    choice: tuple[str, ...] | list[str] | None = None
    grammar: str | None = None
    json_object: bool | None = None
    structural_tag: str | dict[str, Any] | None = None
    disable_any_whitespace: bool = False
    disable_additional_properties: bool = False
    whitespace_pattern: str | None = None

    def __post_init__(self) -> None:
        reasons = []

        def want(name: str, types: Any, wanted: str) -> None:
            value = getattr(self, name)
            if value is not None and not isinstance(value, types):
                reasons.append(f"{name} is {value!r}, wanted {wanted}")

        given = [name for name in _KINDS if getattr(self, name) not in (None, False)]
        if len(given) != 1:
            found = ", ".join(given) or "none"
            reasons.append(f"wanted one of {', '.join(_KINDS)}; got {found}")
        for name in ("json", "structural_tag"):
            want(name, str | dict, "a dict or its JSON text")
        for name in ("regex", "grammar", "whitespace_pattern"):
            want(name, str, "a str")
        for name in ("json_object", "disable_any_whitespace", "disable_additional_properties"):
            want(name, bool, "True or False")
        if self.choice is not None:
            texts = isinstance(self.choice, tuple | list) and len(self.choice) > 0
            if texts and all(isinstance(text, str) and text for text in self.choice):
                object.__setattr__(self, "choice", tuple(self.choice))
            else:
                reasons.append(f"choice is {self.choice!r}, wanted strings that are not empty")
        raise_all("StructuredOutputsParams", reasons)
