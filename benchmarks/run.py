"""The benchmark suite: one command measures everything, prints tables and writes JSON and a plot.

    python benchmarks/run.py [--quick] [--only decode,prefill] [--json FILE] [--plot FILE.png]

Attention is compared with other systems, each in a separate process, in turns (`duel.py`). Systems
that are not installed are reported as absent. For systems in another environment, name the
interpreter:

    python benchmarks/run.py --peer-python vllm_cpu=venvs/vllm/bin/python

or set KVPAGE_BENCH_PYTHON_VLLM_CPU. Everything else is measured for this package only.
"""

from __future__ import annotations

import argparse
import json
import os
import pathlib
import subprocess
import sys
import tempfile
import time
from typing import Any

import floor
import machine
import peers
import report
import shapes
from duel import Duel
from plot import plot
from rich.console import Console

_DUELS = {
    "decode": shapes.decode_cases,
    "prefill": shapes.prefill_cases,
    "mixed": shapes.mixed_cases,
}
# Separate scripts, run in separate processes; each prints a JSON object last.
_SCRIPTS = (
    "memory",
    "growth",
    "dispatch",
    "sharing",
    "relocation",
    "shared_prefix",
    "prefix",
    "llama_steps",
)
_HERE = pathlib.Path(__file__).parent


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    names = ",".join([*_DUELS, *_SCRIPTS])
    parser.add_argument("--only", default=names, help=f"sections, of {names}")
    parser.add_argument("--peers", default=",".join(peers.NAMES), help="which systems take part")
    parser.add_argument("--dtypes", default="float32,bfloat16")
    parser.add_argument("--quick", action="store_true", help="few shapes, one short repeat")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=0.25, help="time for each measurement")
    parser.add_argument("--minutes", type=float, default=60, help="no new repeat begins after this")
    parser.add_argument("--json", type=pathlib.Path, help="file for the results")
    parser.add_argument("--plot", type=pathlib.Path, help="PNG file for the plot")
    parser.add_argument(
        "--peer-python", action="append", default=[], metavar="PEER=PYTHON", help="interpreter"
    )
    arguments = parser.parse_args()
    for option, known in (("only", [*_DUELS, *_SCRIPTS]), ("peers", list(peers.NAMES))):
        chosen = getattr(arguments, option).split(",")
        unknown = sorted(set(chosen) - set(known))
        if unknown:
            parser.error(f"--{option}: {', '.join(unknown)} is none of {', '.join(known)}")
        setattr(arguments, option, chosen)
    if arguments.quick:
        arguments.repeats, arguments.seconds = 1, 0.05
    return arguments


def _pythons(arguments: argparse.Namespace) -> dict[str, str]:
    """The interpreter of each chosen peer."""
    given = dict(pair.split("=", 1) for pair in arguments.peer_python)
    result = {}
    for name in arguments.peers:
        variable = os.environ.get(f"KVPAGE_BENCH_PYTHON_{name.upper()}")
        result[name] = given.get(name) or variable or sys.executable
    return result


def _duels(
    arguments: argparse.Namespace, folder: pathlib.Path, console: Console, result: dict[str, Any]
) -> None:
    dtypes = arguments.dtypes.split(",")
    cases = [c for s in _DUELS if s in arguments.only for c in _DUELS[s](dtypes, arguments.quick)]
    if not cases:
        return
    deadline = time.monotonic() + 60 * arguments.minutes
    duel = Duel(_pythons(arguments), folder, lambda text: console.print(text, style="dim"))
    try:
        for name, reason in duel.absent.items():
            console.print(f"absent: {peers.NAMES[name]} ({reason.splitlines()[0]})")
        duel.check(dtypes)
        duel.run(cases, arguments.repeats, arguments.seconds, deadline)
    finally:
        duel.close()
        result |= {
            "versions": duel.versions,
            "absent": duel.absent,
            "errors": duel.errors,
            "left_out": duel.failures,
            "attention": duel.records,
        }


def _scripts(arguments: argparse.Namespace, console: Console, result: dict[str, Any]) -> None:
    for name in _SCRIPTS:
        if name not in arguments.only:
            continue
        options = ["--json"]
        if arguments.quick:
            options += ["--calls", "100"] if name == "dispatch" else ["--quick"]
        result[name] = _script(name, sys.executable, options, console)
    tables = result.get("llama_steps", {}).get("tables")
    if tables and "vllm_cpu" in arguments.peers:
        # The context length of the goals; in quick runs, the one that was measured.
        speeds = next(iter(tables.values()))
        options = ["--context", str(speeds[0]["context"])]
        row = _script("llama_vllm", _pythons(arguments)["vllm_cpu"], options, console)
        if "failed" not in row:
            speeds.insert(3, row)


def _script(name: str, python: str, options: list[str], console: Console) -> dict[str, Any]:
    console.print(f"{name} ...", style="dim")
    run = subprocess.run(
        [python, str(_HERE / f"{name}.py"), *options],
        capture_output=True,
        text=True,
        check=False,
    )
    if run.returncode or not run.stdout.strip():
        last = (run.stderr.strip().splitlines() or ["no output"])[-1]
        console.print(f"{name} failed: {last}", style="red")
        return {"failed": run.stderr[-4000:]}
    return json.loads(run.stdout.strip().splitlines()[-1])


def _print(console: Console, result: dict[str, Any]) -> None:
    records = result.get("attention", [])
    for section in _DUELS:
        report.print_records(console, records, section)
    if result.get("errors"):
        worst: dict[tuple[str, str], float] = {}
        for e in result["errors"]:
            apart = e["variant"] if e["variant"] in ("exact", "int8", "fp8") else ""
            key = (report.title(e | {"variant": apart}), e["dtype"])
            worst[key] = max(worst.get(key, 0.0), e["error"])
        rows = [
            {"": name, "dtype": dtype, "largest error": error}
            for (name, dtype), error in worst.items()
        ]
        report.print_rows(console, "error against float64 on small cases", rows)
    for name in _SCRIPTS:
        values = result.get(name, {})
        tables = values.get("tables") or ({name: [values]} if values else {})
        for table, rows in tables.items():
            if "failed" not in values:
                report.print_rows(console, table, rows)
    result["goals"] = report.goals(records) + report.step_goals(result)
    if result["goals"]:
        report.print_goals(console, result["goals"])


def main() -> None:
    """Runs the chosen sections."""
    arguments = _arguments()
    # Tables are wider than the 80 columns assumed for a pipe.
    console = Console(width=None if sys.stdout.isatty() else 160)
    result: dict[str, Any] = {"machine": machine.describe(), "options": vars(arguments).copy()}
    del result["options"]["json"], result["options"]["plot"], result["options"]["peer_python"]
    with tempfile.TemporaryDirectory() as temporary:
        folder = pathlib.Path(temporary)
        os.environ[floor.LIBRARY_VARIABLE] = floor.build(temporary)
        _duels(arguments, folder, console, result)
        _scripts(arguments, console, result)
    _print(console, result)
    if arguments.json:
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        arguments.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
        console.print(f"written: {arguments.json}")
    if arguments.plot and result.get("attention"):
        about = result["machine"]
        text = f"{about['cpu']}, {about['cores']} cores, {about['date'][:10]}"
        arguments.plot.parent.mkdir(parents=True, exist_ok=True)
        plot(result["attention"], arguments.plot, text)
        console.print(f"written: {arguments.plot}")


if __name__ == "__main__":
    main()
