"""Steady decoding in the engine: CPU time per step of its thread, and idle time of the device.

    python benchmarks/engine_steps.py [--quick] [--json]

The 56M Llama of `llama_steps.py` in float32, 8 sequences, greedy, in memory that other sequences
have used before. The engine runs in a thread of its own, as in `AsyncEngine`, which is timed by its
CPU clock; in the rest of a step it waits for the device. In a second run, its time is divided among
the parts of a step. In a third run, under the profiler, `idle` is the time in which no
instruction of a step ran. The same compiled step called in a loop without reading results shows how
much of that is due to XLA.
"""

from __future__ import annotations

import concurrent.futures
import functools
import pathlib
import sys
import time
from typing import Any

import jax
import jax.numpy as jnp
import llama_steps
import numpy as np
import script
from flax import nnx
from threadsplit import ThreadSplit
from timesplit import split

import jax_kvpage as kvp
from jax_kvpage.serving import Engine, EngineConfig, SamplingParams
from jax_kvpage.serving.engine.packing import Operands

sys.path.append(str(pathlib.Path(__file__).parents[1] / "examples"))

from llama.serving import model_step

__all__ = ["measure"]

_BATCH = 8
_MODEL = "56M"
_RUNS = [(64, 200), (1792, 100)]  # context, steps
_QUICK = [(64, 20)]


def _engine(context: int, room: int) -> tuple[Engine, kvp.KVPool]:
    config = llama_steps._MODELS[_MODEL]
    graph, tree, weights = llama_steps._weights(config)
    step, weights = model_step(nnx.merge(graph, jax.tree.unflatten(tree, weights)))
    spec = kvp.CacheSpec(
        config.num_hidden_layers,
        config.num_key_value_heads,
        config.head_dim,
        _BATCH,
        context + room,
        dtype=jnp.float32,
    )
    pool = kvp.KVPool(spec, f"{-(-_BATCH * (context + room + 64) * spec.token_bytes >> 20)}MiB")
    slots, cache = pool.acquire(pool.cache(), [context + room] * _BATCH)
    jax.block_until_ready(pool.release(cache, slots))
    shapes = ((_BATCH, _BATCH), (512, _BATCH))
    engine = Engine(step, weights, pool, EngineConfig(buckets=shapes, prefix_caching=False))
    engine.warm_up()
    rng = np.random.default_rng(0)
    params = SamplingParams(max_tokens=room, temperature=0.0, ignore_eos=True)
    outputs = [
        engine.add_request(rng.integers(100, 30000, context).tolist(), params)
        for _ in range(_BATCH)
    ]
    while not all(output.outputs and output.outputs[0].token_ids for output in outputs):
        engine.step()
    return engine, pool


def _steps(engine: Engine, count: int) -> None:
    for _ in range(count):
        engine.step()
    # The last step is still in flight; so was the one before the first.


def _parts(engine: Engine, count: int) -> dict[str, Any]:
    """CPU time of the engine's thread in each part of a step, in ms."""
    clock, programs, runner = ThreadSplit("other"), engine._programs, engine._runner
    compiled = dict(programs._compiled)
    calls = [
        (engine._memory, "look", "plan"),
        (engine.scheduler, "schedule", "plan"),
        (engine._slots, "claim", "memory"),
        (runner, "launch", "arrays"),
        (programs, "read_back", "read-back"),
        (engine._reader, "read", "outputs"),
    ]
    for owner, name, part in calls:
        setattr(owner, name, clock.timed(part, getattr(owner, name)))
    for variant, program in compiled.items():
        programs._compiled[variant] = clock.timed("dispatch", program)
    try:
        with clock.running():
            _steps(engine, count)
    finally:
        for owner, name, _ in calls:
            delattr(owner, name)
        programs._compiled.update(compiled)
    spent = clock.milliseconds(count)
    order = dict.fromkeys(["plan", "memory", "arrays", "dispatch", "read-back", "outputs", "other"])
    return {"all": sum(spent.values())} | {part: spent[part] for part in order}


def _bare(engine: Engine, count: int) -> None:
    """Runs the compiled decode step in a loop, starting at the engine's present lengths."""
    runner, programs = engine._runner, engine._programs
    cache, state = engine._slots.cache, runner._launcher.state
    slots = np.asarray([each.slot for each in engine._slots.occupied()], np.int32)
    rows = np.arange(_BATCH, dtype=np.int32)
    positions = np.asarray(jax.device_get(cache.lengths))[slots] + 1
    for i in range(count):
        step = Operands(
            -1 - rows, np.ones(_BATCH, np.int32), slots, rows,
            positions + i, runner._columns[:, :_BATCH],
        )  # fmt: skip
        packed = programs.pack(step)
        cache, state, _ = programs.run(packed, 0, cache, state)
    engine._slots.cache, runner._launcher.state = jax.block_until_ready((cache, state))


def _row(context: int, steps: int) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    engine, pool = _engine(context, 5 * steps + 64)
    with pool:
        _steps(engine, 8)
        begin, processor = time.perf_counter(), time.thread_time()
        _steps(engine, steps)
        seconds, processor = time.perf_counter() - begin, time.thread_time() - processor
        parts = _parts(engine, steps)
        hlo = engine._programs._compiled[(_BATCH, _BATCH), 0, False].as_text()
        traced = split(functools.partial(_steps, engine, steps), steps, hlo)
        jax.block_until_ready(engine._slots.cache)
        lengths = np.asarray(engine._slots.cache.lengths)
        for sequence in engine._slots.occupied():
            pool.extend(sequence.slot, int(lengths[sequence.slot]) + steps + 8)
        begin = time.perf_counter()
        _bare(engine, steps // 2)
        bare = (time.perf_counter() - begin) / (steps // 2)
        loop = split(functools.partial(_bare, engine, steps // 2), steps // 2, hlo)
    about: dict[str, Any] = {"model": _MODEL, "context": context}
    rows = [
        about
        | {
            "steps": "in the engine",
            "ms": seconds / steps * 1e3,
            "thread ms": processor / steps * 1e3,
            "thread share": processor / seconds,
            "idle share": traced["idle ms"] / traced["step ms"],
            "products ms": traced["products ms"],
            "kernels ms": traced["kernels ms"],
        },
        about
        | {
            "steps": "in a loop",
            "ms": bare * 1e3,
            "idle share": loop["idle ms"] / loop["step ms"],
            "products ms": loop["products ms"],
            "kernels ms": loop["kernels ms"],
        },
    ]
    return rows, about | parts


def measure(quick: bool) -> dict[str, Any]:
    """Measures steps in the engine and in a loop, and the thread's time by part."""
    steps: list[dict[str, Any]] = []
    parts: list[dict[str, Any]] = []
    for run in _QUICK if quick else _RUNS:
        with concurrent.futures.ThreadPoolExecutor(1) as thread:
            rows, row = thread.submit(_row, *run).result()
        steps += rows
        parts.append(row)
    return {
        "tables": {
            f"decode steps of {_BATCH} sequences, float32": steps,
            "processor time of the engine's thread, ms a step": parts,
        }
    }


if __name__ == "__main__":
    script.run(__doc__, measure)
