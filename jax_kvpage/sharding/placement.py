"""Which replica of a data-parallel pool a request goes to.

The cost of a replica is the number of tokens of the request that it would have to compute, plus the
tokens that its live slots have room for. The request goes where the cost is least among replicas
that have room for it; among equals to the one that has more of it, then to the lower number. So a
request follows its prefix until that replica is busier than another by more than the prefix saves,
and without a prefix it goes where most blocks are free. One token counts like the other because all
replicas run in one program: reading a token in each step of an answer takes about as long as
computing it once. Weighing what is cached against load is the idea of SGLang's cache-aware router
and of Preble (Srivatsa et al., 2024).

Requests of one call are placed in their order, each after those before it: their common beginnings
count as cached where the first of them went.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

__all__ = ["Request", "place"]


class Request(NamedTuple):
    """A request that is to be placed.

    Attributes:
        tokens: what it begins with.
        room: tokens to map room for.
        cached: for each replica how many of its tokens are found there.
        ids: int32[n] of its tokens; None where prefixes do not matter.
    """

    tokens: int
    room: int
    cached: Sequence[int]
    ids: np.ndarray | None = None


def place(
    requests: Sequence[Request],
    loads: Sequence[int],
    block_tokens: int,
    has_room: Callable[[int, list[int], list[int]], bool],
) -> list[int] | None:
    """The replica of each request; None if one of them has room nowhere.

    Args:
        requests: in the order of the call.
        loads: of each replica, the tokens that its live slots have room for.
        block_tokens: tokens of a block.
        has_room: whether a replica can take all of these requests (indices), which need so many
            tokens each that are not there yet.
    """
    loads = list(loads)
    members: list[list[int]] = [[] for _ in loads]
    needed: list[list[int]] = [[] for _ in loads]
    where: list[int] = []
    for index, request in enumerate(requests):
        found = [
            max([cached, *(_common(request, requests[i], block_tokens) for i in members[replica])])
            for replica, cached in enumerate(request.cached)
        ]
        order = sorted(
            range(len(loads)),
            key=lambda r: (request.tokens - found[r] + loads[r], -found[r], r),
        )
        for replica in order:
            missing = max(request.tokens, request.room) - found[replica]
            if has_room(replica, [*members[replica], index], [*needed[replica], missing]):
                break
        else:
            return None
        where.append(replica)
        members[replica].append(index)
        needed[replica].append(missing)
        loads[replica] += -(-missing // block_tokens) * block_tokens
    return where


def _common(request: Request, other: Request, block_tokens: int) -> int:
    """The tokens that two requests begin with, in whole blocks: these are computed once."""
    if request.ids is None or other.ids is None:
        return 0
    size = min(len(request.ids), len(other.ids))
    differ = request.ids[:size] != other.ids[:size]
    same = int(np.argmax(differ)) if differ.any() else size
    return same // block_tokens * block_tokens
