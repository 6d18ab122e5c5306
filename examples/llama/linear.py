"""Projections of the example's model: projections of the same input are fused into one product.

Weights are `[outputs, inputs]`, as in checkpoints, so that loading is a plain read and the
embedding can be used as a tied head without a copy. A fused weight is the concatenation of the rows
of its parts.
"""

import itertools
import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import nnx

__all__ = ["Linear", "normal", "product"]

# On CPU, the weight is the left operand of products with up to this many tokens.
_FEW_TOKENS = 64


class Linear(nnx.Module):
    """Linear maps of the same input, computed as one product.

    Args:
      inputs: Size of the input.
      parts: Size of each map's output.
      bias: Whether the maps have a bias, initially zero.
      dtype: Type of the weights and the product.
      rngs: Source of the random weights (see `normal`), drawn for each part as
        `[inputs, outputs]` like in Flax's own layer, so that a seed gives both the same weights.
      std: Standard deviation of the weights.

    Attributes:
      parts: See above; if the weights are split over a mesh (mesh.py), the sizes on one device.
      summed_over: The mesh axis whose devices each have some columns of the weight, or None.
    """

    def __init__(
        self,
        inputs: int,
        parts: Sequence[int],
        bias: bool,
        dtype: jnp.dtype,
        rngs: nnx.Rngs | None,
        std: float,
    ) -> None:
        self.parts = tuple(parts)
        self.summed_over: str | None = None
        drawn = [normal((inputs, outputs), std, dtype, rngs).T for outputs in parts]
        self.weight = nnx.Param(jnp.concatenate(drawn))
        self.bias = nnx.data(nnx.Param(jnp.zeros(sum(parts), dtype)) if bias else None)

    def __call__(self, x: jax.Array) -> list[jax.Array]:
        """The output of each map, `[..., outputs]`, for x `[..., inputs]`."""
        out = product(x, self.weight[...], x.dtype)
        if self.summed_over is not None:
            out = jax.lax.psum(out, self.summed_over)
        if self.bias is not None:
            out += jnp.expand_dims(self.bias[...], tuple(range(x.ndim - 1)))
        ends = itertools.accumulate(self.parts[:-1])
        return jnp.split(out, list(ends), axis=-1)


def normal(
    shape: tuple[int, ...], std: float, dtype: jnp.dtype, rngs: nnx.Rngs | None
) -> jax.Array:
    """Normally distributed weights; zeros without `rngs`, because tracing random numbers only to
    know their shapes takes as long as reading 200 MB of weights.
    """
    if rngs is None:
        return jnp.zeros(shape, dtype)
    return nnx.initializers.normal(std)(rngs.params(), shape, dtype)


def product(x: jax.Array, weight: jax.Array, dtype: jnp.dtype) -> jax.Array:
    """`x @ weight.T`, in `dtype`, for x `[..., inputs]` and weight `[outputs, inputs]`."""

    def plain(x: jax.Array, weight: jax.Array) -> jax.Array:
        return jnp.einsum("...d,vd->...v", x, weight, preferred_element_type=dtype)

    def weight_first(x: jax.Array, weight: jax.Array) -> jax.Array:
        rows = x.reshape(-1, x.shape[-1])
        out = jnp.einsum("vd,td->vt", weight, rows, preferred_element_type=dtype)
        # Without the barrier, XLA swaps the operands back.
        return jax.lax.optimization_barrier(out).T.reshape(*x.shape[:-1], -1)

    if math.prod(x.shape[:-1]) > _FEW_TOKENS:
        return plain(x, weight)
    # Measured on CPU with 8 tokens in float32: with the weight as the right operand the products of
    # a small model take 1.0 to 2.1 times as long. With 512 tokens the order makes no difference in
    # float32, and in bfloat16 the weight on the left is slower.
    return jax.lax.platform_dependent(x, weight, cpu=weight_first, default=plain)
