"""The scheduler's view of tokens that are kept in a store for waiting requests."""

from typing import Literal, Protocol

import numpy as np

from jax_kvpage.serving.request import SequenceGroup

__all__ = ["Fetched", "SwapSpace"]

Fetched = Literal["here", "coming", "gone"]


class SwapSpace(Protocol):
    """A store for the tokens of waiting groups. The engine implements it on the store of its pool.

    A plan names the groups to swap out (`StepPlan.swap`); groups that cannot be swapped are
    recomputed. Only groups of one sequence are swapped, because siblings share blocks. Tokens
    stored in another way, such as those of a prompt, may be fetched for any group before it starts.
    """

    def holds(self, group: SequenceGroup) -> bool:
        """Returns whether a waiting group has tokens here that must be fetched before it starts."""

    def cost(self, num_tokens: np.ndarray) -> np.ndarray:
        """Returns the cost of writing and reading back sequences, in tokens computed meanwhile.

        Args:
            num_tokens: int64[g]: tokens that each sequence has computed.

        Returns:
            int64[g].
        """

    def find(self, group: SequenceGroup) -> tuple[int, int]:
        """Returns the tokens that a group will start with, and how many blocks it already has."""

    def fetch(self, group: SequenceGroup) -> Fetched:
        """Starts fetching a group's tokens on the first call; never waits.

        Returns:
            "here" once a slot with the tokens is available; "gone" if the store no longer holds
            them: they are in memory, where they can be found, or must be recomputed.
        """

    def give_up(self) -> bool:
        """Drops all groups and frees the memory that they hold. Called when nothing else can run.

        Returns:
            Whether anything was dropped.
        """
