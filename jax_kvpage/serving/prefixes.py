"""Prefix keys: requests with the same first tokens wait for the first of them."""

from collections.abc import Hashable, Sequence

__all__ = ["PrefixKeys"]

_MOST = 4096  # prefixes remembered


class PrefixKeys:
    """Finds the newest earlier prompt that begins with the same block.

    Args:
        block_tokens: tokens in a block; shorter prefixes do not count.
    """

    def __init__(self, block_tokens: int) -> None:
        self._block_tokens = block_tokens
        self._newest: dict[Hashable, Sequence[int]] = {}

    def find(self, ids: Sequence[int], namespace: str = "") -> tuple[Hashable, int]:
        """Returns values for `Request.prefix_key` and `Request.num_prefix_tokens`.

        Args:
            ids: the prompt.
            namespace: prompts of different namespaces never share a prefix.

        Returns:
            (key, tokens): the number of leading tokens shared with the newest prompt that has the
            same first block, or the whole prompt if there is none; (None, 0) if the prompt is
            shorter than a block.
        """
        size = self._block_tokens
        if len(ids) < size:
            return None, 0
        key = namespace, tuple(ids[:size])
        other = self._newest.pop(key, ())
        common = next(
            (i for i, (a, b) in enumerate(zip(ids, other, strict=False)) if a != b),
            min(len(ids), len(other)),
        )
        if len(self._newest) >= _MOST:
            del self._newest[next(iter(self._newest))]
        self._newest[key] = ids
        return key, common or len(ids)
