"""Where preempted sequences go instead of being computed again, as the scheduler sees it."""

from typing import Literal, Protocol

import numpy as np

from jax_kvpage.serving.request import SequenceGroup

__all__ = ["Fetched", "SwapSpace"]

Fetched = Literal["here", "coming", "lost"]


class SwapSpace(Protocol):
    """Memory below memory. The engine answers from the store of its pool.

    A plan names the groups to swap out (`StepPlan.swap`); those that cannot be are computed again.
    Only groups of one sequence are swapped: siblings share blocks.
    """

    def holds(self, group: SequenceGroup) -> bool:
        """Whether a waiting group is swapped."""

    def cost(self, num_tokens: np.ndarray) -> np.ndarray:
        """What it takes to write sequences and to read them again, in tokens computed meanwhile.

        Args:
            num_tokens: int64[g] that each sequence has computed.

        Returns:
            int64[g].
        """

    def find(self, group: SequenceGroup) -> tuple[int, int]:
        """Tokens that a swapped group comes back with, and how many of its blocks cost no free one
        any more.
        """

    def fetch(self, group: SequenceGroup) -> Fetched:
        """Begins to bring a swapped group back when called first; never waits.

        Returns:
            "here" once a slot can be had with its tokens; "lost" if it must be computed again: it
            is no longer held.
        """

    def give_up(self) -> bool:
        """Forgets all groups, which gives back what they hold in memory: nothing else can go on.

        Returns:
            Whether there was anything.
        """
