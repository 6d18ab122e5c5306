"""The compiled programs of the engine: a step over a ragged batch, a decode step that maps blocks,
and a scan over many decode steps.

All take the weights as a flat list of arrays, which dispatches faster than a Flax state, and the
cache as a donated pytree of a few hundred bytes. Shapes are static, so a program is compiled once
per number of tokens, not per length: idle or finished sequences stay in the batch as padding.
"""

import dataclasses
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

import jax_kvpage

from .model import Llama
from .sampling import Sampling, sample

__all__ = ["SMALLEST_PREFILL", "Programs", "ScanResult"]

SMALLEST_PREFILL = 16  # tokens of the smallest program for prompts


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class ScanResult:
    """Output of N decode steps in one program, for the lanes `[S]` of its batch.

    Attributes:
      tokens: int32 `[N, S]`.
      produced: bool `[N, S]`, whether the lane ran in that step, that is, it was not finished and
        had blocks.
      active: bool `[S]`, lanes that have not finished. An active lane that did not produce in the
        last step is waiting for blocks.
    """

    tokens: jax.Array
    produced: jax.Array
    active: jax.Array


class Programs:
    """Compiled programs of a model.

    Args:
      model: The model; its weights are shared, not copied.
      sampling: How tokens are chosen.
      stop_ids: Token ids that end a sequence.
      implementation: As for `jax_kvpage.update_and_attend`.

    Attributes:
      compile_seconds: Time spent tracing and compiling so far; throughput excludes it.
    """

    def __init__(
        self,
        model: Llama,
        sampling: Sampling,
        stop_ids: tuple[int, ...],
        implementation: str | None = None,
    ) -> None:
        self._graph, state = nnx.split(model)
        self._weights, self._tree = jax.tree.flatten(state)
        self._sampling = sampling
        self._stop_ids = stop_ids
        self._implementation = implementation
        self._compiled: dict[Any, Callable[..., Any]] = {}
        self.compile_seconds = 0.0

    def step(
        self,
        cache: jax_kvpage.KVCache,
        tokens: jax.Array,
        batch: jax_kvpage.Batch,
        rows: jax.Array,
        sequence_ids: jax.Array,
    ) -> tuple[Any, jax_kvpage.KVCache]:
        """Runs new tokens `[T]` of a ragged batch and chooses each sequence's next token.

        Args:
          cache: Donated.
          tokens: int32 `[T]`.
          batch: A batch of S sequences; prefill, chunked prefill and decode differ only in this.
          rows: int32 `[S]`, each sequence's last token in this batch.
          sequence_ids: int32 `[S]`.

        Returns:
          The tokens, int32 `[S]`, undefined for padding, and the advanced cache.
        """
        return self._call(self._step, (), cache, tokens, batch, rows, sequence_ids)

    def prefill(
        self,
        cache: jax_kvpage.KVCache,
        parts: Sequence[tuple[int, Sequence[int], int]],
        lanes: int,
    ) -> tuple[Any, jax_kvpage.KVCache]:
        """Like `step`, for new tokens of some sequences.

        The number of tokens is padded to a power of two, so that few programs are compiled.

        Args:
          cache: Donated.
          parts: For each sequence, its slot, new tokens and id.
          lanes: S; lanes after the parts are padding.
        """
        total = sum(len(tokens) for _, tokens, _ in parts)
        width = max(SMALLEST_PREFILL, 1 << (total - 1).bit_length())
        tokens = np.zeros(width, np.int32)
        slots, ids = np.full(lanes, -1, np.int32), np.zeros(lanes, np.int32)
        offsets = np.zeros(lanes + 1, np.int32)
        for lane, (slot, new, sequence_id) in enumerate(parts):
            end = offsets[lane] + len(new)
            tokens[offsets[lane] : end] = new
            slots[lane], ids[lane] = slot, sequence_id
            offsets[lane + 1 :] = end
        # Transfers are explicit, for `jax.transfer_guard("disallow")`.
        slots, offsets, tokens, rows, ids = jax.device_put(
            (slots, offsets, tokens, np.maximum(offsets[1:] - 1, 0), ids)
        )
        batch = jax_kvpage.Batch(slots, offsets, num_tokens=width)
        return self.step(cache, tokens, batch, rows, ids)

    def decode(
        self,
        cache: jax_kvpage.KVCache,
        tokens: jax.Array,
        slots: jax.Array,
        sequence_ids: jax.Array,
    ) -> tuple[Any, jax.Array, jax_kvpage.KVCache]:
        """Runs one decode step, which maps the blocks it needs.

        Args:
          cache: Donated.
          tokens: int32 `[S]`, each sequence's latest token.
          slots: int32 `[S]`, -1 for idle lanes.
          sequence_ids: int32 `[S]`.

        Returns:
          Chosen tokens int32 `[S]`; bool `[S]`, whether the lane ran: false for idle lanes and for
          those that got no block; the advanced cache.
        """
        return self._call(self._decode, (), cache, tokens, slots, sequence_ids)

    def scan(
        self,
        num_steps: int,
        cache: jax_kvpage.KVCache,
        tokens: jax.Array,
        slots: jax.Array,
        remaining: jax.Array,
        sequence_ids: jax.Array,
    ) -> tuple[ScanResult, jax_kvpage.KVCache]:
        """Runs `num_steps` decode steps in one program that maps its own blocks.

        Args:
          num_steps: Static.
          cache: Donated.
          tokens: int32 `[S]`, each sequence's latest token.
          slots: int32 `[S]`, -1 for idle lanes.
          remaining: int32 `[S]`, tokens that each sequence may still produce.
          sequence_ids: int32 `[S]`.
        """
        return self._call(self._scan, (num_steps,), cache, tokens, slots, remaining, sequence_ids)

    def _call(self, function: Callable[..., Any], static: tuple[int, ...], *args: Any) -> Any:
        if jax.config.jax_disable_jit:  # ahead-of-time compilation is not possible
            return function(*static, self._weights, *args)
        shapes = tuple((leaf.shape, leaf.dtype) for leaf in jax.tree.leaves(args))
        key = (function.__name__, static, args[0].spec, shapes)
        compiled = self._compiled.get(key)
        if compiled is None:
            begin = time.monotonic()
            count = len(static)
            program = jax.jit(
                function, static_argnums=tuple(range(count)), donate_argnums=(count + 1,)
            )
            compiled = program.lower(*static, self._weights, *args).compile()
            self._compiled[key] = compiled
            self.compile_seconds += time.monotonic() - begin
        return compiled(self._weights, *args)

    def _step(
        self,
        weights: list[jax.Array],
        cache: jax_kvpage.KVCache,
        tokens: jax.Array,
        batch: jax_kvpage.Batch,
        rows: jax.Array,
        sequence_ids: jax.Array,
    ) -> tuple[Any, jax_kvpage.KVCache]:
        logits, cache = self._logits(weights, cache, tokens, batch, rows)
        cache = jax_kvpage.advance(cache, batch)
        # The chosen token comes right after the written ones.
        next_positions = jax_kvpage.positions(cache, jax_kvpage.Batch.decode(batch.slots))
        return self._choose(logits, sequence_ids, next_positions), cache

    def _logits(
        self,
        weights: list[jax.Array],
        cache: jax_kvpage.KVCache,
        tokens: jax.Array,
        batch: jax_kvpage.Batch,
        rows: jax.Array,
    ) -> tuple[jax.Array, jax_kvpage.KVCache]:
        """The model's logits for these rows; traced. Subclasses may run the model elsewhere."""
        model = nnx.merge(self._graph, jax.tree.unflatten(self._tree, weights))
        return model(tokens, cache, batch, rows=rows, implementation=self._implementation)

    def _choose(self, logits: jax.Array, sequence_ids: jax.Array, positions: jax.Array) -> Any:
        """Chooses the next tokens from the logits; traced. Subclasses may return something else."""
        return sample(logits, sequence_ids, positions, self._sampling)

    def _decode(
        self,
        weights: list[jax.Array],
        cache: jax_kvpage.KVCache,
        tokens: jax.Array,
        slots: jax.Array,
        sequence_ids: jax.Array,
    ) -> tuple[Any, jax.Array, jax_kvpage.KVCache]:
        batch = jax_kvpage.Batch.decode(slots)
        cache, ok = jax_kvpage.grow(cache, batch)
        rows = jnp.arange(slots.shape[0], dtype=jnp.int32)
        chosen, cache = self._step(weights, cache, tokens, batch.mask(ok), rows, sequence_ids)
        return chosen, ok & (slots >= 0), cache

    def _scan(
        self,
        num_steps: int,
        weights: list[jax.Array],
        cache: jax_kvpage.KVCache,
        tokens: jax.Array,
        slots: jax.Array,
        remaining: jax.Array,
        sequence_ids: jax.Array,
    ) -> tuple[ScanResult, jax_kvpage.KVCache]:
        stop_ids = jnp.asarray(self._stop_ids, jnp.int32)

        def body(carry: tuple[Any, ...], _: None) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
            cache, tokens, remaining, active = carry
            mine = jnp.where(active, slots, -1)
            chosen, produced, cache = self._decode(weights, cache, tokens, mine, sequence_ids)
            tokens = jnp.where(produced, chosen, tokens)
            remaining = remaining - produced.astype(jnp.int32)
            stopped = (remaining <= 0) | jnp.isin(chosen, stop_ids)
            active = active & ~(produced & stopped)
            return (cache, tokens, remaining, active), (tokens, produced)

        active = (slots >= 0) & (remaining > 0)
        carry = (cache, tokens, remaining, active)
        (cache, _, _, active), (out, produced) = jax.lax.scan(body, carry, length=num_steps)
        return ScanResult(out, produced, active), cache
