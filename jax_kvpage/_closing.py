"""Base class of context managers with a `close` method."""

import abc
from typing import Self

__all__ = ["Closing"]


class Closing(abc.ABC):
    """Calls `close` at the end of a `with` block."""

    @abc.abstractmethod
    def close(self) -> None:
        """Releases all resources; safe to call again."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()
