"""Memory saved by shared blocks, as the vLLM paper counts it (Kwon et al., 2023, section 6.3):
blocks that need no memory, over the blocks that sequences refer to.
"""

import jax_kvpage

__all__ = ["SharingMeter"]


class SharingMeter:
    """Blocks that sequences refer to and blocks in use, summed over the steps of a run.

    Attributes:
      referenced: Blocks in the sequences' slots; one that n sequences share counts n times.
      used: The same, where each block counts once.
    """

    def __init__(self) -> None:
        self.referenced = 0
        self.used = 0

    def sample(self, pool: jax_kvpage.KVPool) -> None:
        """Counts the blocks of all occupied slots at this moment."""
        rows = [row for row in pool.slot_table() if not row.draining]
        self.referenced += sum(row.num_blocks for row in rows)
        self.used += pool.stats().blocks_mapped

    @property
    def saved(self) -> float:
        """The share of referenced blocks that needed no memory, from 0 to 1."""
        return 1.0 - self.used / self.referenced if self.referenced else 0.0
