"""Compares two builds of this package in one run: decode and prefill attention, and dispatch.

    python benchmarks/compare_builds.py --old DIR --new DIR [--repeats 5] [--json FILE]

Each DIR contains a built `jax_kvpage` package (`pip install --no-deps --target DIR .`). Three
processes take turns (`duel.py`): the old build, the new one, and the old one again, whose ratio to
itself shows the noise of the machine. The figures are medians over shapes of the ratio of times.
"""

from __future__ import annotations

import argparse
import json
import os
import pathlib
import statistics
import subprocess
import sys
import tempfile
from typing import Any

import floor
import shapes
from duel import Duel

_HERE = pathlib.Path(__file__).parent
_LABELS = ("old", "new", "again")


def attention(
    sites: dict[str, str], repeats: int, seconds: float, quick: bool, python: str
) -> list[dict[str, Any]]:
    """Measures times relative to the old build's, for each section, dtype and variant.

    Args:
        sites: directory with each build's package, by label.
        repeats: turns of every shape.
        seconds: time for each measurement.
        quick: few shapes.
        python: interpreter for all of them.
    """
    names = {f"kvpage@{label}": label for label in _LABELS}
    environments = {name: {"PYTHONPATH": sites[label]} for name, label in names.items()}
    dtypes = ["float32", "bfloat16"]
    cases = shapes.decode_cases(dtypes, quick) + shapes.prefill_cases(dtypes, quick)
    with tempfile.TemporaryDirectory() as temporary:
        os.environ[floor.LIBRARY_VARIABLE] = floor.build(temporary)
        duel = Duel(
            dict.fromkeys(names, python),
            pathlib.Path(temporary),
            lambda text: print(text, file=sys.stderr),
            environments,
        )
        try:
            if duel.absent:
                raise SystemExit(f"a build does not start: {duel.absent}")
            duel.run(cases, repeats, seconds, float("inf"))
        finally:
            duel.close()
    times: dict[tuple[str, str, str], dict[str, dict[str, float]]] = {}
    for record in duel.records:
        key = (record["section"], record["dtype"], record["variant"])
        by_shape = times.setdefault(key, {})
        by_shape.setdefault(record["label"], {})[names[record["peer"]]] = record["seconds"]
    rows = []
    for (section, dtype, variant), by_shape in times.items():
        row: dict[str, Any] = {"section": section, "dtype": dtype, "variant": variant}
        for label in _LABELS[1:]:
            row[label] = statistics.median(t[label] / t["old"] for t in by_shape.values())
        rows.append(row | {"shapes": len(by_shape)})
    return rows


def dispatch(sites: dict[str, str], repeats: int, python: str) -> dict[str, Any]:
    """Measures the dispatch time of a step in each build, in us, and relative to the old one."""
    times: dict[str, list[float]] = {label: [] for label in _LABELS}
    for repeat in range(repeats):
        for label in _LABELS[repeat % 3 :] + _LABELS[: repeat % 3]:
            run = subprocess.run(
                [python, str(_HERE / "dispatch.py"), "--calls", "400", "--json"],
                env={**os.environ, "PYTHONPATH": sites[label]},
                capture_output=True,
                text=True,
                check=True,
            )
            times[label].append(json.loads(run.stdout.splitlines()[-1])["kvpage_us"])
    medians = {label: statistics.median(values) for label, values in times.items()}
    ratios = {label: medians[label] / medians["old"] for label in _LABELS[1:]}
    return {"section": "dispatch", "us": medians, **ratios}


def main() -> None:
    """Prints a row for each section, and the results as JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--old", required=True, type=pathlib.Path, help="directory of a package")
    parser.add_argument("--new", required=True, type=pathlib.Path, help="directory of a package")
    parser.add_argument("--repeats", type=int, default=5, help="turns (default: 5)")
    parser.add_argument("--seconds", type=float, default=0.25, help="for each measurement")
    parser.add_argument("--quick", action="store_true", help="few shapes")
    parser.add_argument("--python", default=sys.executable, help="interpreter for all builds")
    parser.add_argument("--json", type=pathlib.Path, help="file for the results")
    arguments = parser.parse_args()
    for folder in (arguments.old, arguments.new):
        if not (folder / "jax_kvpage").is_dir():
            parser.error(f"{folder} contains no jax_kvpage package")
    old, new = str(arguments.old.resolve()), str(arguments.new.resolve())
    sites = {"old": old, "new": new, "again": old}
    python = arguments.python
    rows = attention(sites, arguments.repeats, arguments.seconds, arguments.quick, python)
    rows.append(dispatch(sites, arguments.repeats, python))
    print(f"{'':<34}{'new / old':>10}{'old / old':>10}")
    for row in rows:
        name = " ".join(str(row.get(k, "")) for k in ("section", "dtype", "variant"))
        print(f"{name:<34}{row['new']:>10.3f}{row['again']:>10.3f}")
    if arguments.json:
        arguments.json.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
