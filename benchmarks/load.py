"""How fast the Llama example loads a checkpoint, compared with a plain read of its file.

    python benchmarks/load.py [--quick] [--json]

The file is in the page cache. A plain read copies it once, into newly allocated memory, as loading
does; loading may also convert weights. Both take turns; figures are medians. "setup" is the part of
loading that determines the shapes of parameters. CPU time of all threads is reported because other
load on the machine distorts wall times.
"""

from __future__ import annotations

import pathlib
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import script
from flax import nnx

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent / "examples"))

from llama.checkpoint import load_model, save_model
from llama.config import LlamaConfig
from llama.model import Llama

__all__ = ["measure"]

_CASES = (("float32", "float32"), ("bfloat16", "bfloat16"), ("bfloat16", "float32"))


def _config(quick: bool) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=8000 if quick else 32000,
        hidden_size=512 if quick else 1024,
        intermediate_size=1536 if quick else 4096,
        num_hidden_layers=4 if quick else 8,
        num_attention_heads=16,
        num_key_value_heads=8,
        head_dim=64,
        tie_word_embeddings=True,
    )


def _read(file: pathlib.Path) -> None:
    with file.open("rb", buffering=0) as opened:
        opened.read()


def _load(path: pathlib.Path, dtype: str) -> None:
    model = load_model(path, dtype=jnp.dtype(dtype))
    jax.block_until_ready(nnx.state(model))


def _setup(config: LlamaConfig) -> None:
    nnx.eval_shape(lambda: Llama(config, rngs=None))


def _seconds(call: Callable[..., None], *arguments: Any) -> tuple[float, float]:
    """Wall time and processor time."""
    wall, busy = time.perf_counter(), time.process_time()
    call(*arguments)
    return time.perf_counter() - wall, time.process_time() - busy


def _row(folder: pathlib.Path, config: LlamaConfig, stored: str, loaded: str) -> dict[str, Any]:
    path = folder / stored
    if not path.exists():
        save_model(Llama(config, rngs=nnx.Rngs(0)), path, dtype=jnp.dtype(stored))
    file = path / "model.safetensors"
    times = []
    for _ in range(6):
        times.append(
            (*_seconds(_read, file), *_seconds(_load, path, loaded), *_seconds(_setup, config))
        )
    read, read_busy, load, load_busy, setup, _ = map(
        statistics.median, zip(*times[1:], strict=True)
    )
    size = file.stat().st_size
    return {
        "stored": stored,
        "loaded as": loaded,
        "MB": size / 1e6,
        "read GB/s": size / read / 1e9,
        "load GB/s": size / load / 1e9,
        "load over read": load / read,
        "processor ms, read": read_busy * 1e3,
        "processor ms, load": load_busy * 1e3,
        "setup ms": setup * 1e3,
    }


def measure(quick: bool) -> dict[str, Any]:
    """One row for each pair of stored and loaded type."""
    config = _config(quick)
    with tempfile.TemporaryDirectory() as temporary:
        folder = pathlib.Path(temporary)
        rows = [_row(folder, config, stored, loaded) for stored, loaded in _CASES]
    return {"tables": {"loading a checkpoint, beside a plain read": rows}}


if __name__ == "__main__":
    script.run(__doc__ or "", measure)
