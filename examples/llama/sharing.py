"""Memory saved by sharing blocks, as defined in the vLLM paper (Kwon et al., 2023, section 6.3):
the number of blocks saved by sharing, divided by the number of blocks without sharing.
"""

import jax_kvpage

__all__ = ["SharingMeter"]


class SharingMeter:
    """Counts referenced blocks and blocks in use, summed over the steps of a run.

    Attributes:
      referenced: Blocks in the sequences' slots; a block shared by n sequences counts n times.
      used: The same, but each block counts once.
    """

    def __init__(self) -> None:
        self.referenced = 0
        self.used = 0

    def sample(self, pool: jax_kvpage.KVPool) -> None:
        """Adds the blocks that all occupied slots have now."""
        rows = [row for row in pool.slot_table() if not row.draining]
        self.referenced += sum(row.num_blocks for row in rows)
        self.used += pool.stats().blocks_mapped

    @property
    def saved(self) -> float:
        """The share of referenced blocks that took no memory, from 0 to 1."""
        return 1.0 - self.used / self.referenced if self.referenced else 0.0
