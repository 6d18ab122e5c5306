"""What closes at the end of a `with` block."""

import abc
from typing import Self

__all__ = ["Closing"]


class Closing(abc.ABC):
    """A class with `close`, which the end of a `with` block calls."""

    @abc.abstractmethod
    def close(self) -> None:
        """Releases what this holds; safe to call again."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()
