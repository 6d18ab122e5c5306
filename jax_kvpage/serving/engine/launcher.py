"""Launches compiled steps on the newest cache and sampler state."""

from collections.abc import Sequence as Items

import numpy as np

from jax_kvpage.pool import KVPool
from jax_kvpage.serving.engine.guidance import Guide, fill_masks
from jax_kvpage.serving.engine.packing import Packed
from jax_kvpage.serving.engine.programs import Outcome, Programs
from jax_kvpage.serving.engine.slots import Slots

__all__ = ["Launcher"]


class Launcher:
    """Launches steps.

    Args:
        programs: compiled steps.
        pool: the memory.
        slots: holds the newest cache.
        num_guesses: maximum tokens to verify per sequence.

    Attributes:
        state: the newest sampler state.
    """

    def __init__(self, programs: Programs, pool: KVPool, slots: Slots, num_guesses: int) -> None:
        self._programs = programs
        self._pool = pool
        self._slots = slots
        self._num_guesses = num_guesses
        self.restart()

    def restart(self) -> None:
        """Starts from a new state."""
        self.state = self._programs.initial_state(self._pool.spec.max_seq_len, self._pool.placement)

    def set_history(self, row: int, ids: list[int]) -> None:
        """Sets the token history of a sequence with penalties."""
        self.state = self._programs.set_history(self.state, row, ids)

    def run(
        self,
        packed: Packed,
        verifies: bool = False,
        guided: Items[tuple[int, Guide, Items[int]]] = (),
        targets: np.ndarray | None = None,
    ) -> Outcome:
        """Launches a step.

        Args:
            packed: operands of the step.
            verifies: whether they have guesses.
            guided: see `Flight.guided`.
            targets: see `Programs.run`.

        Returns:
            The outcome to read back.
        """
        variant = self._num_guesses if verifies or targets is not None else 0
        masks = None
        if guided:
            placed = [(packed.sequences[i], guide, tokens) for i, guide, tokens in guided]
            masks = fill_masks(
                placed, self._programs.step_rows(packed), variant + 1, self._programs.num_words
            )
        cache, self.state, outcome = self._programs.run(
            packed, variant, self._slots.cache, self.state, masks, targets
        )
        self._slots.cache = cache
        return outcome
