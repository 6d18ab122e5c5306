"""Prints tables of the results, and compares them with the project's goals."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable
from typing import Any

from peers import NAMES
from rich.console import Console
from rich.table import Table

__all__ = ["Goal", "goals", "print_goals", "print_records", "print_rows", "step_goals", "title"]

Record = dict[str, Any]
Goal = tuple[str, str, str, bool | None]  # what, measured, wanted, met
OURS = ("kvpage", "fused")
# Shorter contexts take about 100 microseconds per call, most of which is not reading.
LARGE_BYTES = 25e6
_DECODE_GOALS = {"float32": (0.80, 0.74, 1.3), "bfloat16": (0.75, 0.68, 2.0)}


def title(record: Record) -> str:
    """Name of a record's peer and variant."""
    name = NAMES.get(record["peer"]) or record["name"]
    return f"{name}, {record['variant']}" if record["variant"] else name


def _place(record: Record) -> tuple[int, int]:
    """Sort key: ours first, then the peers in the order of `NAMES`."""
    variants = ("fused", "per_layer", "scattered", "update", "single call", "exact", "int8", "fp8")
    variant = record["variant"]
    order = variants.index(variant) if variant in variants else 0
    return list(NAMES).index(record["peer"]), order


def print_records(console: Console, records: list[Record], section: str) -> None:
    """Prints a table for each dtype, with a row for each contender and a column for each shape."""
    for dtype in dict.fromkeys(r["dtype"] for r in records if r["section"] == section):
        chosen = [r for r in records if r["section"] == section and r["dtype"] == dtype]
        labels = list(dict.fromkeys(r["label"] for r in chosen))
        unit = {
            "decode": "GB/s of valid keys and values (fraction of the read floor beside it)",
            "prefill": "GFLOP/s (milliseconds)",
        }.get(section, "milliseconds")
        table = Table(title=f"{section}, {dtype}: {unit}", title_justify="left")
        table.add_column("")
        for label in labels:
            table.add_column(label, justify="right")
        if section == "decode":
            floors = [
                statistics.median(r["floor_gbps"] for r in chosen if r["label"] == label)
                for label in labels
            ]
            table.add_row("read floor", *(f"{f:.1f}" for f in floors), end_section=True)
        for name in dict.fromkeys(title(r) for r in sorted(chosen, key=_place)):
            mine = {r["label"]: r for r in chosen if title(r) == name}
            table.add_row(name, *(_cell(mine.get(label), section) for label in labels))
        console.print(table)


def _cell(record: Record | None, section: str) -> str:
    if record is None:
        return "-"
    if section == "decode":
        return f"{record['gbps']:.1f} ({record['fraction']:.2f})"
    milliseconds = record["seconds"] * 1e3
    if section == "prefill":
        return f"{record['gflops']:.0f} ({milliseconds:.1f})"
    spread = max(record["seconds_high"] / record["seconds"] - 1, 0)
    return f"{milliseconds:.2f} +{spread:.0%}"


def print_rows(console: Console, name: str, rows: list[dict[str, Any]]) -> None:
    """Prints dictionaries with the same keys as a table."""
    if not rows:
        return
    table = Table(title=name, title_justify="left")
    for key in rows[0]:
        table.add_column(key, justify="left" if isinstance(rows[0][key], str) else "right")
    for row in rows:
        table.add_row(*(_text(value) for value in row.values()))
    console.print(table)


def _text(value: Any) -> str:
    if not isinstance(value, float):
        return str(value)
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def _speeds(
    records: list[Record], section: str, dtype: str, key: str
) -> dict[str, dict[Any, float]]:
    """Speed by shape, then contender: fractions of the floor, or GFLOP/s."""
    speeds: dict[str, dict[Any, float]] = {}
    for r in records:
        if r["section"] == section and r["dtype"] == dtype:
            speeds.setdefault(r["label"], {})[r["peer"], r["variant"]] = r[key]
    return speeds


def _best_peer(speeds: dict[Any, float]) -> float:
    return max((s for (peer, _), s in speeds.items() if peer != OURS[0]), default=math.nan)


def _ratios(speeds: dict[str, dict[Any, float]], variant: str, base: str) -> list[float]:
    """Ratios of one of our variants to another, by shape."""
    pairs = [(s.get((OURS[0], variant)), s.get((OURS[0], base))) for s in speeds.values()]
    return [a / b for a, b in pairs if a and b]


def goals(records: list[Record]) -> list[Goal]:
    """The goals of decode and prefill, and whether these records meet them."""
    result: list[Goal] = []

    def add(
        what: str, values: list[float], pick: Callable[[list[float]], float], wanted: float
    ) -> None:
        values = [v for v in values if not math.isnan(v)]
        if values:
            value = pick(values)
            result.append((what, f"{value:.2f}", f">= {wanted}", value >= wanted))

    for dtype, (median, least, times) in _DECODE_GOALS.items():
        speeds = _speeds(records, "decode", dtype, "fraction")
        bytes_of = {
            r["label"]: r["kv_bytes"]
            for r in records
            if r["section"] == "decode" and r["dtype"] == dtype
        }
        large = {k: v for k, v in speeds.items() if bytes_of[k] >= LARGE_BYTES and OURS in v}
        ours = [v[OURS] for v in large.values()]
        head = f"decode {dtype}, at least 25 MB a layer:"
        add(f"{head} median fraction of the floor", ours, statistics.median, median)
        add(f"{head} smallest fraction", ours, min, least)
        against = [v[OURS] / _best_peer(v) for v in large.values()]
        add(f"{head} median against the fastest peer", against, statistics.median, times)
        everywhere = [v[OURS] / _best_peer(v) for v in speeds.values() if OURS in v]
        add(f"decode {dtype}: least against the fastest peer, any shape", everywhere, min, 1.0)
        layers = _ratios(speeds, "per_layer", "fused")
        add(f"decode {dtype}: per_layer against fused, median", layers, statistics.median, 0.9)
        blocks = _ratios(speeds, "scattered", "fused")
        add(f"decode {dtype}: scattered against contiguous, median", blocks, statistics.median, 0.9)
        for stored in ("int8", "fp8"):
            times_faster = _ratios(speeds, stored, "fused")
            name = f"decode {dtype}: stored as {stored}, median speed against {dtype}"
            add(name, times_faster, statistics.median, 1.0)
        prefill = [
            v[OURS] / _best_peer(v)
            for v in _speeds(records, "prefill", dtype, "gflops").values()
            if OURS in v
        ]
        add(f"prefill {dtype}: against the best peer", prefill, min, 0.95)
    return result


def _tables(result: dict[str, Any], section: str) -> list[list[dict[str, Any]]]:
    return list(result.get(section, {}).get("tables", {}).values())


def step_goals(result: dict[str, Any]) -> list[Goal]:
    """The goals of growth and of whole steps."""
    rows: list[Goal] = []

    def add(what: str, value: float, wanted: float) -> None:
        rows.append((what, f"{value:.2f}", f"<= {wanted}", value <= wanted))

    growth = _tables(result, "growth")
    if growth:
        off = max(abs(row["off by"]) for row in growth[0])
        add("a decoded token: furthest from a straight line in the context", off, 0.1)
        add("a step that maps blocks against one that does not", growth[1][0]["ratio"], 1.1)
        most = max(row["against the smallest"] for row in growth[2])
        add("append in the largest pool against the smallest", most, 1.1)
    llama = _tables(result, "llama_steps")
    if llama:
        for row in llama[1]:
            if row["cache"] == "jax_kvpage":
                what = f"Llama {row['model']} after {row['context']}: share outside products and"
                wanted = 0.15 if row["model"] == "1.1B" else math.inf
                add(f"{what} kernels", row["rest_share"], wanted)
        ours = {
            (row["model"], row["context"]): row["ms a step"]
            for row in llama[0]
            if row["cache"] == "jax_kvpage"
        }
        for row in llama[0]:
            if row["cache"] != "jax_kvpage":
                what = f"Llama {row['model']} after {row['context']}: a step against {row['cache']}"
                ratio = ours[row["model"], row["context"]] / row["ms a step"]
                add(what, ratio, 1.0 if row["context"] > 1024 else math.inf)
    return [(*row[:2], "", None) if "inf" in row[2] else row for row in rows]


def print_goals(console: Console, rows: list[Goal]) -> None:
    """Prints the comparison as a table."""
    table = Table(title="goals", title_justify="left")
    for name in ("what", "measured", "wanted", ""):
        table.add_column(name)
    for what, measured, wanted, met in rows:
        mark = "" if met is None else "[green]met" if met else "[red]not met"
        table.add_row(what, measured, wanted, mark)
    console.print(table)
