"""Attention over one layer of a deep pool, and the fixed cost of a layer in a decode step.

    python benchmarks/gpu/layers.py [--platform cuda] [--dry-run] [--limit 90]

Runs `layer_attention.py` and `decode_step.py`, the latter with and without CUDA graphs, each in a
separate process. Fractions are relative to the fastest copy measured here, bytes read plus written.
Prints tables, and one JSON object last; measurements of a part that is stopped are kept.
"""

from __future__ import annotations

import argparse
import json
import pathlib
import sys
import time
from typing import Any

from scripts import output_of, print_tables

_HERE = pathlib.Path(__file__).resolve().parent
# Script, options, and seconds needed by the parts after it.
_PARTS: tuple[tuple[str, list[str], float], ...] = (
    ("layer_attention", [], 22),
    ("decode_step", ["--mode", "graph"], 11),
    ("decode_step", ["--mode", "plain"], 0),
)


def _lines(command: list[str], limit: float) -> tuple[list[dict[str, Any]], str]:
    """What a script printed within the limit, and why it ended early ("" if it did not)."""
    output, reason = output_of(command, limit)
    answers = []
    for line in output.splitlines():
        try:
            answers.append(json.loads(line))
        except ValueError:
            continue  # from another library, or truncated
    return answers, reason


def _attention_row(record: dict[str, Any]) -> dict[str, Any]:
    return {
        "shape": record["shape"],
        "layers": record["layers"],
        "layout": record["layout"],
        "blocks": record["blocks"],
        "tokens a block": record["block_tokens"],
        "neighbours": record["neighbours"],
        "us": record["seconds"] * 1e6,
        "GB/s": record["gbps"],
        "of copy": record["fraction"],
        "quartiles": f"{record['fraction_low']:.3f} - {record['fraction_high']:.3f}",
        "setup, s": record["setup_seconds"],
    }


def _step_row(step: dict[str, Any]) -> dict[str, Any]:
    return {
        "shape": step["shape"],
        "layers": step["layers"],
        "layout": step["layout"],
        "mode": step["mode"],
        "us a step": step["seconds"] * 1e6,
        "us a layer": step["layer_us"],
        "reading, us": step["reading_us"],
        "fixed, us a layer": step["fixed_us"],
        "of copy": step["fraction"],
    }


def _evaluate(result: dict[str, Any]) -> None:
    """Adds speeds, fractions and tables."""
    copy = max((c["gbps"] for c in result["copies"]), default=float("nan"))
    result["copy_gbps"] = copy
    for record in result["records"]:
        record["gbps"] = record["kv_bytes"] / record["seconds"] / 1e9
        record["fraction"] = record["gbps"] / copy
        for name, other in (("low", "high"), ("high", "low")):
            gbps = record["kv_bytes"] / record[f"seconds_{other}"] / 1e9
            record[f"fraction_{name}"] = gbps / copy
    for step in result["steps"]:
        step["layer_us"] = step["seconds"] * 1e6 / step["layers"]
        step["reading_us"] = step["layer_bytes"] / copy / 1e3
        step["fixed_us"] = step["layer_us"] - step["reading_us"]
        step["fraction"] = step["reading_us"] / step["layer_us"]
    launches = [{k: v for k, v in row.items() if k != "kind"} for row in result["launches"]]
    result["tables"] = {
        f"attention of one layer of a deep pool; copies move {copy:.0f} GB/s, read plus written": [
            _attention_row(r) for r in result["records"]
        ],
        "a decode step: append and attention in every layer, and advance": [
            _step_row(s) for s in result["steps"]
        ],
        "launches of a decode step (without graphs)": launches,
    }


def collect(platform: str, dry: bool, limit: float) -> dict[str, Any]:
    """Runs all parts within the limit."""
    end = time.monotonic() + limit
    result: dict[str, Any] = {
        "copies": [],
        "records": [],
        "steps": [],
        "launches": [],
        "left_out": [],
    }
    places = {"copy": "copies", "record": "records", "step": "steps", "launch": "launches"}
    for script, options, behind in _PARTS:
        left = end - time.monotonic() - behind
        command = [sys.executable, str(_HERE / f"{script}.py"), "--platform", platform, *options]
        command += ["--dry-run"] if dry else []
        if script == "layer_attention":
            command += ["--limit", str(max(left - 12, 1))]
        answers, reason = _lines(command, left)
        for answer in answers:
            result[places.get(answer["kind"], "left_out")].append(answer)
        if reason:
            result["left_out"].append({"part": " ".join([script, *options]), "reason": reason})
    _evaluate(result)
    return result


def main() -> int:
    """Prints one JSON object last."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--platform", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--dry-run", action="store_true", help="tiny sizes")
    parser.add_argument("--limit", type=float, default=90, help="seconds for all parts")
    arguments = parser.parse_args()
    result = collect(arguments.platform, arguments.dry_run, arguments.limit)
    print_tables(result["tables"])
    for row in result["left_out"]:
        print("left out:", row)
    print(json.dumps(result))
    return 0


if __name__ == "__main__":
    sys.exit(main())
