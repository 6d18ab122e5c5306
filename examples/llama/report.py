"""Statistics of a run for the table and for `--json`, and the plot of memory over time."""

import math
import pathlib
from collections.abc import Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

import jax_kvpage

from .engine_runner import EngineRunner
from .scan_runner import Request, ScanRunner

__all__ = ["figures", "plot_memory", "print_table", "turn_figures"]


def figures(
    engine: ScanRunner | EngineRunner,
    requests: Sequence[Request],
    spec: jax_kvpage.CacheSpec,
    stats: jax_kvpage.PoolStats,
    seconds: float,
) -> dict[str, Any]:
    """The statistics of a run, as plain numbers and strings.

    Args:
      engine: The engine after the run.
      requests: The requests that it ran.
      spec: The pool's resolved spec.
      stats: The pool's statistics after the run.
      seconds: Duration of the run, including compilation.
    """
    generated = sum(len(request.output_ids) for request in requests)
    running = max(seconds - engine.compile_seconds, 1e-9)
    static = spec.max_slots * spec.max_seq_len * spec.token_bytes
    return {
        "num_sequences": len({request.index for request in requests}),
        "prompt_tokens": sum(len(request.prompt_ids) for request in requests),
        "generated_tokens": generated,
        "seconds": round(running, 4),
        "compile_seconds": round(engine.compile_seconds, 4),
        "tokens_per_second": round(generated / running, 2),
        "decode_steps": engine.steps,
        "layout": spec.layout,
        "kv_dtype": str(spec.dtype),
        "block_tokens": spec.block_tokens,
        "block_bytes": spec.block_bytes,
        "capacity": stats.capacity,
        "blocks_mapped": stats.peak // spec.block_bytes,
        "bytes_mapped": stats.peak,
        "bytes_static_cache": static,
        "bytes_reserved_virtual": stats.reserved_virtual,
        "mapped_share_of_static": round(stats.peak / static, 4),
        "saved_by_sharing": round(engine.sharing.saved, 4),
        "system_calls": stats.system_calls,
        "system_calls_per_token": round(stats.system_calls / max(generated, 1), 4),
        "stalls": engine.stalls,
        "preemptions": sum(request.preemptions for request in requests),
        "accepted_guesses": engine.accepted if isinstance(engine, EngineRunner) else 0,
    }


def turn_figures(turns: Sequence[Sequence[Request]]) -> list[dict[str, int]]:
    """For each turn: prompt tokens of its requests, how many of these were cached, and generated
    tokens."""
    return [
        {
            "prompt_tokens": sum(len(request.prompt_ids) for request in turn),
            "cached_tokens": sum(request.cached_tokens for request in turn),
            "generated_tokens": sum(len(request.output_ids) for request in turn),
        }
        for turn in turns
    ]


def print_table(values: dict[str, Any]) -> None:
    """Prints the statistics as a table on standard output."""
    table = Table(title="What it took", title_justify="left", show_header=False)
    table.add_column(style="bold")
    table.add_column(justify="right")
    rate = f"{values['tokens_per_second']:,.1f}"
    compiled = f"{values['seconds']:.2f} s (and {values['compile_seconds']:.2f} s compiling)"
    rows = [
        ("sequences", f"{values['num_sequences']}"),
        (
            "tokens read / generated",
            f"{values['prompt_tokens']:,} / {values['generated_tokens']:,}",
        ),
        ("time", compiled),
        ("tokens/s", rate),
        ("layout, storage", f"{values['layout']}, {values['kv_dtype']}"),
        ("block", f"{values['block_tokens']} tokens, {_bytes(values['block_bytes'])}"),
        ("blocks mapped at most", f"{values['blocks_mapped']:,}"),
        ("bytes mapped at most", _bytes(values["bytes_mapped"])),
        ("a static cache reserves", _bytes(values["bytes_static_cache"])),
        ("mapped / static", f"{values['mapped_share_of_static']:.1%}"),
        ("system calls per token", f"{values['system_calls_per_token']:.3f}"),
        ("stalls / preemptions", f"{values['stalls']} / {values['preemptions']}"),
    ]
    if values["saved_by_sharing"]:
        rows.insert(-2, ("blocks saved by sharing", f"{values['saved_by_sharing']:.1%}"))
    if values["accepted_guesses"]:
        rows.append(("guessed tokens that were right", f"{values['accepted_guesses']:,}"))
    for number, turn in enumerate(values.get("turns", []), start=1):
        counts = f"{turn['prompt_tokens']:,} / {turn['cached_tokens']:,}"
        rows.append((f"turn {number}: tokens read / cached", counts))
    for name, value in rows:
        table.add_row(name, value)
    Console().print(table)


def plot_memory(
    engine: ScanRunner | EngineRunner, values: dict[str, Any], file: str | pathlib.Path
) -> None:
    """Plots mapped memory over time against the size of a static cache.

    Raises:
      OSError: The file cannot be written.
      ValueError: matplotlib does not know the file name's suffix.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    static = values["bytes_static_cache"]
    unit, size = _unit(static)
    seconds = [sample.seconds for sample in engine.samples]
    mapped = [sample.mapped_bytes / size for sample in engine.samples]
    occupied = [sample.occupied_bytes / size for sample in engine.samples]
    figure, axes = pyplot.subplots(figsize=(7, 4), layout="constrained")
    axes.axhline(static / size, color="tab:red", linestyle="--", label="a static cache")
    axes.step(seconds, mapped, where="post", color="tab:blue", label="mapped")
    axes.fill_between(
        seconds, occupied, step="post", color="tab:blue", alpha=0.25, label="of running sequences"
    )
    axes.set_xlabel("seconds, without compiling")
    axes.set_ylabel(unit)
    axes.set_ylim(bottom=0)
    axes.set_title(f"KV cache of {values['num_sequences']} sequences")
    axes.legend()
    figure.savefig(file, dpi=150)
    pyplot.close(figure)


def _unit(count: float) -> tuple[str, int]:
    """The largest binary unit not above `count`, and its size in bytes."""
    units = ("B", "KiB", "MiB", "GiB", "TiB")
    power = min(int(math.log2(max(count, 1)) // 10), len(units) - 1)
    return units[power], 1024**power


def _bytes(count: float) -> str:
    unit, size = _unit(count)
    return f"{count / size:.{0 if size == 1 or count >= 100 * size else 1}f} {unit}"
