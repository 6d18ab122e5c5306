"""Conversations of several turns with the Llama example, and the prefix cache under a real model:
the text is the same as without it, and so are the bits if the program shapes are equal.
"""

from __future__ import annotations

import functools
import json
from typing import Any

import decode_llama
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from llama.arguments import BUNDLED
from llama.checkpoint import load_model
from llama.model import Llama
from llama.programs import Programs
from llama.sampling import Sampling
from llama_models import generate

import jax_kvpage as kvp

_EOS = 1


@functools.cache
def _model() -> Llama:
    return load_model(BUNDLED, dtype=jnp.dtype("float32"))


def _spec(slots: int, layout: str = "fused") -> kvp.CacheSpec:
    spec = kvp.CacheSpec(5, 2, 32, slots, 512, dtype=jnp.float32, layout=layout, block_tokens=16)
    return spec.resolve("cpu")


def _json(capsys: pytest.CaptureFixture[str], *arguments: object) -> dict[str, Any]:
    assert decode_llama.main(["--json", *map(str, arguments)]) == 0
    return json.loads(capsys.readouterr().out)


@pytest.mark.parametrize(
    "options",
    [
        ("--scan", 5, "--layout", "per_layer"),
        pytest.param((), marks=pytest.mark.exhaustive),
    ],
)
def test_turns_say_what_whole_conversations_say(
    capsys: pytest.CaptureFixture[str], options: tuple[object, ...]
) -> None:
    prompts = ["The function returns a list of names. The module", "A class is"]
    turns = [" If it is not found,", " The caller"]
    arguments = [x for p in prompts for x in ("--prompt", p)]
    arguments += [x for t in turns for x in ("--turn", t)]
    result = _json(capsys, *arguments, "--max-new-tokens", 24, *options)
    sequences = result["sequences"]
    assert (len(sequences), result["num_sequences"], len(result["turns"])) == (6, 2, 3)
    for before, after in zip(sequences[:-2], sequences[2:], strict=True):
        known = before["prompt_ids"] + before["output_ids"]
        assert after["prompt_ids"][: len(known)] == known
        # The model has processed all but the last token of an answer.
        assert after["cached_tokens"] == len(known) - 1
    conversations = [sequence["prompt_ids"] for sequence in sequences]
    whole = generate(_model(), conversations, spec=_spec(6), stop_ids=(_EOS,))
    assert [sequence["output_ids"] for sequence in sequences] == whole.outputs
    cached = [sum(s["cached_tokens"] for s in sequences[i : i + 2]) for i in (0, 2, 4)]
    assert [turn["cached_tokens"] for turn in result["turns"]] == cached


def test_turns_in_a_small_pool_say_the_same(capsys: pytest.CaptureFixture[str]) -> None:
    """Blocks of one conversation are evicted for the other, and recomputed when needed."""
    arguments = [x for p in ("The module", "A class is") for x in ("--prompt", p)]
    arguments += ["--turn", " If it is not", "--turn", " The caller", "--max-new-tokens", 30]
    plain = _json(capsys, *arguments)
    small = _json(capsys, *arguments, "--capacity", "160KiB", "--block-tokens", 16)
    assert [s["output_ids"] for s in small["sequences"]] == [
        s["output_ids"] for s in plain["sequences"]
    ]
    assert small["turns"][2]["cached_tokens"] < plain["turns"][2]["cached_tokens"]


def test_the_table_shows_what_was_cached(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--prompt", "The module", "--turn", " If it is not", "--max-new-tokens", "12"]
    assert decode_llama.main(arguments) == 0
    shown = capsys.readouterr().out
    first, second = _json(capsys, *arguments)["sequences"]
    assert f"> The module{first['text']} [" in shown
    assert f">  If it is not{second['text']} [" in shown
    counts = f"{len(second['prompt_ids'])} / {second['cached_tokens']}"
    (row,) = [line for line in shown.splitlines() if "turn 2: tokens read / cached" in line]
    assert counts in row


def test_turns_that_cannot_be(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        decode_llama.main(["--turn", "x", "--num-samples", "2"])
    assert "leave out --num-samples" in capsys.readouterr().err
    arguments = ["--prompt", "x", "--turn", "y", "--max-new-tokens", "600"]
    assert decode_llama.main(arguments) == 2
    assert "may ask for" in capsys.readouterr().err


class _Logits(Programs):
    """Programs that return each lane's logits instead of a token."""

    def _choose(self, logits: jax.Array, sequence_ids: jax.Array, positions: jax.Array) -> Any:
        del sequence_ids, positions
        return logits


@pytest.mark.parametrize("layout", ["fused", "per_layer"])
@pytest.mark.parametrize("how", ["adopted", "mapped", "forked"])
def test_the_prefix_cache_does_not_change_a_bit(layout: str, how: str) -> None:
    """Prompt chunks, then decode steps: all logits are the same with a chunk computed or cached."""
    chunk, programs = 64, _Logits(_model(), Sampling(), ())
    rng = np.random.default_rng(0)
    prompt = rng.integers(2, 2048, 2 * chunk).tolist()
    # The part that others have cached ends inside a block.
    found = chunk - 8

    def logits_of(pool: kvp.KVPool, cache: kvp.KVCache, known: int, slot: int) -> Any:
        rows, ids = [], list(prompt)
        # The chunk after the cached part has the same shape in both runs.
        cuts = [found, found + chunk, len(prompt)]
        for begin, end in zip([0, *cuts], cuts, strict=False):
            if end > known:
                part = [(slot, ids[begin:end], 0)]
                out, cache = programs.prefill(cache, part, 1)
                rows.append(np.asarray(out[0]))
        for _ in range(12):
            ids.append(int(rows[-1].argmax()))
            pool.extend(slot, len(ids))
            token, slots, lanes = (jnp.asarray([x], jnp.int32) for x in (ids[-1], slot, 0))
            out, ok, cache = programs.decode(cache, token, slots, lanes)
            assert bool(ok[0])
            rows.append(np.asarray(out[0]))
        return rows[-14:], cache

    with kvp.KVPool(_spec(4, layout), "16MiB") as pool:
        slot, cache = pool.acquire(pool.cache(), len(prompt))
        plain, cache = logits_of(pool, cache, 0, slot)
    with kvp.KVPool(_spec(4, layout), "16MiB") as pool:
        others = prompt[:found] if how == "adopted" else [*prompt[:found], *[5] * 40]
        first, _, cache = pool.acquire_prefix(pool.cache(), others)
        _, cache = programs.prefill(cache, [(first, others[:found], 0)], 1)
        if others[found:]:
            _, cache = programs.prefill(cache, [(first, others[found:], 0)], 1)
        pool.commit(first, others)
        if how != "forked":
            cache = pool.release(cache, first)
            pool.check(cache)
        slot, known, cache = pool.acquire_prefix(cache, prompt)
        assert (known, slot == first) == (found, how == "adopted")
        cached, cache = logits_of(pool, cache, known, slot)
    for want, got in zip(plain, cached, strict=True):
        np.testing.assert_array_equal(got.view(np.int32), want.view(np.int32))
