"""How many of the blocks that memory calls free a plan may count on, after refusals."""

__all__ = ["Trust"]


class Trust:
    """Backs off after memory has refused blocks that it called free.

    As many as it called free then are not counted on; half of them are again after each step.

    Args:
        max_refusals: steps in a row in which nothing ran for a refusal, until it is final.

    Attributes:
        is_full: whether the step counts on all blocks that memory calls free.
    """

    def __init__(self, max_refusals: int = 8) -> None:
        self._max_refusals = max_refusals
        self.is_full = True
        self._withheld = 0
        self._refusals = 0

    def usable(self, free: int) -> int:
        """Blocks to count on in the next step, of those that memory calls free."""
        self.is_full = self._withheld == 0
        usable = max(free - self._withheld, 0)
        self._withheld //= 2
        return usable

    def refused(self, usable: int) -> None:
        """Hears of a refusal in a step that counted on some blocks."""
        self._withheld = max(self._withheld, usable)

    def is_final(self, idle: bool) -> bool:
        """Whether the refusal just heard of is the last of too many.

        Args:
            idle: whether nothing runs or drains, so that the next try will be no different.
        """
        self._refusals = self._refusals + 1 if idle else 0
        return self._refusals >= self._max_refusals

    def ran(self) -> None:
        """Hears that a plan ran."""
        self._refusals = 0
