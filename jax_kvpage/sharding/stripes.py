"""StripeSharding: how the tokens of each sequence are split over a mesh axis.

A sequence is cut into stripes of a few tokens, which are assigned to the devices round-robin, so
that all devices have the same share of every long sequence, and the same work. This is the
interleaving of vLLM's decode context parallelism and of Striped Attention (Brandon et al., arXiv
2311.09431).
"""

import dataclasses
from typing import Any

from jax_kvpage._values import raise_all
from jax_kvpage.sharding.over_axis import AxisSharding, mesh_problems
from jax_kvpage.spec import CacheSpec

__all__ = ["STRIPE_TOKENS", "StripeSharding"]

# Divides every block_tokens. Short stripes also distribute short sequences.
STRIPE_TOKENS = 16


@dataclasses.dataclass(frozen=True)
class StripeSharding(AxisSharding):
    """A cache whose sequences are split over devices, with all heads on each.

    The token at position p belongs to device p // stripe_tokens % size. A device stores its tokens
    of a sequence contiguously, at local positions.

    Attributes:
        stripe_tokens: consecutive tokens on one device.
    """

    axis: str
    stripe_tokens: int = STRIPE_TOKENS

    @classmethod
    def of(cls, spec: CacheSpec, mesh: Any, axis: Any) -> "StripeSharding":
        """Returns the sharding of an unresolved spec; its `local` is not resolved either.

        Raises:
            ValueError: a mesh, axis or max_seq_len cannot be used; lists all reasons.
        """
        reasons = mesh_problems(mesh, sequence_axis=axis)
        devices = int(mesh.shape[axis])
        unit, tokens = devices * STRIPE_TOKENS, spec.max_seq_len
        if tokens % unit:
            below, above = tokens // unit * unit, -(-tokens // unit) * unit
            nearest = f"{below} or {above}" if below else str(above)
            reasons.append(
                f"max_seq_len={tokens}: wanted a multiple of {unit}, a stripe of {STRIPE_TOKENS} "
                f"tokens for each of the {devices} devices: the nearest is {nearest}"
            )
        processes = {device.process_index for device in mesh.devices.flat}
        if len(processes) > 1:
            reasons.append(
                f"mesh: its devices belong to {len(processes)} processes, but sequences can be "
                "spread over the devices of one process only so far"
            )
        raise_all("KVPool", reasons)
        local = dataclasses.replace(spec, max_seq_len=tokens // devices, granule=None)
        return cls(mesh, axis, local)

    def tokens_on(self, device: Any, tokens: Any) -> Any:
        """Number of a sequence's first `tokens` tokens on a device; takes integers or arrays."""
        rounds, rest = divmod(tokens, self.stripe_tokens * self.size)
        last = rest - device * self.stripe_tokens
        if isinstance(last, int):
            return rounds * self.stripe_tokens + min(max(last, 0), self.stripe_tokens)
        return rounds * self.stripe_tokens + last.clip(0, self.stripe_tokens)

    def position(self, device: Any, index: Any) -> Any:
        """Position in the sequence of a device's token `index`; takes integers or arrays."""
        rounds, rest = divmod(index, self.stripe_tokens)
        return (rounds * self.size + device) * self.stripe_tokens + rest

    def in_order(self, array: Any) -> Any:
        """Reorders [S, size * n, ...] from device by device to position order."""
        sequences, tokens, *rest = array.shape
        parts = array.reshape(sequences, self.size, -1, self.stripe_tokens, *rest)
        return parts.swapaxes(1, 2).reshape(sequences, tokens, *rest)

    def share(self, tokens: int) -> int:
        """The most tokens of a sequence of `tokens` on one device, which is the first."""
        return int(self.tokens_on(0, tokens))
