"""Reads the `config.json` of a Hugging Face model of a Llama-like architecture.

Only the families of families.py are accepted: the file of another architecture may look similar but
need another forward pass. Every setting that changes the forward pass is either honoured or refused
before any weight is read. Keys that only concern training or other programs are ignored.
"""

import dataclasses
import pathlib
from collections.abc import Mapping
from typing import Any

from .families import (
    FAMILIES,
    Family,
    family_of,
    layer_settings,
    layer_windows,
    rotated_layers,
)
from .rope import RopeConfig, parse_rope
from .values import ConfigError, boolean, integer, number, read_object, same, shown, token_ids

__all__ = ["ConfigError", "LlamaConfig", "RopeConfig", "load_config", "parse_config"]

_DTYPES = ("float32", "bfloat16", "float16")
_MOST_LAYERS = 4096  # so that a damaged number does not build a model of millions of layers
# Settings of other architectures, and the values at which they have no effect. Some converted
# models need them although their model_type does not.
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "add_cross_attention": (False,),
    "alibi": (False,),
    "attention_multiplier": (),
    "attn_logit_softcapping": (),
    "clip_qkv": (),
    "embedding_multiplier": (1,),
    "final_logit_softcapping": (),
    "is_encoder_decoder": (False,),
    "logit_scale": (1,),
    "logits_scaling": (1,),
    "num_experts": (0, 1),
    "num_local_experts": (0, 1),
    "pruned_heads": ({},),
    "qk_layernorm": (False,),
    "qk_norm": (False,),
    "residual_multiplier": (1,),
    "scale_depth": (),
    "scale_emb": (1,),
    "use_parallel_residual": (False,),
    "use_qk_norm": (False,),
}


@dataclasses.dataclass(frozen=True)
class LlamaConfig:
    """The part of a `config.json` that the model code needs; most names follow Hugging Face.

    `attention_bias` is for q, k and v. `windows` holds the sliding window of each layer (None: the
    entire sequence); if it is empty, no layer has one. `rotated` holds whether each layer has a
    rotary embedding; if it is empty, all layers have one.
    """

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
    rope: RopeConfig = dataclasses.field(default_factory=RopeConfig)
    model_type: str = "llama"
    windows: tuple[int | None, ...] = ()
    rotated: tuple[bool, ...] = ()
    bos_token_id: int | None = None
    eos_token_ids: tuple[int, ...] = ()
    dtype: str = "float32"

    @property
    def family(self) -> Family:
        """The family of this model's architecture."""
        return FAMILIES[self.model_type]

    @property
    def longest_sequence(self) -> int:
        """The most tokens of a sequence: the trained positions, extended by RoPE scaling."""
        return self.rope.longest_sequence(self.max_position_embeddings)

    def window(self, layer: int) -> int | None:
        """The sliding window of a layer; None if it attends to the entire sequence."""
        return self.windows[layer] if self.windows else None

    def rotates(self, layer: int) -> bool:
        """Whether a layer has a rotary embedding."""
        return self.rotated[layer] if self.rotated else True

    def to_json(self) -> dict[str, Any]:
        """The `config.json` of this model, with the older names of keys, which every version of
        transformers reads.
        """
        eos: int | list[int] | None = list(self.eos_token_ids)
        if len(self.eos_token_ids) <= 1:
            eos = next(iter(self.eos_token_ids), None)
        values = dataclasses.asdict(self)
        for name in ("rope", "eos_token_ids", "dtype", "windows", "rotated"):
            del values[name]
        for name in ("attention_bias", "mlp_bias"):
            if getattr(self.family, name) is not None:
                del values[name]  # the architecture has no such setting
        return {
            "architectures": [self.family.architecture],
            "hidden_act": "silu",
            **values,
            **layer_settings(self.family, self.windows, self.rotated, self.num_hidden_layers),
            "rope_theta": self.rope.theta,
            "rope_scaling": self.rope.to_json() or None,
            "eos_token_id": eos,
            "torch_dtype": self.dtype,
        }


def load_config(path: str | pathlib.Path) -> LlamaConfig:
    """Reads `config.json` in the directory `path`.

    Raises:
      ConfigError: No such file, not JSON, another architecture, or a setting that the model does
        not support.
    """
    path = pathlib.Path(path)
    file = path / "config.json"
    if not file.is_file():
        raise ConfigError(_no_config(path))
    try:
        config = parse_config(read_object(file))
    except ConfigError as error:
        raise ConfigError(_about(file, error)) from error
    # Chat models often have the end-of-turn token only in this file.
    generation = file.with_name("generation_config.json")
    if generation.is_file():
        try:
            more = token_ids(read_object(generation), "eos_token_id", config.vocab_size)
        except ConfigError as error:
            raise ConfigError(_about(generation, error)) from error
        ids = dict.fromkeys((*config.eos_token_ids, *more))
        config = dataclasses.replace(config, eos_token_ids=tuple(ids))
    return config


def _about(file: pathlib.Path, error: ConfigError) -> str:
    text = str(error)
    return text if text.startswith(str(file)) else f"{file}: {text}"


def _no_config(path: pathlib.Path) -> str:
    """The error for a path without a config.json, with a hint if it looks like the name of a model
    on the Hub."""
    problem = f"no config.json in {path}"
    if not path.is_dir():
        problem += ", which is not a directory" if path.exists() else ", which does not exist"
    hub_name = not path.exists() and not path.is_absolute() and len(path.parts) == 2
    model = str(path) if hub_name else "ORG/NAME"
    folder = path.name if hub_name else "NAME"
    return (
        f"{problem}: --checkpoint wants a Hugging Face model directory; to download a model from "
        f"the Hub, run `hf download {model} --local-dir {folder}` (pip install huggingface_hub) "
        f"and pass --checkpoint {folder}"
    )


def parse_config(values: Mapping[str, Any]) -> LlamaConfig:
    """The configuration in the JSON object `values`; raises ConfigError as `load_config` does."""
    family = family_of(values)
    _refuse_other_models(values)
    defaults = family.defaults
    heads = integer(values, "num_attention_heads")
    hidden = integer(values, "hidden_size")
    kv_default = min(defaults.get("num_key_value_heads", heads), heads)
    kv_heads = integer(values, "num_key_value_heads", kv_default)
    if heads % kv_heads:
        raise ConfigError(
            f"num_attention_heads {heads} is not a multiple of num_key_value_heads {kv_heads}"
        )
    head_default = defaults.get("head_dim", hidden // heads)
    if values.get("head_dim") is None and "head_dim" not in defaults and hidden % heads:
        raise ConfigError(
            f"hidden_size {hidden} is not a multiple of num_attention_heads {heads} "
            "and no head_dim is given"
        )
    head_dim = integer(values, "head_dim", head_default)
    if head_dim % 2:
        raise ConfigError(f"head_dim {head_dim} is odd; rotary embeddings need an even one")
    max_positions = integer(
        values, "max_position_embeddings", defaults.get("max_position_embeddings", 2048)
    )
    layers = integer(values, "num_hidden_layers", most=_MOST_LAYERS)
    vocab_size = integer(values, "vocab_size")
    bos = values.get("bos_token_id")
    if isinstance(bos, list):
        raise ConfigError(f"bos_token_id is {shown(bos)}, expected one token id")
    token_ids(values, "bos_token_id", vocab_size)

    return LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=hidden,
        intermediate_size=integer(values, "intermediate_size"),
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=head_dim,
        rms_norm_eps=number(values, "rms_norm_eps", 1e-6),
        max_position_embeddings=max_positions,
        tie_word_embeddings=boolean(
            values, "tie_word_embeddings", defaults.get("tie_word_embeddings", False)
        ),
        attention_bias=_bias(family, values, "attention_bias"),
        mlp_bias=_bias(family, values, "mlp_bias"),
        rope=parse_rope(values, max_positions, defaults.get("rope_theta", 10000.0)),
        model_type=family.model_type,
        windows=layer_windows(family, values, layers, max_positions),
        rotated=rotated_layers(family, values, layers),
        bos_token_id=bos,
        eos_token_ids=token_ids(values, "eos_token_id", vocab_size),
        dtype=_dtype(values),
    )


def _bias(family: Family, values: Mapping[str, Any], name: str) -> bool:
    """Whether projections have a bias; fixed in some architectures, else set by `config.json`."""
    fixed = getattr(family, name)
    given = boolean(values, name, bool(fixed))
    if fixed is not None and given != fixed:
        raise ConfigError(
            f"{name} is {shown(given)}; in the architecture {family.model_type} it is {fixed}"
        )
    return given


def _refuse_other_models(values: Mapping[str, Any]) -> None:
    """Refuses models that need another forward pass or another reader of weights."""
    for name in ("quantization_config", "compression_config"):
        given = values.get(name)
        if given is None or given == {}:
            continue
        method = given.get("quant_method", "unknown") if isinstance(given, dict) else given
        method = method if isinstance(method, str) else shown(method)
        raise ConfigError(
            f"quantized weights ({method}) are not supported; use the float checkpoint"
        )
    activation = values.get("hidden_act")
    if activation not in (None, "silu", "swish"):
        raise ConfigError(f"hidden_act is {shown(activation)}; only 'silu' is supported")
    for name, neutral in _NEUTRAL.items():
        value = values.get(name)
        if value is not None and not any(same(value, item) for item in neutral):
            raise ConfigError(
                f"{name} is {shown(value)}; Llama's shape has no such setting, and this example "
                "would ignore it"
            )


def _dtype(values: Mapping[str, Any]) -> str:
    """`dtype` (transformers 5) or `torch_dtype` (earlier versions); float32 without either."""
    for name in ("dtype", "torch_dtype"):
        value = values.get(name)
        if value is not None:
            if value not in _DTYPES:
                raise ConfigError(f"{name} is {shown(value)}, expected one of {', '.join(_DTYPES)}")
            return str(value)
    return "float32"
