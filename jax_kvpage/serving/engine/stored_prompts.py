"""Prompts of waiting requests that are in the pool's store but not in memory."""

import dataclasses
from collections.abc import Callable, Iterator

import numpy as np

from jax_kvpage.errors import KVPageError
from jax_kvpage.pool import KVPool
from jax_kvpage.serving.engine.prefill_rate import PrefillRate
from jax_kvpage.serving.engine.slot_calls import past_fault
from jax_kvpage.serving.request import SequenceGroup
from jax_kvpage.serving.swap import Fetched
from jax_kvpage.tickets import Ticket

__all__ = ["StoredPrompts"]


@dataclasses.dataclass(slots=True)
class _Prompt:
    num_preemptions: int  # of the group, at the time of the lookup
    num_tokens: int  # stored tokens; 0 if memory has as many, or after the read
    ticket: Ticket | None = None


class StoredPrompts:
    """Reads stored prompts into the prefix cache, once per request and once after each preemption.

    Args:
        pool: a pool with a store.
        prefill_rate: measured speed of the engine.
        tokens_of: returns the token ids and the namespace of a waiting group.
    """

    def __init__(
        self,
        pool: KVPool,
        prefill_rate: PrefillRate,
        tokens_of: Callable[[SequenceGroup], tuple[np.ndarray, str]],
    ) -> None:
        self._pool = pool
        self._prefill_rate = prefill_rate
        self._tokens_of = tokens_of
        self._prompts: dict[SequenceGroup, _Prompt] = {}

    def find(self, group: SequenceGroup) -> int:
        """Returns how many tokens of a group the store has; 0 if memory has as many."""
        prompt = self._prompts.get(group)
        if prompt is None or prompt.num_preemptions < group.num_preemptions:
            ids, space = self._tokens_of(group)
            stored = past_fault(lambda: self._pool.stored_prefix(ids, space))
            more = stored > 0 and stored > past_fault(lambda: self._pool.find_prefix(ids, space))
            prompt = _Prompt(group.num_preemptions, stored if more else 0)
            self._prompts[group] = prompt
        return prompt.num_tokens

    def fetch(self, group: SequenceGroup) -> Fetched:
        """See `SwapSpace`. `find` must have found something for the group."""
        prompt = self._prompts[group]
        if prompt.ticket is None:
            rate = self._prefill_rate.tokens_per_second or None
            try:
                ids, space = self._tokens_of(group)
                prompt.ticket = self._pool.prefetch(ids, space, prefill_tokens_per_second=rate)
            except KVPageError:  # for example, the store was closed
                prompt.num_tokens = 0
                return "gone"
        if not prompt.ticket.ready:
            return "coming"
        prompt.num_tokens, prompt.ticket = 0, None
        return "gone"

    def forget(self, group: SequenceGroup) -> None:
        """Forgets a group that has ended. A read in progress completes by itself."""
        self._prompts.pop(group, None)

    def reads(self) -> Iterator[Ticket]:
        """Yields the reads in progress."""
        for prompt in self._prompts.values():
            if prompt.ticket is not None:
                yield prompt.ticket
