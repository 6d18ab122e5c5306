"""Prometheus metrics with vLLM's names and meanings, so that dashboards for vLLM work."""

import dataclasses
from collections.abc import Iterator
from typing import Any

import prometheus_client
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

import jax_kvpage
from jax_kvpage.serving import Engine, RequestOutput

__all__ = ["CONTENT_TYPE", "Metrics", "Snapshot", "Watch"]

CONTENT_TYPE = prometheus_client.CONTENT_TYPE_LATEST

_LABELS = ("model_name", "engine")
_REASONS = {"capacity": "length", "cancelled": "abort", "deadline": "abort"}
# vLLM's buckets.
_FIRST_TOKEN = (
    0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0,
    20.0, 40.0, 80.0, 160.0, 640.0, 2560.0,
)  # fmt: skip
_BETWEEN = (
    0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0,
    40.0, 80.0,
)  # fmt: skip
_WHOLE = (
    0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0, 50.0, 60.0, 120.0, 240.0,
    480.0, 960.0, 1920.0, 7680.0,
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Snapshot:
    """The state of the engine and its pool between two steps.

    Attributes:
      running: Number of requests with memory.
      waiting: Number of requests in the queue.
      preemptions: Number of preemptions.
      usage: Share of the blocks that requests have, from 0 to 1. Blocks that only the prefix cache
        keeps count as free.
      queries: Tokens looked up in the prefix cache.
      hits: How many of these were found.
      store_queries: Tokens looked up that were not already in memory; None without a store.
      store_hits: How many of these were read from the store.
    """

    running: int
    waiting: int
    preemptions: int
    usage: float
    queries: int
    hits: int
    store_queries: int | None = None
    store_hits: int | None = None

    @classmethod
    def of(cls, engine: Engine, pool: jax_kvpage.KVPool) -> "Snapshot":
        """Takes a snapshot; must be called between steps."""
        counts, blocks = engine.stats, pool.stats()
        spills = pool.store is not None and pool.sharding is None  # over a mesh: no prefixes
        tiers = pool.spill_stats() if spills else None
        return cls(
            running=counts.running,
            waiting=counts.waiting,
            preemptions=counts.preemptions,
            usage=(blocks.blocks_mapped + blocks.blocks_draining) / blocks.blocks_total,
            queries=blocks.prefix_queries,
            hits=blocks.prefix_hits,
            store_queries=tiers and tiers.queries - tiers.memory_hits,
            store_hits=tiers and tiers.store_hits,
        )


class Metrics:
    """All metrics of a server.

    Args:
      model: Name of the served model, for the label.

    Attributes:
      num_generated: Number of tokens generated so far.
    """

    def __init__(self, model: str) -> None:
        self._registry = prometheus_client.CollectorRegistry()
        self._values = values = (model, "0")
        self.num_generated = 0
        self._engine = _EngineCollector(values)
        self._registry.register(self._engine)

        def counter(name: str, what: str) -> prometheus_client.Counter:
            made = prometheus_client.Counter(f"vllm:{name}", what, _LABELS, registry=self._registry)
            return made.labels(*values)

        def histogram(name: str, what: str, buckets: Any) -> prometheus_client.Histogram:
            made = prometheus_client.Histogram(
                f"vllm:{name}", what, _LABELS, buckets=buckets, registry=self._registry
            )
            return made.labels(*values)

        self.prompt_tokens = counter("prompt_tokens", "Prompt tokens processed.")
        self.generation_tokens = counter("generation_tokens", "Tokens generated.")
        self.first_token = histogram(
            "time_to_first_token_seconds", "From arrival to the first token.", _FIRST_TOKEN
        )
        self.between = histogram(
            "inter_token_latency_seconds", "From one token to the next.", _BETWEEN
        )
        self.per_token = histogram(
            "request_time_per_output_token_seconds",
            "Mean time between the tokens of a request.",
            _BETWEEN,
        )
        self.whole = histogram("e2e_request_latency_seconds", "From arrival to the end.", _WHOLE)
        self._success = prometheus_client.Counter(
            "vllm:request_success",
            "Requests that have ended, by reason.",
            (*_LABELS, "finished_reason"),
            registry=self._registry,
        )
        for reason in ("stop", "length", "abort", "error"):
            self._success.labels(*values, reason)

    def ended(self, reason: str) -> None:
        """Counts a request that has ended.

        Args:
          reason: The engine's finish reason.
        """
        self._success.labels(*self._values, _REASONS.get(reason, reason)).inc()

    def render(self, snapshot: Snapshot) -> bytes:
        """The metrics in Prometheus's text format."""
        self._engine.snapshot = snapshot
        return prometheus_client.generate_latest(self._registry)


class Watch:
    """Measures one request of the engine from its outputs.

    Args:
      metrics: The metrics to update.
    """

    def __init__(self, metrics: Metrics) -> None:
        self._metrics = metrics
        self._prompt = self._tokens = self._times = 0
        self._finished = False

    def see(self, output: RequestOutput) -> None:
        """Counts what is new in an output."""
        metrics, times = self._metrics, output.metrics
        total = sum(len(each.token_ids) for each in output.outputs)
        metrics.generation_tokens.inc(total - self._tokens)
        metrics.num_generated += total - self._tokens
        self._tokens = total
        if self._prompt == 0 and times.first_token is not None:
            self._prompt = len(output.prompt_token_ids)
            metrics.prompt_tokens.inc(self._prompt)
            metrics.first_token.observe(times.first_token - times.arrival)
        for at in range(max(self._times, 1), len(times.token_times)):
            metrics.between.observe(times.token_times[at] - times.token_times[at - 1])
        self._times = len(times.token_times)
        if output.finished and times.finished is not None:
            self._finished = True
            metrics.whole.observe(times.finished - times.arrival)
            if self._times > 1:
                whole = times.token_times[-1] - times.token_times[0]
                metrics.per_token.observe(whole / (self._times - 1))
            metrics.ended(output.outputs[0].finish_reason or "error")

    def close(self) -> None:
        """Counts an unfinished request as cancelled."""
        if not self._finished:
            self._metrics.ended("cancelled")


class _EngineCollector(Collector):
    """Metrics that the engine keeps itself, from the latest snapshot."""

    def __init__(self, values: tuple[str, str]) -> None:
        self._values = values
        self.snapshot: Snapshot | None = None

    def collect(self) -> Iterator[Metric]:
        now = self.snapshot
        if now is None:  # at registration
            return
        gauges = {
            "num_requests_running": ("Requests that run.", now.running),
            "num_requests_waiting": ("Requests that wait.", now.waiting),
            "kv_cache_usage_perc": ("Part of the KV cache in use; 1 is all.", now.usage),
        }
        counters = {
            "num_preemptions": ("Preemptions so far.", now.preemptions),
            "prefix_cache_queries": ("Tokens looked for in the prefix cache.", now.queries),
            "prefix_cache_hits": ("Tokens found in the prefix cache.", now.hits),
        }
        if now.store_queries is not None and now.store_hits is not None:
            counters |= {
                "external_prefix_cache_queries": (
                    "Tokens looked for that were not in memory.",
                    now.store_queries,
                ),
                "external_prefix_cache_hits": (
                    "Tokens read from the store and found.",
                    now.store_hits,
                ),
            }
        for kind, named in ((GaugeMetricFamily, gauges), (CounterMetricFamily, counters)):
            for name, (what, value) in named.items():
                family = kind(f"vllm:{name}", what, labels=_LABELS)
                family.add_metric(self._values, value)
                yield family
