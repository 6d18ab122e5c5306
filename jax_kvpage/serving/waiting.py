"""The queue: groups in the order of the schedule, followers of a prefix that is being computed, and
deadlines.
"""

import heapq
from collections.abc import Hashable, Iterator

from jax_kvpage.serving.request import SequenceGroup, Status

__all__ = ["Deadlines", "WaitingQueue"]


def _waits(group: SequenceGroup) -> bool:
    return group.status in (Status.WAITING, Status.PREEMPTED)


class WaitingQueue:
    """Groups by priority and arrival. A preempted one returns to its place.

    Groups that end while they wait stay until they come up, and are then left out.
    """

    def __init__(self) -> None:
        self._heap: list[tuple[tuple[int, int], SequenceGroup]] = []
        self._followers: dict[Hashable, list[SequenceGroup]] = {}
        self.num_waiting = 0

    def push(self, group: SequenceGroup) -> None:
        """Puts a group into its place."""
        heapq.heappush(self._heap, (group.order, group))
        self.num_waiting += 1

    def head(self) -> SequenceGroup | None:
        """The next group, which stays."""
        while self._heap and not _waits(self._heap[0][1]):
            heapq.heappop(self._heap)
        return self._heap[0][1] if self._heap else None

    def pop(self) -> SequenceGroup:
        """Takes the next group; there must be one."""
        self.num_waiting -= 1
        return heapq.heappop(self._heap)[1]

    def leave(self) -> None:
        """Counts a group that ends while it waits."""
        self.num_waiting -= 1

    def hold(self, key: Hashable) -> None:
        """Takes the next group aside until `let_go(key)`."""
        self._followers.setdefault(key, []).append(heapq.heappop(self._heap)[1])

    def let_go(self, key: Hashable) -> None:
        """Puts the groups that were taken aside back into their places."""
        for group in self._followers.pop(key, ()):
            if _waits(group):
                heapq.heappush(self._heap, (group.order, group))


class Deadlines:
    """Groups by deadline."""

    def __init__(self) -> None:
        self._heap: list[tuple[float, int, SequenceGroup]] = []

    def push(self, group: SequenceGroup) -> None:
        """Remembers a group that has a deadline."""
        if group.request.deadline is not None:
            heapq.heappush(self._heap, (group.request.deadline, group.arrival, group))

    def passed(self, now: float) -> Iterator[SequenceGroup]:
        """Unfinished groups whose deadline is before `now`; each comes once."""
        while self._heap and (self._heap[0][0] < now or self._heap[0][2].status is Status.FINISHED):
            group = heapq.heappop(self._heap)[2]
            if group.status is not Status.FINISHED:
                yield group
