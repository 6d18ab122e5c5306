"""Time to the first token: stored prefixes that are read compared with computing them.

    python benchmarks/store_hits.py [--quick] [--json] [--folder /tmp]

An engine serves one request after the other, with a stored prefix of some length. A request that
finds the prefix in the store alternates with one in an empty namespace, which computes it. Based on
its measurements, the engine decides whether to read or to compute (taken or refused); for requests
that were taken, the time to the first token is divided by that of the computed request in the same
pair, and the 95th percentile of these times by that of the computed ones. Ratios of at most 1 mean
that reading was not slower. The store's files are in the page cache ("warm"), or were dropped from
it before each request ("cold").

Models: the one of this repository, and one of 56M parameters with random weights.
"""

from __future__ import annotations

import dataclasses
import os
import pathlib
import shutil
import sys
import tempfile
import time
from typing import Any

import numpy as np
import script

sys.path.append(str(pathlib.Path(__file__).parents[1] / "examples"))

import random_llama
from llama.arguments import BUNDLED
from llama.checkpoint import load_model
from llama.serving import model_step

import jax_kvpage as kvp
from jax_kvpage.serving import Engine, EngineConfig, SamplingParams

__all__ = ["measure"]

_ONE = SamplingParams(max_tokens=1, temperature=0.0, ignore_eos=True)
_BUCKETS = ((4, 4), (32, 4), (128, 4), (512, 4), (2048, 4))
# A row with long prefixes ends after this many seconds, but with at least this many requests.
_ROW_SECONDS, _FEWEST = 60, 6


def _drop(folder: pathlib.Path) -> None:
    """Drops the files, which must have been synced, from the page cache."""
    for path in folder.iterdir():
        fd = os.open(path, os.O_RDONLY)
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(fd)


@dataclasses.dataclass(frozen=True)
class _Request:
    seconds: float
    cached: int


def _first_token(engine: Engine, prompt: list[int], namespace: str | None) -> _Request:
    begin = time.perf_counter()
    output = engine.add_request(prompt, _ONE, namespace=namespace)
    while not output.finished:
        engine.step()
    return _Request(time.perf_counter() - begin, output.metrics.num_cached_tokens)


def _rows(name: str, checkpoint: str, root: pathlib.Path, lengths: list[int], rounds: int) -> Any:
    model = load_model(checkpoint)
    shape = model.config
    spec = kvp.CacheSpec(
        shape.num_hidden_layers, shape.num_key_value_heads, shape.head_dim, 4, max(lengths) + 64
    ).resolve("cpu")
    step, weights = model_step(model)
    rng = np.random.default_rng(0)
    rows = []
    with (
        kvp.BlockStore(root / name, limit=None) as store,
        kvp.KVPool(spec, 3 * spec.slot_bytes, store=store) as pool,
        Engine(
            step,
            weights,
            pool,
            EngineConfig(max_num_batched_tokens=2048, buckets=_BUCKETS, namespace=name),
        ) as engine,
    ):
        engine.warm_up()
        prompts = {n: rng.integers(0, shape.vocab_size, n + 1).tolist() for n in lengths}
        for prompt in prompts.values():
            _first_token(engine, prompt, None)
            pool.save_prefixes()
            pool.evict()
        for state in ("warm", "cold"):
            for length, prompt in prompts.items():
                pairs: list[tuple[_Request, _Request]] = []
                begin = time.monotonic()
                for number in range(rounds + 1):
                    if number > _FEWEST and time.monotonic() - begin > _ROW_SECONDS:
                        break
                    pool.evict()
                    if state == "cold":
                        _drop(store.path)
                    stored = _first_token(engine, prompt, None)
                    pool.evict()
                    computed = _first_token(engine, prompt, f"{state} {number}")
                    if computed.cached:
                        raise AssertionError("the namespace was to have nothing")
                    if number:  # the first pair touches the memory
                        pairs.append((stored, computed))
                taken = [(s.seconds, c.seconds) for s, c in pairs if s.cached]
                row: dict[str, Any] = {"model": name, "tokens": length, "page cache": state}
                row |= {"taken": len(taken), "refused": len(pairs) - len(taken)}
                if taken:
                    read, compute = np.asarray(taken).T
                    row["ms read"] = 1e3 * float(np.median(read))
                    row["ms computed"] = 1e3 * float(np.median(compute))
                    row["ratio, median"] = float(np.median(read / compute))
                    row["ratio, p95"] = float(np.percentile(read, 95) / np.percentile(compute, 95))
                rows.append(row)
                print(row, file=sys.stderr, flush=True)
    return rows


def measure(quick: bool, folder: str) -> dict[str, Any]:
    """One table: a row for each model, length of the prefix and state of the page cache."""
    lengths = [128, 512] if quick else [128, 512, 2048, 4096, 8192, 16384]
    rounds = 6 if quick else 20
    root = pathlib.Path(tempfile.mkdtemp(dir=folder))
    try:
        (root / "checkpoint").mkdir()
        random_llama.write_checkpoint(str(root / "checkpoint"))
        models = {"shipped": str(BUNDLED), "56M": str(root / "checkpoint")}
        rows = [
            row for name, path in models.items() for row in _rows(name, path, root, lengths, rounds)
        ]
    finally:
        shutil.rmtree(root)
    return {"tables": {"time to the first token behind a stored prefix": rows}}


if __name__ == "__main__":
    script.run(__doc__, measure, folder=tempfile.gettempdir())
