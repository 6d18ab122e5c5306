"""Admits requests to the queue, and refuses those that can never run."""

from jax_kvpage.serving.memory import Memory
from jax_kvpage.serving.request import Request, RequestRefused, SequenceGroup
from jax_kvpage.serving.stats import SchedulerStats
from jax_kvpage.serving.waiting import Deadlines, WaitingQueue

__all__ = ["QueueEntry", "check_queue", "check_sizes", "limit_of"]


class QueueEntry:
    """Entry point of the queue.

    Args:
        memory: memory in which requests will run.
        queue: queue to add them to.
        stats: counts refused requests.
        max_num_seqs: maximum sequences that run at one time.
        max_num_waiting: maximum groups in the queue; None for no limit.

    Attributes:
        deadlines: groups that have a deadline.
    """

    def __init__(
        self,
        memory: Memory,
        queue: WaitingQueue,
        stats: SchedulerStats,
        max_num_seqs: int,
        max_num_waiting: int | None,
    ) -> None:
        self._memory = memory
        self._queue = queue
        self._stats = stats
        self._max_num_seqs = max_num_seqs
        self._max_num_waiting = max_num_waiting
        self._arrivals = 0
        self.deadlines = Deadlines()

    def add(self, request: Request) -> SequenceGroup:
        """See `Scheduler.add`."""
        try:
            limit, reason = limit_of(request, self._memory, self._max_num_seqs)
            check_queue(request, self._queue.num_waiting, self._max_num_waiting)
        except RequestRefused:
            self._stats.refused_requests += 1
            raise
        group = SequenceGroup(request, self._arrivals, limit, reason)
        self._arrivals += 1
        self._queue.push(group)
        self.deadlines.push(group)
        return group


def check_sizes(max_num_seqs: int, max_num_batched_tokens: int) -> None:
    """Raises a ValueError if one step could not run all decoding sequences."""
    if not 1 <= max_num_seqs <= max_num_batched_tokens:
        raise ValueError(
            f"Scheduler: max_num_seqs is {max_num_seqs} and max_num_batched_tokens "
            f"{max_num_batched_tokens}: wanted 1 <= max_num_seqs <= max_num_batched_tokens"
        )


def check_queue(request: Request, waiting: int, most: int | None) -> None:
    """Refuses a request that finds the queue full.

    Args:
        request: request to add.
        waiting: groups in the queue.
        most: limit of the queue; None for no limit.

    Raises:
        RequestRefused: the queue is full.
    """
    if most is not None and waiting >= most:
        raise RequestRefused(
            f"request {request.request_id!r}: {waiting} requests wait already, and "
            f"max_num_waiting is {most}",
            wanted=waiting + 1,
            available=most,
        )


def limit_of(request: Request, memory: Memory, max_num_seqs: int) -> tuple[int, str]:
    """Returns the length at which the sequences of a request end.

    Args:
        request: request to add.
        memory: memory in which it will run.
        max_num_seqs: maximum sequences that run at one time.

    Returns:
        (limit, reason): length at which its sequences end, prompt included, and the finish reason
        there: "length", or "capacity" if the whole memory cannot hold more.

    Raises:
        RequestRefused: it cannot produce a single token.
    """
    n, prompt, size = request.n, request.num_prompt_tokens, memory.block_tokens
    name = f"request {request.request_id!r}"
    if request.slots > max_num_seqs:
        raise RequestRefused(
            f"{name} takes {request.slots} slots, but max_num_seqs is {max_num_seqs}",
            wanted=request.slots,
            available=max_num_seqs,
        )
    least = max(prompt + 1, request.reserve_tokens)
    if least > memory.max_seq_len:
        raise RequestRefused(
            f"{name} needs room for {least} tokens ({prompt} of the prompt), but max_seq_len is "
            f"{memory.max_seq_len}",
            wanted=least,
            available=memory.max_seq_len,
        )
    # The last token of a sequence is never stored.
    stored = max(prompt, request.reserve_tokens)
    shared = request.num_shared_tokens // size
    most = (shared + (memory.capacity - shared) // n) * size
    if stored > most:
        wanted = shared + n * (-(-stored // size) - shared)
        raise RequestRefused(
            f"{name} needs {wanted} blocks of {size} tokens for {stored} tokens in each of {n} "
            f"sequences, but there are {memory.capacity} blocks in all",
            wanted=wanted,
            available=memory.capacity,
        )
    longest = min(prompt + request.max_tokens, memory.max_seq_len)
    return (longest, "length") if longest <= most + 1 else (most + 1, "capacity")
