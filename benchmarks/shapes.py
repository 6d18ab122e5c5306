"""The measured cases: batches of sequences, their sizes, and their bytes and operations.

Llama-3-8B's attention: 32 query heads over 8 key/value heads of size 128. A case is sent to the
peers' processes as JSON; each generates the same data for it.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

__all__ = ["Case", "check_cases", "decode_cases", "mixed_cases", "prefill_cases"]

# A cycle over all copies of a case accesses at least this much, so that no copy is still in the
# last level cache (32 MiB on the target machines) in the next cycle.
CYCLE_BYTES = 128 * 2**20
MAX_COPIES = 64
# A compiled program runs up to this many copies one after the other, as a step runs its layers.
LAYERS_PER_PROGRAM = 8
ITEM_BYTES = {"float32": 4, "bfloat16": 2}


@dataclasses.dataclass(frozen=True)
class Case:
    """A batch: sequence s has `contexts[s]` tokens, the last `new[s]` of which are queries.

    Attributes:
        section: "decode", "prefill" or "mixed".
        label: name of the shape.
        contexts: tokens of each sequence, including the new ones.
        new: new tokens of each sequence, its last ones.
        dtype: "float32" or "bfloat16", for queries and the cache.
        copies: number of caches of this shape in a cycle.
        q_heads, kv_heads, dim: shape of the attention.
    """

    section: str
    label: str
    contexts: tuple[int, ...]
    new: tuple[int, ...]
    dtype: str
    copies: int = 1
    q_heads: int = 32
    kv_heads: int = 8
    dim: int = 128

    @property
    def group(self) -> int:
        """Query heads that share a key/value head."""
        return self.q_heads // self.kv_heads

    @property
    def tokens(self) -> int:
        """Queries of the batch."""
        return sum(self.new)

    @property
    def kv_bytes(self) -> int:
        """Bytes of the valid keys and values of one copy, which decode must read."""
        return 2 * sum(self.contexts) * self.kv_heads * self.dim * ITEM_BYTES[self.dtype]

    @property
    def flops(self) -> int:
        """Operations of the two products of one copy, without masked pairs.

        A full prompt of S tokens counts as half of 4 S^2 D H, as is usual.
        """
        pairs = 0.0
        for context, new in zip(self.contexts, self.new, strict=True):
            pairs += new * (context - new) + (new * new / 2 if new > 1 else 1)
        return int(4 * pairs * self.q_heads * self.dim)

    @property
    def offsets(self) -> list[int]:
        """Where each sequence's queries begin; [S + 1]."""
        sums = [0]
        for new in self.new:
            sums.append(sums[-1] + new)
        return sums

    def to_json(self) -> dict[str, Any]:
        """As a JSON object."""
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> Case:
        """The case from the result of `to_json`."""
        return cls(**values | {"contexts": tuple(values["contexts"]), "new": tuple(values["new"])})


def _with_copies(case: Case) -> Case:
    copies = min(math.ceil(CYCLE_BYTES / case.kv_bytes), MAX_COPIES)
    if copies > LAYERS_PER_PROGRAM:
        copies = math.ceil(copies / LAYERS_PER_PROGRAM) * LAYERS_PER_PROGRAM
    return dataclasses.replace(case, copies=copies)


def ragged(batch: int, length: int) -> tuple[int, ...]:
    """Contexts spread evenly over [length / 2, length], in an order that is not sorted."""
    half = length // 2
    spread = [half + (2 * i + 1) * half // (2 * batch) for i in range(batch)]
    step = 5 if batch % 5 else 7  # coprime with the batch: a permutation
    return tuple(spread[i * step % batch] for i in range(batch))


def decode_cases(dtypes: list[str], quick: bool = False) -> list[Case]:
    """One new token per sequence, batch {1, 8, 32} x length {512, 2048, 8192}."""
    grid = [(b, n) for n in (512, 2048, 8192) for b in (1, 8, 32)]
    if quick:
        grid = [(1, 512), (8, 2048)]
    return [
        _with_copies(Case("decode", f"B{b} L{n}", ragged(b, n), (1,) * b, dtype))
        for dtype in dtypes
        for b, n in grid
    ]


def prefill_cases(dtypes: list[str], quick: bool = False) -> list[Case]:
    """A full prompt of 2048 tokens."""
    size = 512 if quick else 2048
    return [Case("prefill", f"S{size}", (size,), (size,), dtype) for dtype in dtypes]


def mixed_cases(dtypes: list[str], quick: bool = False) -> list[Case]:
    """Batches of a server: decodes together with a chunk of a prompt, and chunks alone."""
    lots = 7 if quick else 31
    decodes = ragged(lots, 2048)
    return [
        case
        for dtype in dtypes
        for case in (
            Case(
                "mixed", f"{lots} decodes + chunk 512", (*decodes, 2048), (*(1,) * lots, 512), dtype
            ),
            Case("mixed", "chunk 512 after 7680", (8192,), (512,), dtype),
            Case("mixed", "8 prompts of 96-192", ragged(8, 192), ragged(8, 192), dtype),
        )
    ]


def check_cases(dtype: str) -> list[Case]:
    """Small shapes on which every peer's result is compared with NumPy before it is timed."""
    return [
        Case("decode", "check", (37, 300, 5), (1, 1, 1), dtype),
        Case("prefill", "check", (70,), (70,), dtype),
        Case("mixed", "check", (40, 90, 33), (1, 20, 33), dtype),
    ]
