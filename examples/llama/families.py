"""The model families with a Llama-like architecture, and the differences between them.

All have RMS norms, rotary embeddings, grouped-query attention and a gated MLP. They differ in
biases, in norms of queries and keys, in which layers have a sliding window or no rotation, and in
the defaults of keys missing from `config.json`. Other families need another forward pass and are
refused.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

from .values import ConfigError, boolean, integer, shown

__all__ = [
    "FAMILIES",
    "Family",
    "family_of",
    "layer_settings",
    "layer_windows",
    "rotated_layers",
]

_FULL, _SLIDING = "full_attention", "sliding_attention"


@dataclasses.dataclass(frozen=True)
class Family:
    """One architecture.

    Attributes:
      model_type: Its name in `config.json`.
      architecture: The name of its class in transformers.
      models: Well-known models of the family.
      defaults: Defaults of keys that a `config.json` may omit, if they differ from Llama's.
      attention_bias: Whether q, k and v have a bias; None if `config.json` decides.
      mlp_bias: The same for the MLP.
      output_bias: Whether the output projection has a bias if q, k and v have one.
      qk_norm: Whether queries and keys are normalized before the rotation.
    """

    model_type: str
    architecture: str
    models: str
    defaults: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    attention_bias: bool | None = None
    mlp_bias: bool | None = None
    output_bias: bool = True
    qk_norm: bool = False


FAMILIES: dict[str, Family] = {
    family.model_type: family
    for family in (
        Family("llama", "LlamaForCausalLM", "Llama, SmolLM2"),
        Family(
            "mistral",
            "MistralForCausalLM",
            "Mistral",
            {"num_key_value_heads": 8, "max_position_embeddings": 131072, "sliding_window": 4096},
            attention_bias=False,
            mlp_bias=False,
        ),
        Family(
            "qwen2",
            "Qwen2ForCausalLM",
            "Qwen2, Qwen2.5",
            {"num_key_value_heads": 32, "max_position_embeddings": 32768, "sliding_window": 4096},
            attention_bias=True,
            mlp_bias=False,
            output_bias=False,
        ),
        Family(
            "qwen3",
            "Qwen3ForCausalLM",
            "Qwen3",
            {
                "num_key_value_heads": 32,
                "max_position_embeddings": 32768,
                "sliding_window": 4096,
                "head_dim": 128,
            },
            mlp_bias=False,
            qk_norm=True,
        ),
        Family(
            "smollm3",
            "SmolLM3ForCausalLM",
            "SmolLM3",
            {
                "num_key_value_heads": 4,
                "max_position_embeddings": 32768,
                "rope_theta": 2e6,
                "tie_word_embeddings": True,
            },
        ),
    )
}
_ARCHITECTURES = {family.architecture.lower(): family for family in FAMILIES.values()}


def family_of(values: Mapping[str, Any]) -> Family:
    """The family named by `model_type`, or by `architectures` if there is no `model_type`.

    Raises:
      ConfigError: An unknown architecture, or the two contradict each other.
    """
    kind, classes = values.get("model_type"), values.get("architectures")
    if classes is not None and not isinstance(classes, list):
        raise ConfigError(f"architectures is {shown(classes)}, expected a list of class names")
    named = [_ARCHITECTURES.get(str(name).lower()) for name in classes or []]
    family = FAMILIES.get(kind) if isinstance(kind, str) else None
    if kind is None and named:
        family = named[0]
    # A class other than the family's usual one has other layers or another head.
    if family is not None and (not named or family in named):
        return family
    what = f"architectures is {shown(classes)}" if kind is None or family else ""
    what = what or f"model_type is {shown(kind)}"
    if kind is None and classes is None:
        what = "model_type is None"
    served = ", ".join(f"{each.model_type} ({each.models})" for each in FAMILIES.values())
    raise ConfigError(f"{what}; this example serves models of Llama's shape: {served}")


def layer_windows(
    family: Family, values: Mapping[str, Any], layers: int, max_positions: int
) -> tuple[int | None, ...]:
    """The sliding window of each layer, None for a layer that attends to the entire sequence; empty
    if no layer has a window.
    """
    if family.model_type == "llama":
        _refuse_window(values, layers, max_positions)
        return ()
    window = None
    if values.get("sliding_window", family.defaults.get("sliding_window")) is not None:
        window = integer(values, "sliding_window", family.defaults.get("sliding_window"))
    if family.model_type == "mistral":
        kinds = [_FULL if window is None else _SLIDING] * layers
        off = window is not None and not boolean(values, "use_sliding_window", True)
        if off or _layer_types(values, layers, kinds) != kinds:
            name = "use_sliding_window" if off else "layer_types"
            raise ConfigError(
                f"{name} is {shown(values[name])}; all layers of a Mistral have the window of "
                f"sliding_window, here {window}"
            )
    else:
        if not boolean(values, "use_sliding_window"):
            window = None
        if family.model_type == "smollm3":
            # The layers without rotation are those with a window.
            rotated = rotated_layers(family, values, layers) or (True,) * layers
            slides = [not rotates for rotates in rotated]
        else:
            first = integer(values, "max_window_layers", 28, least=0)
            slides = [index >= first for index in range(layers)]
        kinds = [_SLIDING if slide and window is not None else _FULL for slide in slides]
        kinds = _layer_types(values, layers, kinds)
    if window is None and _SLIDING in kinds:
        raise ConfigError(
            f"layer_types names {_SLIDING!r}, but use_sliding_window and sliding_window give no "
            "window"
        )
    windows = tuple(window if kind == _SLIDING else None for kind in kinds)
    return windows if _SLIDING in kinds else ()


def rotated_layers(family: Family, values: Mapping[str, Any], layers: int) -> tuple[bool, ...]:
    """Whether each layer has a rotary embedding; empty if all have one."""
    given = values.get("no_rope_layers")
    if family.model_type != "smollm3":
        if given not in (None, []):
            raise ConfigError(
                f"no_rope_layers is {shown(given)}; only SmolLM3 has layers without rotation"
            )
        return ()
    if given is None:
        interval = integer(values, "no_rope_layer_interval", 4)
        flags = [int((index + 1) % interval != 0) for index in range(layers)]
    elif (
        isinstance(given, list)
        and len(given) >= layers
        and all(isinstance(flag, int) and flag in (0, 1) for flag in given)
    ):
        flags = given[:layers]
    else:
        raise ConfigError(
            f"no_rope_layers is {shown(given)}, expected a 0 or a 1 for each of {layers} layers"
        )
    return () if all(flags) else tuple(bool(flag) for flag in flags)


def layer_settings(
    family: Family, windows: tuple[int | None, ...], rotated: tuple[bool, ...], layers: int
) -> dict[str, Any]:
    """The keys of `config.json` that `layer_windows` and `rotated_layers` read."""
    if family.model_type == "llama":
        return {}
    window = next((each for each in windows if each is not None), None)
    settings: dict[str, Any] = {"sliding_window": window}
    if family.model_type == "mistral":
        return settings
    settings["use_sliding_window"] = window is not None
    settings["layer_types"] = [_FULL if each is None else _SLIDING for each in windows]
    if not windows:
        settings["layer_types"] = [_FULL] * layers
    if family.model_type == "smollm3":
        settings["no_rope_layers"] = [int(flag) for flag in rotated or (True,) * layers]
    return settings


def _layer_types(values: Mapping[str, Any], layers: int, default: list[str]) -> list[str]:
    given = values.get("layer_types")
    if given is None:
        return default
    known = isinstance(given, list) and all(kind in (_FULL, _SLIDING) for kind in given)
    if not known or len(given) != layers:
        raise ConfigError(
            f"layer_types is {shown(given)}, expected {_FULL!r} or {_SLIDING!r} for each of "
            f"{layers} layers"
        )
    return list(given)


def _refuse_window(values: Mapping[str, Any], layers: int, max_positions: int) -> None:
    window = values.get("sliding_window")
    if window is None or values.get("use_sliding_window") is False:
        window = max_positions
    if _SLIDING in _layer_types(values, layers, []):
        raise ConfigError(
            f"layer_types is {shown(values['layer_types'])}; a Llama attends to the whole sequence"
        )
    if isinstance(window, bool) or not isinstance(window, int) or window < max_positions:
        raise ConfigError(
            f"sliding_window is {shown(window)}; a Llama attends to the whole sequence, and this "
            "example would ignore it"
        )
