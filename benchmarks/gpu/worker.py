"""Checks one contender against float64, then times it; prints one JSON object per line.

    python benchmarks/gpu/worker.py kvpage [--sections decode,prefill] [--platform cuda]

If the contender is not installed, this reports it and exits with status 0. Lines are printed as
they are measured, so a process that is stopped loses only the remaining measurements.
"""

from __future__ import annotations

import argparse
import gc
import importlib
import json
import os
import sys
import time
import traceback
from typing import Any

import numpy as np
from cases import Case, check_cases, decode_cases, is_core, prefill_cases
from peers.base import Data
from timing import measure

# A larger error is a wrong result and not rounding: inputs are normally distributed, outputs are
# bfloat16.
_TOLERANCE = {"int8": 0.1, "fp8": 0.4}


def _error(contender: Any, case: Case, variant: str) -> float:
    data = Data(case)
    ready = contender.prepare(case, variant, data)
    try:
        off = np.abs(ready.output().astype(np.float64) - data.expected())
        return float("nan") if np.isnan(off).any() else float(off.max())
    finally:
        ready.close()


def _time(contender: Any, case: Case, variant: str, seconds: float) -> dict[str, Any]:
    ready = contender.prepare(case, variant, None)
    try:
        return measure(ready.run, ready.wait, ready.calls, seconds) | {"notes": ready.notes}
    finally:
        ready.close()


def _about(case: Case, variant: str) -> dict[str, Any]:
    return {
        "section": case.section,
        "label": case.label,
        "dtype": case.dtype,
        "variant": variant,
        "kv_bytes": case.kv_bytes,
        "flops": case.flops,
        "tokens": case.tokens,
        "copies": case.copies,
        "core": is_core(case),
    }


class Worker:
    """Checks and times one contender.

    Args:
        name: module below `contenders/`.
        platform: "cuda", or "cpu" to test the script.
        answers: stream for the lines.
    """

    def __init__(self, name: str, platform: str, answers: Any) -> None:
        self.name = name
        self._answers = answers
        self._wrong: dict[tuple[str, str], str] = {}
        self.contender = importlib.import_module(f"contenders.{name}").CONTENDER(platform)

    def say(self, kind: str, **values: Any) -> None:
        """Prints one JSON line."""
        line = {"kind": kind, "peer": self.name, **values}
        print(json.dumps(line), file=self._answers, flush=True)

    def check(self, sections: list[str], only: list[str]) -> None:
        """Checks all variants; one that fails or is wrong in a section is not timed there."""
        for case in check_cases():
            for variant in self.contender.variants:
                if case.section not in sections or (only and variant not in only):
                    continue
                if self.contender.unsupported(case, variant):
                    continue
                about = {"section": case.section, "label": case.label, "variant": variant}
                try:
                    error = 0.0 if variant == "update" else _error(self.contender, case, variant)
                    if not error < _TOLERANCE.get(variant, 0.05):
                        self._leave_out(about, f"wrong: off by {error:.3g}")
                    self.say("error", **about, error=error)
                except Exception as problem:
                    self._leave_out(about, _reason(problem))
                gc.collect()

    def _leave_out(self, about: dict[str, str], reason: str) -> None:
        self._wrong[about["variant"], about["section"]] = reason
        self.say("left_out", **about, reason=reason)

    def time(self, cases: list[Case], only: list[str], seconds: float, deadline: float) -> None:
        """Times each chosen variant on each case, until the deadline."""
        for case in cases:
            for variant in self.contender.variants:
                reason = self.contender.unsupported(case, variant)
                if (only and variant not in only) or reason:
                    continue
                if not self.contender.chosen(case, variant):
                    continue
                if (variant, case.section) in self._wrong:
                    continue
                about = _about(case, variant)
                if time.monotonic() > deadline:
                    self.say("left_out", **about, reason="out of time")
                    continue
                begin = time.monotonic()
                try:
                    result = _time(self.contender, case, variant, seconds)
                    took = time.monotonic() - begin
                    self.say("record", **about, **result, wall_seconds=took)
                except Exception as problem:
                    self.say("left_out", **about, reason=_reason(problem))
                gc.collect()


def _reason(problem: Exception) -> str:
    traceback.print_exc()
    return f"{type(problem).__name__}: {problem}"[:1000]


def main() -> int:
    """Measures the chosen sections."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("contender")
    parser.add_argument("--platform", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--sections", default="decode,prefill,mixed")
    parser.add_argument("--variants", default="", help="only these")
    parser.add_argument("--core", action="store_true", help="core shapes only")
    parser.add_argument("--seconds", type=float, default=0.2, help="for each measurement")
    parser.add_argument("--limit", type=float, default=600, help="no case begins after this")
    parser.add_argument("--dry-run", action="store_true", help="tiny sizes")
    arguments = parser.parse_args()
    begin = time.monotonic()
    os.environ["JAX_PLATFORMS"] = "cpu" if arguments.platform == "cpu" else "cuda,cpu"
    # Libraries may print to stdout, so answers go to a duplicate of it.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    try:
        worker = Worker(arguments.contender, arguments.platform, answers)
        worker.say("versions", versions=worker.contender.versions())
    except Exception as problem:
        reason = f"{type(problem).__name__}: {problem}".splitlines()[0]
        line = {"kind": "absent", "peer": arguments.contender, "reason": reason}
        print(json.dumps(line), file=answers, flush=True)
        return 0
    sections = arguments.sections.split(",")
    only = [v for v in arguments.variants.split(",") if v]
    worker.check(sections, only)
    worker.say("copy", gbps=worker.contender.copy_bandwidth() / 1e9, when="before")
    cases = decode_cases(arguments.dry_run) + prefill_cases(arguments.dry_run)
    cases = [c for c in cases if c.section in sections and (is_core(c) or not arguments.core)]
    if arguments.dry_run:
        arguments.seconds = 0.01
    worker.time(cases, only, arguments.seconds, begin + arguments.limit)
    worker.say("copy", gbps=worker.contender.copy_bandwidth() / 1e9, when="after")
    return 0


if __name__ == "__main__":
    sys.exit(main())
