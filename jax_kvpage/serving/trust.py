"""Back-off after refusals: how many of the free blocks a plan may use."""

__all__ = ["Trust"]


class Trust:
    """Backs off after memory has refused blocks that it reported as free.

    After a refusal, the number of blocks that were reported as free is withheld from plans. Each
    step halves it.

    Args:
        max_refusals: consecutive steps in which nothing ran because of a refusal, until a refusal
            is final.

    Attributes:
        is_full: whether the step may use all blocks that memory reports as free; False after a
            refusal until `usable` says so again.
    """

    def __init__(self, max_refusals: int = 8) -> None:
        self._max_refusals = max_refusals
        self.is_full = True
        self._withheld = 0
        self._refusals = 0

    def usable(self, free: int) -> int:
        """Blocks that the next step may use, of those that memory reports as free."""
        self.is_full = self._withheld == 0
        usable = max(free - self._withheld, 0)
        self._withheld //= 2
        return usable

    def refused(self, usable: int) -> None:
        """Records a refusal in a step that could use this many blocks."""
        self._withheld = max(self._withheld, usable)
        self.is_full = False

    def is_final(self, idle: bool) -> bool:
        """Whether the latest refusal is final: too many came in a row.

        Args:
            idle: whether nothing runs or drains, so that the next attempt can only fail again.
        """
        self._refusals = self._refusals + 1 if idle else 0
        return self._refusals >= self._max_refusals

    def ran(self) -> None:
        """Records that a plan ran."""
        self._refusals = 0
