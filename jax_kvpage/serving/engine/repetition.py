"""Steady decoding: steps that repeat the previous one, so that little has to be packed."""

from jax_kvpage.serving.engine.flight import Flight
from jax_kvpage.serving.engine.packing import Operands, Packed
from jax_kvpage.serving.engine.tracking import SequenceState

__all__ = ["Repetition"]


class Repetition:
    """Recognizes a step that runs the newest token of the same sequences as the step before it.

    If all these tokens are on the device, the operands of the two steps differ only in the
    positions, which are one higher. In steady decoding, that is most steps.
    """

    def __init__(self) -> None:
        self._states: list[SequenceState] = []
        self._packed: Packed | None = None

    def forget(self) -> None:
        """The next step does not repeat the previous one.

        Call it whenever a sequence gets a row or a slot, or the host chooses a newest token.
        """
        self._packed = None

    def keep(self, flight: Flight, step: Operands, packed: Packed) -> None:
        """Remembers a step, its operands, and these as they are packed."""
        repeats = flight.num_decodes == len(flight.states) and not flight.guesses
        self._packed = packed if repeats and bool((step.tokens < 0).all()) else None
        self._states = flight.states

    def next(self, flight: Flight) -> Packed | None:
        """Returns the packed operands of a step that repeats the one before, else None."""
        packed = self._packed
        if (
            packed is None
            or flight.num_decodes < len(flight.states)
            or flight.guesses
            or flight.states != self._states
        ):
            return None
        self._packed = packed.moved()
        return self._packed
