"""The queue in scheduling order, groups that wait for a prefix to be computed, and deadlines."""

import heapq
from collections.abc import Hashable, Iterator

from jax_kvpage.serving.request import SequenceGroup, Status

__all__ = ["Deadlines", "WaitingQueue"]


def _waits(group: SequenceGroup) -> bool:
    return group.status in (Status.WAITING, Status.PREEMPTED)


class WaitingQueue:
    """Waiting groups by priority and arrival. A preempted group returns to its place.

    Groups that end while they wait stay in the queue until they reach the head, and are then
    dropped.
    """

    def __init__(self) -> None:
        self._heap: list[tuple[tuple[int, int], SequenceGroup]] = []
        self._followers: dict[Hashable, list[SequenceGroup]] = {}
        self.num_waiting = 0

    def push(self, group: SequenceGroup) -> None:
        """Adds a group in its place."""
        heapq.heappush(self._heap, (group.order, group))
        self.num_waiting += 1

    def head(self) -> SequenceGroup | None:
        """Returns the next group without removing it."""
        while self._heap and not _waits(self._heap[0][1]):
            heapq.heappop(self._heap)
        return self._heap[0][1] if self._heap else None

    def pop(self) -> SequenceGroup:
        """Removes and returns the next group; the queue must not be empty."""
        self.num_waiting -= 1
        return heapq.heappop(self._heap)[1]

    def leave(self) -> None:
        """Counts a group that ends while it waits."""
        self.num_waiting -= 1

    def hold(self, key: Hashable) -> None:
        """Sets the next group aside until `let_go(key)`."""
        self._followers.setdefault(key, []).append(heapq.heappop(self._heap)[1])

    def let_go(self, key: Hashable) -> None:
        """Returns the groups that were set aside to their places."""
        for group in self._followers.pop(key, ()):
            if _waits(group):
                heapq.heappush(self._heap, (group.order, group))


class Deadlines:
    """Unfinished groups by deadline."""

    def __init__(self) -> None:
        self._heap: list[tuple[float, int, SequenceGroup]] = []

    def push(self, group: SequenceGroup) -> None:
        """Adds a group if it has a deadline."""
        if group.request.deadline is not None:
            heapq.heappush(self._heap, (group.request.deadline, group.arrival, group))

    def passed(self, now: float) -> Iterator[SequenceGroup]:
        """Yields unfinished groups whose deadline is before `now`, each once."""
        while self._heap and (self._heap[0][0] < now or self._heap[0][2].status is Status.FINISHED):
            group = heapq.heappop(self._heap)[2]
            if group.status is not Status.FINISHED:
                yield group
