"""Simulation workloads: public traces, and lengths drawn as in the PagedAttention paper."""

import csv
import dataclasses
import datetime
import gzip
import json
import pathlib

import numpy as np

__all__ = ["Workload", "azure_trace", "mooncake_trace", "synthetic"]

# Mean lengths of prompts and outputs (Kwon et al., 2023, figure 11).
_MEANS = {"sharegpt": (161.31, 337.99), "alpaca": (19.31, 58.45)}


@dataclasses.dataclass(frozen=True)
class Workload:
    """Requests in order of arrival.

    Attributes:
        name: name of the workload.
        arrivals: float64[r]: arrival times in seconds.
        prompts: int64[r]: prompt tokens.
        outputs: int64[r]: output tokens until the model stops.
        n: sequences per request.
    """

    name: str
    arrivals: np.ndarray
    prompts: np.ndarray
    outputs: np.ndarray
    n: int = 1

    def __len__(self) -> int:
        return len(self.arrivals)

    def first(self, count: int) -> "Workload":
        """The first `count` requests."""
        return dataclasses.replace(
            self,
            arrivals=self.arrivals[:count],
            prompts=self.prompts[:count],
            outputs=self.outputs[:count],
        )

    def repeated(self, count: int) -> "Workload":
        """`count` requests: the workload repeated as often as needed."""
        times, rest = np.divmod(np.arange(count), len(self))
        return dataclasses.replace(
            self,
            arrivals=self.arrivals[rest] + times * self.arrivals[-1],
            prompts=self.prompts[rest],
            outputs=self.outputs[rest],
        )

    def faster(self, factor: float) -> "Workload":
        """The same requests at a multiple of the rate; infinity makes all arrive at once."""
        return dataclasses.replace(self, arrivals=self.arrivals / factor)

    def within(self, max_seq_len: int) -> "Workload":
        """Only the requests whose prompt and output fit into a sequence."""
        fits = self.prompts + self.outputs <= max_seq_len
        return dataclasses.replace(
            self,
            arrivals=self.arrivals[fits],
            prompts=self.prompts[fits],
            outputs=self.outputs[fits],
        )


def azure_trace(folder: pathlib.Path) -> Workload:
    """The conversations of the Azure LLM inference trace 2023 (Patel et al., Splitwise, 2024).

    Args:
        folder: folder that contains azure2023_conv.csv.gz.
    """
    with gzip.open(folder / "azure2023_conv.csv.gz", "rt") as lines:
        rows = list(csv.DictReader(lines))
    times = [datetime.datetime.fromisoformat(row["TIMESTAMP"][:26]) for row in rows]
    return Workload(
        "azure",
        np.asarray([(time - times[0]).total_seconds() for time in times]),
        np.asarray([int(row["ContextTokens"]) for row in rows]),
        np.asarray([int(row["GeneratedTokens"]) for row in rows]),
    )


def mooncake_trace(folder: pathlib.Path) -> Workload:
    """The conversations of the Mooncake trace (Qin et al., FAST 2025).

    Args:
        folder: folder that contains mooncake_conversation.jsonl.gz.
    """
    with gzip.open(folder / "mooncake_conversation.jsonl.gz", "rt") as lines:
        rows = [json.loads(line) for line in lines]
    return Workload(
        "mooncake",
        np.asarray([row["timestamp"] / 1000 for row in rows]),
        np.asarray([row["input_length"] for row in rows]),
        np.asarray([row["output_length"] for row in rows]),
    )


def synthetic(
    name: str, count: int, *, rate: float, n: int = 1, max_seq_len: int = 2048, seed: int = 0
) -> Workload:
    """Requests with the mean lengths of ShareGPT or Alpaca in the PagedAttention paper.

    Lengths are log-normal, which has a long tail like the real ones; arrivals are Poisson.

    Args:
        name: "sharegpt" or "alpaca".
        count: number of requests.
        rate: requests per second; infinity makes all arrive at once.
        n: sequences per request.
        max_seq_len: longer requests are drawn again.
        seed: random seed.
    """
    if name not in _MEANS:
        raise ValueError(f"synthetic: name is {name!r}, wanted one of {', '.join(_MEANS)}")
    random, sigma = np.random.default_rng(seed), 1.0
    columns = np.zeros((2, count), np.int64)
    todo = np.arange(count)
    while todo.size:
        for column, mean in zip(columns, _MEANS[name], strict=True):
            drawn = random.lognormal(np.log(mean) - sigma**2 / 2, sigma, todo.size)
            column[todo] = np.maximum(drawn.round(), 1)
        todo = todo[columns[:, todo].sum(0) > max_seq_len]
    arrivals = np.cumsum(random.exponential(1.0, count)) / rate
    return Workload(name, arrivals, columns[0], columns[1], n)
