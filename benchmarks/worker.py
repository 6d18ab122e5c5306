"""Runs a peer: reads requests from stdin and writes answers to stdout, one JSON object per line.

{"op": "hello"}                             -> versions, variants
{"op": "check", "case", "variant"}          -> largest error against float64
{"op": "turn", "case", "variant", "seconds"} -> seconds per call, and the floor before and after
"""

from __future__ import annotations

import argparse
import gc
import importlib
import json
import os
import statistics
import sys
import time
import traceback
from typing import Any

import numpy as np
from floor import Floor
from peers.base import Data, Peer, Ready
from shapes import Case

_FEWEST_CYCLES = 3


def _times(ready: Ready, seconds: float) -> list[float]:
    """Times cycles for `seconds`, after a warm-up cycle; returns the seconds per call of each."""
    begin = time.perf_counter()
    ready.cycle()
    # A very slow peer gets one more cycle, not two.
    fewest = _FEWEST_CYCLES if time.perf_counter() - begin < 2 * seconds else 1
    times: list[float] = []
    deadline = time.perf_counter() + seconds
    while len(times) < fewest or time.perf_counter() < deadline:
        begin = time.perf_counter()
        ready.cycle()
        times.append((time.perf_counter() - begin) / ready.calls)
    return times


def _turn(peer: Peer, case: Case, variant: str, seconds: float, floor: Floor) -> dict[str, Any]:
    ready = peer.prepare(Data(case), variant)
    try:
        before = floor.measure(case.kv_bytes)
        times = _times(ready, seconds)
        after = floor.measure(case.kv_bytes)
    finally:
        ready.close()
    return {
        "seconds": statistics.median(times),
        "seconds_best": min(times),
        "cycles": len(times),
        "floor": [before, after],
        "notes": ready.notes,
    }


def _check(peer: Peer, case: Case, variant: str) -> dict[str, Any]:
    data = Data(case)
    ready = peer.prepare(data, variant)
    try:
        error = np.abs(ready.output().astype(np.float64) - data.expected()).max()
    finally:
        ready.close()
    return {"error": float(error)}


def _answer(peer: Peer, request: dict[str, Any], floor: list[Floor]) -> dict[str, Any]:
    if request["op"] == "hello":
        return {"versions": peer.versions(), "variants": list(peer.variants)}
    case, variant = Case.from_json(request["case"]), request["variant"]
    reason = peer.unsupported(case, variant)
    if reason:
        return {"unsupported": reason}
    if request["op"] == "check":
        return _check(peer, case, variant)
    if not floor:
        floor.append(Floor())
    return _turn(peer, case, variant, request["seconds"], floor[0])


def main() -> None:
    """Serves requests until stdin ends."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("peer", help="module below peers/")
    name = parser.parse_args().peer
    # Libraries may print to stdout, so answers go to a duplicate of it.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    peer: Peer | None = None
    floor: list[Floor] = []
    for line in sys.stdin:
        try:
            peer = peer or importlib.import_module(f"peers.{name}").PEER
            answer = _answer(peer, json.loads(line), floor)
        except ImportError as error:
            answer = {"absent": str(error)}
        except Exception as error:
            traceback.print_exc()
            answer = {"failed": f"{type(error).__name__}: {error}"[:2000]}
        gc.collect()
        print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    main()
