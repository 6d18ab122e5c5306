"""Conversations of several turns: each turn's request is the entire text so far, but only tokens
that are not cached are computed.

The engine acquires slots by tokens (`acquire_prefix`) and commits what was written. A later turn
thus continues in the slot of the turn before, if its blocks were not needed meanwhile, and
conversations share their common prefix.
"""

from collections.abc import Sequence

import jax

from .scan_runner import Request, ScanRunner

__all__ = ["ConversationRunner", "next_turn"]


class ConversationRunner(ScanRunner):
    """An engine whose requests reuse the tokens of earlier ones; run it once for each turn."""

    def _place(self, request: Request, donor: Request | None, wait: bool) -> int | None:
        assert donor is None, "requests of a conversation have no group"
        if wait:  # released slots become free when their programs have run
            jax.block_until_ready(self._cache)
        request.slot, cached, self._cache = self._pool.acquire_prefix(
            self._cache,
            request.tokens,
            self._reserve(request),
            min_cached=2,  # not just the token with which every text begins
        )
        if not request.preemptions:
            request.cached_tokens = cached
        return cached

    def _take(self, request: Request, token: int) -> None:
        # The model has processed all tokens but the new one: from now on they can be found.
        known = len(self._pool.committed(request.slot))
        self._pool.commit(request.slot, request.tokens[known:])
        super()._take(request, token)


def next_turn(requests: Sequence[Request], ids: Sequence[int]) -> list[Request]:
    """Makes requests that continue with `ids` after the answers of finished requests."""
    return [
        Request(request.index, [*request.tokens, *ids], request.max_new_tokens)
        for request in requests
    ]
