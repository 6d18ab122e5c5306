"""The groups that have memory: how they start, fork, lose their memory and end.

Blocks are counted here only for promises: those that siblings will need once their shared prompt is
computed, and those that released rows are about to free.
"""

import bisect
from collections.abc import Hashable, Iterable

from jax_kvpage.serving.plan import Admission, Fork
from jax_kvpage.serving.request import Sequence, SequenceGroup, Status
from jax_kvpage.serving.rows import Rows

__all__ = ["RunningSet"]


class RunningSet:
    """Running groups, and the rows of their sequences.

    Args:
        rows: per-row arrays.
        max_seq_len: maximum tokens per sequence.
        max_preemptions: a group preempted this many times gets room up to its limit at once.

    Attributes:
        groups: running groups in scheduling order.
        prefilling: sequences with more than one token to compute, in scheduling order.
        forking: groups with siblings that wait for the prompt.
        promised: blocks that these siblings will need.
        promised_slots: slots that running groups may still acquire.
        released: rows freed since the last plan.
        releasing: blocks that become free with them.
        done_prefixes: prefix keys whose group no longer computes the prompt.
    """

    def __init__(self, rows: Rows, max_seq_len: int, max_preemptions: int) -> None:
        self._rows = rows
        self._max_seq_len = max_seq_len
        self._max_preemptions = max_preemptions
        self.groups: list[SequenceGroup] = []
        self.prefilling: list[Sequence] = []
        self.forking: list[SequenceGroup] = []
        self.promised = 0
        self.promised_slots = 0
        self.released: list[int] = []
        self.releasing = 0
        self.done_prefixes: list[Hashable] = []
        self._computing: dict[Hashable, SequenceGroup] = {}

    @property
    def num_unforked(self) -> int:
        """Sequences of running groups that have no row yet."""
        return sum(len(group.unforked) for group in self.forking)

    @property
    def num_pending(self) -> int:
        """Prompt tokens that running sequences have yet to compute."""
        rows = [sequence.row for sequence in self.prefilling]
        return int((self._rows.known[rows] - self._rows.computed[rows]).sum())

    def is_protected(self, group: SequenceGroup) -> bool:
        """Whether the group has been preempted too often to be preempted again."""
        return group.num_preemptions >= self._max_preemptions

    def room(self, sequence: Sequence) -> int:
        """Tokens to map room for at the start: one more than the sequence has, if it may grow."""
        group = sequence.group
        last = group.limit - 1  # the last token is never computed
        if self.is_protected(group):
            return last
        tokens = max(sequence.num_tokens, group.request.num_shared_tokens + 1)
        wanted = max(min(tokens + 1, last), group.request.reserve_tokens)
        return min(wanted, self._max_seq_len)

    def shared_blocks(self, group: SequenceGroup) -> int:
        """Full blocks that the group's unfinished sequences will share when they start."""
        if len(group.live) < 2:
            return 0
        return group.request.num_shared_tokens // self._rows.block_tokens

    def blocks_to_start(self, group: SequenceGroup) -> int:
        """Blocks that the group needs to start, including those of its siblings."""
        every = sum(self._rows.blocks(self.room(sequence)) for sequence in group.live)
        return every - (len(group.live) - 1) * self.shared_blocks(group)

    def start(self, group: SequenceGroup, num_cached: int) -> Admission:
        """Gives the first sequence a row; the others follow once the prompt is computed.

        Args:
            group: a waiting group.
            num_cached: tokens already in its slot.
        """
        rows, leader = self._rows, group.live[0]
        blocks, shared = self.blocks_to_start(group), self.shared_blocks(group)
        group.status = Status.RUNNING
        rows.add_group(group, shared, not self.is_protected(group))
        bisect.insort(self.groups, group, key=lambda other: other.order)
        room = self.room(leader)
        rows.add(leader, num_cached, room)
        group.unforked = group.live[1:]
        if not group.request.lockstep or rows.known[leader.row] - num_cached > 1:
            self.prefills(leader)
        if group.unforked:
            group.donor = leader
            self.forking.append(group)
        self._promise(group, blocks - rows.blocks(room))
        self.promised_slots += group.request.slots - group.request.n + len(group.unforked)
        self.caches(group, num_cached)
        self._level(group)
        return Admission(leader, room, num_cached)

    def caches(self, group: SequenceGroup, num_cached: int) -> None:
        """Records the cached tokens of a group, which may have to compute a prefix for others."""
        key = group.request.prefix_key
        if key is not None and num_cached < self.prefix_to_cache(group):
            self._computing.setdefault(key, group)

    def prefix_to_cache(self, group: SequenceGroup) -> int:
        """Tokens that followers wait for: full blocks, and never the last token."""
        whole = self._prefix_tokens(group) // self._rows.block_tokens * self._rows.block_tokens
        return min(whole, group.live[0].num_tokens - 1)

    def computes(self, prefix_key: Hashable) -> bool:
        """Whether a running group is computing this prefix."""
        return prefix_key is not None and prefix_key in self._computing

    def prefills(self, sequence: Sequence) -> None:
        """Adds a sequence to those with more than one token to compute."""
        bisect.insort(self.prefilling, sequence, key=lambda s: (s.group.order, s.index))

    def prefilled(self, sequence: Sequence) -> None:
        """Moves a sequence with one token left to compute to the decoding ones."""
        self.prefilling.remove(sequence)
        if sequence.group.request.lockstep:
            self._level(sequence.group)
        else:
            self._rows.set_decoding(sequence.row, not sequence.finish_reason)

    def unprefilled(self, sequence: Sequence) -> None:
        """Undoes `prefilled`; in lockstep, the siblings stop decoding too."""
        group = sequence.group
        for each in group.sequences if group.request.lockstep else (sequence,):
            if each.row >= 0:
                self._rows.set_decoding(each.row, False)
        self.prefills(sequence)

    def advanced(self, sequence: Sequence) -> None:
        """Lets the followers of a prefix start once a sequence has computed it completely."""
        if not self._computing:
            return
        group = sequence.group
        wanted = self._prefix_tokens(group)
        if group.request.lockstep:  # the last prompt token runs together with the siblings
            wanted = min(wanted, group.request.num_prompt_tokens - 1)
        if self._rows.computed[sequence.row] >= wanted:
            self._end_prefix(group)

    def fork(self, group: SequenceGroup) -> Fork:
        """Gives the siblings rows. Call `release_donors` once memory has carried out the fork."""
        rows, shared, donor = self._rows, group.request.num_shared_tokens, group.donor
        assert donor is not None
        children = tuple(group.unforked)
        room = tuple(self.room(child) for child in children)
        for child, tokens in zip(children, room, strict=True):
            child.num_tokens = max(child.num_tokens, shared + 1)
            rows.add(child, shared, tokens)
            if child.num_tokens > shared + 1:
                self.prefills(child)
            elif not group.request.lockstep:
                rows.set_decoding(child.row, True)
        self._forked(group)
        self._level(group)
        return Fork(donor, children, shared, room)

    def unfork(self, fork: Fork) -> None:
        """Undoes a fork that memory refused."""
        group = fork.parent.group
        blocks = 0
        # In reverse order, so that a repeated fork gets the same rows.
        for child, room in reversed(list(zip(fork.children, fork.room, strict=True))):
            blocks += self._rows.blocks(room) - int(self._rows.shared[group.index])
            if child in self.prefilling:
                self.prefilling.remove(child)
            self._rows.remove(child)
        if group.request.lockstep:
            for sequence in group.live:
                if sequence.row >= 0:
                    self._rows.set_decoding(sequence.row, False)
        group.unforked, group.donor = list(fork.children), fork.parent
        self.forking.append(group)
        self._promise(group, blocks)
        self.promised_slots += len(group.unforked)

    def end(self, sequence: Sequence, reason: str) -> bool:
        """Ends a sequence; returns whether that ended its group."""
        group = sequence.group
        sequence.finish_reason = reason
        group.live.remove(sequence)
        if sequence in group.unforked:
            shared = int(self._rows.shared[group.index])
            group.unforked.remove(sequence)
            self._promise(group, shared - self._rows.blocks(self.room(sequence)))
            self.promised_slots -= 1
            if not group.unforked:
                self._forked(group)
        elif sequence is group.donor:
            # The siblings still need its slot.
            self._rows.set_decoding(sequence.row, False)
        elif sequence.row >= 0:
            self._drop(sequence)
        if group.live:
            self._level(group)
            return False
        if group.status is Status.RUNNING:
            self._leave(group)
        group.status = Status.FINISHED
        return True

    def preempt(self, group: SequenceGroup) -> None:
        """Takes the memory away from a group."""
        group.num_lost_tokens = self._rows.num_computed(group)
        self._leave(group)
        group.status = Status.PREEMPTED
        group.num_preemptions += 1

    def unstart(self, group: SequenceGroup) -> None:
        """Undoes a start that memory refused; there is nothing to release."""
        released, releasing = list(self.released), self.releasing
        self._leave(group)
        self.released, self.releasing = released, releasing
        group.status = Status.PREEMPTED if group.num_preemptions else Status.WAITING

    def release_donors(self, forks: Iterable[Fork]) -> None:
        """Releases donors whose siblings have now been forked, if they ended before that."""
        for fork in forks:
            if fork.parent.finish_reason and fork.parent.row >= 0:
                self._drop(fork.parent)

    def _promise(self, group: SequenceGroup, blocks: int) -> None:
        self._rows.promised[group.index] += blocks
        self.promised += blocks

    def _forked(self, group: SequenceGroup) -> None:
        self._promise(group, -int(self._rows.promised[group.index]))
        self.promised_slots -= len(group.unforked)
        group.unforked, group.donor = [], None
        self.forking.remove(group)

    def _level(self, group: SequenceGroup) -> None:
        """Lets lockstep sequences decode once no sibling is behind."""
        if not group.request.lockstep or group.unforked or group.status is not Status.RUNNING:
            return
        rows = [sequence.row for sequence in group.live]
        level = (self._rows.computed[rows] == self._rows.known[rows] - 1).all()
        for row in rows if level else ():
            self._rows.set_decoding(row, True)

    def _drop(self, sequence: Sequence) -> None:
        group = sequence.group
        if sequence in self.prefilling:
            self.prefilling.remove(sequence)
        self.releasing += self._rows.own_blocks(sequence.row)
        self.released.append(self._rows.remove(sequence))
        if all(other.row < 0 for other in group.sequences):
            self.releasing += int(self._rows.shared[group.index])

    def _leave(self, group: SequenceGroup) -> None:
        """Removes a group and frees all that it holds."""
        if group.unforked:
            self._forked(group)
        for sequence in group.sequences:
            if sequence.row >= 0:
                self._drop(sequence)
        del self.groups[bisect.bisect_left(self.groups, group.order, key=lambda g: g.order)]
        self.promised_slots -= group.request.slots - group.request.n
        self._end_prefix(group)
        self._rows.remove_group(group)

    @staticmethod
    def _prefix_tokens(group: SequenceGroup) -> int:
        return group.request.num_prefix_tokens or group.request.num_prompt_tokens

    def _end_prefix(self, group: SequenceGroup) -> None:
        key = group.request.prefix_key
        if key is not None and self._computing.get(key) is group:
            del self._computing[key]
            self.done_prefixes.append(key)
