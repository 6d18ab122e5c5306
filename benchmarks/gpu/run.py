"""Measures everything on one GPU within a time limit; writes JSON and a plot, prints tables.

    python benchmarks/gpu/run.py --out benchmarks/results [--only layers --seconds 60]

The sections are driver, layers, attention, shared, mapping and llama. Contenders run one after the
other, each in a separate process: this package first, and its most important shapes again at the
end, to show the drift of the machine. Contenders that are not installed, fail or run out of time
are listed. Speeds are bytes of valid keys and values over the median time; fractions are relative
to the fastest copy of the same run (bytes read plus written).
"""

from __future__ import annotations

import argparse
import datetime
import json
import pathlib
import re
import subprocess
import sys
import time
from typing import Any

sys.path.append(str(pathlib.Path(__file__).resolve().parents[1]))

import machine
import tables
from contenders import NAMES
from plot import plot
from rich.console import Console
from scripts import output_of

_HERE = pathlib.Path(__file__).resolve().parent
_SECTIONS = ("driver", "layers", "attention", "shared", "mapping", "llama")
# Shares of the remaining time when a contender's turn comes.
_SHARES = {
    "kvpage": 0.34,
    "torch_sdpa": 0.2,
    "torch_varlen": 0.25,
    "jax_dense": 0.35,
    "jax_cudnn_paged": 0.45,
    "pallas_paged": 0.6,
}


class Run:
    """The measurements so far.

    Args:
        arguments: the command line.
        console: where to print progress.
    """

    def __init__(self, arguments: argparse.Namespace, console: Console) -> None:
        self._arguments, self._console = arguments, console
        self._begin = time.monotonic()
        self._reserved = 0.0
        self._extra = ["--platform", arguments.platform]
        self._extra += ["--dry-run"] if arguments.dry_run else []
        self.result: dict[str, Any] = {
            "machine": machine.describe() | {"gpu": _gpu()},
            "versions": {},
            "absent": {},
            "left_out": [],
            "errors": [],
            "copies": [],
            "attention": [],
            "again": [],
        }

    def left(self) -> float:
        """Seconds left, less those reserved for the parts that must still run."""
        return self._arguments.seconds - (time.monotonic() - self._begin) - self._reserved

    def say(self, text: str) -> None:
        """Prints progress with the time."""
        self._console.print(f"[{time.monotonic() - self._begin:4.0f} s] {text}", style="dim")

    def _call(self, command: list[str], limit: float, log: str) -> str:
        """Runs a script; returns its output up to its end or the time limit."""
        log_file = self._arguments.log
        with log_file.open("a") as errors:
            errors.write(f"\n=== {log}\n")
            errors.flush()
            output, reason = output_of(command, limit, errors)
        if reason:
            self.say(f"{log}: {reason}, see the log")
        if reason.startswith("status"):
            self.result["left_out"].append({"peer": log, "reason": reason})
        return output

    def driver(self) -> None:
        """Measures the driver's calls and its device-to-device copy."""
        tool = self._arguments.driver_calls
        if tool is None or not tool.exists():
            self.result["absent"]["driver calls"] = f"{tool} was not built"
            return
        options = []
        if self._arguments.platform == "cpu":
            options = ["--fake", "--blocks", "2", "--rounds", "2", "--copy-mib", "16"]
        output = self._call([str(tool), *options], 40, "driver calls")
        if output:
            self.result["driver"] = json.loads(output.splitlines()[-1])
            self._copy("driver", self.result["driver"]["copy"]["gbps"])

    def _copy(self, by: str, gbps: float) -> None:
        if self._arguments.platform == "cuda" or by != "driver":
            self.result["copies"].append({"by": by, "gbps": gbps})

    def script(self, name: str, limit: float) -> None:
        """Runs a script of this folder whose last line is a JSON object."""
        self.say(name)
        command = [sys.executable, str(_HERE / f"{name}.py"), *self._extra]
        if name != "mapping":
            command += ["--limit", str(max(limit - 5, 1))]
        lines = self._call(command, limit, name).splitlines()
        try:
            self.result[name] = json.loads(lines[-1])
        except (IndexError, ValueError):
            self.result["left_out"].append({"peer": name, "reason": "no result: see the log"})

    def contender(self, name: str, limit: float, again: bool = False) -> None:
        """Runs one worker; with `again`, the core decode shapes of its first variant again."""
        self.say(f"{NAMES[name]}{' again' if again else ''}, up to {limit:.0f} s")
        options = ["--limit", str(max(limit - 10, 1))]
        if again:
            options += ["--sections", "decode", "--core", "--variants", "fused"]
        command = [sys.executable, "-u", str(_HERE / "worker.py"), name, *self._extra, *options]
        for line in self._call(command, limit, name).splitlines():
            try:
                answer = json.loads(line)
            except ValueError:
                continue  # truncated
            self._take(name, answer, again)

    def _take(self, name: str, answer: dict[str, Any], again: bool) -> None:
        kind = answer.pop("kind")
        if kind == "record":
            self.result["again" if again else "attention"].append(answer)
        elif kind == "copy":
            self._copy(f"{name}, {answer['when']}", answer["gbps"])
        elif kind == "versions":
            self.result["versions"][name] = answer["versions"]
        elif kind == "absent":
            self.result["absent"][name] = answer["reason"]
            self.say(f"absent: {NAMES[name]} ({answer['reason']})")
        elif kind == "left_out":
            self.result["left_out"].append(answer)
        elif kind == "error" and not again:
            self.result["errors"].append(answer)

    def all(self) -> None:
        """Runs all chosen sections; time is reserved for the last ones."""
        only, dry = self._arguments.only, self._arguments.dry_run
        self._reserved = 45 * ("mapping" in only) + 95 * ("llama" in only) + 50 * ("shared" in only)
        if "driver" in only:
            self.driver()
        if "layers" in only:
            self.script("layers", max(min(self.left(), 300 if dry else 110), 30))
        if "attention" in only:
            for name in self._arguments.contenders:
                limit = 300 if dry else self.left() * _SHARES[name]
                if limit < 15:
                    self.result["absent"][name] = "out of time"
                    continue
                self.contender(name, limit)
            if "kvpage" in self._arguments.contenders:
                self.contender("kvpage", max(min(self.left(), 40), 20), again=True)
        self._reserved = 0
        if "shared" in only:
            self.script("shared_prefix", 60)
        if "mapping" in only:
            self.script("mapping", 45)
        if "llama" in only:
            self.script("llama_graphs", max(min(self.left(), 110), 30))
        self._fractions()

    def _fractions(self) -> None:
        """Adds speeds, and their fractions of the fastest copy."""
        copy = max((c["gbps"] for c in self.result["copies"]), default=float("nan"))
        self.result["copy_gbps"] = copy
        for record in self.result["attention"] + self.result["again"]:
            for suffix, time_suffix in (("", ""), ("_low", "_high"), ("_high", "_low")):
                gbps = record["kv_bytes"] / record[f"seconds{time_suffix}"] / 1e9
                record[f"gbps{suffix}"] = gbps
                record[f"fraction{suffix}"] = gbps / copy
            record["tflops"] = record["flops"] / record["seconds"] / 1e12
            record["name"] = NAMES[record["peer"]]


def _gpu() -> dict[str, str]:
    fields = "name,driver_version,memory.total,clocks.sm,clocks.max.sm,temperature.gpu,power.draw"
    command = ["nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader"]
    try:
        run = subprocess.run(command, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return {"name": "none"}
    return dict(zip(fields.split(","), run.stdout.splitlines()[0].split(", "), strict=False))


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=pathlib.Path, default=_HERE.parent / "results")
    parser.add_argument("--only", default=",".join(_SECTIONS))
    parser.add_argument("--contenders", default=",".join(NAMES))
    parser.add_argument("--seconds", type=float, default=450, help="for everything")
    parser.add_argument("--platform", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--dry-run", action="store_true", help="tiny sizes")
    parser.add_argument("--log", type=pathlib.Path, help="file for the scripts' other output")
    parser.add_argument("--driver-calls", type=pathlib.Path, help="the program of that name")
    arguments = parser.parse_args()
    for option, known in (("only", _SECTIONS), ("contenders", tuple(NAMES))):
        chosen = getattr(arguments, option).split(",")
        unknown = sorted(set(chosen) - set(known))
        if unknown:
            parser.error(f"--{option}: {', '.join(unknown)} is none of {', '.join(known)}")
        setattr(arguments, option, chosen)
    return arguments


def main() -> int:
    """Runs the chosen sections."""
    arguments = _arguments()
    arguments.out.mkdir(parents=True, exist_ok=True)
    arguments.log = arguments.log or arguments.out / "bench.log"
    console = Console(width=None if sys.stdout.isatty() else 170)
    run = Run(arguments, console)
    try:
        run.all()
    finally:
        card = run.result["machine"]["gpu"]["name"]
        slug = re.sub(r"[^a-z0-9]+", "-", card.lower()).strip("-")
        date = datetime.datetime.now(datetime.UTC).date().isoformat()
        stem = f"dry-run-{date}" if arguments.dry_run else f"gpu-{slug}-{date}"
        file = arguments.out / f"{stem}.json"
        file.write_text(json.dumps(run.result, indent=1) + "\n", encoding="utf-8")
        console.print(f"written: {file}")
    decode = [r for r in run.result["attention"] if r["section"] == "decode" and r["core"]]
    if decode:
        picture = arguments.out / f"{stem}.png"
        plot(decode, picture, f"{card}, {date}", floor="copy bandwidth")
        console.print(f"written: {picture}")
    tables.show(console, run.result)
    return 0


if __name__ == "__main__":
    sys.exit(main())
