"""What an engine is told once."""

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np

from jax_kvpage.serving.admission import AdmissionPolicy
from jax_kvpage.serving.preemption import PreemptionPolicy

__all__ = ["EngineConfig"]

_NUMBERS = {  # the least that each may be
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

    Where the pool has replicas (`data_axis`), the first three are those of each replica.

    Attributes:
        max_num_seqs: sequences that run at one time at most; None for all slots of the pool.
        max_num_batched_tokens: tokens in a step at most. Longer prompts take several steps.
        buckets: shapes (tokens, sequences) of steps; a step runs in the smallest that holds it, and
            each is one compiled program. None chooses some: powers of two for steps that only
            decode, and a few larger ones. Where padding would be much, prompts are computed in
            smaller parts, which fill a bucket. A single shape makes results bit-identical with any
            other requests beside, at the price of padding.
        eos_token_ids: tokens that end an output unless `ignore_eos`.
        prefix_caching: whether requests start with what is in memory of their tokens. A pool with
            `sequence_axis` has no prefix cache: False there.
        namespace: of the prefix cache, in which this engine stores and finds tokens. Engines of the
            same model and parameters, one after the other on a pool, share what they computed under
            one name. None makes a new name for each engine: what another model has computed is
            never found.
        max_logprobs: most `logprobs` and `prompt_logprobs` that a request may ask for, and
            candidates of each beam in a search: twice its width, or more with several stop tokens.
            If it is more than the model's vocabulary, requests get all of that.
        prompt_logprobs: whether requests may ask for `SamplingParams.prompt_logprobs`. Each bucket
            then has another program, which gives logits for all of its tokens.
        max_stop_token_ids: most tokens that may end a request with `min_tokens`.
        max_num_waiting: requests in the queue at most; None for no bound.
        num_speculative_tokens: tokens to guess for each sequence and verify in one step; 0 for
            none. The engine then reads each step back before the next. Outputs stay the same.
            Sequences with penalties are not guessed. Without a draft model, guesses are what
            followed the newest tokens where they occurred before (prompt lookup).
        prompt_lookup_min: newest tokens that must have occurred in the sequence before, for a guess
            of what followed them.
        prompt_lookup_max: newest tokens that are looked for at most.
        seed: of the seeds that requests without one get.
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
            if not _integer(value) or value < low:
                reasons.append(f"{name} is {value!r}, wanted {low} or more")
        reasons += self._normalize("eos_token_ids", _token_ids, "a tuple of token ids")
        if self.buckets is not None:
            reasons += self._normalize("buckets", _pairs, "pairs of 1 or more tokens, sequences")
        if not reasons and not 1 <= self.prompt_lookup_min <= self.prompt_lookup_max:
            reasons.append(
                f"prompt_lookup_min is {self.prompt_lookup_min} and prompt_lookup_max "
                f"{self.prompt_lookup_max}, wanted 1 <= min <= max"
            )
        if self.namespace is not None and not (
            isinstance(self.namespace, str) and "\n" not in self.namespace
        ):
            reasons.append(f"namespace is {self.namespace!r}, wanted a str of one line, or None")
        if reasons:
            raise ValueError("\n  - ".join(["EngineConfig:", *reasons]))

    def _normalize(self, name: str, convert: Callable[[Any], Any], wanted: str) -> list[str]:
        """Converts an option to tuples; returns what is wrong with it."""
        value = getattr(self, name)
        try:
            object.__setattr__(self, name, convert(value))
        except (TypeError, ValueError):
            return [f"{name} is {value!r}, wanted {wanted}"]
        return []

    def rows(self, max_slots: int) -> int:
        """Sequences at one time.

        Args:
            max_slots: of the pool, or of one of its replicas.

        Raises:
            ValueError: more than the pool has slots, or more than tokens in a step.
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
        """The buckets, smallest first.

        Args:
            rows: sequences at one time.

        Raises:
            ValueError: there are buckets, but none for the largest step.
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


def _integer(value: Any) -> bool:
    return isinstance(value, int | np.integer) and not isinstance(value, bool)


def _token_ids(values: Any) -> tuple[int, ...]:
    """Token ids; raises a TypeError or ValueError for anything else."""
    ids = tuple(values)
    if not all(_integer(token) and 0 <= token < 2**31 for token in ids):
        raise ValueError
    return tuple(map(int, ids))


def _pairs(values: Any) -> tuple[tuple[int, int], ...]:
    """Shapes; raises a TypeError or ValueError for anything else."""
    pairs = tuple((tokens, sequences) for tokens, sequences in values)
    if not all(_integer(number) and number >= 1 for pair in pairs for number in pair):
        raise ValueError
    return tuple((int(tokens), int(sequences)) for tokens, sequences in pairs)


def _doubling(first: int, last: int, factor: int = 2) -> list[int]:
    """first, first * factor, ... up to last, which is included."""
    sizes = []
    while first < last:
        sizes.append(first)
        first *= factor
    return [*sizes, last]
