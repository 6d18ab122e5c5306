"""Engine configuration."""

import dataclasses
from collections.abc import Callable
from typing import Any

from jax_kvpage._values import is_integer, is_text, raise_all
from jax_kvpage.serving.admission import AdmissionPolicy
from jax_kvpage.serving.preemption import PreemptionPolicy

__all__ = ["EngineConfig"]

_NUMBERS = {  # minimum values
    "max_num_seqs": 1,
    "max_num_batched_tokens": 1,
    "max_num_waiting": 1,
    "max_logprobs": 0,
    "max_stop_token_ids": 0,
    "num_speculative_tokens": 0,
    "prompt_lookup_min": 1,
    "prompt_lookup_max": 1,
    "seed": 0,
}
_OPTIONAL = ("max_num_seqs", "max_num_waiting")


@dataclasses.dataclass(frozen=True, kw_only=True)
class EngineConfig:
    """Options of an `Engine`.

    If the pool has replicas (`data_axis`), the first three apply to each replica.

    Attributes:
        max_num_seqs: maximum sequences that run at one time; None for all slots of the pool.
        max_num_batched_tokens: maximum tokens per step. Longer prompts take several steps.
        buckets: shapes (tokens, sequences) of steps. A step runs in the smallest shape that holds
            it; each shape is one compiled program. None chooses powers of two for decode-only
            steps, and a few larger shapes. Where there would be much padding, prompts are computed
            in smaller chunks that fill a bucket. A single shape makes results bit-identical
            regardless of other requests, at the price of padding.
        eos_token_ids: tokens that end an output unless `ignore_eos`.
        prefix_caching: whether requests reuse those of their tokens that are in memory. Must be
            False for a pool with `sequence_axis`, which has no prefix cache.
        namespace: prefix cache namespace in which this engine stores and finds tokens. Engines with
            the same model and parameters that use a pool one after the other can share computed
            tokens under one name. None creates a new name for each engine, so that tokens computed
            by another model are never found.
        max_logprobs: largest `logprobs` and `prompt_logprobs` that a request may ask for, and also
            the largest number of candidates per beam in a search: twice the beam width, or more
            with several stop tokens. Values beyond the vocabulary size are clipped to it.
        prompt_logprobs: whether requests may ask for `SamplingParams.prompt_logprobs`. Each bucket
            then has one more program, which computes logits for all of its tokens.
        max_stop_token_ids: maximum stop tokens of a request with `min_tokens`.
        max_num_waiting: maximum requests in the queue; None for no limit.
        num_speculative_tokens: tokens to guess for each sequence and verify in one step; 0 disables
            speculation. The engine then reads back each step before the next. Outputs stay the
            same. Sequences with penalties do not speculate. Without a draft model, the guesses are
            the tokens that followed an earlier occurrence of the newest tokens (prompt lookup).
        prompt_lookup_min: minimum newest tokens that must have occurred earlier in the sequence for
            a guess.
        prompt_lookup_max: maximum newest tokens to look up.
        seed: generates the seeds of requests that have none.
        preemption: chooses victims when memory runs out; the scheduler's default if None.
        admission: decides when requests may start; the scheduler's default if None.
    """

    max_num_seqs: int | None = None
    max_num_batched_tokens: int = 512
    buckets: tuple[tuple[int, int], ...] | None = None
    eos_token_ids: tuple[int, ...] = ()
    prefix_caching: bool = True
    namespace: str | None = None
    max_logprobs: int = 20
    prompt_logprobs: bool = False
    max_stop_token_ids: int = 8
    max_num_waiting: int | None = None
    num_speculative_tokens: int = 0
    prompt_lookup_min: int = 2
    prompt_lookup_max: int = 3
    seed: int = 0
    preemption: PreemptionPolicy | None = None
    admission: AdmissionPolicy | None = None

    def __post_init__(self) -> None:
        reasons: list[str] = []
        for name, low in _NUMBERS.items():
            value = getattr(self, name)
            if value is None and name in _OPTIONAL:
                continue
            if not is_integer(value) or value < low:
                reasons.append(f"{name} is {value!r}, wanted {low} or more")
        reasons += self._normalize("eos_token_ids", _token_ids, "a tuple of token ids")
        if self.buckets is not None:
            reasons += self._normalize("buckets", _pairs, "pairs of 1 or more tokens, sequences")
        if not reasons and not 1 <= self.prompt_lookup_min <= self.prompt_lookup_max:
            reasons.append(
                f"prompt_lookup_min is {self.prompt_lookup_min} and prompt_lookup_max "
                f"{self.prompt_lookup_max}, wanted 1 <= min <= max"
            )
        for name in ("prefix_caching", "prompt_logprobs"):
            if not isinstance(getattr(self, name), bool):
                reasons.append(f"{name} is {getattr(self, name)!r}, wanted True or False")
        if self.namespace is not None and not (
            is_text(self.namespace) and "\n" not in self.namespace
        ):
            reasons.append(
                f"namespace is {self.namespace!r}, wanted a str of one line that UTF-8 can encode, "
                "or None"
            )
        raise_all("EngineConfig", reasons)

    def _normalize(self, name: str, convert: Callable[[Any], Any], wanted: str) -> list[str]:
        """Converts an option to tuples; returns reasons why it is invalid."""
        value = getattr(self, name)
        try:
            object.__setattr__(self, name, convert(value))
        except (TypeError, ValueError):
            return [f"{name} is {value!r}, wanted {wanted}"]
        return []

    def rows(self, max_slots: int) -> int:
        """Returns the maximum number of sequences at one time.

        Args:
            max_slots: slots of the pool, or of one of its replicas.

        Raises:
            ValueError: `max_num_seqs` exceeds the slots of the pool or the tokens of a step.
        """
        rows = min(max_slots, self.max_num_batched_tokens)
        if self.max_num_seqs is None:
            return rows
        if self.max_num_seqs > rows:
            raise ValueError(
                f"EngineConfig: max_num_seqs is {self.max_num_seqs}, but the pool has {max_slots} "
                f"slots and max_num_batched_tokens is {self.max_num_batched_tokens}"
            )
        return self.max_num_seqs

    def shapes(self, rows: int) -> list[tuple[int, int]]:
        """Returns the buckets, smallest first.

        Args:
            rows: maximum sequences at one time.

        Raises:
            ValueError: no bucket holds the largest step.
        """
        largest = (self.max_num_batched_tokens, rows)
        if self.buckets is None:
            decode = {(size, size) for size in _doubling(1, rows)}
            if self.num_speculative_tokens:
                each = self.num_speculative_tokens + 1
                verify = {(size * each, size) for size in _doubling(1, rows)}
                decode |= {shape for shape in verify if shape[0] <= largest[0]}
            small = min(rows, 8)
            mixed = {
                (tokens, sequences)
                for tokens in _doubling(32, largest[0], 4)
                for sequences in (small, rows)
                if tokens > sequences
            }
            return sorted(decode | mixed | {largest})
        shapes = sorted(set(self.buckets))
        if not any(tokens >= largest[0] and sequences >= rows for tokens, sequences in shapes):
            raise ValueError(
                f"EngineConfig: buckets {shapes} have none for {largest[0]} tokens "
                f"(max_num_batched_tokens) of {rows} sequences"
            )
        return shapes


def _token_ids(values: Any) -> tuple[int, ...]:
    """Converts token ids; raises a TypeError or ValueError for anything else."""
    ids = tuple(values)
    if not all(is_integer(token) and 0 <= token < 2**31 for token in ids):
        raise ValueError
    return tuple(map(int, ids))


def _pairs(values: Any) -> tuple[tuple[int, int], ...]:
    """Converts shapes; raises a TypeError or ValueError for anything else."""
    pairs = tuple((tokens, sequences) for tokens, sequences in values)
    if not all(is_integer(number) and number >= 1 for pair in pairs for number in pair):
        raise ValueError
    return tuple((int(tokens), int(sequences)) for tokens, sequences in pairs)


def _doubling(first: int, last: int, factor: int = 2) -> list[int]:
    """Returns first, first * factor, ... up to and including last."""
    sizes = []
    while first < last:
        sizes.append(first)
        first *= factor
    return [*sizes, last]
