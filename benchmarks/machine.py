"""Describes the machine, date and commit of a measurement."""

from __future__ import annotations

import datetime
import os
import pathlib
import platform
import re
import subprocess
from typing import Any

__all__ = ["describe"]


def _field(text: str, name: str) -> str:
    match = re.search(rf"^{name}\s*:\s*(.+)$", text, re.MULTILINE)
    return match.group(1).strip() if match else "unknown"


def _commit() -> str:
    """The commit of the repository that contains this file, if any, and whether it is modified."""
    here = str(pathlib.Path(__file__).parent)
    command = ["git", "-C", here, "describe", "--always", "--dirty", "--exclude=*"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def describe() -> dict[str, Any]:
    """The machine, its memory and load, and the date."""
    cpu = pathlib.Path("/proc/cpuinfo").read_text(encoding="utf-8")
    memory = pathlib.Path("/proc/meminfo").read_text(encoding="utf-8")
    flags = set(_field(cpu, "flags").split())
    caches = pathlib.Path("/sys/devices/system/cpu/cpu0/cache")
    sizes = {}
    for index in sorted(caches.glob("index*")):
        if (index / "type").read_text().strip() != "Instruction":
            sizes["L" + (index / "level").read_text().strip()] = (
                (index / "size").read_text().strip()
            )
    wanted = ("avx2", "avx512f", "avx512_bf16", "amx_bf16")
    return {
        "cpu": _field(cpu, "model name"),
        "family": f"{_field(cpu, 'cpu family')}/{_field(cpu, 'model')}",
        "cores": len(os.sched_getaffinity(0)),
        "instructions": [name for name in wanted if name in flags],
        "caches": sizes,
        "memory": _field(memory, "MemTotal"),
        "kernel": platform.release(),
        "load_at_start": os.getloadavg()[0],
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "commit": _commit(),
        "python": platform.python_version(),
    }
