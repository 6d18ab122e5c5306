"""Rotary position embedding: its settings, read from a `config.json`, and its frequencies.

A model with an ignored RoPE setting generates good text for a few tokens and then drifts. Every key
is therefore either honoured or refused.

With dynamic NTK scaling, the frequencies depend on the length of the sequence after the step, once
that exceeds the trained length. Keys are cached after rotation and keep the frequencies of the step
that computed them, as in transformers. The text of such a sequence may therefore depend on how its
prompt is split into steps; with the same split it equals that of transformers.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from .values import ConfigError, boolean, integer, number, same, shown

__all__ = ["RopeConfig", "parse_rope"]

_LENGTH = "original_max_position_embeddings"
# The keys that are honoured for each kind.
_HONOURED = {
    "default": (),
    "linear": ("factor",),
    "dynamic": ("factor",),
    "yarn": (
        "factor",
        "attention_factor",
        "beta_fast",
        "beta_slow",
        "mscale",
        "mscale_all_dim",
        "truncate",
        _LENGTH,
    ),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", _LENGTH),
}
_REQUIRED = ("factor", "low_freq_factor", "high_freq_factor")
# Keys, and the values at which they have no effect for any kind.
_NEUTRAL = {"partial_rotary_factor": 1.0, "attention_factor": 1.0, "rope_interleaved": False}
_NAMES = ("rope_theta", "rope_type", "type")
# Keys of a config.json with "rope" in their name that are read elsewhere.
_TOP_LEVEL = (
    "rope_theta",
    "rope_scaling",
    "rope_parameters",
    "no_rope_layers",
    "no_rope_layer_interval",
)


@dataclasses.dataclass(frozen=True)
class RopeConfig:
    """Rotary position embedding.

    `kind` is "default", "linear", "dynamic", "yarn" or "llama3"; the fields after it are for the
    scaled kinds. Queries and keys are multiplied by `attention_factor`, which only yarn sets.
    """

    theta: float = 10000.0
    kind: str = "default"
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position_embeddings: int = 8192
    attention_factor: float = 1.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True

    def inverse_frequencies(self, head_dim: int) -> np.ndarray:
        """Angles per position, float32 `[head_dim / 2]`; with dynamic scaling, those for sequences
        up to the trained length.

        "llama3" is the rule of Meta's Llama 3.1: long wavelengths are stretched by `factor`, short
        ones are unchanged, and those in between are interpolated. "yarn" interpolates by the index
        of the dimension.
        """
        frequencies = self.theta ** (-np.arange(0, head_dim, 2, dtype=np.float64) / head_dim)
        if self.kind == "linear":
            frequencies = frequencies / self.factor
        elif self.kind == "llama3":
            turns = self.original_max_position_embeddings * frequencies / (2 * np.pi)
            span = self.high_freq_factor - self.low_freq_factor
            keep = np.clip((turns - self.low_freq_factor) / span, 0.0, 1.0)
            frequencies = frequencies * (keep + (1.0 - keep) / self.factor)
        elif self.kind == "yarn":
            low, high = (
                self._dimension(turns, head_dim) for turns in (self.beta_fast, self.beta_slow)
            )
            if self.truncate:
                low, high = math.floor(low), math.ceil(high)
            low, high = max(low, 0), min(high, head_dim - 1)
            span = high - low if high != low else 0.001
            stretched = np.clip((np.arange(head_dim // 2) - low) / span, 0.0, 1.0)
            frequencies = frequencies * (1.0 - stretched + stretched / self.factor)
        return frequencies.astype(np.float32)

    def angles(self, positions: jax.Array, lengths: jax.Array | None, head_dim: int) -> jax.Array:
        """Angles of tokens, float32 `[T, 1, head_dim / 2]`.

        Args:
          positions: int32 `[T]`.
          lengths: int32 `[T]`, the length of each token's sequence after this step; used only by
            dynamic scaling.
          head_dim: Size of a head.
        """
        frequencies = jnp.asarray(self.inverse_frequencies(head_dim))[None, None]
        if self.kind == "dynamic":
            assert lengths is not None
            trained = self.original_max_position_embeddings
            longer = jnp.maximum(lengths, trained).astype(jnp.float32) / trained
            # theta * stretch ** (d / (d - 2)), as a factor for each frequency: 1 up to `trained`.
            stretch = (self.factor * longer - (self.factor - 1.0))[:, None, None]
            powers = np.arange(0, head_dim, 2, dtype=np.float32) / max(head_dim - 2, 1)
            frequencies = frequencies * stretch ** -powers[None, None]
        return positions.astype(jnp.float32)[:, None, None] * frequencies

    def longest_sequence(self, max_positions: int) -> int:
        """The most tokens of a sequence, given the model's `max_position_embeddings`."""
        if self.kind in ("linear", "dynamic"):
            return max(max_positions, int(max_positions * self.factor))
        if self.kind == "yarn":
            return max(max_positions, int(self.original_max_position_embeddings * self.factor))
        return max_positions

    def to_json(self) -> dict[str, Any]:
        """The `rope_scaling` object of a `config.json`; empty for the default kind."""
        if self.kind == "default":
            return {}
        # mscale and mscale_all_dim are included in attention_factor.
        honoured = [name for name in _HONOURED[self.kind] if hasattr(self, name)]
        return {"rope_type": self.kind} | {name: getattr(self, name) for name in honoured}

    def _dimension(self, turns: float, head_dim: int) -> float:
        """The dimension whose angle makes `turns` turns over the trained length (yarn)."""
        length = self.original_max_position_embeddings / (turns * 2 * math.pi)
        return head_dim * math.log(length) / (2 * math.log(self.theta))


def parse_rope(
    values: Mapping[str, Any], max_positions: int, default_theta: float = 10000.0
) -> RopeConfig:
    """Parses the settings of a `config.json`: `rope_parameters` (transformers 5), or `rope_theta`
    with `rope_scaling` (earlier versions).

    Raises:
      ConfigError: An unsupported kind, or a missing, malformed or unsupported setting.
    """
    settings = _settings(values)
    kind = _kind(settings)
    theta = number(settings, "rope_theta", number(values, "rope_theta", default_theta))
    missing = [name for name in _HONOURED[kind] if name in _REQUIRED and name not in settings]
    if missing:
        raise ConfigError(f"rope scaling {kind!r} lacks {', '.join(missing)}")
    for name, value in settings.items():
        if name in _NAMES or name in _HONOURED[kind]:
            continue
        if name == _LENGTH:
            integer(settings, name)  # the trained length, for information; few kinds use it
        elif name == "factor" and kind == "default" and same(value, 1.0):
            continue
        elif name not in _NEUTRAL or not same(value, _NEUTRAL[name]):
            raise ConfigError(f"rope setting {name} = {shown(value)} is not supported for {kind!r}")
    if kind == "default":
        return RopeConfig(theta)
    scaled = RopeConfig(theta, kind, factor=number(settings, "factor"))
    if kind == "linear":
        return scaled
    # For dynamic scaling, transformers uses max_position_embeddings even if the other key is given.
    known = {} if kind == "dynamic" else settings
    scaled = dataclasses.replace(
        scaled, original_max_position_embeddings=integer(known, _LENGTH, max_positions)
    )
    if kind == "yarn":
        return _yarn(scaled, settings)
    if kind == "llama3":
        low, high = (number(settings, f"{end}_freq_factor") for end in ("low", "high"))
        if high <= low:
            raise ConfigError(
                f"rope scaling: high_freq_factor {high} must exceed low_freq_factor {low}"
            )
        scaled = dataclasses.replace(scaled, low_freq_factor=low, high_freq_factor=high)
    return scaled


def _yarn(scaled: RopeConfig, settings: Mapping[str, Any]) -> RopeConfig:
    """Parses the settings of yarn; the attention factor is computed from others if not given."""
    if scaled.theta <= 1.0:
        raise ConfigError(f"rope_theta is {scaled.theta}; yarn needs one above 1")

    def growth(scale: float) -> float:
        return 1.0 if scaled.factor <= 1 else 0.1 * scale * math.log(scaled.factor) + 1.0

    attention = growth(1.0)
    scales = [number(settings, name, 1.0) for name in ("mscale", "mscale_all_dim")]
    if "mscale" in settings and "mscale_all_dim" in settings:
        attention = growth(scales[0]) / growth(scales[1])
    fast, slow = number(settings, "beta_fast", 32.0), number(settings, "beta_slow", 1.0)
    if fast < slow:
        raise ConfigError(f"rope scaling: beta_fast {fast} must not be below beta_slow {slow}")
    return dataclasses.replace(
        scaled,
        attention_factor=number(settings, "attention_factor", attention),
        beta_fast=fast,
        beta_slow=slow,
        truncate=boolean(settings, "truncate", True),
    )


def _settings(values: Mapping[str, Any]) -> dict[str, Any]:
    """Merges all settings into one dictionary, without nulls; refuses contradicting ones."""
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
    # Settings outside these objects, such as partial_rotary_factor and rope_interleaved.
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
            f"rope scaling {shown(kind)} is not supported; there are "
            f"{', '.join(map(repr, _HONOURED))}"
        )
    return kind
