"""Tokens of waiting requests that the pool's store has, and memory has not."""

import dataclasses
from collections.abc import Callable, Iterator

import numpy as np

from jax_kvpage.errors import KVPageError
from jax_kvpage.pool import KVPool
from jax_kvpage.serving.engine.pace import Pace
from jax_kvpage.serving.request import SequenceGroup
from jax_kvpage.serving.swap import Fetched
from jax_kvpage.tickets import Ticket

__all__ = ["StoredPrompts"]


@dataclasses.dataclass(slots=True)
class _Prompt:
    num_preemptions: int  # of the group, when it was looked for
    num_tokens: int  # stored; 0: no more than in memory, or read
    ticket: Ticket | None = None


class StoredPrompts:
    """Reads them into the prefix cache, each once for a request and once after each preemption.

    Args:
        pool: with a store.
        pace: of the engine.
        tokens_of: ids and namespace of a group that waits.
    """

    def __init__(
        self,
        pool: KVPool,
        pace: Pace,
        tokens_of: Callable[[SequenceGroup], tuple[np.ndarray, str]],
    ) -> None:
        self._pool = pool
        self._pace = pace
        self._tokens_of = tokens_of
        self._prompts: dict[SequenceGroup, _Prompt] = {}

    def find(self, group: SequenceGroup) -> int:
        """Tokens that the store has of a group; 0 if memory has as many."""
        prompt = self._prompts.get(group)
        if prompt is None or prompt.num_preemptions < group.num_preemptions:
            ids, space = self._tokens_of(group)
            stored = self._pool.stored_prefix(ids, space)
            more = stored > 0 and stored > self._pool.find_prefix(ids, space)
            prompt = _Prompt(group.num_preemptions, stored if more else 0)
            self._prompts[group] = prompt
        return prompt.num_tokens

    def fetch(self, group: SequenceGroup) -> Fetched:
        """See `SwapSpace`; for a group of which `find` has found something."""
        prompt = self._prompts[group]
        if prompt.ticket is None:
            pace = self._pace.tokens_per_second or None
            try:
                ids, space = self._tokens_of(group)
                prompt.ticket = self._pool.prefetch(ids, space, prefill_tokens_per_second=pace)
            except KVPageError:  # such as a store that was closed
                prompt.num_tokens = 0
                return "gone"
        if not prompt.ticket.ready:
            return "coming"
        prompt.num_tokens, prompt.ticket = 0, None
        return "gone"

    def forget(self, group: SequenceGroup) -> None:
        """Hears that a group has ended. A read that goes on ends by itself."""
        self._prompts.pop(group, None)

    def reads(self) -> Iterator[Ticket]:
        """Those that go on."""
        for prompt in self._prompts.values():
            if prompt.ticket is not None:
                yield prompt.ticket
