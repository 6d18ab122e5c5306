"""Serves jobs with the library's engine and measures it."""

import dataclasses
import itertools
import pathlib
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

import jax_kvpage
from jax_kvpage.serving import (
    DraftModel,
    Engine,
    RequestOutput,
    RequestRefused,
    SamplingParams,
    Step,
)

from .arguments import InputError
from .checkpoint import load_model
from .config import LlamaConfig, load_config
from .model import Llama
from .pools import make_pool
from .sampling import seed_of_prompt
from .workload import Job

__all__ = [
    "Result",
    "Sample",
    "figures",
    "make_draft",
    "model_step",
    "plot_occupancy",
    "serve",
]


@dataclasses.dataclass(frozen=True)
class Sample:
    """Memory at one moment.

    Attributes:
      seconds: Time since the start.
      stored: Number of tokens stored.
      reserved: Number of tokens for which blocks are mapped.
      requests: Tokens reserved by each running request, by its number.
    """

    seconds: float
    stored: int
    reserved: int
    requests: dict[int, int]


@dataclasses.dataclass(frozen=True)
class Result:
    """The result of a run.

    Attributes:
      outputs: The output of each job; None if it was refused.
      refusals: The messages of refused jobs.
      samples: Memory over time.
      seconds: Duration.
    """

    outputs: list[RequestOutput | None]
    refusals: list[str]
    samples: list[Sample]
    seconds: float


def make_draft(
    path: pathlib.Path, config: LlamaConfig, pool: jax_kvpage.KVPool, block_tokens: int | None
) -> DraftModel:
    """Makes a draft model from the directory `path`, in float32, with its own pool.

    Args:
      path: The draft model's directory.
      config: The configuration of the target model.
      pool: The pool of the target model.
      block_tokens: As for `make_pool`.

    Raises:
      ConfigError: The directory has no supported model.
      CheckpointError: Its weights are missing or do not match.
      InputError: The models have different vocabularies.
    """
    own = load_config(path)
    if own.vocab_size != config.vocab_size:
        raise InputError(
            f"--draft {path}: its vocabulary has {own.vocab_size} tokens, the model's "
            f"{config.vocab_size}"
        )
    step, weights = model_step(load_model(path, dtype=jnp.dtype("float32")))
    length = min(pool.spec.max_seq_len, own.max_position_embeddings)
    # Enough memory for all slots when full: a draft without memory guesses nothing.
    memory = make_pool(own, pool.spec.max_slots, length, block_tokens, share=1)
    return DraftModel(step=step, params=weights, pool=memory)


def model_step(
    model: Llama, implementation: str | None = None, *, gather: bool = True
) -> tuple[Step, list[jax.Array]]:
    """The model in the form for the engine: a step function, and its weights as a flat list.

    Args:
      model: The model.
      implementation: As for `jax_kvpage.update_and_attend`.
      gather: Whether vectors of the same size, which are the scales of the norms, become rows of
        one matrix. Each array that a program takes costs time in the thread that dispatches it.
        False: the weights are those of the model, in their order.
    """
    graph, state = nnx.split(model)
    leaves, tree = jax.tree.flatten(state)
    rows: dict[tuple[int, jnp.dtype], list[int]] = {}
    for index, leaf in enumerate(leaves if gather else ()):
        if leaf.ndim == 1:
            rows.setdefault((leaf.size, leaf.dtype), []).append(index)
    gathered = set(itertools.chain.from_iterable(rows.values()))
    kept = [index for index in range(len(leaves)) if index not in gathered]
    matrices = [jnp.stack([leaves[index] for index in indices]) for indices in rows.values()]

    def step(
        weights: list[jax.Array],
        cache: jax_kvpage.KVCache,
        tokens: jax.Array,
        batch: jax_kvpage.Batch,
    ) -> tuple[jax.Array, jax_kvpage.KVCache]:
        found = dict(zip(kept, weights, strict=False))
        for indices, matrix in zip(rows.values(), weights[len(kept) :], strict=True):
            found |= zip(indices, jnp.unstack(matrix), strict=True)
        ordered = [found[index] for index in range(len(found))]
        merged = nnx.merge(graph, jax.tree.unflatten(tree, ordered))
        return merged(tokens, cache, batch, rows=batch.last_rows, implementation=implementation)

    return step, [*(leaves[index] for index in kept), *matrices]


def serve(
    engine: Engine,
    jobs: Sequence[Job],
    params: SamplingParams,
    on_finish: Callable[[int], None],
    sample_every: int = 8,
) -> Result:
    """Runs jobs as they arrive.

    Args:
      engine: The engine, warmed up.
      jobs: The jobs, in order of arrival.
      params: Parameters for all jobs, but with each job's max_tokens and consecutive seeds.
      on_finish: Called with the number of jobs that have just ended.
      sample_every: Steps between two samples of memory.
    """
    outputs: list[RequestOutput | None] = [None] * len(jobs)
    refusals: list[str] = []
    samples: list[Sample] = []
    begin = time.monotonic()
    following, steps = 0, 0
    while following < len(jobs) or engine.has_unfinished:
        now = time.monotonic() - begin
        while following < len(jobs) and jobs[following].arrival <= now:
            job = jobs[following]
            seed = None if params.seed is None else seed_of_prompt(params.seed, following)
            each = dataclasses.replace(params, max_tokens=job.max_tokens, seed=seed)
            try:
                outputs[following] = engine.add_request(job.prompt_ids, each, request_id=following)
            except RequestRefused as refusal:
                refusals.append(str(refusal))
                on_finish(1)
            following += 1
        if not engine.has_unfinished:
            time.sleep(max(jobs[following].arrival - now, 0) if following < len(jobs) else 0)
            continue
        on_finish(sum(output.finished for output in engine.step()))
        if steps % sample_every == 0:
            samples.append(_sample(engine, time.monotonic() - begin))
        steps += 1
    return Result(outputs, refusals, samples, time.monotonic() - begin)


def _sample(engine: Engine, seconds: float) -> Sample:
    memory = engine.memory()
    requests: dict[int, int] = {}
    for each in memory:
        number = int(str(each.request_id))
        requests[number] = requests.get(number, 0) + each.num_reserved
    stored = sum(each.num_tokens for each in memory)
    return Sample(seconds, stored, sum(requests.values()), requests)


def _percentiles(values: Sequence[float]) -> tuple[float, float]:
    """p50 and p99 of seconds, in milliseconds; 0 without values."""
    if not values:
        return 0.0, 0.0
    middle, high = np.percentile(np.asarray(values) * 1000, (50, 99))
    return round(float(middle), 3), round(float(high), 3)


def figures(
    result: Result,
    engine: Engine,
    spec: jax_kvpage.CacheSpec,
    stats: jax_kvpage.PoolStats,
    compile_seconds: float,
) -> dict[str, Any]:
    """The statistics of a run, as plain numbers and strings."""
    outputs = [output for output in result.outputs if output is not None]
    metrics = [output.metrics for output in outputs]
    reasons: dict[str, int] = {}
    for output in outputs:
        for each in output.outputs:
            reason = str(each.finish_reason)
            reasons[reason] = reasons.get(reason, 0) + 1
    generated = sum(len(each.token_ids) for output in outputs for each in output.outputs)
    first = [m.first_token - m.arrival for m in metrics if m.first_token is not None]
    between = [gap for m in metrics for gap in np.diff(m.token_times).tolist()]
    reserved = sum(sample.reserved for sample in result.samples)
    stored = sum(sample.stored for sample in result.samples)
    prompts = sum(len(output.prompt_token_ids) for output in outputs)
    (first50, first99), (between50, between99) = _percentiles(first), _percentiles(between)
    return {
        "requests": len(result.outputs),
        "refused": len(result.refusals),
        "finish_reasons": reasons,
        "prompt_tokens": prompts,
        "generated_tokens": generated,
        "cached_tokens": sum(m.num_cached_tokens for m in metrics),
        "computed_tokens": sum(m.num_computed_tokens for m in metrics),
        "recomputed_tokens": sum(m.num_recomputed_tokens for m in metrics),
        "preemptions": engine.stats.preemptions,
        "swapped": engine.stats.swapped,
        "steps": engine.stats.steps,
        "guesses": engine.stats.drafted,
        "accepted_guesses": engine.stats.accepted,
        "seconds": round(result.seconds, 4),
        "compile_seconds": round(compile_seconds, 4),
        "generated_per_second": round(generated / result.seconds, 2),
        "tokens_per_second": round((prompts + generated) / result.seconds, 2),
        "first_token_ms_p50": first50,
        "first_token_ms_p99": first99,
        "between_tokens_ms_p50": between50,
        "between_tokens_ms_p99": between99,
        "capacity": stats.capacity,
        "peak": stats.peak,
        "static_cache": spec.max_slots * spec.max_seq_len * spec.token_bytes,
        "waste": round(1 - stored / reserved, 4) if reserved else 0.0,
        "running_mean": round(
            float(np.mean([len(sample.requests) for sample in result.samples] or [0])), 2
        ),
    }


def plot_occupancy(result: Result, file: Any) -> None:
    """Draws a stack plot of the tokens for which each request has room over time.

    Raises:
      OSError: The file cannot be written.
      ValueError: matplotlib does not know the file name's suffix.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    numbers = sorted({number for sample in result.samples for number in sample.requests})
    seconds = [sample.seconds for sample in result.samples]
    heights = [[sample.requests.get(n, 0) for sample in result.samples] for n in numbers]
    figure, axes = pyplot.subplots(figsize=(8, 4), layout="constrained")
    if numbers:
        colors = [matplotlib.colormaps["tab20"](n % 20) for n in numbers]
        axes.stackplot(seconds, heights, colors=colors, step="post")
    stored = [sample.stored for sample in result.samples]
    axes.step(seconds, stored, where="post", color="black", linewidth=1, label="stored")
    axes.set_xlabel("seconds")
    axes.set_ylabel("tokens of mapped blocks, by request")
    axes.legend()
    figure.savefig(file, dpi=150)
    pyplot.close(figure)
