"""Requests to the scheduler, and their sequences.

A request asks for one or more continuations of a prompt. Its sequences form a group: they share the
prompt's blocks, are admitted together, wait for blocks together and are preempted together. Token
ids stay with the caller; the scheduler counts tokens.
"""

import dataclasses
import enum
from collections.abc import Hashable

from jax_kvpage._values import is_integer, is_number

__all__ = ["Request", "RequestRefused", "Sequence", "SequenceGroup", "Status"]


class RequestRefused(ValueError):
    """Raised if a request can never be scheduled or the queue is full; nothing was changed.

    Attributes:
        wanted: what the request needs (tokens, blocks, sequences or places in the queue).
        available: how many exist in total.
    """

    def __init__(self, message: str, *, wanted: int, available: int) -> None:
        super().__init__(message)
        self.wanted = wanted
        self.available = available


# Attributes that are counts, and their smallest values.
_LEAST = {
    "num_prompt_tokens": 1,
    "max_tokens": 1,
    "n": 1,
    "num_prefix_tokens": 0,
    "reserve_tokens": 0,
    "num_slots": 0,
}


@dataclasses.dataclass(frozen=True, eq=False, slots=True, kw_only=True)
class Request:
    """A request to the scheduler.

    Attributes:
        request_id: the caller's identifier.
        num_prompt_tokens: tokens of the prompt, at least one.
        max_tokens: maximum number of tokens to produce per sequence.
        n: number of sequences (samples or beams).
        priority: lower numbers go first; ties are broken by order of arrival.
        deadline: when the request ends with the reason "deadline", on the clock of
            `Scheduler.schedule(now)`.
        prefix_key: requests with equal keys start with the same tokens. While one of them computes
            that prefix, the others wait and then find it in the prefix cache.
        num_prefix_tokens: length of that prefix; 0 means the whole prompt.
        reserve_tokens: room that each sequence gets at admission, if more than its own tokens plus
            one.
        num_slots: pool slots to reserve, at least n. Beam search with w beams needs 2w.
        lockstep: no sequence runs its newest token until all siblings can, both after the prompt
            and after a preemption (beam search). The others keep their memory while they wait.

    Raises:
        ValueError: a value of another type or out of range.
    """

    request_id: Hashable
    num_prompt_tokens: int
    max_tokens: int
    n: int = 1
    priority: int = 0
    deadline: float | None = None
    prefix_key: Hashable = None
    num_prefix_tokens: int = 0
    reserve_tokens: int = 0
    num_slots: int = 0
    lockstep: bool = False

    def __post_init__(self) -> None:
        for name, low in _LEAST.items():
            value = getattr(self, name)
            if not is_integer(value) or value < low:
                raise ValueError(f"Request: {name} is {value!r}, wanted {low} or more")
        if not is_integer(self.priority) or not -(2**63) <= self.priority < 2**63:
            raise ValueError(f"Request: priority is {self.priority!r}, wanted an int of 64 bits")
        if self.deadline is not None and not is_number(self.deadline):
            raise ValueError(f"Request: deadline is {self.deadline!r}, wanted a number, or None")
        try:
            hash(self.prefix_key)
        except TypeError as error:
            raise ValueError(f"Request: prefix_key is {self.prefix_key!r}: {error}") from error
        if self.num_prefix_tokens > self.num_prompt_tokens:
            raise ValueError(
                f"Request: num_prefix_tokens is {self.num_prefix_tokens}, but the prompt has "
                f"{self.num_prompt_tokens} tokens"
            )
        if self.num_slots and self.num_slots < self.n:
            raise ValueError(f"Request: num_slots is {self.num_slots}, but n is {self.n}")

    @property
    def slots(self) -> int:
        """Pool slots that the request may use at one time."""
        return self.num_slots or self.n

    @property
    def num_shared_tokens(self) -> int:
        """Tokens that siblings take over from the sequence that computes the prompt.

        Each sibling computes the last prompt token itself, because its first token is sampled from
        the logits of that row.
        """
        return self.num_prompt_tokens - 1 if self.n > 1 else 0


class Status(enum.Enum):
    """State of a group."""

    WAITING = "waiting"
    RUNNING = "running"
    PREEMPTED = "preempted"
    FINISHED = "finished"


@dataclasses.dataclass(eq=False, slots=True)
class Sequence:
    """One continuation of a request.

    Attributes:
        group: the group that it belongs to.
        index: its index in the group.
        num_tokens: prompt and output tokens, as of the last time it lost its row.
        row: row in the scheduler's arrays while it has memory, else -1. Rows are reused by other
            sequences, so across steps keep the sequence, not its row.
        finish_reason: None while unfinished; "length" (max_tokens or max_seq_len was reached),
            "capacity" (memory is full), "deadline", "cancelled", or the reason passed to `finish`.
    """

    group: "SequenceGroup" = dataclasses.field(repr=False)
    index: int
    num_tokens: int
    row: int = -1
    finish_reason: str | None = None

    @property
    def place(self) -> int:
        """Row index across all replicas; -1 without a row."""
        return self.row + self.group.first_row if self.row >= 0 else -1


@dataclasses.dataclass(eq=False, slots=True)
class SequenceGroup:
    """The sequences of one request and their scheduling state.

    Attributes:
        request: the caller's request.
        arrival: position in the order of arrival.
        limit: length at which a sequence ends, prompt included.
        limit_reason: finish reason at the limit, "length" or "capacity".
        sequences: all n sequences.
        status: current state.
        num_preemptions: times that the group lost its memory.
        num_lost_tokens: tokens that it had computed at the last preemption.
        live: unfinished sequences.
        unforked: live sequences that wait for the prompt to be computed.
        donor: the sequence that computes the prompt for them.
        index: its number among the running groups, else -1.
        first_row: row 0 of its replica, as an index across all replicas, once it has started.
    """

    request: Request
    arrival: int
    limit: int
    limit_reason: str
    sequences: list[Sequence] = dataclasses.field(default_factory=list)
    status: Status = Status.WAITING
    num_preemptions: int = 0
    num_lost_tokens: int = 0
    live: list[Sequence] = dataclasses.field(default_factory=list)
    unforked: list[Sequence] = dataclasses.field(default_factory=list)
    donor: Sequence | None = None
    index: int = -1
    first_row: int = 0

    def __post_init__(self) -> None:
        tokens = self.request.num_prompt_tokens
        self.sequences = [Sequence(self, index, tokens) for index in range(self.request.n)]
        self.live = list(self.sequences)

    @property
    def order(self) -> tuple[int, int]:
        """Scheduling order: priority, then arrival."""
        return self.request.priority, self.arrival
