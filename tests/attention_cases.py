"""Random ragged batches for attention, and the pools they run on, for all platforms.

Sequences are any mix of decode (one new token), prefill (empty context), chunked prefill, no new
tokens, and padding. Blocks are scattered by growing slots in turns. Pools live through all
examples, so slots and blocks are recycled while they still hold other requests' data, or NaN if
the pool poisons released memory.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from harness import Rig
from hypothesis import strategies as st
from reference_numpy import Variant, check_lse, check_output

import jax_kvpage as kvp

_MAX_SEQ_LEN = 200
_TOKENS = 48
_SEQUENCES = 6


@dataclasses.dataclass(frozen=True)
class Config:
    layout: str
    storage: str
    query: str
    num_kv_heads: int
    group: int
    head_dim: int
    poison: bool = True

    def __str__(self) -> str:
        heads = f"{self.group * self.num_kv_heads}over{self.num_kv_heads}x{self.head_dim}"
        return f"{self.layout}-{self.storage}-{self.query}-{heads}{'-poison' * self.poison}"


CONFIGS = [
    Config("fused", "float32", "float32", 2, 2, 64),
    Config("per_layer", "float32", "float32", 2, 1, 32),
    Config("fused", "bfloat16", "bfloat16", 2, 4, 128),
    Config("per_layer", "bfloat16", "bfloat16", 1, 8, 64),
    Config("fused", "float16", "float16", 3, 2, 96),
    Config("per_layer", "float16", "float16", 2, 2, 256),
    Config("fused", "bfloat16", "float32", 1, 3, 80, poison=False),
    Config("per_layer", "float32", "bfloat16", 4, 1, 64, poison=False),
    Config("fused", "float16", "bfloat16", 2, 5, 48),
    Config("per_layer", "bfloat16", "float16", 2, 2, 128),
    Config("fused", "float32", "float16", 1, 4, 256),
    Config("per_layer", "float16", "float32", 5, 1, 112, poison=False),
    Config("fused", "int8", "float32", 2, 4, 128),
    Config("per_layer", "int8", "bfloat16", 3, 2, 80),
    Config("fused", "float8_e4m3fn", "float16", 2, 3, 96, poison=False),
    Config("per_layer", "float8_e4m3fn", "float32", 1, 8, 64),
]
XLA_CONFIGS = [CONFIGS[i] for i in (0, 3, 5, 8, 12, 15)]


@dataclasses.dataclass(frozen=True)
class Case:
    before: tuple[int, ...]  # context lengths
    new: tuple[int, ...]
    padding: tuple[bool, ...]
    variant: Variant
    scattered: bool
    one_call: bool
    chunk: int
    seed: int


@st.composite
def cases(draw: st.DrawFn, config: Config, few_programs: bool = False) -> Case:
    """Draws random batches. With `few_programs`, variants are all on or all off, for platforms on
    which compiling is slow.
    """
    before, new, padding, left = [], [], [], _TOKENS
    for _ in range(draw(st.integers(1, _SEQUENCES))):
        mode = draw(st.sampled_from(["decode", "prefill", "chunk", "none", "padding"]))
        n = {"decode": 1, "none": 0}.get(mode, draw(st.integers(1, 40)))
        n = min(n, left)
        left -= n
        limit = _MAX_SEQ_LEN - n
        before.append(0 if mode == "prefill" else draw(st.integers(0, limit)))
        new.append(n)
        padding.append(mode == "padding")
    heads = config.group * config.num_kv_heads
    seed = draw(st.integers(0, 2**31))
    rng = np.random.default_rng(seed)
    variant = Variant(
        scale=0.3,
        sliding_window=draw(st.integers(1, _MAX_SEQ_LEN + 10)),
        logits_soft_cap=5.0,
        sinks=rng.normal(0, 2, heads).astype(np.float32),
        alibi_slopes=rng.uniform(0, 0.5, heads).astype(np.float32),
    )
    names = [field.name for field in dataclasses.fields(Variant)]
    if few_programs:
        off = draw(st.sampled_from([[], names]))
    else:
        off = draw(st.lists(st.sampled_from(names), unique=True))
    variant = dataclasses.replace(variant, **dict.fromkeys(off))
    return Case(
        tuple(before),
        tuple(new),
        tuple(padding),
        variant,
        scattered=draw(st.booleans()),
        one_call=draw(st.booleans()),
        chunk=draw(st.sampled_from([7, 16, 40, _MAX_SEQ_LEN])),
        seed=seed,
    )


class Rigs:
    """One pool per configuration for the whole run, so that recycling is tested too.

    Args:
        capacity: Capacity of each pool; None means as much as all its slots can need.
        block_tokens: Block size of fused pools, where a block may be padded to the mapping
            granularity.
    """

    def __init__(self, capacity: str | None = "64MiB", block_tokens: int | None = None) -> None:
        self._capacity, self._block_tokens = capacity, block_tokens
        self._rigs: dict[Config, Rig] = {}

    def close(self) -> None:
        while self._rigs:
            self._rigs.popitem()[1].pool.close()

    def _rig(self, config: Config) -> Rig:
        if config in self._rigs:
            return self._rigs[config]
        spec = kvp.CacheSpec(
            num_layers=2,
            num_kv_heads=config.num_kv_heads,
            head_dim=config.head_dim,
            max_slots=_SEQUENCES + 2,
            max_seq_len=_MAX_SEQ_LEN,
            dtype=jnp.dtype(config.storage),
            layout=config.layout,
            block_tokens=self._block_tokens if config.layout == "fused" else None,
        )
        capacity: str | int | None = self._capacity
        if capacity is None:
            spec = spec.resolve("cuda" if jax.default_backend() == "gpu" else "cpu")
            blocks = spec.max_slots * spec.num_ranges * spec.blocks_per_range
            capacity = blocks * spec.block_bytes
        pool = kvp.KVPool(spec, capacity, poison=config.poison)
        self._rigs[config] = Rig(
            pool,
            group=config.group,
            query_dtype=jnp.dtype(config.query),
            max_tokens=_TOKENS,
            max_sequences=_SEQUENCES,
        )
        return self._rigs[config]

    def check(self, config: Config, case: Case, implementation: str | None) -> None:
        """Runs the case's step and compares it with float64."""
        rig = self._rig(config)
        rig.rng = np.random.default_rng(case.seed)
        live = [s for s, is_padding in enumerate(case.padding) if not is_padding]
        wanted = [case.before[s] + case.new[s] for s in live]
        try:
            if case.scattered:
                owned = rig.acquire_scattered([max(n, 1) for n in wanted])
            else:
                owned = [rig.acquire(n) for n in wanted]
            slots = dict(zip(live, owned, strict=True))
            for start in range(0, _MAX_SEQ_LEN, case.chunk):
                chunk = {slots[s]: min(case.chunk, case.before[s] - start) for s in live}
                rig.write({slot: n for slot, n in chunk.items() if n > 0})
            sequences = [(slots.get(s, -1), n) for s, n in enumerate(case.new)]
            out, lse, want_out, want_lse = rig.step(
                sequences, case.variant, one_call=case.one_call, implementation=implementation
            )
            # |v| <= 6 for this many normal samples, which bounds any average of them.
            check_output(out, want_out, config.query, 6.0, sequences)
            check_lse(lse, want_lse, sequences)
            rig.check_lengths()
            rig.release(*owned)
        except BaseException:
            # A failing example must leave a usable pool for the smaller examples that Hypothesis
            # tries next.
            self._rigs.pop(config).pool.close()
            raise
