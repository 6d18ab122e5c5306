"""Time split of a compiled step: XLA's matrix products, our kernels, everything else.

Uses a trace of `jax.profiler`, in which XLA's CPU runtime records when each instruction runs. An
instruction counts as a matrix product if its text, or that of the computation it calls, has a
`dot`.
"""

from __future__ import annotations

import pathlib
import re
import tempfile
from collections.abc import Callable
from typing import Any

import jax

__all__ = ["products", "split"]

Interval = tuple[float, float]


def products(hlo: str) -> set[str]:
    """Names of the instructions of a compiled program that are, or contain, a matrix product."""
    bodies: dict[str, list[str]] = {}
    current: list[str] = []
    for line in hlo.splitlines():
        if line and not line[0].isspace() and "{" in line:
            match = re.match(r"(?:ENTRY )?%?([\w.-]+)", line)
            current = bodies.setdefault(match.group(1) if match else "", [])
        else:
            current.append(line)
    has_dot = {name for name, body in bodies.items() if any(" dot(" in line for line in body)}
    found: set[str] = set()
    for line in (line for body in bodies.values() for line in body):
        match = re.match(r"\s*(?:ROOT )?%?([\w.-]+) = ", line)
        called = re.search(r"calls=%?([\w.-]+)", line)
        if match and (" dot(" in line or (called and called.group(1) in has_dot)):
            found.add(match.group(1))
    return found


def _length(intervals: list[Interval]) -> float:
    """Time covered by at least one interval."""
    total, end = 0.0, float("-inf")
    for low, high in sorted(intervals):
        total += max(high - max(low, end), 0.0)
        end = max(end, high)
    return total


def split(run: Callable[[], Any], steps: int, hlo: str, ours: str = "kvpage") -> dict[str, Any]:
    """Runs `run` (which runs `steps` steps and waits for them) under the profiler.

    Args:
        run: the function to trace.
        steps: number of steps.
        hlo: the compiled program's HLO text.
        ours: prefix of the names of our instructions.

    Returns:
        Milliseconds per step: total, products, kernels, rest (the total less these two) and
        `rest_share`, idle (no instruction ran), and the largest parts of the rest.
    """
    dots = products(hlo)
    kinds: dict[str, list[Interval]] = {"products": [], "kernels": [], "other": []}
    others: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder), jax.profiler.TraceAnnotation("timed"):
            run()
        file = next(pathlib.Path(folder).rglob("*.xplane.pb"))
        data = jax.profiler.ProfileData.from_file(str(file))
        known = set(re.findall(r"^\s*(?:ROOT )?%?([\w.-]+) = ", hlo, re.MULTILINE))
        total = 0.0
        for plane in data.planes:
            for event in (event for line in plane.lines for event in line.events):
                if event.name == "timed":
                    total = event.duration_ns
                if event.name not in known:
                    continue
                kind = "products" if event.name in dots else "other"
                kind = "kernels" if event.name.startswith(ours) else kind
                kinds[kind].append((event.start_ns, event.start_ns + event.duration_ns))
                if kind == "other":
                    name = event.name.split(".")[0]
                    others[name] = others.get(name, 0.0) + event.duration_ns
    scale = 1e-6 / steps
    busy = _length(kinds["products"] + kinds["kernels"])
    largest = sorted(others.items(), key=lambda item: -item[1])[:3]
    return {
        "step ms": total * scale,
        "products ms": _length(kinds["products"]) * scale,
        "kernels ms": _length(kinds["kernels"]) * scale,
        "rest ms": (total - busy) * scale,
        "rest_share": (total - busy) / total if total else float("nan"),
        "idle ms": (total - _length([each for kind in kinds.values() for each in kind])) * scale,
        "largest of the rest": ", ".join(f"{n} {t * scale:.2f} ms" for n, t in largest),
    }
