"""The prefix index alone: policies on small traces against simulations, and the binding."""

from __future__ import annotations

import collections
from collections.abc import Sequence

import numpy as np
import pytest

from jax_kvpage import _native

_BLOCK = 4


def _conversations(seed: int, requests: int) -> list[list[int]]:
    """Returns prompts of interleaved conversations: each is the conversation's last prompt plus
    something new. Blocks stand for tokens: equal numbers mean equal tokens after equal ones."""
    random = np.random.default_rng(seed)
    conversations: list[list[int]] = []
    prompts, new = [], 1
    for _ in range(requests):
        if len(conversations) < 20 or random.random() < 0.3:
            conversations.append([0])  # the same first block in all of them
        talk = conversations[
            int(random.integers(max(0, len(conversations) - 60), len(conversations)))
        ]
        more = int(random.integers(1, 12))
        talk += range(new, new + more)
        new += more
        prompts.append(list(talk))
    return prompts


def _replay(prompts: Sequence[list[int]], policy: str, capacity: int) -> int:
    """Returns the tokens found if each prompt is cached completely in `capacity` blocks."""
    index = _native.PrefixIndex(_BLOCK, policy=policy)
    cached = 0
    for prompt in prompts:
        tokens = np.repeat(np.asarray(prompt, np.int32), _BLOCK)
        cached += index.find(tokens).tokens
        index.touch(tokens)
        index.store(0, tokens, np.zeros(len(prompt), np.int32))
        index.evict(index.numbers.entries - capacity)
        assert index.numbers.entries <= capacity
        index.detach(0)
    return cached


def _lru(prompts: Sequence[list[int]], capacity: int) -> int:
    """Does the same with an ordered dict of blocks."""
    blocks: collections.OrderedDict[int, None] = collections.OrderedDict()
    cached = 0
    for prompt in prompts:
        for block in prompt:
            if block not in blocks:
                break
            cached += _BLOCK
        for block in reversed(prompt):  # a block is never older than its continuations
            blocks[block] = None
            blocks.move_to_end(block)
        while len(blocks) > capacity:
            blocks.popitem(last=False)
    return cached


@pytest.mark.parametrize("capacity", [200, 400, 800])
def test_lru_finds_what_a_simulation_finds(capacity: int) -> None:
    prompts = _conversations(capacity, 1500)
    assert _replay(prompts, "lru", capacity) == _lru(prompts, capacity) > 0


def test_remembered_frequency_finds_more_than_recency() -> None:
    """Prompts that recur after more blocks than fit, between prompts that never do."""
    capacity, prompts, new = 400, [], 1000
    for turn in range(200):
        again = turn % 12
        prompts.append(list(range(20 * again, 20 * again + 20)))
        prompts.append(list(range(new, new + 30)))
        new += 30
    assert _replay(prompts, "frequency", capacity) > 3 * _replay(prompts, "lru", capacity)


def test_matches_say_where_they_end() -> None:
    index = _native.PrefixIndex(_BLOCK, ranges=2)
    other = index.namespace("other")
    tokens = np.arange(10, dtype=np.int32)
    assert index.store(3, tokens, np.arange(6, dtype=np.int32)).tolist() == list(range(6))
    assert index.tokens(3) == 10
    match = index.find(np.arange(6, dtype=np.int32))
    assert (match.tokens, match.behind, match.leaf) == (6, 2, False)
    assert match.blocks == [0, 1, 2, 3]
    assert match.owners == [3, 3]
    assert index.find(tokens, other).tokens == 0
    assert sorted(index.cut(3, 5)) == [4, 5]
    assert index.find(tokens).tokens == 5
    index.detach(3)
    assert index.find(tokens).owners == [-1, -1]
    assert sorted(index.evict(1)) == [2, 3]


def test_mistakes_are_errors() -> None:
    index, tokens = _native.PrefixIndex(_BLOCK), np.zeros(5, np.int32)
    with pytest.raises(IndexError, match="namespace"):
        index.find(tokens, 1)
    with pytest.raises(ValueError, match="map"):
        index.store(0, tokens, np.zeros(1, np.int32))
    with pytest.raises(ValueError, match="slot"):
        index.store(-1, tokens, np.zeros(2, np.int32))
    with pytest.raises(ValueError, match="hint"):
        index.hint(tokens, "keep")
    with pytest.raises(ValueError, match="policy"):
        _native.PrefixIndex(_BLOCK, policy="mru")
    with pytest.raises(ValueError, match="positive"):
        _native.PrefixIndex(0)
