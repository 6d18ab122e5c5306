"""The part of the sharing state machine (test_sharing_state_machine.py) that drops the beginnings
of sequences.
"""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from harness import make_batch
from sharing_machine import HAS_FAKE_DRIVER, MAX_SEQ_LEN, SLOTS, SequencesMachine
from sharing_model import DIM, HEADS, LAYERS

import jax_kvpage as kvp


@functools.partial(jax.jit, static_argnames="addressing")
def _read_rests(
    cache: kvp.KVCache, batch: kvp.Batch, begins: jax.Array, addressing: str
) -> tuple[jax.Array, jax.Array]:
    """Returns values and key sums of sequences from `begins` [slots] on, in all layers: with a
    window of one token, attention returns its value, and its score as lse.
    """
    before = dataclasses.replace(cache, lengths=jnp.where(begins > 0, begins, cache.lengths))
    q = jnp.ones((SLOTS * MAX_SEQ_LEN, HEADS, DIM), jnp.float32)
    both = [
        kvp.paged_attention(
            q, before, batch, layer=layer, scale=1.0, sliding_window=1, return_lse=True,
            addressing=addressing,
        )
        for layer in range(LAYERS)
    ]  # fmt: skip
    return jnp.stack([out for out, _ in both]), jnp.stack([lse for _, lse in both])


class DroppingMachine(SequencesMachine):
    """Adds `drop_before`."""

    def drop_before(self, several: set[int], share: float, n: int) -> None:
        """Full blocks at the beginning are freed; other slots keep what they share."""
        slots = sorted({self._pick(i) for i in several})[: 1 + n]
        begins = [int(share * len(self.live[slot].tokens)) for slot in slots]
        result = self._claim(0, 0, lambda cache: self.pool.drop_before(cache, slots, begins))
        if result is None:
            return
        self.cache = result
        for slot, begin in zip(slots, begins, strict=True):
            self.model.drop(slot, begin)

    def check_rests(self) -> None:
        """Checks the tokens behind the dropped beginnings."""
        dropped = {slot: seq for slot, seq in sorted(self.live.items()) if seq.dropped}
        if not dropped:
            return
        begins = np.zeros(SLOTS, np.int32)
        for slot, seq in dropped.items():
            begins[slot] = seq.dropped
        rests = [(slot, len(seq.tokens) - seq.dropped) for slot, seq in dropped.items()]
        batch = make_batch(rests, SLOTS)
        for addressing in ("slots",) if HAS_FAKE_DRIVER else ("slots", "table"):
            values, scores = map(np.asarray, _read_rests(self.cache, batch, begins, addressing))
            at = 0
            for slot, n in rests:
                for layer in range(LAYERS):
                    k, v = self.model.contents(slot, layer)[:, begins[slot] :]
                    got, score = values[layer, at : at + n], scores[layer, at : at + n]
                    np.testing.assert_allclose(got, v, rtol=1e-5, err_msg=f"slot {slot}")
                    np.testing.assert_allclose(score, k.sum(-1), rtol=1e-4, atol=1e-3)
                at += n
