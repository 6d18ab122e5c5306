"""Llama-like model families against transformers on random weights: logits of prefill, chunks and
decode steps, and 64 greedy tokens, for each variation of layers and RoPE.
"""

from __future__ import annotations

import functools
import inspect
import json
import pathlib
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from llama.checkpoint import load_model, save_model
from llama.config import load_config, parse_config
from llama.model import Llama
from llama_models import cache_spec, generate

import jax_kvpage as kvp

torch = pytest.importorskip("torch", reason="the oracle is transformers on torch")
transformers = pytest.importorskip("transformers", reason="the oracle is transformers")

_TOLERANCE = 1e-4
_TIE = 1e-3  # if the reference's two best logits are closer than this, either token is right
_VOCABULARY = 320
_LONGEST = 192
_LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
_YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 48}
_SLIDING, _FULL = "sliding_attention", "full_attention"
_VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama_linear": ("Llama", {"rope_parameters": {"rope_type": "linear", "factor": 4.0}}),
    "llama_dynamic": (
        "Llama",
        {"rope_parameters": {"rope_type": "dynamic", "factor": 3.0}, "max_position_embeddings": 32},
    ),
    "llama_yarn": (
        "Llama",
        {"rope_parameters": _YARN | {"beta_fast": 8.0, "beta_slow": 0.5, "truncate": False}},
    ),
    "smollm2": ("Llama", {"tie_word_embeddings": True, "attention_bias": False}),
    "mistral_window": ("Mistral", {"sliding_window": 12}),
    "mistral_full": ("Mistral", {"sliding_window": None, "head_dim": 16}),
    "qwen2": ("Qwen2", {"tie_word_embeddings": True, "rope_parameters": _YARN}),
    "qwen2_windows": (
        "Qwen2",
        {"use_sliding_window": True, "sliding_window": 9, "max_window_layers": 1},
    ),
    "qwen3": ("Qwen3", {"head_dim": 32, "rope_parameters": {"rope_theta": 1e6}}),
    "qwen3_layer_types": (
        "Qwen3",
        {
            "head_dim": 16,
            "attention_bias": True,
            "use_sliding_window": True,
            "sliding_window": 20,
            "layer_types": [_SLIDING, _FULL],
            "rope_parameters": {"rope_type": "dynamic", "factor": 2.0},
            "max_position_embeddings": 64,
        },
    ),
    "smollm3": (
        "SmolLM3",
        {"no_rope_layers": [1, 0], "rope_parameters": _LLAMA3 | {"rope_theta": 5e5}},
    ),
    "smollm3_interval": (
        "SmolLM3",
        {
            "no_rope_layer_interval": 2,
            "use_sliding_window": True,
            "sliding_window": 16,
            "mlp_bias": True,
            "rope_parameters": _YARN | {"mscale": 1.0, "mscale_all_dim": 0.5},
        },
    ),
}


@pytest.fixture(autouse=True, scope="module")
def one_torch_thread() -> Iterator[None]:
    """The models are tiny: several threads would only wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@functools.cache
def _reference(variant: str) -> Any:
    """Returns a transformers model with random weights whose logits are well separated."""
    family, settings = _VARIANTS[variant]
    common = {
        "vocab_size": _VOCABULARY,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": _LONGEST,
        "bos_token_id": None,
        "eos_token_id": None,
        "pad_token_id": None,
        "attn_implementation": "eager",
    }
    config = getattr(transformers, f"{family}Config")(**common | settings)
    generator = torch.Generator().manual_seed(len(variant))
    model = getattr(transformers, f"{family}ForCausalLM")(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            # Layers must outweigh the embedding, or a tied head repeats its input.
            scale = 0.15 if "embed_tokens" in name or "lm_head" in name else 0.3
            parameter.copy_(scale * noise if parameter.ndim > 1 else 1.0 + 0.1 * noise)
    return model


def _ours(name: str, path: pathlib.Path) -> Llama:
    _reference(name).save_pretrained(path)
    return load_model(path, dtype=jnp.dtype(jnp.float32))


def _reference_logits(reference: Any, portions: Sequence[Sequence[int]]) -> list[np.ndarray]:
    """Returns logits `[T, vocabulary]` of each portion of a sequence, fed in turn to a cache.

    Like ours, a transformers cache keeps keys with the rotation of the time they were computed.
    """
    parameters = inspect.signature(type(reference).forward).parameters
    name = "cache" if "cache" in parameters else "past_key_values"
    cache = transformers.DynamicCache(config=reference.config)
    found = []
    with torch.no_grad():
        # A dynamic RoPE module remembers the longest sequence until it sees a short one.
        reference(torch.tensor([[0]]))
        for tokens in portions:
            given = torch.tensor([list(tokens)])
            output = reference(given, use_cache=True, **{name: cache})
            found.append(output.logits[0].numpy())
    return found


class _Rig:
    """A pool and the jitted model, to feed tokens of several sequences in arbitrary portions."""

    def __init__(self, model: Llama, pool: kvp.KVPool, implementation: str) -> None:
        graph, self._state = nnx.split(model)
        self.cache = pool.cache()

        @functools.partial(jax.jit, donate_argnames="cache")
        def run(
            state: nnx.State, cache: kvp.KVCache, tokens: jax.Array, batch: kvp.Batch
        ) -> tuple[jax.Array, kvp.KVCache]:
            model = nnx.merge(graph, state)
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


def _assert_greedy(reference: Any, prompt: Sequence[int], output: Sequence[int]) -> None:
    """Asserts that each token is the reference's choice after the previous tokens, or ties with it.

    Feeding the output to the reference (teacher forcing) amounts to comparing with its own greedy
    text as long as they agree, and continues after they diverge at a tie.
    """
    if reference.config.rope_parameters["rope_type"] == "dynamic":
        portions = [prompt, *([token] for token in output[:-1])]
    else:  # the split does not matter
        portions = [[*prompt, *output[:-1]]]
    rows = np.concatenate(_reference_logits(reference, portions))[len(prompt) - 1 :]
    for step, (row, token) in enumerate(zip(rows, output, strict=True)):
        second, best = np.sort(row)[-2:]
        if best - second >= _TIE:
            assert token == row.argmax(), f"token {step}"
        else:
            assert row[token] >= second, f"token {step} is neither of the best two"


@pytest.mark.parametrize(
    ("variant", "implementation"),
    [*((name, "cpu") for name in _VARIANTS), ("qwen3_layer_types", "xla")],
)
def test_logits_and_greedy_text_are_the_reference_s(
    tmp_path: pathlib.Path, variant: str, implementation: str
) -> None:
    reference = _reference(variant)
    model = _ours(variant, tmp_path)
    rng = np.random.default_rng(0)
    a, b = rng.integers(0, _VOCABULARY, 135), rng.integers(0, _VOCABULARY, 21)
    layout = "fused" if implementation == "cpu" else "per_layer"
    spec = cache_spec(model.config, max_slots=2, max_seq_len=_LONGEST, layout=layout)
    # Two prompts side by side, then chunks of one beside decode steps of the other.
    portions_a, portions_b = (a[:33], a[33:84], a[84:]), (b[:19], b[19:20], b[20:])
    with kvp.KVPool(spec, spec.virtual_bytes) as pool:
        rig = _Rig(model, pool, implementation)
        slots, rig.cache = pool.acquire(rig.cache, [len(a), len(b)])
        steps = [
            rig.feed(list(zip(slots, portions, strict=True)))
            for portions in zip(portions_a, portions_b, strict=True)
        ]
    expected = zip(
        _reference_logits(reference, portions_a),
        _reference_logits(reference, portions_b),
        strict=True,
    )
    for found, wanted in zip(steps, expected, strict=True):
        for ours, theirs in zip(found, wanted, strict=True):
            assert np.abs(theirs).max() > 1
            np.testing.assert_allclose(ours, theirs, rtol=0, atol=_TOLERANCE)
    if implementation == "xla":
        return
    prompts = [a[:41].tolist(), b[:3].tolist()]
    run = generate(model, prompts, spec=spec, max_new_tokens=64, scan_steps=21)
    for prompt, output in zip(prompts, run.outputs, strict=True):
        assert len(output) == 64
        assert len(set(output)) > 5
        _assert_greedy(reference, prompt, output)


@pytest.mark.parametrize("variant", ["llama_dynamic", "qwen2_windows", "smollm3"])
def test_dense_logits_are_the_reference_s(tmp_path: pathlib.Path, variant: str) -> None:
    tokens = np.random.default_rng(1).integers(0, _VOCABULARY, (2, 70))
    found = _ours(variant, tmp_path).dense(jnp.asarray(tokens, jnp.int32))
    for row, row_tokens in zip(np.asarray(found), tokens, strict=True):
        (expected,) = _reference_logits(_reference(variant), [row_tokens])
        np.testing.assert_allclose(row, expected, rtol=0, atol=_TOLERANCE)


@pytest.mark.parametrize("variant", _VARIANTS)
def test_old_and_new_config_files_mean_the_same(tmp_path: pathlib.Path, variant: str) -> None:
    _reference(variant).config.save_pretrained(tmp_path)
    config = load_config(tmp_path)
    new = json.loads((tmp_path / "config.json").read_text())
    old = dict(new)
    rope = old.pop("rope_parameters")
    old["rope_theta"] = rope.pop("rope_theta")
    old["rope_scaling"] = {"type": rope.pop("rope_type"), **rope} if len(rope) > 1 else None
    assert parse_config(old) == config
    # The output of save_model, read by transformers and by us.
    assert parse_config(config.to_json()) == config
    theirs = type(_reference(variant).config)(**config.to_json())
    for name in ("layer_types", "no_rope_layers", "sliding_window", "rope_parameters", "head_dim"):
        wanted = getattr(_reference(variant).config, name, None)
        found = getattr(theirs, name, None)
        if name == "rope_parameters":
            # attention_factor is written in place of the settings that determine it.
            found = {key: found[key] for key in wanted if key in found}
            wanted = {key: wanted[key] for key in wanted if not key.startswith("mscale")}
        if name != "head_dim" or wanted is not None:
            assert found == wanted, name


def test_a_saved_model_is_loaded(tmp_path: pathlib.Path) -> None:
    model = _ours("qwen3_layer_types", tmp_path / "theirs")
    save_model(model, tmp_path / "ours", dtype=jnp.dtype(jnp.float32))
    loaded = load_model(tmp_path / "ours")
    assert loaded.config == model.config
    before, after = (jax.tree.leaves(nnx.state(each)) for each in (model, loaded))
    for left, right in zip(before, after, strict=True):
        np.testing.assert_array_equal(left, right)
    with torch.no_grad():
        kind = transformers.AutoModelForCausalLM
        theirs = kind.from_pretrained(tmp_path / "ours", attn_implementation="eager").eval()
    tokens = list(range(40))
    (found,), (wanted,) = (
        _reference_logits(each, [tokens]) for each in (theirs, _reference("qwen3_layer_types"))
    )
    np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-5)


@pytest.mark.parametrize("family", ["Llama", "Mistral", "Qwen2", "Qwen3", "SmolLM3"])
def test_defaults_of_keys_that_are_left_out(family: str) -> None:
    theirs = getattr(transformers, f"{family}Config")(num_attention_heads=32)
    kind = theirs.model_type
    required = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers")
    given = {name: getattr(theirs, name) for name in required}
    ours = parse_config({"model_type": kind, "num_attention_heads": 32, **given})
    for name in ("num_key_value_heads", "max_position_embeddings", "tie_word_embeddings"):
        assert getattr(ours, name) == getattr(theirs, name), name
    assert ours.rms_norm_eps == theirs.rms_norm_eps
    assert ours.rope.theta == theirs.rope_parameters["rope_theta"]
    dim = getattr(theirs, "head_dim", None) or theirs.hidden_size // 32
    assert ours.head_dim == dim
    windows = [getattr(theirs, "sliding_window", None) if kind == "mistral" else None]
    assert set(ours.windows or [None]) == set(windows)


def test_each_model_class_of_transformers_that_is_served_is_tested() -> None:
    from llama.families import FAMILIES

    tested = {f"{family}ForCausalLM" for family, _ in _VARIANTS.values()}
    assert tested == {family.architecture for family in FAMILIES.values()}
    for family in FAMILIES.values():
        theirs = getattr(transformers, family.architecture)
        assert theirs.config_class.model_type == family.model_type
