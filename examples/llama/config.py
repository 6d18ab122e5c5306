"""Reads a Hugging Face Llama `config.json`.

Only `model_type: "llama"` is accepted: a file of another architecture may look much the same and
still need another forward pass. Settings that the model code does not support raise an error here,
before any weight is read.
"""

import dataclasses
import json
import pathlib
from typing import Any

import numpy as np

__all__ = ["ConfigError", "LlamaConfig", "RopeConfig", "load_config", "parse_config"]

_DTYPES = ("float32", "bfloat16", "float16")


class ConfigError(ValueError):
    """A `config.json` that is missing, malformed, or describes a model this package does not
    run."""


@dataclasses.dataclass(frozen=True)
class RopeConfig:
    """Rotary position embedding.

    `kind` is "default", "linear" or "llama3"; all fields except `theta` belong to the scaled
    kinds.
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


@dataclasses.dataclass(frozen=True)
class LlamaConfig:
    """The settings of a `config.json` that the model code needs; names follow Hugging Face."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    rms_norm_eps: float = 1e-6
    max_position_embeddings: int = 2048
    tie_word_embeddings: bool = False
    attention_bias: bool = False
    mlp_bias: bool = False
    rope: RopeConfig = RopeConfig()
    bos_token_id: int | None = None
    eos_token_ids: tuple[int, ...] = ()
    dtype: str = "float32"

    def to_json(self) -> dict[str, Any]:
        """The `config.json` of this model, with the older names that every version of transformers
        reads.
        """
        scaling: dict[str, Any] = {}
        if self.rope.kind != "default":
            scaling = {"rope_type": self.rope.kind, "factor": self.rope.factor}
        if self.rope.kind == "llama3":
            fields = ("low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
            scaling |= {name: getattr(self.rope, name) for name in fields}
        eos: int | list[int] | None = list(self.eos_token_ids)
        if len(self.eos_token_ids) <= 1:
            eos = next(iter(self.eos_token_ids), None)
        values = dataclasses.asdict(self)
        for name in ("rope", "eos_token_ids", "dtype"):
            del values[name]
        return {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "hidden_act": "silu",
            **values,
            "rope_theta": self.rope.theta,
            "rope_scaling": scaling or None,
            "eos_token_id": eos,
            "torch_dtype": self.dtype,
        }


def load_config(path: str | pathlib.Path) -> LlamaConfig:
    """Reads `config.json` in the directory `path`.

    Raises:
      ConfigError: No such file, not JSON, another architecture, or a setting that the model does
        not support.
    """
    file = pathlib.Path(path) / "config.json"
    if not file.is_file():
        raise ConfigError(
            f"no config.json in {path}: --checkpoint wants a Hugging Face model directory"
        )
    values = _read_object(file)
    try:
        config = parse_config(values)
    except ConfigError as error:
        raise ConfigError(f"{file}: {error}") from error
    # Chat models often name the end of a turn only here.
    generation = file.with_name("generation_config.json")
    if generation.is_file():
        more = _read_object(generation).get("eos_token_id")
        ids = dict.fromkeys((*config.eos_token_ids, *_ids(more)))
        config = dataclasses.replace(config, eos_token_ids=tuple(ids))
    return config


def _read_object(file: pathlib.Path) -> dict[str, Any]:
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ConfigError(f"{file} is not JSON: {error}") from error
    if not isinstance(values, dict):
        raise ConfigError(f"{file} holds a JSON {type(values).__name__}, expected an object")
    return values


def parse_config(values: dict[str, Any]) -> LlamaConfig:
    """The configuration in the JSON object `values`; raises ConfigError as `load_config` does."""
    kind = values.get("model_type")
    if kind != "llama":
        raise ConfigError(
            f"model_type is {kind!r}; this example runs the Llama architecture only ('llama')"
        )
    if values.get("quantization_config"):
        method = values["quantization_config"].get("quant_method", "unknown")
        raise ConfigError(
            f"quantised weights ({method}) are not supported; use the float checkpoint"
        )
    activation = values.get("hidden_act", "silu")
    if activation not in ("silu", "swish"):
        raise ConfigError(f"hidden_act is {activation!r}; only 'silu' is supported")

    heads = _integer(values, "num_attention_heads")
    hidden = _integer(values, "hidden_size")
    kv_heads = _integer(values, "num_key_value_heads", heads)
    if heads % kv_heads:
        raise ConfigError(
            f"num_attention_heads {heads} is not a multiple of num_key_value_heads {kv_heads}"
        )
    if values.get("head_dim") is None and hidden % heads:
        raise ConfigError(
            f"hidden_size {hidden} is not a multiple of num_attention_heads {heads} "
            "and no head_dim is given"
        )
    head_dim = _integer(values, "head_dim", hidden // heads)
    if head_dim % 2:
        raise ConfigError(f"head_dim {head_dim} is odd; rotary embeddings need an even one")
    max_positions = _integer(values, "max_position_embeddings", 2048)
    dtype = values.get("dtype") or values.get("torch_dtype") or "float32"
    if dtype not in _DTYPES:
        raise ConfigError(f"dtype is {dtype!r}, expected one of {', '.join(_DTYPES)}")

    return LlamaConfig(
        vocab_size=_integer(values, "vocab_size"),
        hidden_size=hidden,
        intermediate_size=_integer(values, "intermediate_size"),
        num_hidden_layers=_integer(values, "num_hidden_layers"),
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=head_dim,
        rms_norm_eps=_number(values, "rms_norm_eps", 1e-6),
        max_position_embeddings=max_positions,
        tie_word_embeddings=bool(values.get("tie_word_embeddings", False)),
        attention_bias=bool(values.get("attention_bias", False)),
        mlp_bias=bool(values.get("mlp_bias", False)),
        rope=_rope(values, max_positions),
        bos_token_id=values.get("bos_token_id"),
        eos_token_ids=_ids(values.get("eos_token_id")),
        dtype=dtype,
    )


def _integer(values: dict[str, Any], name: str, default: int | None = None) -> int:
    value = values.get(name)
    value = default if value is None else value
    if value is None:
        raise ConfigError(f"{name} is missing")
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ConfigError(f"{name} is {value!r}, expected a positive integer")
    return value


def _number(values: dict[str, Any], name: str, default: float | None = None) -> float:
    value = values.get(name, default)
    if isinstance(value, bool) or not isinstance(value, (int, float)) or value <= 0:
        raise ConfigError(f"{name} is {value!r}, expected a positive number")
    return float(value)


def _ids(value: list[int] | int | None) -> tuple[int, ...]:
    """Token ids that a configuration gives as one number, a list, or not at all."""
    if value is None:
        return ()
    return tuple(value) if isinstance(value, list) else (value,)


def _rope(values: dict[str, Any], max_positions: int) -> RopeConfig:
    """Rope settings: `rope_parameters` (transformers 5), or `rope_theta` with `rope_scaling`
    (before it).
    """
    settings: dict[str, Any] = {}
    for name in ("rope_scaling", "rope_parameters"):
        given = values.get(name) or {}
        if not isinstance(given, dict):
            raise ConfigError(f"{name} is {given!r}, expected an object")
        settings |= given
    theta = _number(values | settings, "rope_theta", 10000.0)
    kind = settings.get("rope_type", settings.get("type", "default"))
    if kind == "default":
        return RopeConfig(theta)
    if kind not in ("linear", "llama3"):
        raise ConfigError(
            f"rope scaling {kind!r} is not supported; there are 'default', 'linear' and 'llama3'"
        )
    needed = ["factor"]
    if kind == "llama3":
        needed += ["low_freq_factor", "high_freq_factor"]
    missing = [name for name in needed if name not in settings]
    if missing:
        raise ConfigError(f"rope scaling {kind!r} lacks {', '.join(missing)}")
    scaled = RopeConfig(theta, kind, factor=_number(settings, "factor"))
    if kind == "linear":
        return scaled
    low, high = (_number(settings, f"{end}_freq_factor") for end in ("low", "high"))
    if high <= low:
        raise ConfigError(
            f"rope scaling: high_freq_factor {high} must exceed low_freq_factor {low}"
        )
    return dataclasses.replace(
        scaled,
        low_freq_factor=low,
        high_freq_factor=high,
        original_max_position_embeddings=_integer(
            settings, "original_max_position_embeddings", max_positions
        ),
    )
