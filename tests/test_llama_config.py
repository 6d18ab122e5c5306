"""Malformed or unsupported settings in a config.json are refused with their name and value,
whichever key they are under.
"""

from __future__ import annotations

import json
import pathlib
from typing import Any

import pytest
from llama.config import ConfigError, load_config, parse_config

_BASE: dict[str, Any] = {
    "model_type": "llama",
    "vocab_size": 128,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}
_LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
_NAN, _INFINITY = float("nan"), float("inf")
# Values that are wrong for a key of the given type.
_NO_INTEGERS = (True, 0, -2, 2.0, "2", [2], {}, 2**31, 10**400, _NAN)
_NO_NUMBERS = (True, 0, -1.0, "1e-5", [1e-5], {}, _NAN, _INFINITY, -_INFINITY, 1e39, 1e-46, 10**400)
_NO_BOOLEANS = (0, 1, "false", "true", "", [], {}, 0.0)
_NO_IDS = (True, -1, 128, 2**40, 1.0, "</s>", "", {}, [[1]], [1, "2"], [False], [-1], [5, 128])
_INTEGERS = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "max_position_embeddings",
)


def _refusal(values: dict[str, Any]) -> str:
    """Returns the error message, which must be one line that a terminal shows without scrolling."""
    with pytest.raises(ConfigError) as caught:
        parse_config(values)
    message = str(caught.value)
    assert "\n" not in message
    assert len(message) < 300
    return message


@pytest.mark.parametrize("name", _INTEGERS)
def test_integers(name: str) -> None:
    for value in _NO_INTEGERS:
        assert _refusal(_BASE | {name: value}).startswith(f"{name} is ")


def test_more_layers_than_any_model_has() -> None:
    message = _refusal(_BASE | {"num_hidden_layers": 10**6})
    assert message == "num_hidden_layers is 1000000, expected at most 4096"


def test_numbers() -> None:
    for value in _NO_NUMBERS:
        assert _refusal(_BASE | {"rms_norm_eps": value}).startswith("rms_norm_eps is ")
        assert _refusal(_BASE | {"rope_theta": value}).startswith("rope_theta is ")
        for name in ("rope_theta", "factor", "low_freq_factor", "high_freq_factor"):
            rope = {"rope_parameters": _LLAMA3 | {name: value}}
            assert _refusal(_BASE | rope).startswith(f"{name} is ")
    assert parse_config(_BASE | {"rms_norm_eps": None, "rope_theta": None}).rms_norm_eps == 1e-6


@pytest.mark.parametrize("name", ["tie_word_embeddings", "attention_bias", "mlp_bias"])
def test_booleans(name: str) -> None:
    for value in _NO_BOOLEANS:
        message = _refusal(_BASE | {name: value})
        assert message == f"{name} is {value!r}, expected true or false"
    for value, read in ((None, False), (False, False), (True, True)):
        assert getattr(parse_config(_BASE | {name: value}), name) is read


def test_token_ids(tmp_path: pathlib.Path) -> None:
    for name in ("eos_token_id", "bos_token_id"):
        for value in _NO_IDS:
            assert _refusal(_BASE | {name: value}).startswith(name)
    assert _refusal(_BASE | {"bos_token_id": [1]}) == "bos_token_id is [1], expected one token id"
    for value, ids in ((None, ()), (0, (0,)), ([3, 127, 3], (3, 127)), ([], ())):
        assert parse_config(_BASE | {"eos_token_id": value}).eos_token_ids == ids
    (tmp_path / "config.json").write_text(json.dumps(_BASE))
    for value in _NO_IDS:
        (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": value}))
        with pytest.raises(ConfigError, match=r"generation_config\.json: eos_token_id"):
            load_config(tmp_path)


@pytest.mark.parametrize("name", ["dtype", "torch_dtype"])
def test_dtypes(name: str) -> None:
    for value in ("", [], {}, 0, False, "int8", ["float32"]):
        assert _refusal(_BASE | {name: value}).startswith(f"{name} is {value!r}, expected one of")
    assert parse_config(_BASE | {name: "bfloat16"}).dtype == "bfloat16"


@pytest.mark.parametrize(
    "given", ["gptq", 4, True, ["awq"], {"quant_method": "awq"}, {"quant_method": 3}, {"bits": 4}]
)
def test_quantized_weights(given: object) -> None:
    for name in ("quantization_config", "compression_config"):
        assert "quantized weights (" in _refusal(_BASE | {name: given})
        assert parse_config(_BASE | {name: None}) == parse_config(_BASE)


@pytest.mark.parametrize(
    ("rope", "message"),
    [
        ({"rope_type": "longrope", "factor": 4.0}, "rope scaling 'longrope' is not supported"),
        ({"rope_type": "yarn"}, "rope scaling 'yarn' lacks factor"),
        ({"rope_type": "yarn", "factor": 4.0, "mscale": "1"}, "mscale is '1', expected a positive"),
        ({"rope_type": "yarn", "factor": 4.0, "truncate": 1}, "truncate is 1, expected true or"),
        ({"rope_type": "yarn", "factor": 4.0, "beta_fast": 0.5}, "beta_fast 0.5 must not be below"),
        ({"rope_type": "yarn", "factor": 4.0, "alpha": 2}, "rope setting alpha = 2"),
        ({"rope_type": "yarn", "factor": 4.0, "rope_theta": 1.0}, "rope_theta is 1.0; yarn needs"),
        ({"rope_type": "dynamic"}, "rope scaling 'dynamic' lacks factor"),
        ({"rope_type": "dynamic", "factor": 2.0, "alpha": 8}, "rope setting alpha = 8"),
        ({"rope_type": ["linear"]}, "rope scaling ['linear'] is not supported"),
        ({"type": "linear", "rope_type": "llama3"}, "rope_type is 'llama3', but type is 'linear'"),
        ({"type": "linear"}, "rope scaling 'linear' lacks factor"),
        ({"type": "linear", "factor": None}, "rope scaling 'linear' lacks factor"),
        ({"factor": 2.0}, "rope setting factor = 2.0 is not supported for 'default'"),
        ({"mrope_section": [2, 3]}, "rope setting mrope_section = [2, 3] is not supported"),
        ({"partial_rotary_factor": 0.5}, "rope setting partial_rotary_factor = 0.5"),
        (_LLAMA3 | {"attention_factor": 0.7}, "rope setting attention_factor = 0.7"),
        (_LLAMA3 | {"beta_fast": 32}, "rope setting beta_fast = 32 is not supported for 'llama3'"),
        ({"full_attention": {"rope_type": "default"}}, "rope setting full_attention = "),
        ({"original_max_position_embeddings": "64"}, "original_max_position_embeddings is '64'"),
    ],
)
def test_rope_settings_that_would_be_ignored(rope: dict[str, Any], message: str) -> None:
    for name in ("rope_scaling", "rope_parameters"):
        assert message in _refusal(_BASE | {name: rope})


@pytest.mark.parametrize("given", ["llama3", [], False, 0, ""])
def test_rope_settings_that_are_no_object(given: object) -> None:
    for name in ("rope_scaling", "rope_parameters"):
        assert _refusal(_BASE | {name: given}) == f"{name} is {given!r}, expected an object"


def test_rope_settings_beside_the_object() -> None:
    for name, value in (
        ("partial_rotary_factor", 0.25),
        ("rotary_pct", 0.25),
        ("rope_interleaved", True),
        ("rope_ratio", 2.0),
    ):
        assert f"= {value!r} is not supported" in _refusal(_BASE | {name: value})
    neutral = {"partial_rotary_factor": 1.0, "rope_interleaved": False, "rotary_pct": 1}
    assert parse_config(_BASE | neutral) == parse_config(_BASE)
    # transformers prefers the outer one.
    length = {"original_max_position_embeddings": 64}
    inner = {key: value for key, value in _LLAMA3.items() if key not in length}
    outer = parse_config(_BASE | {"rope_scaling": inner} | length)
    assert outer.rope == parse_config(_BASE | {"rope_scaling": _LLAMA3}).rope
    assert "contradict" in _refusal(
        _BASE | {"rope_scaling": _LLAMA3, "original_max_position_embeddings": 32}
    )


def test_two_spellings_must_agree() -> None:
    both = {"rope_scaling": _LLAMA3, "rope_parameters": _LLAMA3 | {"rope_theta": 5e5}}
    assert parse_config(_BASE | both).rope.theta == 5e5
    both["rope_scaling"] = _LLAMA3 | {"factor": 4.0}
    message = _refusal(_BASE | both)
    assert message == "factor is 4.0 and, in rope_parameters, 8.0: they contradict each other"


@pytest.mark.parametrize(
    ("changes", "name"),
    [
        ({"final_logit_softcapping": 30.0}, "final_logit_softcapping"),
        ({"embedding_multiplier": 12}, "embedding_multiplier"),
        ({"num_local_experts": 8}, "num_local_experts"),
        ({"qk_norm": True}, "qk_norm"),
        ({"is_encoder_decoder": True}, "is_encoder_decoder"),
        ({"sliding_window": 1024}, "sliding_window"),
        ({"sliding_window": "1024"}, "sliding_window"),
    ],
)
def test_settings_of_other_architectures(changes: dict[str, Any], name: str) -> None:
    assert _refusal(_BASE | changes).startswith(f"{name} is ")


@pytest.mark.parametrize(
    "other",
    [
        {"model_type": "gpt2", "architectures": ["GPT2LMHeadModel"]},
        {"model_type": "gemma2", "architectures": ["Gemma2ForCausalLM"]},
        {"model_type": "phi3"},
        {"model_type": "mixtral", "architectures": ["MixtralForCausalLM"]},
        {"model_type": "qwen2_moe"},
        {"model_type": ["llama"]},
        {"model_type": None, "architectures": ["PhiForCausalLM"]},
        {"model_type": "llama", "architectures": ["LlamaForSequenceClassification"]},
        {"model_type": "llama", "architectures": ["MistralForCausalLM"]},
        {"model_type": None, "architectures": []},
    ],
)
def test_models_of_another_shape(other: dict[str, Any]) -> None:
    message = _refusal(_BASE | other)
    named = "model_type" if other["model_type"] not in (None, "llama") else "architectures"
    assert message.startswith(f"{named} is {other[named]!r}; ")
    for served in ("llama (Llama, SmolLM2)", "mistral", "qwen2", "qwen3", "smollm3"):
        assert served in message


def test_a_family_is_found_by_its_class() -> None:
    for name in ("LlamaForCausalLM", "LLaMAForCausalLM"):
        named = {"model_type": None, "architectures": [name]}
        assert parse_config(_BASE | named) == parse_config(_BASE)
    assert "architectures is 'Llama'" in _refusal(_BASE | {"architectures": "Llama"})


_SLIDING = "sliding_attention"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "llama", "layer_types": [_SLIDING] * 2}, "layer_types is ['sliding_"),
        ({"model_type": "llama", "no_rope_layers": [1, 0]}, "no_rope_layers is [1, 0]; only"),
        ({"model_type": "mistral", "sliding_window": 0}, "sliding_window is 0"),
        ({"model_type": "mistral", "attention_bias": True}, "attention_bias is True; in the"),
        ({"model_type": "mistral", "use_sliding_window": False}, "use_sliding_window is False"),
        ({"model_type": "mistral", "layer_types": ["full_attention"] * 2}, "layer_types is"),
        ({"model_type": "qwen2", "attention_bias": False}, "attention_bias is False; in the"),
        ({"model_type": "qwen2", "mlp_bias": True}, "mlp_bias is True"),
        ({"model_type": "qwen2", "layer_types": [_SLIDING] * 2}, "layer_types names 'sliding_"),
        ({"model_type": "qwen2", "layer_types": [_SLIDING]}, "for each of 2 layers"),
        ({"model_type": "qwen2", "layer_types": ["linear_attention"] * 2}, "layer_types is"),
        (
            {"model_type": "qwen3", "use_sliding_window": True, "max_window_layers": -1},
            "max_window_layers is -1, expected an integer from 0",
        ),
        ({"model_type": "smollm3", "no_rope_layers": [1]}, "a 0 or a 1 for each of 2 layers"),
        ({"model_type": "smollm3", "no_rope_layers": [1, 2]}, "a 0 or a 1 for each"),
        ({"model_type": "smollm3", "no_rope_layer_interval": 0}, "no_rope_layer_interval is 0"),
    ],
)
def test_settings_of_layers(changes: dict[str, Any], message: str) -> None:
    assert message in _refusal(_BASE | {"num_key_value_heads": 2} | changes)


def test_how_long_sequences_may_be() -> None:
    def longest(**rope: Any) -> int:
        return parse_config(_BASE | {"rope_scaling": rope or None}).longest_sequence

    assert longest() == longest(**_LLAMA3) == 2048
    assert longest(rope_type="linear", factor=2.0) == 4096
    assert longest(rope_type="dynamic", factor=2.0) == 4096
    assert longest(rope_type="yarn", factor=4.0, original_max_position_embeddings=1024) == 4096


def test_settings_that_change_nothing() -> None:
    harmless = {
        "attention_dropout": 0.1,
        "initializer_range": 0.02,
        "pad_token_id": -1,
        "pretraining_tp": 2,
        "use_cache": False,
        "transformers_version": "5.0",
        "embedding_multiplier": 1.0,
        "final_logit_softcapping": None,
        "num_local_experts": 0,
        "sliding_window": 4096,
        "quantization_config": {},
    }
    assert parse_config(_BASE | harmless) == parse_config(_BASE)
    off = {"sliding_window": 16, "use_sliding_window": False}
    assert parse_config(_BASE | off) == parse_config(_BASE)


def test_files_that_python_reads_and_json_does_not_allow(tmp_path: pathlib.Path) -> None:
    file = tmp_path / "config.json"
    for text in ("[" * 100_000, '{"vocab_size": ' + "9" * 5000 + "}", "\ufeff{}"):
        file.write_text(text, encoding="utf-8")
        with pytest.raises(ConfigError, match="is not JSON"):
            load_config(tmp_path)
    file.write_bytes(b'{"model_type": "\xff"}')
    with pytest.raises(ConfigError, match="is not JSON"):
        load_config(tmp_path)
    for constant in ("NaN", "Infinity", "-Infinity", "1e999"):
        text = json.dumps(_BASE | {"rms_norm_eps": 1}).replace(": 1}", f": {constant}}}")
        file.write_text(text)
        with pytest.raises(ConfigError, match=r"config\.json: rms_norm_eps is -?(nan|inf)"):
            load_config(tmp_path)


def test_a_name_of_the_hub_is_no_directory(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match="org/some-llama, which does not exist") as caught:
        load_config("org/some-llama")
    assert "`hf download org/some-llama --local-dir some-llama`" in str(caught.value)
    assert str(caught.value).endswith("pass --checkpoint some-llama")
    for path in ("single", tmp_path / "a" / "b", tmp_path):
        with pytest.raises(ConfigError, match="`hf download ORG/NAME --local-dir NAME`"):
            load_config(path)
    pathlib.Path("file").touch()
    with pytest.raises(ConfigError, match="file, which is not a directory"):
        load_config("file")
