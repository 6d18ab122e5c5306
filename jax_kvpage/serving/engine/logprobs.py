"""Log probabilities that were read back, as callers see them."""

import numpy as np

from jax_kvpage.serving.outputs import Logprob

__all__ = ["logprob_table"]


def logprob_table(
    token: int, count: int, own: np.ndarray, rank: np.ndarray, ids: np.ndarray, values: np.ndarray
) -> tuple[dict[int, Logprob], float]:
    """The log probabilities of a token and of the `count` most likely ones, and its own."""
    table = {
        int(ids[place]): Logprob(float(values[place]), place + 1)
        for place in range(min(count, len(ids)))
    }
    table.setdefault(token, Logprob(float(own), int(rank)))
    return table, float(own)
