"""Placement: chooses the replica of a data-parallel pool for each request.

The cost of a replica is the number of tokens of the request that it would have to compute, plus the
tokens that its live slots have room for. A request goes to the replica with the least cost among
those with room for it; ties go to the replica that has more of its tokens, then to the lower
number. So a request follows its prefix until that replica is busier than another by more than the
prefix saves, and without a prefix it goes where most blocks are free. Both kinds of tokens have the
same weight because all replicas run in one program: reading a token in each step of an answer takes
about as long as computing it once. Weighing cached tokens against load is the idea of SGLang's
cache-aware router and of Preble (Srivatsa et al., 2024).

Requests of one call are placed in order, each after the previous ones: their common prefixes count
as cached where the first of them went.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

__all__ = ["Request", "place"]


class Request(NamedTuple):
    """A request to place.

    Attributes:
        tokens: number of tokens that it begins with.
        room: tokens to map room for.
        cached: for each replica, the number of its tokens that are cached there.
        ids: int32[n]: its token ids; None if prefixes do not matter.
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
    """Returns the replica of each request, or None if one of them has room nowhere.

    Args:
        requests: requests in the order of the call.
        loads: for each replica, the tokens that its live slots have room for.
        block_tokens: tokens per block.
        has_room: whether a replica can take all of the given requests (indices), given the number
            of missing tokens of each.
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
    """Length of the common prefix of two requests in full blocks, which are computed once."""
    if request.ids is None or other.ids is None:
        return 0
    size = min(len(request.ids), len(other.ids))
    differ = request.ids[:size] != other.ids[:size]
    same = int(np.argmax(differ)) if differ.any() else size
    return same // block_tokens * block_tokens
