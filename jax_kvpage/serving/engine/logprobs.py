"""Converts log probabilities that were read back."""

import numpy as np

from jax_kvpage.serving.outputs import Logprob

__all__ = ["logprob_table"]


def logprob_table(token: int, count: int, details: np.ndarray) -> tuple[dict[int, Logprob], float]:
    """Returns the log probabilities of a token and of the `count` most likely ones, and its own.

    Args:
        token: token id.
        count: number of most likely tokens.
        details: int32[2 + 2M]: details of the token; see `log_probabilities`.
    """
    most = len(details) // 2 - 1
    ids, values = details[2 : 2 + most].tolist(), details[2 + most :].view(np.float32).tolist()
    table = {ids[place]: Logprob(values[place], place + 1) for place in range(min(count, most))}
    own, rank = float(details[:1].view(np.float32)[0]), int(details[1])
    table.setdefault(token, Logprob(own, rank))
    return table, own
