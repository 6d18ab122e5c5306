"""Requests to the scheduler, and their sequences.

A request asks for one or more continuations of a prompt. Its sequences form a group: they share the
prompt's blocks, are admitted together, wait for blocks together and are preempted together. Token
ids stay with the caller; the scheduler counts tokens.
"""

import dataclasses
import enum
from collections.abc import Hashable

__all__ = ["Request", "RequestRefused", "Sequence", "SequenceGroup", "Status"]


class RequestRefused(ValueError):
    """A request that can never be scheduled, or that finds the queue full. Nothing has changed.

    Attributes:
        wanted: minimum that it needs (of tokens, blocks, sequences or places in the queue).
        available: how many there are in all.
    """

    def __init__(self, message: str, *, wanted: int, available: int) -> None:
        super().__init__(message)
        self.wanted = wanted
        self.available = available


@dataclasses.dataclass(frozen=True, eq=False, slots=True, kw_only=True)
class Request:
    """A request to the scheduler.

    Attributes:
        request_id: the caller's name for it.
        num_prompt_tokens: tokens of the prompt, at least one.
        max_tokens: tokens to produce at most, for each sequence.
        n: sequences: samples or beams.
        priority: lower numbers go first; equal ones in order of arrival.
        deadline: when the request ends with the reason "deadline", in the clock of
            `Scheduler.schedule(now)`.
        prefix_key: requests with equal keys start with the same tokens; while one of them computes
            them, the others wait, so that they find them in the prefix cache.
        num_prefix_tokens: how many tokens those are; 0 means the whole prompt.
        reserve_tokens: room that each sequence gets at admission, if that is more than its tokens
            and one.
        num_slots: slots of the pool to keep for it, at least n. Beam search over w beams needs 2w.
        lockstep: no sequence runs its newest token before all siblings can, the first time after
            the prompt and later ones after a preemption (beam search). The others then wait with
            their memory.
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
        for name in ("num_prompt_tokens", "max_tokens", "n"):
            if getattr(self, name) < 1:
                raise ValueError(f"Request: {name} is {getattr(self, name)}, wanted 1 or more")
        if not 0 <= self.num_prefix_tokens <= self.num_prompt_tokens:
            raise ValueError(
                f"Request: num_prefix_tokens is {self.num_prefix_tokens}, but the prompt has "
                f"{self.num_prompt_tokens} tokens"
            )
        if self.num_slots and self.num_slots < self.n:
            raise ValueError(f"Request: num_slots is {self.num_slots}, but n is {self.n}")

    @property
    def slots(self) -> int:
        """Slots of the pool that it may take at one time."""
        return self.num_slots or self.n

    @property
    def num_shared_tokens(self) -> int:
        """Tokens that siblings take over from the sequence that computes the prompt.

        Each computes the last token of the prompt: its first token is sampled from logits of its
        row.
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
        group: the sequences of the same request.
        index: place among them.
        num_tokens: prompt and output tokens, as of when it last lost its row.
        row: row in the scheduler's arrays while it has memory, else -1. Rows are given to other
            sequences later; keep the sequence, not its row, across steps.
        finish_reason: None while unfinished; "length" (max_tokens or the longest sequence is
            reached), "capacity" (memory holds no more), "deadline", "cancelled", or what `finish`
            was given.
    """

    group: "SequenceGroup" = dataclasses.field(repr=False)
    index: int
    num_tokens: int
    row: int = -1
    finish_reason: str | None = None

    @property
    def place(self) -> int:
        """Its row among those of all replicas; -1 without one."""
        return self.row + self.group.first_row if self.row >= 0 else -1


@dataclasses.dataclass(eq=False, slots=True)
class SequenceGroup:
    """The sequences of one request and their place in the schedule.

    Attributes:
        request: the caller's request.
        arrival: place in the order of arrival.
        limit: tokens at which a sequence ends, prompt included.
        limit_reason: why it ends there, "length" or "capacity".
        sequences: all n.
        status: its state.
        num_preemptions: times that it lost its memory.
        num_lost_tokens: tokens that it had computed when it last did.
        live: sequences that are not finished.
        unforked: of these, the ones that wait for the prompt to be computed.
        donor: the sequence that computes the prompt for them.
        index: number among the running groups, -1 otherwise.
        first_row: the place of row 0 of its replica, if it has started.
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
        """Sort key of the schedule: priority, then arrival."""
        return self.request.priority, self.arrival
