"""The example's Llama against transformers on the same random weights: logits, and greedy text
token by token.
"""

from __future__ import annotations

import functools
import json
import pathlib
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from llama.checkpoint import load_model
from llama.config import parse_config
from llama.model import Llama
from llama_models import cache_spec, generate

import jax_kvpage as kvp

torch = pytest.importorskip("torch", reason="the oracle is transformers on torch")
transformers = pytest.importorskip("transformers", reason="the oracle is transformers")

_TOLERANCE = 2e-4
_TIE = 1e-4  # if the two best logits are closer than this, either token is right
_LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 5e5,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
_VARIANTS: dict[str, dict[str, Any]] = {
    "grouped": {"num_key_value_heads": 2, "head_dim": 64},
    "tied": {"num_key_value_heads": 4, "head_dim": 32, "tie_word_embeddings": True},
    "llama3": {"num_key_value_heads": 2, "head_dim": 64, "rope_parameters": _LLAMA3},
    "wide": {"num_key_value_heads": 1, "head_dim": 128, "attention_bias": True, "mlp_bias": True},
}


def _reference(seed: int, **variant: Any) -> Any:
    """Returns a transformers model with random weights whose logits are well separated."""
    config = transformers.LlamaConfig(
        vocab_size=320,
        hidden_size=96,
        intermediate_size=160,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=256,
        bos_token_id=None,
        eos_token_id=None,
        attn_implementation="eager",
        **variant,
    )
    generator = torch.Generator().manual_seed(seed)
    model = transformers.LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(0.12 * noise if parameter.ndim > 1 else 1.0 + 0.1 * noise)
    return model


@functools.cache
def _reference_of(name: str, seed: int = 0) -> Any:
    return _reference(seed, **_VARIANTS[name])


def _ours(reference: Any, path: pathlib.Path) -> Llama:
    reference.save_pretrained(path)
    return load_model(path, dtype=jnp.dtype(jnp.float32))


def _reference_logits(reference: Any, tokens: Sequence[int]) -> np.ndarray:
    """Logits of all positions of one sequence, float32 `[T, vocab]`."""
    with torch.no_grad():
        return reference(torch.tensor([list(tokens)])).logits[0].numpy()


def _assert_close(found: np.ndarray, expected: np.ndarray) -> None:
    error = np.max(np.abs(found - expected)) / np.max(np.abs(expected))
    assert error < _TOLERANCE, f"max|a-b| / max|b| = {error:.2e}"


class _Rig:
    """A pool and the jitted model, to feed tokens of several sequences in arbitrary portions."""

    def __init__(self, model: Llama, pool: kvp.KVPool, implementation: str) -> None:
        self._graph, self._state = nnx.split(model)
        self.cache = pool.cache()

        @functools.partial(jax.jit, donate_argnames="cache")
        def run(
            state: nnx.State, cache: kvp.KVCache, tokens: jax.Array, batch: kvp.Batch
        ) -> tuple[jax.Array, kvp.KVCache]:
            model = nnx.merge(self._graph, state)
            logits, cache = model(tokens, cache, batch, implementation=implementation)
            return logits, kvp.advance(cache, batch)

        self._run = run

    def feed(self, portions: Sequence[tuple[int, Sequence[int]]]) -> list[np.ndarray]:
        """Runs (slot, tokens) portions as one ragged batch; returns the logits of each."""
        counts = [len(tokens) for _, tokens in portions]
        batch = kvp.Batch.from_lengths([slot for slot, _ in portions], counts)
        tokens = np.concatenate([tokens for _, tokens in portions]).astype(np.int32)
        logits, self.cache = self._run(self._state, self.cache, jnp.asarray(tokens), batch)
        return np.split(np.asarray(logits), np.cumsum(counts)[:-1])


@pytest.mark.parametrize("implementation", ["cpu", "xla"])
@pytest.mark.parametrize("variant", _VARIANTS)
def test_logits_of_prefill_chunked_prefill_and_decode(
    tmp_path: pathlib.Path, variant: str, implementation: str
) -> None:
    reference = _reference_of(variant)
    model = _ours(reference, tmp_path)
    layout = "fused" if implementation == "cpu" else "per_layer"
    rng = np.random.default_rng(0)
    long, short = rng.integers(0, 320, 70), rng.integers(0, 320, 21)
    expected = [_reference_logits(reference, tokens) for tokens in (long, short)]
    spec = cache_spec(model.config, max_slots=3, layout=layout, block_tokens=None)
    with kvp.KVPool(spec, spec.virtual_bytes) as pool:
        rig = _Rig(model, pool, implementation)
        (a, b), rig.cache = pool.acquire(rig.cache, [len(long), len(short)])
        # Prefill of one sequence beside the first chunk of the other, then a chunk beside a decode
        # step, then decode of both.
        first = rig.feed([(b, short[:19]), (a, long[:33])])
        second = rig.feed([(a, long[33:68]), (b, short[19:20])])
        third = rig.feed([(a, long[68:69]), (b, short[20:21])])
        (last,) = rig.feed([(a, long[69:70])])
    _assert_close(np.concatenate([first[1], second[0], third[0], last]), expected[0])
    _assert_close(np.concatenate([first[0], second[1], third[1]]), expected[1])


def test_dense_logits_are_the_reference_too(tmp_path: pathlib.Path) -> None:
    reference = _reference_of("llama3")
    tokens = np.random.default_rng(1).integers(0, 320, (2, 60))
    found = _ours(reference, tmp_path).dense(jnp.asarray(tokens, jnp.int32))
    for row, row_tokens in zip(np.asarray(found), tokens, strict=True):
        _assert_close(row, _reference_logits(reference, row_tokens))


def _assert_greedy(reference: Any, prompt: Sequence[int], output: Sequence[int]) -> None:
    """Asserts that each token is the reference's choice after the previous tokens, or ties with it.

    Feeding the output to the reference (teacher forcing) amounts to comparing with its own greedy
    text as long as they agree, and continues after they diverge at a tie.
    """
    logits = _reference_logits(reference, [*prompt, *output])[len(prompt) - 1 : -1]
    for step, (row, token) in enumerate(zip(logits, output, strict=True)):
        gap = float(row.max() - row[token])
        assert gap < _TIE, (
            f"token {step} is {token}, the reference's is {row.argmax()} by {gap:.2e}"
        )


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_greedy_text_is_the_reference_s(tmp_path: pathlib.Path, seed: int) -> None:
    reference = _reference_of("llama3", seed)
    model = _ours(reference, tmp_path)
    rng = np.random.default_rng(seed)
    prompts = [rng.integers(0, 320, length).tolist() for length in (3, 41, 17, 64)]
    for layout, scan_steps in (("fused", 0), ("per_layer", 16)):
        spec = cache_spec(model.config, max_slots=4, layout=layout, block_tokens=None)
        for implementation in ("cpu", "xla"):
            run = generate(
                model,
                prompts,
                spec=spec,
                max_new_tokens=64,
                scan_steps=scan_steps,
                implementation=implementation,
                prefill_chunk=64,
            )
            assert len({token for output in run.outputs for token in output}) > 20
            for prompt, output in zip(prompts, run.outputs, strict=True):
                assert len(output) == 64
                _assert_greedy(reference, prompt, output)


def test_the_reference_s_own_generate_agrees(tmp_path: pathlib.Path) -> None:
    reference = _reference_of("grouped")
    model = _ours(reference, tmp_path)
    prompt = np.random.default_rng(7).integers(0, 320, 12).tolist()
    with torch.no_grad():
        expected = reference.generate(
            torch.tensor([prompt]), max_new_tokens=64, do_sample=False, pad_token_id=0
        )[0, len(prompt) :].tolist()
    spec = cache_spec(model.config, max_slots=1)
    (output,) = generate(model, [prompt], spec=spec, max_new_tokens=64).outputs
    _assert_greedy(reference, prompt, output)
    if output != expected:
        first = next(i for i in range(64) if output[i] != expected[i])
        _assert_greedy(reference, prompt, expected[: first + 1])


def test_every_setting_of_the_reference_is_honoured_or_harmless(tmp_path: pathlib.Path) -> None:
    """Reports fields that a new version of transformers adds to its LlamaConfig."""
    read = {*_settings_read(tmp_path), "rope_parameters"}
    harmless = {
        "attention_dropout",  # training only
        "initializer_range",
        "pad_token_id",
        "pretraining_tp",  # order of the same sums, up to transformers 4
        "use_cache",
    }
    fields = set(transformers.LlamaConfig.__annotations__) - {"model_type"}
    fields = {name for name in fields if not name.startswith("base_model_")}
    assert fields <= read | harmless


def _settings_read(path: pathlib.Path) -> set[str]:
    """Returns the keys of the reference's config.json that `parse_config` looks at."""
    seen = set()

    class Watched(dict[str, Any]):
        def get(self, name: str, default: Any = None) -> Any:
            seen.add(name)
            return super().get(name, default)

    _reference_of("llama3").config.save_pretrained(path)
    parse_config(Watched(json.loads((path / "config.json").read_text())))
    return seen
