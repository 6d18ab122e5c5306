"""Back-off after refusals: limits how many free blocks a plan may use."""

__all__ = ["Backoff"]

# Consecutive steps in which nothing ran because of a refusal before a refusal is final.
_MAX_REFUSALS = 8


class Backoff:
    """Backs off after memory refused blocks that it had reported as free.

    After a refusal, as many blocks as the refused plan could use are withheld from plans. The
    number is halved in each step.

    Attributes:
        is_full: whether the step may use all blocks that memory reports as free; False from a
            refusal until `usable` sets it again.
    """

    def __init__(self) -> None:
        self.is_full = True
        self._withheld = 0
        self._refusals = 0

    def usable(self, free: int) -> int:
        """Returns how many of the blocks reported as free the next step may use."""
        self.is_full = self._withheld == 0
        usable = max(free - self._withheld, 0)
        self._withheld //= 2
        return usable

    def refused(self, usable: int) -> None:
        """Records a refusal in a step that could use `usable` blocks."""
        self._withheld = max(self._withheld, usable)
        self.is_full = False

    def is_final(self, idle: bool) -> bool:
        """Returns whether the latest refusal is final because too many came in a row.

        Args:
            idle: whether nothing runs or drains, so that another attempt can only fail again.
        """
        self._refusals = self._refusals + 1 if idle else 0
        return self._refusals >= _MAX_REFUSALS

    def ran(self) -> None:
        """Records that a plan ran."""
        self._refusals = 0
