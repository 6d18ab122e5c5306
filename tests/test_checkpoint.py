"""Reading Hugging Face Llamas: old and new configurations, single-file and sharded weights, and
every kind of mistake.
"""

from __future__ import annotations

import json
import pathlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from llama.checkpoint import CheckpointError, load_model, save_model
from llama.config import ConfigError, LlamaConfig, load_config, parse_config
from llama.tokenizer import Tokenizer, TokenizerError
from llama_models import TINY, edit_json, random_model, write_byte_tokenizer, write_checkpoint
from safetensors.numpy import load_file, save_file

_BASE: dict[str, Any] = {
    "model_type": "llama",
    "vocab_size": 128,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}
_LLAMA3 = {
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}


def _leaves(model: nnx.Module) -> list[np.ndarray]:
    return [np.asarray(leaf, np.float32) for leaf in jax.tree.leaves(nnx.state(model))]


def test_a_short_config_gets_the_defaults_of_the_architecture() -> None:
    config = parse_config(_BASE)
    assert (config.num_key_value_heads, config.head_dim) == (4, 16)
    assert config.rope.kind == "default"
    assert config.rope.theta == 10000.0
    assert not config.tie_word_embeddings
    assert config.eos_token_ids == ()


def test_grouped_heads_and_an_explicit_head_dim() -> None:
    config = parse_config(_BASE | {"num_key_value_heads": 2, "head_dim": 32})
    assert (config.num_key_value_heads, config.head_dim) == (2, 32)


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_theta": 5e5, "rope_scaling": {"rope_type": "llama3", **_LLAMA3}},
        {"rope_theta": 5e5, "rope_scaling": {"type": "llama3", **_LLAMA3}},
        {"rope_parameters": {"rope_type": "llama3", "rope_theta": 5e5, **_LLAMA3}},
    ],
    ids=["rope_type", "type", "rope_parameters"],
)
def test_all_spellings_of_rope_scaling_mean_the_same(rope: dict[str, Any]) -> None:
    config = parse_config(_BASE | rope)
    assert config.rope.kind == "llama3"
    assert config.rope.theta == 5e5
    assert config.rope.original_max_position_embeddings == 64
    plain = parse_config(_BASE | {"rope_theta": 5e5}).rope.inverse_frequencies(16)
    scaled = config.rope.inverse_frequencies(16)
    # The fastest rotations stay unchanged, the slowest are stretched by the full factor.
    assert scaled[0] == plain[0]
    np.testing.assert_allclose(scaled[-1], plain[-1] / 8.0, rtol=1e-6)


@pytest.mark.parametrize("name", ["rope_scaling", "rope_parameters"])
def test_rope_settings_may_be_null_or_default(name: str) -> None:
    for value in (None, {}, {"rope_type": "default"}):
        assert parse_config(_BASE | {"rope_theta": 123.0, name: value}).rope.theta == 123.0


def test_linear_rope_scaling_divides_all_frequencies() -> None:
    config = parse_config(_BASE | {"rope_scaling": {"type": "linear", "factor": 4.0}})
    plain = parse_config(_BASE).rope.inverse_frequencies(16)
    np.testing.assert_allclose(config.rope.inverse_frequencies(16), plain / 4, rtol=1e-6)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "gemma3_text"}, r"model_type is 'gemma3_text'.*Llama's shape: llama"),
        ({"model_type": None}, r"model_type is None"),
        ({"hidden_act": "gelu"}, r"hidden_act is 'gelu'"),
        ({"quantization_config": {"quant_method": "gptq"}}, r"quantized weights \(gptq\)"),
        ({"num_key_value_heads": 3}, r"num_attention_heads 4 .* num_key_value_heads 3"),
        ({"hidden_size": 66}, r"hidden_size 66 .* num_attention_heads 4 and no head_dim"),
        ({"head_dim": 15}, r"head_dim 15 is odd"),
        ({"vocab_size": None}, r"vocab_size is missing"),
        ({"num_hidden_layers": "two"}, r"num_hidden_layers is 'two', expected a positive integer"),
        ({"rms_norm_eps": "tiny"}, r"rms_norm_eps is 'tiny', expected a positive number"),
        ({"torch_dtype": "int8"}, r"dtype is 'int8', expected one of float32, bfloat16, float16"),
        ({"rope_scaling": "llama3"}, r"rope_scaling is 'llama3', expected an object"),
        ({"rope_scaling": {"type": "longrope"}}, r"'longrope' is not supported.*'llama3'"),
        ({"rope_scaling": {"type": "llama3", "factor": 8.0}}, r"lacks low_freq_factor, high_freq"),
        (
            {"rope_scaling": {"type": "llama3", **_LLAMA3, "high_freq_factor": 1.0}},
            r"high_freq_factor 1.0 must exceed low_freq_factor 1.0",
        ),
    ],
)
def test_configs_that_are_refused(
    tmp_path: pathlib.Path, changes: dict[str, Any], message: str
) -> None:
    (tmp_path / "config.json").write_text(json.dumps(_BASE | changes))
    with pytest.raises(ConfigError, match=message) as caught:
        load_config(tmp_path)
    assert "config.json" in str(caught.value)


def test_config_files_that_are_none(tmp_path: pathlib.Path) -> None:
    with pytest.raises(ConfigError, match=r"no config\.json in .* wants a Hugging Face model"):
        load_config(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ConfigError, match="is not JSON"):
        load_config(tmp_path)
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(ConfigError, match="holds a JSON list, expected an object"):
        load_config(tmp_path)


def test_end_of_text_ids_of_both_files_count(tmp_path: pathlib.Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(_BASE | {"eos_token_id": 7}))
    assert load_config(tmp_path).eos_token_ids == (7,)
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [9, 7]}))
    assert load_config(tmp_path).eos_token_ids == (7, 9)


@pytest.mark.parametrize(
    "config",
    [
        TINY,
        parse_config(
            _BASE
            | {"num_key_value_heads": 1, "attention_bias": True, "mlp_bias": True}
            | {"rope_parameters": {"rope_type": "llama3", "rope_theta": 1e4, **_LLAMA3}}
        ),
    ],
    ids=["tied", "biases"],
)
def test_what_is_saved_is_loaded(tmp_path: pathlib.Path, config: LlamaConfig) -> None:
    model = random_model(config)
    save_model(model, tmp_path, dtype=jnp.dtype(jnp.float32))
    loaded = load_model(tmp_path)
    assert loaded.config == config
    for ours, theirs in zip(_leaves(model), _leaves(loaded), strict=True):
        np.testing.assert_array_equal(ours, theirs)


@pytest.mark.parametrize("stored", ["float32", "bfloat16", "float16"])
def test_weights_are_converted_on_request(tmp_path: pathlib.Path, stored: str) -> None:
    model = write_checkpoint(tmp_path, dtype=stored)
    kept = load_model(tmp_path)
    assert {str(leaf.dtype) for leaf in jax.tree.leaves(nnx.state(kept))} == {stored}
    wide = load_model(tmp_path, dtype=jnp.dtype(jnp.float32))
    assert {str(leaf.dtype) for leaf in jax.tree.leaves(nnx.state(wide))} == {"float32"}
    for ours, theirs in zip(_leaves(model), _leaves(wide), strict=True):
        np.testing.assert_array_equal(ours.astype(jnp.dtype(stored)).astype(np.float32), theirs)


def test_a_sharded_checkpoint_is_the_same_model(tmp_path: pathlib.Path) -> None:
    model = write_checkpoint(tmp_path, shards=3)
    assert len(list(tmp_path.glob("*.safetensors"))) == 3
    for ours, theirs in zip(_leaves(model), _leaves(load_model(tmp_path)), strict=True):
        np.testing.assert_array_equal(ours, theirs)


def _edit_weights(path: pathlib.Path, edit: Callable[[dict[str, np.ndarray]], None]) -> None:
    tensors = load_file(path / "model.safetensors")
    edit(tensors)
    save_file(tensors, path / "model.safetensors")


def _drop(name: str) -> Callable[[dict[str, np.ndarray]], None]:
    return lambda tensors: tensors.__delitem__(name)


def _put(name: str, value: np.ndarray) -> Callable[[dict[str, np.ndarray]], None]:
    return lambda tensors: tensors.update({name: value})


_UP = "model.layers.1.mlp.up_proj.weight"


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (_drop(_UP), r"1 tensors are missing: model.layers.1.mlp.up_proj.weight"),
        (_put(_UP, np.zeros((64, 96), np.float32)), r"\[64, 96\], config.json asks for \[96, 64\]"),
        (_put(_UP, np.zeros((96, 64), np.int8)), r"up_proj.weight is I8, expected one of"),
        (
            _put("model.layers.0.self_attn.q_norm.weight", np.ones(32, np.float32)),
            r"1 tensors are not of this model: model.layers.0.self_attn.q_norm.weight",
        ),
    ],
    ids=["missing", "shape", "dtype", "extra"],
)
def test_weights_that_do_not_fit(
    tmp_path: pathlib.Path, edit: Callable[[dict[str, np.ndarray]], None], message: str
) -> None:
    write_checkpoint(tmp_path)
    _edit_weights(tmp_path, edit)
    with pytest.raises(CheckpointError, match=message):
        load_model(tmp_path)


def test_all_that_is_wrong_is_said_at_once(tmp_path: pathlib.Path) -> None:
    write_checkpoint(tmp_path)
    _edit_weights(tmp_path, _drop("model.norm.weight"))
    _edit_weights(tmp_path, _put(_UP, np.zeros((1, 2), np.float32)))
    with pytest.raises(CheckpointError, match=r"missing: model.norm.weight; .*\[1, 2\]"):
        load_model(tmp_path)


def test_what_some_checkpoints_store_needlessly_is_passed_over(tmp_path: pathlib.Path) -> None:
    model = write_checkpoint(tmp_path)
    embedding = load_file(tmp_path / "model.safetensors")["model.embed_tokens.weight"]
    _edit_weights(tmp_path, _put("lm_head.weight", embedding))
    frequencies = np.ones(16, np.float32)
    _edit_weights(tmp_path, _put("model.layers.0.self_attn.rotary_emb.inv_freq", frequencies))
    for ours, theirs in zip(_leaves(model), _leaves(load_model(tmp_path)), strict=True):
        np.testing.assert_array_equal(ours, theirs)


def test_a_missing_shard_is_named(tmp_path: pathlib.Path) -> None:
    write_checkpoint(tmp_path, shards=3)
    (tmp_path / "model-00002-of-00003.safetensors").unlink()
    with pytest.raises(CheckpointError, match="1 of 3 shards are missing: model-00002-of-00003"):
        load_model(tmp_path)


def test_an_index_that_lies_is_caught(tmp_path: pathlib.Path) -> None:
    write_checkpoint(tmp_path, shards=2)
    index = tmp_path / "model.safetensors.index.json"
    weight_map = json.loads(index.read_text())["weight_map"]
    other = {name: file for name, file in weight_map.items() if file != weight_map[_UP]}
    edit_json(index, weight_map=weight_map | {_UP: next(iter(other.values()))})
    with pytest.raises(CheckpointError, match=f"{_UP} is not in .*, where the index says"):
        load_model(tmp_path)
    index.write_text("{}")
    with pytest.raises(CheckpointError, match="is not an index of safetensors files"):
        load_model(tmp_path)


def test_files_that_are_no_weights(tmp_path: pathlib.Path) -> None:
    write_checkpoint(tmp_path)
    file = tmp_path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(CheckpointError, match="is damaged or not a safetensors file"):
        load_model(tmp_path)
    file.unlink()
    with pytest.raises(CheckpointError, match=r"no model.safetensors or .*index.json in"):
        load_model(tmp_path)
    (tmp_path / "pytorch_model.bin").touch()
    with pytest.raises(CheckpointError, match=r"pytorch_model\.bin is a PyTorch file, convert it"):
        load_model(tmp_path)


def test_tokenizers(tmp_path: pathlib.Path) -> None:
    with pytest.raises(TokenizerError, match=r"no tokenizer\.json"):
        Tokenizer(tmp_path, 256)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(TokenizerError, match="is not a tokenizer"):
        Tokenizer(tmp_path, 256)
    write_byte_tokenizer(tmp_path)
    tokenizer = Tokenizer(tmp_path, 256)
    ids = tokenizer.encode("naïve")
    assert len(ids) == 6
    assert tokenizer.decode(ids) == "naïve"
    with pytest.raises(TokenizerError, match="has no tokens"):
        tokenizer.encode("")
    with pytest.raises(TokenizerError, match="vocab_size 40: they do not belong together"):
        Tokenizer(tmp_path, 40).encode("naïve")
