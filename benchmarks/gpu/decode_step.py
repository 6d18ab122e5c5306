"""A decode step without a model: append and attention in 32 layers, then advance, in one program.

    python benchmarks/gpu/decode_step.py [--platform cuda] [--mode graph] [--dry-run]

The fixed cost of a layer is the time of a step less the time to read keys and values once, divided
by the number of layers; short contexts show it directly. `--mode graph` runs each step as one CUDA
graph, `--mode plain` launches kernels one by one and also counts launches with JAX's profiler.
Prints one JSON object per line.
"""

from __future__ import annotations

import argparse
import collections
import functools
import json
import os
import pathlib
import re
import sys
import tempfile
from typing import Any

import jax
import jax.numpy as jnp
from filling import HEAD_DIM, KV_HEADS, fill_slots
from timing import measure

import jax_kvpage as kvp

MODES = {
    "graph": "--xla_gpu_enable_command_buffer=FUSION,CUBLAS,CUBLASLT,CUSTOM_CALL,CUDNN "
    "--xla_gpu_graph_min_graph_size=1",
    "plain": "--xla_gpu_enable_command_buffer=",
}
_HEADS = 32
_PROFILED_STEPS = 3
# Attention through the pool's block table.
_BY_TABLE = " + table"


class _Bench:
    """A pool of one layout with sequences, and the program of a step."""

    def __init__(self, platform: str, layout: str, layers: int, batch: int, context: int) -> None:
        self.platform = platform
        addressing: Any = "table" if layout.endswith(_BY_TABLE) else "slots"
        self.layers, self.token_bytes = layers, 2 * 2 * KV_HEADS * HEAD_DIM
        spec = kvp.CacheSpec(
            layers,
            KV_HEADS,
            HEAD_DIM,
            batch,
            context,
            dtype=jnp.bfloat16,
            layout=layout.removesuffix(_BY_TABLE),
        ).resolve(platform)
        blocks = batch * spec.blocks_per_range * spec.num_ranges
        # Every step starts from the same cache, so contexts do not grow.
        self.pool = kvp.KVPool(spec, blocks * spec.block_bytes, on_stale="allow")
        self.slots, self.cache = self.pool.acquire(self.pool.cache(), [context] * batch)
        self.cache = fill_slots(self.cache, self.slots, context)
        self.pool.check(self.cache)
        self.batch = kvp.Batch.decode(self.slots)
        random = functools.partial(jax.random.normal, dtype=jnp.bfloat16)
        self.q = random(jax.random.key(1), (batch, _HEADS, HEAD_DIM))
        self.kv = random(jax.random.key(2), (batch, KV_HEADS, HEAD_DIM))
        self._last = self.q

        @jax.jit
        def step(
            cache: kvp.KVCache, batch: kvp.Batch, q: jax.Array, kv: jax.Array
        ) -> tuple[jax.Array, kvp.KVCache]:
            for layer in range(layers):
                q, cache = kvp.update_and_attend(
                    q, kv, kv, cache, batch, layer=layer, addressing=addressing
                )
            return q, kvp.advance(cache, batch)

        self._step = step

    def run(self, times: int) -> None:
        """Queues steps; the queries of each are the previous step's output."""
        for _ in range(times):
            self._last, _ = self._step(self.cache, self.batch, self._last, self.kv)

    def wait(self) -> None:
        """Waits until all steps are done."""
        self._last.block_until_ready()

    def shorten(self, context: int) -> None:
        """Sets the length of all contexts to `context` tokens, including the new one."""
        # Repeated steps have advanced the pool's newest epoch.
        self.cache = self.pool.cache()
        ids = jnp.asarray(self.slots, jnp.int32)
        lengths = jnp.full(len(self.slots), context - 1, jnp.int32)
        self.cache = kvp.set_lengths(self.cache, ids, lengths)

    def time(self, seconds: float) -> dict[str, Any]:
        """Measures the seconds of a step."""
        return measure(self.run, self.wait, 1, seconds)

    def launches(self) -> list[dict[str, Any]]:
        """Kernels and copies of a step, from the profiler."""
        self.run(1)
        self.wait()
        with tempfile.TemporaryDirectory(prefix="jax_kvpage-profile-") as folder:
            with jax.profiler.trace(folder):
                self.run(_PROFILED_STEPS)
                self.wait()
            (file,) = pathlib.Path(folder).rglob("*.xplane.pb")
            profile = jax.profiler.ProfileData.from_file(str(file))
        calls: dict[str, list[float]] = collections.defaultdict(list)
        for plane in profile.planes:
            # A CPU has no launches: use any events, to test the script.
            if not plane.name.startswith("/device:GPU" if self.platform == "cuda" else "/host:CPU"):
                continue
            for line in plane.lines:
                # Other lines of a GPU repeat its events by op or by module.
                if self.platform == "cuda" and not line.name.startswith("Stream"):
                    continue
                for event in line.events:
                    calls[_short(event.name)].append(event.duration_ns / 1e3)
        rows = sorted(calls.items(), key=lambda item: -sum(item[1]))
        rows.insert(0, ("all", [us for _, times in rows for us in times]))
        return [
            {"launch": name, "a step": len(us) / _PROFILED_STEPS, "us each": sum(us) / len(us)}
            for name, us in rows[:15]
        ]


def _short(name: str) -> str:
    """A kernel's name without template arguments, parameters and namespaces."""
    name = re.sub(r"^void ", "", name.replace("(anonymous namespace)::", ""))
    return re.split(r"[<(]", name)[0].split("::")[-1].strip()[:60] or name[:60]


def _layout(arguments: argparse.Namespace, layout: str) -> None:
    layers, batch, context, short = (3, 2, 40, 8) if arguments.dry_run else (32, 8, 2048, 64)
    bench = _Bench(arguments.platform, layout, layers, batch, context)
    about = {"mode": arguments.mode, "layout": layout, "layers": layers}
    seconds = 0.01 if arguments.dry_run else arguments.seconds
    for tokens in (context, short):
        if tokens != context:
            bench.shorten(tokens)
        say(
            "step",
            **about,
            shape=f"{batch} x {tokens}",
            layer_bytes=batch * tokens * bench.token_bytes,
            **bench.time(seconds),
        )
    bench.pool.check(bench.cache)
    if arguments.mode == "plain":
        try:
            for row in bench.launches():
                say("launch", layout=layout, **row)
        except Exception as problem:
            # Profiling needs permissions that some machines do not grant.
            say("left_out", **about, reason=f"launches: {type(problem).__name__}: {problem}"[:500])
    bench.pool.close()


def say(kind: str, **values: Any) -> None:
    """Prints one JSON line."""
    print(json.dumps({"kind": kind, **values}), flush=True)


def main() -> int:
    """Measures both layouts, through slots and through the pool's block table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--platform", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--mode", choices=tuple(MODES), default="graph")
    parser.add_argument("--dry-run", action="store_true", help="tiny sizes")
    parser.add_argument("--seconds", type=float, default=0.3, help="for each measurement")
    arguments = parser.parse_args()
    # XLA reads its flags once, when JAX first asks for a device.
    flags = f"{os.environ.get('XLA_FLAGS', '')} {MODES[arguments.mode]}".strip()
    os.environ["XLA_FLAGS"] = flags
    jax.config.update("jax_platforms", "cpu" if arguments.platform == "cpu" else "cuda,cpu")
    for layout in ("fused", "per_layer", f"fused{_BY_TABLE}", f"per_layer{_BY_TABLE}"):
        try:
            _layout(arguments, layout)
        except Exception as problem:
            reason = f"{type(problem).__name__}: {problem}"[:500]
            say("left_out", mode=arguments.mode, layout=layout, reason=reason)
    return 0


if __name__ == "__main__":
    sys.exit(main())
