"""What is kept below memory for requests that wait, as the scheduler sees it."""

from typing import Literal, Protocol

import numpy as np

from jax_kvpage.serving.request import SequenceGroup

__all__ = ["Fetched", "SwapSpace"]

Fetched = Literal["here", "coming", "gone"]


class SwapSpace(Protocol):
    """Memory below memory. The engine answers from the store of its pool.

    A plan names the groups to swap out (`StepPlan.swap`); those that cannot be are computed again.
    Only groups of one sequence are swapped: siblings share blocks. Tokens that were stored in
    another way, such as a prompt's, may be fetched for any group before it starts.
    """

    def holds(self, group: SequenceGroup) -> bool:
        """Whether a waiting group has tokens here that are fetched before it starts."""

    def cost(self, num_tokens: np.ndarray) -> np.ndarray:
        """What it takes to write sequences and to read them again, in tokens computed meanwhile.

        Args:
            num_tokens: int64[g] that each sequence has computed.

        Returns:
            int64[g].
        """

    def find(self, group: SequenceGroup) -> tuple[int, int]:
        """Tokens that a group will start with, and how many of its blocks cost no free one any
        more.
        """

    def fetch(self, group: SequenceGroup) -> Fetched:
        """Begins to bring a group's tokens when called first; never waits.

        Returns:
            "here" once a slot can be had with them; "gone" if nothing is held any more: they are in
            memory, to be found there, or must be computed.
        """

    def give_up(self) -> bool:
        """Forgets all groups, which gives back what they hold in memory: nothing else can go on.

        Returns:
            Whether there was anything.
        """
