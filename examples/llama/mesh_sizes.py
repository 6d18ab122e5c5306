"""The sizes of a mesh on the command line. This module does not import JAX."""

import argparse
import dataclasses

__all__ = ["MeshSizes"]

_WANTED = "must be tp=N, dp=N or dp=N,tp=N"


@dataclasses.dataclass(frozen=True)
class MeshSizes:
    """How many devices share a model, and how many replicas of it there are.

    Attributes:
      tp: Devices per replica.
      dp: Replicas.
    """

    tp: int = 1
    dp: int = 1

    def __str__(self) -> str:
        sizes = {"dp": self.dp, "tp": self.tp}
        return ",".join(f"{axis}={size}" for axis, size in sizes.items() if size > 1) or "tp=1"

    @property
    def devices(self) -> int:
        """The total number of devices."""
        return self.tp * self.dp

    @classmethod
    def parse(cls, text: str) -> "MeshSizes":
        """Parses "dp=N,tp=N"; an argparse type."""
        sizes: dict[str, int] = {}
        for part in text.split(","):
            axis, _, size = part.partition("=")
            if (
                axis not in ("tp", "dp")
                or axis in sizes
                or not size.strip().lstrip("-").isdecimal()
            ):
                raise argparse.ArgumentTypeError(f"{_WANTED}, got {text!r}")
            sizes[axis] = int(size)
            if sizes[axis] < 1:
                raise argparse.ArgumentTypeError(f"{axis} must be 1 or more, got {sizes[axis]}")
        return cls(**sizes)
