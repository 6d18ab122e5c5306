"""Runs scripts in separate processes within a time limit, and prints tables."""

from __future__ import annotations

import os
import subprocess
from typing import IO, Any

__all__ = ["output_of", "print_tables"]


def output_of(command: list[str], limit: float, errors: IO[str] | None = None) -> tuple[str, str]:
    """Runs a command.

    Args:
        command: the command and its arguments.
        limit: seconds after which it is killed.
        errors: the file for its standard error; None: this process's.

    Returns:
        What it printed within the limit, and why it ended early, "" if it did not.
    """
    environment = os.environ | {"PYTHONUNBUFFERED": "1"}
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=errors, text=True, env=environment
    ) as process:
        try:
            output, _ = process.communicate(timeout=max(limit, 1))
        except subprocess.TimeoutExpired:
            process.kill()
            output, _ = process.communicate()
            return output, f"stopped after {limit:.0f} s"
    return output, f"status {process.returncode}" if process.returncode else ""


def print_tables(tables: dict[str, list[dict[str, Any]]]) -> None:
    """Prints each table's name and a line for each of its rows."""
    for name, rows in tables.items():
        print(name)
        for row in rows:
            cells = (f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in row.items())
            print("  ", ", ".join(cells))
