"""Loss of accuracy from reusing a segment at other positions, by the share that is recomputed.

    python benchmarks/partial_reuse.py [--quick] [--json]

A prompt is [other text][document][continuation]. The document's keys and values were computed after
a start token only, or with nothing before it. The first share of it is run through the model in the
prompt, and the rest is reused (`KVPool.reuse_segment`); then the continuation is run, and the
logits at each of its tokens are compared with those of a prompt that was computed in full. The
model is the one that ships with the examples, in float32, on texts held out from its training.
"""

from __future__ import annotations

import pathlib
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import script
from flax import nnx
from numpy.typing import NDArray

import jax_kvpage as kvp

sys.path.append(str(pathlib.Path(__file__).parents[1] / "examples"))

from llama import corpus
from llama.arguments import BUNDLED
from llama.checkpoint import load_model
from llama.model import Llama
from llama.tokenizer import Tokenizer

__all__ = ["SHARES", "Reuser", "compare", "measure"]

SHARES = (0, 5, 10, 15, 25, 50, 100)
_OTHER, _DOCUMENT, _CONTINUATION = 127, 192, 32
_START = 0  # the token that begins every text

Ids = Sequence[int]
Logits = NDArray[np.float32]


class Reuser:
    """A model and a pool with a few slots, in which prompts are computed fully or in part."""

    def __init__(self, model: Llama) -> None:
        config = model.config
        self._inv_freq = config.rope.inverse_frequencies(config.head_dim)
        spec = kvp.CacheSpec(
            config.num_hidden_layers,
            config.num_key_value_heads,
            config.head_dim,
            max_slots=4,
            max_seq_len=512,
            dtype=jnp.float32,
        )
        self.pool = kvp.KVPool(spec, "64MiB")
        self.cache = self.pool.cache()
        graph, state = nnx.split(model)

        def step(state: Any, cache: kvp.KVCache, tokens: jax.Array, batch: kvp.Batch) -> Any:
            logits, cache = nnx.merge(graph, state)(tokens, cache, batch)
            return logits, kvp.advance(cache, batch)

        compiled = jax.jit(step, donate_argnums=1)
        self._step: Callable[..., Any] = lambda *rest: compiled(state, *rest)

    def run(self, slot: int, ids: Ids) -> Logits:
        """Runs new tokens of a sequence; returns the logits of each."""
        if not len(ids):
            return np.zeros((0, 0), np.float32)
        batch = kvp.Batch.from_lengths([slot], [len(ids)])
        logits, self.cache = self._step(self.cache, jnp.asarray(ids, jnp.int32), batch)
        self.pool.commit(slot, ids)
        return np.asarray(logits)

    def compute(self, ids: Ids) -> int:
        """Computes these tokens in a new slot and returns it."""
        slot, self.cache = self.pool.acquire(self.cache, len(ids))
        self.run(slot, ids)
        return slot

    def prompt(
        self,
        before: Ids,
        document: Ids,
        after: Ids,
        source: int,
        share: float,
        begin: int = 1,
        rotated: bool = True,
    ) -> Logits:
        """The logits of the tokens `after` a document, part of which is reused.

        Args:
            before: tokens before the document.
            document: tokens of the document.
            after: tokens after the document.
            source: a slot that has the document.
            share: share of the document to recompute, 0 to 1.
            begin: position of the document in `source`; 1: after a start token.
            rotated: False keeps the old angles of the keys, which is wrong.
        """
        recomputed = round(share * len(document))
        slot, self.cache = self.pool.acquire(
            self.cache, len(before) + len(document) + len(after), wait=True
        )
        self.run(slot, before)
        self.run(slot, document[:recomputed])
        self.cache = self.pool.reuse_segment(
            self.cache,
            slot,
            source,
            begin + recomputed,
            len(document) - recomputed,
            inv_freq=self._inv_freq if rotated else np.zeros_like(self._inv_freq),
        )
        self.pool.commit(slot, document[recomputed:])
        logits = self.run(slot, after)
        self.cache = self.pool.release(self.cache, slot)
        return logits

    def without(self, before: Ids, after: Ids) -> Logits:
        """The logits of the tokens `after` a prompt without the document."""
        slot = self.compute(before)
        self.pool.extend(slot, len(before) + len(after))
        logits = self.run(slot, after)
        self.cache = self.pool.release(self.cache, slot)
        return logits


def _log_softmax(logits: Logits) -> NDArray[np.float64]:
    x = np.asarray(logits, np.float64)
    x = x - x.max(axis=-1, keepdims=True)
    return x - np.log(np.exp(x).sum(axis=-1, keepdims=True))


def compare(full: Logits, got: Logits) -> dict[str, float]:
    """Compares logits [n, vocab] with those of a full computation."""
    right, log = _log_softmax(full), _log_softmax(got)
    error = np.abs(np.asarray(full, np.float64) - got)
    return {
        "max abs": float(error.max()),
        "mean abs": float(error.mean()),
        "KL, nats": float((np.exp(right) * (right - log)).sum(axis=-1).mean()),
        "same top token": float((full.argmax(axis=-1) == got.argmax(axis=-1)).mean()),
    }


def _texts(count: int) -> Iterator[tuple[Ids, Ids, Ids]]:
    """Yields (before, document, after) of held-out texts; `before` is from another text."""
    tokenizer = Tokenizer(BUNDLED, 2048)
    length = _DOCUMENT + _CONTINUATION
    encoded = [
        tokenizer.encode(text, special=False) for text in corpus.build() if corpus.is_held_out(text)
    ]
    long = [ids for ids in encoded if len(ids) >= length]
    for i in range(min(count, len(long))):
        other, ids = long[i - 1][:_OTHER], long[i]
        yield [_START, *other], ids[:_DOCUMENT], ids[_DOCUMENT:length]


def _rows(table: dict[str, list[dict[str, float]]]) -> list[dict[str, Any]]:
    """For each row of a table, the largest "max abs" over its texts, and means of the others."""
    rows = []
    for name, trials in table.items():
        row: dict[str, Any] = {"recomputed": name, "texts": len(trials)}
        for key in trials[0]:
            values = [trial[key] for trial in trials]
            row[key] = max(values) if key == "max abs" else float(np.mean(values))
        rows.append(row)
    return rows


def measure(quick: bool) -> dict[str, Any]:
    """Measures a table for each source of the document, by share, and a table of controls."""
    reuser = Reuser(load_model(BUNDLED, dtype=jnp.float32))
    found: dict[str, dict[str, list[dict[str, float]]]] = {}

    def note(table: str, row: str, full: Logits, got: Logits) -> None:
        found.setdefault(table, {}).setdefault(row, []).append(compare(full, got))

    for before, document, after in _texts(4 if quick else 64):
        sources = {"behind a start token": 1, "with nothing before it": 0}
        for name, begin in sources.items():
            source = reuser.compute([_START, *document][1 - begin :])
            full = reuser.prompt(before, document, after, source, 1.0, begin)
            for share in SHARES:
                got = reuser.prompt(before, document, after, source, share / 100, begin)
                note(f"a document computed {name}", f"{share}%", full, got)
            if begin:
                got = reuser.prompt(before, document, after, source, 0.0, rotated=False)
                note("controls", "0%, keys not rotated", full, got)
                note("controls", "document left out", full, reuser.without(before, after))
            reuser.cache = reuser.pool.release(reuser.cache, source)
        reuser.pool.check(reuser.cache)
    reuser.pool.close()
    return {"tables": {name: _rows(table) for name, table in found.items()}}


if __name__ == "__main__":
    script.run(__doc__, measure)
