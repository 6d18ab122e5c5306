"""Requests to serve, and traces of lengths and times, for which tokens are random."""

import csv
import dataclasses
import gzip
import io
import json
import operator
import pathlib
import zlib
from collections.abc import Iterator
from datetime import datetime

import numpy as np

from .arguments import InputError

__all__ = ["Job", "read_trace", "trace_jobs"]

_SPAN = 512  # tokens per hash id in a Mooncake trace


@dataclasses.dataclass(frozen=True)
class Job:
    """A future request.

    Attributes:
      arrival: Seconds after the start.
      prompt_ids: The prompt.
      max_tokens: Tokens to generate.
    """

    arrival: float
    prompt_ids: list[int]
    max_tokens: int


@dataclasses.dataclass(frozen=True)
class _Row:
    seconds: float
    prompt_tokens: int
    output_tokens: int
    spans: tuple[int, ...]


def read_trace(path: pathlib.Path, most: int) -> list[_Row]:
    """Reads the first rows of a trace, gzipped or not.

    Supports the Azure LLM inference traces (CSV: TIMESTAMP, ContextTokens, GeneratedTokens) and
    Mooncake's (JSON lines: timestamp, input_length, output_length, hash_ids).

    Raises:
      InputError: The file cannot be read, or has another format.
    """
    try:
        data = path.read_bytes()
        text = (gzip.decompress(data) if path.suffix == ".gz" else data).decode()
    except (OSError, EOFError, UnicodeDecodeError, zlib.error) as error:
        raise InputError(f"--trace {path}: {error}") from error
    jsonl = path.name.removesuffix(".gz").endswith(".jsonl")
    try:
        parse = _mooncake(text) if jsonl else _azure(text)
        rows = [row for row, _ in zip(parse, range(most), strict=False)]
    except (KeyError, ValueError, TypeError) as error:
        raise InputError(f"--trace {path}: not a known trace: {error!r}") from error
    if not rows:
        raise InputError(f"--trace {path} holds no requests")
    return rows


def _azure(text: str) -> Iterator[_Row]:
    first = None
    for row in csv.DictReader(io.StringIO(text)):
        # Fractional seconds have seven digits, one more than Python reads.
        now = datetime.fromisoformat(row["TIMESTAMP"][:26])
        first = first or now
        seconds = (now - first).total_seconds()
        yield _Row(seconds, int(row["ContextTokens"]), int(row["GeneratedTokens"]), ())


def _mooncake(text: str) -> Iterator[_Row]:
    for line in text.splitlines():
        row = json.loads(line)
        spans = tuple(map(operator.index, row["hash_ids"]))
        if min(spans, default=0) < 0:
            raise ValueError(f"hash_ids: wanted 0 or more, got {min(spans)}")
        yield _Row(
            row["timestamp"] / 1000, int(row["input_length"]), int(row["output_length"]), spans
        )


def trace_jobs(
    rows: list[_Row], vocab_size: int, shrink: int, speed: float, seed: int
) -> list[Job]:
    """Makes requests with random tokens; equal hash ids give equal tokens.

    Args:
      rows: From `read_trace`.
      vocab_size: The model's vocabulary size.
      shrink: Divides all lengths, for models with a short context.
      speed: Divides all times; 0 lets all requests arrive at the start.
      seed: Seed of the tokens.
    """
    jobs = []
    for number, row in enumerate(rows):
        length = max(row.prompt_tokens // shrink, 1)
        span = max(_SPAN // shrink, 1)
        keys = [(seed, 0, key) for key in row.spans] or [(seed, 1, number)]
        size = span if row.spans else length
        parts = [np.random.default_rng(key).integers(0, vocab_size, size) for key in keys]
        ids = np.concatenate(parts)[:length].tolist()
        arrival = row.seconds / speed if speed else 0.0
        jobs.append(Job(arrival, ids, max(row.output_tokens // shrink, 1)))
    return jobs
