"""What an engine is told once."""

import dataclasses

from jax_kvpage.serving.admission import AdmissionPolicy
from jax_kvpage.serving.preemption import PreemptionPolicy

__all__ = ["EngineConfig"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class EngineConfig:
    """Options of an `Engine`.

    Attributes:
        max_num_seqs: sequences that run at one time at most; None for all slots of the pool.
        max_num_batched_tokens: tokens in a step at most. Longer prompts take several steps.
        buckets: shapes (tokens, sequences) of steps; a step runs in the smallest that holds it, and
            each is one compiled program. None chooses some: powers of two for steps that only
            decode, and a few larger ones. A single shape makes results bit-identical with any other
            requests beside, at the price of padding.
        eos_token_ids: tokens that end an output unless `ignore_eos`.
        prefix_caching: whether requests start with what is in memory of their tokens.
        namespace: of the prefix cache, in which this engine stores and finds tokens. Engines of the
            same model and parameters, one after the other on a pool, share what they computed under
            one name. None makes a new name for each engine: what another model has computed is
            never found.
        max_logprobs: most `SamplingParams.logprobs` that a request may ask for.
        max_stop_token_ids: most tokens that may end a request with `min_tokens`.
        max_num_waiting: requests in the queue at most; None for no bound.
        num_speculative_tokens: tokens to guess for each sequence and verify in one step; 0 for
            none. The engine then reads each step back before the next. Outputs stay the same.
            Sequences with penalties are not guessed.
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
    max_logprobs: int = 5
    max_stop_token_ids: int = 8
    max_num_waiting: int | None = None
    num_speculative_tokens: int = 0
    prompt_lookup_min: int = 2
    prompt_lookup_max: int = 3
    seed: int = 0
    preemption: PreemptionPolicy | None = None
    admission: AdmissionPolicy | None = None

    def __post_init__(self) -> None:
        reasons = []
        for name in ("max_num_seqs", "max_num_batched_tokens", "max_num_waiting"):
            value = getattr(self, name)
            if value is not None and value < 1:
                reasons.append(f"{name} is {value}, wanted 1 or more")
        for name in ("max_logprobs", "max_stop_token_ids", "num_speculative_tokens", "seed"):
            if getattr(self, name) < 0:
                reasons.append(f"{name} is {getattr(self, name)}, wanted 0 or more")
        if not 1 <= self.prompt_lookup_min <= self.prompt_lookup_max:
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

    def rows(self, max_slots: int) -> int:
        """Sequences at one time, for a pool.

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
        shapes = sorted({(int(tokens), int(sequences)) for tokens, sequences in self.buckets})
        if not any(tokens >= largest[0] and sequences >= rows for tokens, sequences in shapes):
            raise ValueError(
                f"EngineConfig: buckets {shapes} have none for {largest[0]} tokens "
                f"(max_num_batched_tokens) of {rows} sequences"
            )
        return shapes


def _doubling(first: int, last: int, factor: int = 2) -> list[int]:
    """first, first * factor, ... up to last, which is included."""
    sizes = []
    while first < last:
        sizes.append(first)
        first *= factor
    return [*sizes, last]
