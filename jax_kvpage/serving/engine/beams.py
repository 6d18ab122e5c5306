"""Beam search in the engine: the sequences of a request are its running beams.

They decode in lockstep, so each step yields the most likely next tokens of all of them. Beams that
are dropped take over the tokens of others, by forking their slots.
"""

from collections.abc import Callable, Sequence

import numpy as np

from jax_kvpage.serving.engine.flight import Token
from jax_kvpage.serving.engine.ledger import Ledger
from jax_kvpage.serving.engine.slots import Slots
from jax_kvpage.serving.engine.tracking import RequestState, SequenceState

__all__ = ["Beams"]


class Beams:
    """Advances beam searches.

    Args:
        slots: slots of the sequences.
        ledger: unfinished requests.
        choose: called for sequences whose newest token the host has chosen.
    """

    def __init__(
        self, slots: Slots, ledger: Ledger, choose: Callable[[SequenceState], None]
    ) -> None:
        self._slots = slots
        self._ledger = ledger
        self._choose = choose

    def go_on(self, request: RequestState, tokens: Sequence[Token], now: float) -> bool:
        """Advances a search by one step; nothing may be in flight.

        Args:
            request: an unfinished request.
            tokens: most likely token of each beam, with the log probabilities of the candidates.
            now: current time in seconds.

        Returns:
            Whether the search has ended.
        """
        search = request.search
        assert search is not None
        found = {token.state: token.logprobs for token in tokens}
        rows = [table[0] for beam in request.beams if (table := found[beam]) is not None]
        logprobs = np.asarray([[each.logprob for each in row.values()] for row in rows], np.float32)
        parents = search.take(logprobs, np.asarray([list(row) for row in rows], np.int32))
        if search.done:
            self._ledger.take_beams(request, now)
            return True
        request.beams = self._reorder(request.beams, parents)
        for beam, output in zip(request.beams, search.tokens, strict=True):
            beam.ids.append(output[-1])
            self._choose(beam)
        return False

    def _reorder(self, beams: list[SequenceState], parents: list[int]) -> list[SequenceState]:
        """Returns the beams that continue from `parents`.

        The first child of a parent keeps its slot; the others get the slots of beams without
        children.
        """
        kept = {beams[parent] for parent in parents}
        unused = iter([beam for beam in beams if beam not in kept])
        following, heirs = [], []
        for parent in parents:
            donor = beams[parent]
            if donor in kept:
                kept.remove(donor)
                following.append(donor)
            else:
                heirs.append((next(unused), donor))
                following.append(heirs[-1][0])
        if heirs:
            self._slots.take_over(heirs)
        return following
