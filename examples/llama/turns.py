"""Conversations of several turns: each turn's request is the whole text so far, and computes only
what the cache does not have.

The engine asks for slots by tokens (`acquire_prefix`) and commits what has been written. So a later
turn goes on in the slot that the one before has left, if its blocks were not needed meanwhile, and
conversations that begin alike share what they have in common.
"""

from collections.abc import Sequence

import jax

from .generate import Engine, Request

__all__ = ["ConversationEngine", "next_turn"]


class ConversationEngine(Engine):
    """An engine whose requests find the tokens of earlier ones; run it once for each turn."""

    def _place(self, request: Request, donor: Request | None, wait: bool) -> int | None:
        assert donor is None, "requests of a conversation have no group"
        if wait:  # what earlier requests have released comes free when their programs have run
            jax.block_until_ready(self._cache)
        request.slot, cached, self._cache = self._pool.acquire_prefix(
            self._cache,
            request.tokens,
            self._reserve(request),
            min_cached=2,  # not only the token with which every text begins
        )
        if not request.preemptions:
            request.cached_tokens = cached
        return cached

    def _take(self, request: Request, token: int) -> None:
        # All tokens but the new one have been through the model: from now on they can be found.
        known = len(self._pool.committed(request.slot))
        self._pool.commit(request.slot, request.tokens[known:])
        super()._take(request, token)


def next_turn(requests: Sequence[Request], ids: Sequence[int]) -> list[Request]:
    """Requests that go on with `ids` after the answers of finished ones."""
    return [
        Request(request.index, [*request.tokens, *ids], request.max_new_tokens)
        for request in requests
    ]
