"""Compares the peers, each in its own process, in turns, so that all see the same machine.

A turn sets up a case in a peer's process, measures the floor, the peer and the floor again, and
frees everything. Repeats are the outermost loop and the order of the peers rotates, so that a slow
period of the machine affects all of them.
"""

from __future__ import annotations

import json
import os
import pathlib
import statistics
import subprocess
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from shapes import ITEM_BYTES, Case, check_cases

__all__ = ["Contender", "Duel", "PeerProcess", "summarise"]

_WORKER = pathlib.Path(__file__).with_name("worker.py")
# A larger error is a wrong result and not rounding: inputs are normally distributed.
_TOLERANCE = {"float32": 1e-4, "bfloat16": 5e-2, "int8": 0.1, "fp8": 0.4}

Contender = tuple[str, str]  # peer, variant


class PeerProcess:
    """A peer's process (`worker.py`).

    Args:
        name: module below `peers/`, optionally followed by "@" and a label.
        python: interpreter that has the peer installed.
        log: file for its standard error.
        environment: additional environment variables of the process.
    """

    def __init__(
        self,
        name: str,
        python: str,
        log: pathlib.Path,
        environment: dict[str, str] | None = None,
    ) -> None:
        self.name = name
        self._log = log.open("w")
        # -u: the worker reads line by line; PYTHONPATH reaches interpreters that have our package.
        self._process = subprocess.Popen(
            [python, "-u", str(_WORKER), name.partition("@")[0]],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
            env={**os.environ, **(environment or {})},
        )

    def ask(self, **request: Any) -> dict[str, Any]:
        """Sends a request and waits for the answer, which is `failed` if the process has died."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        try:
            self._process.stdin.write(json.dumps(request) + "\n")
            self._process.stdin.flush()
            line = self._process.stdout.readline()
        except BrokenPipeError:
            line = ""
        if line:
            return json.loads(line)
        return {"failed": f"the process ended with status {self._process.wait()}"}

    def close(self) -> None:
        """Ends the process."""
        if self._process.stdin is not None:
            self._process.stdin.close()
        try:
            self._process.wait(timeout=20)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._log.close()


class Duel:
    """Checks and measures the available peers.

    Args:
        pythons: interpreter of each peer, by name.
        folder: folder for the processes' logs.
        say: called with progress messages.
        environments: additional environment variables of a peer's process, by name.

    Attributes:
        versions: versions of each available peer.
        absent: why a peer is not available.
        errors: the largest error of each peer, variant and dtype against float64.
        records: a record for each case, peer and variant: see `summarise`.
    """

    def __init__(
        self,
        pythons: dict[str, str],
        folder: pathlib.Path,
        say: Callable[[str], None],
        environments: dict[str, dict[str, str]] | None = None,
    ) -> None:
        self._say = say
        self._processes: dict[str, PeerProcess] = {}
        self._contenders: list[Contender] = []
        self._turns: dict[tuple[Case, Contender], list[dict[str, Any]]] = {}
        self._given_up: dict[tuple[Contender, str], str] = {}
        self.versions: dict[str, dict[str, str]] = {}
        self.absent: dict[str, str] = {}
        self.errors: list[dict[str, Any]] = []
        for name, python in pythons.items():
            try:
                environment = (environments or {}).get(name)
                process = PeerProcess(name, python, folder / f"{name}.log", environment)
            except OSError as error:
                self.absent[name] = f"its interpreter does not start: {error}"
                continue
            answer = process.ask(op="hello")
            if "versions" not in answer:
                self.absent[name] = answer.get("absent") or answer.get("failed", "no answer")
                process.close()
                continue
            self._processes[name] = process
            self.versions[name] = answer["versions"]
            self._contenders += [(name, variant) for variant in answer["variants"]]

    def close(self) -> None:
        """Ends all processes."""
        for process in self._processes.values():
            process.close()

    def check(self, dtypes: Iterable[str]) -> None:
        """Compares every peer with float64 on small cases; those that are wrong are not timed."""
        for dtype in dtypes:
            for case in check_cases(dtype):
                for contender in self._contenders:
                    answer = self._ask("check", case, contender)
                    if "error" in answer:
                        entry = {"peer": contender[0], "variant": contender[1], "dtype": dtype}
                        self.errors.append(entry | {"section": case.section} | answer)
                        if not answer["error"] < _TOLERANCE.get(contender[1], _TOLERANCE[dtype]):
                            self._give_up(contender, case, f"wrong: error {answer['error']:.3g}")

    def _ask(self, op: str, case: Case, contender: Contender, **more: Any) -> dict[str, Any]:
        if (contender, case.section + case.dtype) in self._given_up:
            return {}
        name, variant = contender
        answer = self._processes[name].ask(op=op, case=case.to_json(), variant=variant, **more)
        if "failed" in answer:
            self._give_up(contender, case, answer["failed"])
        elif "unsupported" in answer:
            self._given_up[contender, case.section + case.dtype] = answer["unsupported"]
            if case.section == "mixed":  # support depends on the case
                del self._given_up[contender, case.section + case.dtype]
        return answer

    def _give_up(self, contender: Contender, case: Case, reason: str) -> None:
        name = " ".join(contender).strip()
        self._say(f"{name} is left out of {case.section} {case.dtype}: {reason.splitlines()[0]}")
        self._given_up[contender, case.section + case.dtype] = reason

    def run(self, cases: list[Case], repeats: int, seconds: float, deadline: float) -> None:
        """Measures all cases; stops between repeats when `deadline` (monotonic) has passed."""
        for repeat in range(repeats):
            begin = time.monotonic()
            for number, case in enumerate(cases):
                self._say(f"repeat {repeat + 1}: {case.section} {case.label} {case.dtype}")
                for contender in _rotated(self._contenders, repeat + number):
                    if repeat and time.monotonic() > deadline:
                        self._say(f"out of time in repeat {repeat + 1}")
                        return
                    answer = self._ask("turn", case, contender, seconds=seconds)
                    if "seconds" in answer:
                        self._turns.setdefault((case, contender), []).append(answer)
            self._say(f"repeat {repeat + 1} took {time.monotonic() - begin:.0f} s")

    @property
    def failures(self) -> list[dict[str, str]]:
        """Skipped cases and the reasons."""
        return [
            {"peer": contender[0], "variant": contender[1], "what": what, "reason": reason}
            for (contender, what), reason in self._given_up.items()
        ]

    @property
    def records(self) -> list[dict[str, Any]]:
        """All measurements, summarised."""
        return [
            summarise(case, *contender, turns) for (case, contender), turns in self._turns.items()
        ]


def _rotated(contenders: list[Contender], by: int) -> Iterator[Contender]:
    by %= max(len(contenders), 1)
    yield from contenders[by:]
    yield from contenders[:by]


def summarise(case: Case, peer: str, variant: str, turns: list[dict[str, Any]]) -> dict[str, Any]:
    """Makes a record with medians over the turns, and the turns themselves.

    Returns:
        The case, seconds per call, gbps (of valid keys and values), gflops, the floor, and the
        fraction of it; seconds and fraction also with `_low` and `_high` over the turns.
    """
    seconds = [turn["seconds"] for turn in turns]
    floors = [statistics.mean(turn["floor"]) for turn in turns]
    fractions = [case.kv_bytes / s / f for s, f in zip(seconds, floors, strict=True)]
    median = statistics.median(seconds)
    return {
        "section": case.section,
        "label": case.label,
        "dtype": case.dtype,
        "peer": peer,
        "variant": variant,
        "kv_bytes": case.kv_bytes,
        "tokens": case.tokens,
        "copies": case.copies,
        "item_bytes": ITEM_BYTES[case.dtype],
        "seconds": median,
        "seconds_low": min(seconds),
        "seconds_high": max(seconds),
        "gbps": case.kv_bytes / median / 1e9,
        "gflops": case.flops / median / 1e9,
        "floor_gbps": statistics.median(floors) / 1e9,
        "fraction": statistics.median(fractions),
        "fraction_low": min(fractions),
        "fraction_high": max(fractions),
        "turns": turns,
    }
