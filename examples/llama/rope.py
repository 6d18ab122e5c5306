"""Rotary position embedding: its settings, read from a `config.json`, and its frequencies.

A setting of RoPE that is silently ignored gives a model that reads well for a few tokens and then
drifts. Every key is therefore honoured or refused.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np

from .values import ConfigError, integer, number, same, shown

__all__ = ["RopeConfig", "parse_rope"]

# The keys that each kind honours.
_HONOURED = {
    "default": (),
    "linear": ("factor",),
    "llama3": (
        "factor",
        "low_freq_factor",
        "high_freq_factor",
        "original_max_position_embeddings",
    ),
}
# Keys that change nothing at this value, for every kind.
_NEUTRAL = {"partial_rotary_factor": 1.0, "attention_factor": 1.0, "rope_interleaved": False}
_NAMES = ("rope_theta", "rope_type", "type")
_TOP_LEVEL = ("rope_theta", "rope_scaling", "rope_parameters")


@dataclasses.dataclass(frozen=True)
class RopeConfig:
    """Rotary position embedding.

    `kind` is "default", "linear" or "llama3"; the fields after it belong to the scaled kinds.
    """

    theta: float = 10000.0
    kind: str = "default"
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position_embeddings: int = 8192

    def inverse_frequencies(self, head_dim: int) -> np.ndarray:
        """Angles per position, float32 `[head_dim / 2]`.

        "llama3" is the rule of Meta's Llama 3.1: long wavelengths are stretched by `factor`, short
        ones are kept, and those between are blended.
        """
        frequencies = self.theta ** (-np.arange(0, head_dim, 2, dtype=np.float64) / head_dim)
        if self.kind == "linear":
            frequencies = frequencies / self.factor
        elif self.kind == "llama3":
            turns = self.original_max_position_embeddings * frequencies / (2 * np.pi)
            span = self.high_freq_factor - self.low_freq_factor
            keep = np.clip((turns - self.low_freq_factor) / span, 0.0, 1.0)
            frequencies = frequencies * (keep + (1.0 - keep) / self.factor)
        return frequencies.astype(np.float32)


def parse_rope(values: Mapping[str, Any], max_positions: int) -> RopeConfig:
    """The settings in a `config.json`: `rope_parameters` (transformers 5), or `rope_theta` with
    `rope_scaling` (earlier versions).

    Raises:
      ConfigError: An unsupported kind, a missing or malformed setting, or one that is not honoured.
    """
    settings = _settings(values)
    kind = _kind(settings)
    theta = number(settings, "rope_theta", number(values, "rope_theta", 10000.0))
    missing = [name for name in _HONOURED[kind] if name not in settings and name.endswith("factor")]
    if missing:
        raise ConfigError(f"rope scaling {kind!r} lacks {', '.join(missing)}")
    for name, value in settings.items():
        if name in _NAMES or name in _HONOURED[kind]:
            continue
        if name == "original_max_position_embeddings":
            integer(settings, name)  # a record of the training length; only llama3 computes with it
        elif name == "factor" and kind == "default" and same(value, 1.0):
            continue
        elif name not in _NEUTRAL or not same(value, _NEUTRAL[name]):
            raise ConfigError(f"rope setting {name} = {shown(value)} is not supported for {kind!r}")
    if kind == "default":
        return RopeConfig(theta)
    scaled = RopeConfig(theta, kind, factor=number(settings, "factor"))
    if kind == "linear":
        return scaled
    low, high = (number(settings, f"{end}_freq_factor") for end in ("low", "high"))
    if high <= low:
        raise ConfigError(
            f"rope scaling: high_freq_factor {high} must exceed low_freq_factor {low}"
        )
    return dataclasses.replace(
        scaled,
        low_freq_factor=low,
        high_freq_factor=high,
        original_max_position_embeddings=integer(
            settings, "original_max_position_embeddings", max_positions
        ),
    )


def _settings(values: Mapping[str, Any]) -> dict[str, Any]:
    """All settings in one dictionary, without nulls; refuses two that contradict each other."""
    settings: dict[str, Any] = {}

    def add(name: str, value: Any, origin: str) -> None:
        if value is None:
            return
        if name in settings and not same(settings[name], value):
            raise ConfigError(
                f"{name} is {shown(settings[name])} and, in {origin}, {shown(value)}: "
                "they contradict each other"
            )
        settings[name] = value

    for origin in ("rope_scaling", "rope_parameters"):
        given = values.get(origin)
        if given is not None and not isinstance(given, dict):
            raise ConfigError(f"{origin} is {shown(given)}, expected an object")
        for name, value in (given or {}).items():
            add(name, value, origin)
    # Settings beside those objects, such as partial_rotary_factor and rope_interleaved.
    for name, value in values.items():
        at_top = name in ("original_max_position_embeddings", "rotary_pct")
        if at_top or (("rope" in name or "rotary" in name) and name not in _TOP_LEVEL):
            add(name, value, "config.json")
    if "rotary_pct" in settings:
        add("partial_rotary_factor", settings.pop("rotary_pct"), "rotary_pct")
    return settings


def _kind(settings: Mapping[str, Any]) -> str:
    names = [settings[key] for key in ("rope_type", "type") if key in settings]
    if len(names) == 2 and names[0] != names[1]:
        raise ConfigError(
            f"rope_type is {shown(names[0])}, but type is {shown(names[1])}: "
            "they contradict each other"
        )
    kind = names[0] if names else "default"
    if not isinstance(kind, str) or kind not in _HONOURED:
        raise ConfigError(
            f"rope scaling {shown(kind)} is not supported; there are 'default', 'linear' and "
            "'llama3'"
        )
    return kind
