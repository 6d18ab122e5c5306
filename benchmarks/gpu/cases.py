"""The cases measured on a GPU: Llama-3-8B's attention (32 query heads over 8 KV heads of size 128).

`shapes.Case` of the CPU suite, with sizes that fill the GPU: every call reads device memory,
because the copies of a case together are several times larger than the last level cache.
"""

from __future__ import annotations

import dataclasses
import math
import pathlib
import sys

sys.path.append(str(pathlib.Path(__file__).resolve().parents[1]))

from shapes import Case, ragged

__all__ = ["LAYERS_PER_PROGRAM", "Case", "check_cases", "decode_cases", "is_core", "prefill_cases"]

# The largest L2 of the target GPUs has 60 MB.
CYCLE_BYTES = 256 * 2**20
MAX_COPIES = 64
# A compiled program runs up to this many copies one after the other: the layers of the model.
LAYERS_PER_PROGRAM = 32
_BATCHES = (1, 8, 64)
_LENGTHS = (1024, 8192, 32768)
_CORE = ((64, 8192), (8, 8192), (1, 32768), (64, 1024))
_DRY = ((2, 64),)


def _case(section: str, label: str, contexts: tuple[int, ...], new: tuple[int, ...]) -> Case:
    case = Case(section, label, contexts, new, "bfloat16")
    copies = min(math.ceil(CYCLE_BYTES / case.kv_bytes), MAX_COPIES)
    if copies > LAYERS_PER_PROGRAM:
        copies = MAX_COPIES
    return dataclasses.replace(case, copies=copies)


def is_core(case: Case) -> bool:
    """Whether variants that skip some shapes run on this one."""
    return case.section != "decode" or any(
        case.label.startswith(f"B{b} L{n} ") for b, n in (*_CORE, *_DRY)
    )


def decode_cases(dry: bool = False) -> list[Case]:
    """One new token per sequence; full: all contexts are L, ragged: spread over [L / 2, L].

    The most important shapes come first, so that a run that is cut short has measured them.
    """
    grid = [*_CORE, *((b, n) for n in _LENGTHS for b in _BATCHES if (b, n) not in _CORE)]
    if dry:
        grid = list(_DRY)
    return [
        dataclasses.replace(case, copies=2) if dry else case
        for b, n in grid
        for case in (
            _case("decode", f"B{b} L{n} full", (n,) * b, (1,) * b),
            _case("decode", f"B{b} L{n} ragged", ragged(b, n), (1,) * b),
        )
    ]


def prefill_cases(dry: bool = False) -> list[Case]:
    """Full prompts, a chunk after a long context, and a mixed batch of a server."""
    unit = 32 if dry else 2048
    decodes = ragged(7 if dry else 63, unit)
    cases = [
        _case("prefill", f"1 x {unit}", (unit,), (unit,)),
        _case("prefill", f"1 x {4 * unit}", (4 * unit,), (4 * unit,)),
        _case("prefill", f"8 x {unit}", (unit,) * 8, (unit,) * 8),
        _case("mixed", f"chunk {unit // 4} after {4 * unit}", (17 * unit // 4,), (unit // 4,)),
        _case(
            "mixed",
            f"{len(decodes)} decodes + chunk {unit // 4}",
            (*decodes, unit),
            (*(1,) * len(decodes), unit // 4),
        ),
    ]
    return [dataclasses.replace(case, copies=min(case.copies, 2 if dry else 4)) for case in cases]


def check_cases() -> list[Case]:
    """Small shapes on which results are compared with float64 before anything is timed."""
    return [
        Case("decode", "check ragged", (37, 300, 5), (1, 1, 1), "bfloat16"),
        Case("decode", "check full", (96, 96), (1, 1), "bfloat16"),
        Case("prefill", "check", (70,), (70,), "bfloat16"),
        Case("mixed", "check", (40, 90, 33), (1, 20, 33), "bfloat16"),
    ]
