"""Closing: what a `with` block closes."""

from typing import Self

__all__ = ["Closing"]


class Closing:
    """A class with `close`, which the end of a `with` block calls."""

    def close(self) -> None:
        """Gives up what this holds; safe to call again."""
        raise NotImplementedError

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()
