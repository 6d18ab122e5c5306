"""The command line of benchmarks that measure tables: `--quick`, and `--json` for run.py."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from typing import Any

__all__ = ["run"]


def _cell(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def run(doc: str, measure: Callable[..., dict[str, Any]], **options: str) -> None:
    """Prints the rows of `measure(quick)["tables"]`, or its result as one JSON object.

    Args:
        doc: the benchmark's docstring; its first line is the help text.
        measure: called with whether to be quick. Cells that are None are not printed.
        **options: additional options by name, with their defaults; `measure` gets their values as
            keyword arguments.
    """
    parser = argparse.ArgumentParser(description=doc.splitlines()[0])
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--json", action="store_true", help="print one JSON object, nothing else")
    for name, default in options.items():
        flag = "--" + name.replace("_", "-")
        parser.add_argument(flag, default=default, help=f"default: {default}")
    arguments = parser.parse_args()
    result = measure(arguments.quick, **{name: getattr(arguments, name) for name in options})
    if arguments.json:
        print(json.dumps(result))
        return
    for name, rows in result["tables"].items():
        print(name)
        for row in rows:
            print("  ", ", ".join(f"{k} {_cell(v)}" for k, v in row.items() if v is not None))
