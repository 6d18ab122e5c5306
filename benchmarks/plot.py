"""Plots each peer's fraction of the read floor, by shape."""

from __future__ import annotations

import pathlib
from typing import Any

from report import title

__all__ = ["plot"]

# One strong colour for this package, muted ones for peers, distinguishable in greyscale.
_OURS = "#c2410c"
_PEERS = ["#1f2937", "#2563eb", "#0d9488", "#7c3aed", "#94a3b8", "#cbd5e1"]
_ORDER = ["vllm_cpu", "openvino_pa", "torch_sdpa", "ort_gqa", "jax_static", "jax_gather"]


def plot(
    records: list[dict[str, Any]], file: pathlib.Path, machine: str, floor: str = "read floor"
) -> None:
    """Draws grouped bars of decode attention, one panel for each dtype, into a PNG file.

    Args:
        records: measurements; if a peer has several variants, the fastest is shown.
        file: the file to write.
        machine: description of the machine, shown in the corner.
        floor: name of the reference for fractions.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    decode = [
        r
        for r in records
        if r["section"] == "decode" and (r["peer"] != "kvpage" or r["variant"] == "fused")
    ]
    dtypes = list(dict.fromkeys(r["dtype"] for r in decode))
    if not dtypes:
        return
    figure, panels = pyplot.subplots(
        len(dtypes), 1, figsize=(11, 3.4 * len(dtypes)), sharey=True, squeeze=False
    )
    for panel, dtype in zip(panels[:, 0], dtypes, strict=True):
        _panel(panel, [r for r in decode if r["dtype"] == dtype])
        panel.set_title(
            f"decode attention, {dtype}: fraction of the {floor}", loc="left", fontsize=11
        )
    handles, labels = panels[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="lower center", ncols=4, frameon=False, fontsize=9)
    figure.text(0.995, 0.995, machine, ha="right", va="top", fontsize=7, color="#64748b")
    figure.tight_layout(rect=(0, 0.09 / len(dtypes) + 0.03, 1, 0.98))
    figure.savefig(file, dpi=130)


def _panel(panel: Any, records: list[dict[str, Any]]) -> None:
    labels = list(dict.fromkeys(r["label"] for r in records))
    there = {r["peer"] for r in records}
    order = [*_ORDER, *sorted(there - {"kvpage", *_ORDER})]
    peers = ["kvpage", *(p for p in order if p in there)]
    width = 0.84 / len(peers)
    for i, peer in enumerate(peers):
        fastest = sorted((r for r in records if r["peer"] == peer), key=lambda r: r["fraction"])
        mine = {r["label"]: r for r in fastest}
        xs = [
            j + (i - (len(peers) - 1) / 2) * width
            for j, label in enumerate(labels)
            if label in mine
        ]
        rows = [mine[label] for label in labels if label in mine]
        if not rows:
            continue
        heights = [r["fraction"] for r in rows]
        spread = [
            [r["fraction"] - r["fraction_low"] for r in rows],
            [r["fraction_high"] - r["fraction"] for r in rows],
        ]
        name = "jax_kvpage" if peer == "kvpage" else title(rows[0])
        color = _OURS if peer == "kvpage" else _PEERS[order.index(peer) % len(_PEERS)]
        panel.bar(
            xs,
            heights,
            width * 0.92,
            label=name,
            color=color,
            yerr=spread,
            error_kw={"elinewidth": 0.7, "ecolor": "#475569"},
        )
    panel.axhline(1, color="#64748b", linewidth=0.8, linestyle="--")
    panel.set_xticks(range(len(labels)), labels, fontsize=9)
    panel.set_ylim(0, 1.1)
    panel.spines[["top", "right"]].set_visible(False)
    panel.grid(axis="y", linewidth=0.3)
    panel.set_axisbelow(True)
