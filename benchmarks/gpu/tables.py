"""The results as tables, printed at the end of the output."""

from __future__ import annotations

from typing import Any

from contenders import NAMES
from report import print_rows
from rich.console import Console
from rich.table import Table

__all__ = ["goals", "show"]

Record = dict[str, Any]
# The shape of the goals, in a pool of one layer and in a layer of a deep pool.
_GOAL_LABEL, _GOAL_SHAPE, _GOAL_FRACTION = "B64 L8192", "64 x 8192", 0.85
# The number of sequences and of shared tokens for the goal of reading a prefix once.
_SHARED_GOAL = (32, 4096)


def _row_name(record: Record) -> str:
    return f"{NAMES[record['peer']]}, {record['variant']}".removesuffix(", ")


def _cell(record: Record | None, section: str) -> str:
    if record is None:
        return "-"
    if section == "decode":
        return f"{record['gbps']:.0f} ({record['fraction']:.2f})"
    if section == "prefill":
        return f"{record['tflops']:.0f} ({record['seconds'] * 1e3:.3f})"
    return f"{record['seconds'] * 1e3:.3f}"


def _records(console: Console, records: list[Record], section: str, title: str) -> None:
    chosen = [r for r in records if r["section"] == section]
    if not chosen:
        return
    labels = list(dict.fromkeys(r["label"] for r in chosen))
    table = Table(title=title, title_justify="left")
    table.add_column("")
    for label in labels:
        table.add_column(label, justify="right")
    order = list(NAMES)
    for name in dict.fromkeys(
        _row_name(r) for r in sorted(chosen, key=lambda r: order.index(r["peer"]))
    ):
        mine = {r["label"]: r for r in chosen if _row_name(r) == name}
        table.add_row(name, *(_cell(mine.get(label), section) for label in labels))
    console.print(table)


def _ours(records: list[Record], variant: str = "fused") -> dict[str, Record]:
    return {
        r["label"]: r
        for r in records
        if r["section"] == "decode" and r["peer"] == "kvpage" and r["variant"] == variant
    }


def _best_peer(records: list[Record], label: str) -> Record | None:
    peers = (r for r in records if r["label"] == label and r["peer"] != "kvpage")
    return max(peers, key=lambda r: r["gbps"], default=None)


def goals(result: dict[str, Any]) -> list[dict[str, str]]:
    """Each goal, its measurement, and whether it is met."""
    records = result["attention"]
    rows: list[dict[str, str]] = []

    def add(what: str, value: float, wanted: float) -> None:
        met = "met" if value >= wanted else "NOT met"
        rows.append({"what": what, "measured": f"{value:.3f}", "wanted": f">= {wanted}", "": met})

    layers = [r for r in result.get("layers", {}).get("records", []) if r["shape"] == _GOAL_SHAPE]
    tables = next((r for r in layers if r["layout"] == "tables"), None)
    for record in layers:
        if record is tables:
            continue
        name = (
            f"one of {record['layers']} layers, {_GOAL_SHAPE}, {record['layout']}, "
            f"{record['blocks']} blocks"
        )
        add(f"{name}: fraction of the copy bandwidth", record["fraction"], _GOAL_FRACTION)
        if tables:
            add(f"{name}: speed against block tables", record["gbps"] / tables["gbps"], 1.0)
        best = _best_peer(records, f"{_GOAL_LABEL} full")
        if best:
            what = f"{name}: speed against the fastest peer ({_row_name(best)})"
            add(what, record["gbps"] / best["gbps"], 1.0)
    ours = _ours(records)
    for label, record in ours.items():
        if not label.startswith(_GOAL_LABEL):
            continue
        add(f"decode {label}: fraction of the copy bandwidth", record["fraction"], _GOAL_FRACTION)
        best = _best_peer(records, label)
        if best:
            name = f"decode {label}: speed against the fastest peer ({_row_name(best)})"
            add(name, record["gbps"] / best["gbps"], 1.0)
    for variant, what in (
        ("per_layer", "layout per_layer against fused"),
        ("table", "the pool's block table against its slots"),
        ("table_per_layer", "the pool's block table with layout per_layer against slots, fused"),
        ("tables", "block tables over arrays of pages against contiguous slots"),
        ("scattered", "scattered blocks against blocks in a row"),
        ("update", "append and attention in one call against attention alone"),
        ("int8", "int8 storage against bfloat16"),
        ("fp8", "fp8 storage against bfloat16"),
    ):
        ratios = {
            label: record["gbps"] / ours[label]["gbps"]
            for label, record in _ours(records, variant).items()
            if label in ours
        }
        if ratios:
            text = f"{min(ratios.values()):.3f} - {max(ratios.values()):.3f}"
            rows.append({"what": what, "measured": text, "wanted": "", "": ""})
    for rows_of_table in result.get("shared_prefix", {}).get("tables", {}).values():
        for row in rows_of_table:
            about = "{sequences} sequences, {shared} shared tokens, {layout}".format(**row)
            wanted = 1.5 if (row["sequences"], row["shared"]) == _SHARED_GOAL else 0.97
            add(f"{about}: read once against once for each", row["speed against each"], wanted)
    again = {r["label"]: r for r in result["again"]}
    drift = [again[k]["seconds"] / r["seconds"] for k, r in ours.items() if k in again]
    if drift:
        text = f"{min(drift):.3f} - {max(drift):.3f}"
        rows.append({"what": "the same once more: time", "measured": text, "wanted": "", "": ""})
    return rows


def _driver_rows(driver: dict[str, Any]) -> list[dict[str, Any]]:
    sizes = driver["microseconds_by_mib"]
    names = list(next(iter(sizes.values())))
    return [
        {"driver call": name}
        | {f"{mib} MiB, us": figures[name]["median"] for mib, figures in sizes.items()}
        for name in names
    ]


def show(console: Console, result: dict[str, Any]) -> None:
    """Prints all tables; the most important ones last."""
    for name, reason in result["absent"].items():
        console.print(f"absent: {NAMES.get(name, name)} ({reason})")
    left_out = {
        (NAMES.get(r["peer"], r["peer"]), r.get("variant", ""), r.get("section", ""), r["reason"])
        for r in result["left_out"]
    }
    for peer, variant, section, reason in sorted(left_out):
        where = " ".join(x for x in (peer, variant, section) if x)
        console.print(f"left out: {where}: {reason.splitlines()[0][:110]}")
    if "driver" in result:
        print_rows(console, "the driver's calls", _driver_rows(result["driver"]))
    for row in result.get("layers", {}).get("left_out", []):
        where = " ".join(str(row[k]) for k in ("part", "shape", "layout", "blocks") if k in row)
        console.print(f"left out: layers: {where}: {row['reason'].splitlines()[0][:110]}")
    for row in result.get("shared_prefix", {}).get("left_out", []):
        console.print(f"left out: shared prefixes: {row['shape']} {row['layout']}: {row['reason']}")
    for name in ("mapping", "llama_graphs", "shared_prefix", "layers"):
        for title, rows in result.get(name, {}).get("tables", {}).items():
            print_rows(console, title, rows)
    if not result.get("llama_graphs", {}).get("same_tokens", True):
        console.print(
            "tokens differ between modes (XLA rounds as it likes): see digests in the JSON"
        )
    copy = f"copies move {result['copy_gbps']:.0f} GB/s, read plus written"
    records = result["attention"]
    _records(console, records, "mixed", "mixed batches: milliseconds")
    _records(console, records, "prefill", "prefill: TFLOP/s (milliseconds)")
    decode = [r for r in records if r["section"] == "decode"]
    rest = [r for r in decode if not r["core"]]
    title = f"decode: GB/s of keys and values (fraction of a copy); {copy}"
    _records(console, rest, "decode", title)
    for kind in ("full", "ragged"):
        core = [r for r in decode if r["core"] and r["label"].endswith(kind)]
        _records(console, core, "decode", title)
    print_rows(console, "goals and ratios", goals(result))
