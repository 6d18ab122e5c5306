"""StripeSharding: how the tokens of every sequence are spread over an axis of a mesh.

A sequence is cut into stripes of a few tokens, which go to the devices in turn, so that all devices
have the same share of every long sequence, and the same work. This is the interleaving of vLLM's
decode context parallelism and of Striped Attention (Brandon et al., arXiv 2311.09431).
"""

import dataclasses
from typing import Any

from jax_kvpage.sharding.over_axis import AxisSharding, mesh_problems
from jax_kvpage.spec import CacheSpec

__all__ = ["STRIPE_TOKENS", "StripeSharding"]

# A divisor of every block_tokens. Short stripes share out short sequences too.
STRIPE_TOKENS = 16


@dataclasses.dataclass(frozen=True)
class StripeSharding(AxisSharding):
    """A cache whose sequences are spread over devices, all heads on each.

    The token at position p belongs to device p // stripe_tokens % size. A device holds its tokens
    of a sequence one after the other, so they have local positions there.

    Attributes:
        stripe_tokens: neighbouring tokens that one device holds.
    """

    axis: str
    stripe_tokens: int = STRIPE_TOKENS

    @classmethod
    def of(cls, spec: CacheSpec, mesh: Any, axis: Any) -> "StripeSharding":
        """The sharding of an unresolved spec, whose `local` is not resolved either.

        Raises:
            ValueError: a mesh, axis or max_seq_len that cannot be used, with all reasons.
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
        if reasons:
            raise ValueError("\n  - ".join(["KVPool:", *reasons]))
        local = dataclasses.replace(spec, max_seq_len=tokens // devices, granule=None)
        return cls(mesh, axis, local)

    def tokens_on(self, device: Any, tokens: Any) -> Any:
        """How many of a sequence's first tokens a device holds; for integers and arrays."""
        rounds, rest = divmod(tokens, self.stripe_tokens * self.size)
        last = rest - device * self.stripe_tokens
        if isinstance(last, int):
            return rounds * self.stripe_tokens + min(max(last, 0), self.stripe_tokens)
        return rounds * self.stripe_tokens + last.clip(0, self.stripe_tokens)

    def position(self, device: Any, index: Any) -> Any:
        """The position in the sequence of a device's token `index`; for integers and arrays."""
        rounds, rest = divmod(index, self.stripe_tokens)
        return (rounds * self.size + device) * self.stripe_tokens + rest

    def in_order(self, array: Any) -> Any:
        """[S, size * n, ...], the tokens of one device after those of another, by position."""
        sequences, tokens, *rest = array.shape
        parts = array.reshape(sequences, self.size, -1, self.stripe_tokens, *rest)
        return parts.swapaxes(1, 2).reshape(sequences, tokens, *rest)

    def share(self, tokens: int) -> int:
        """The most tokens that a device holds of so many: those of the first one."""
        return int(self.tokens_on(0, tokens))
