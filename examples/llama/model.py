"""Llama and similar families (families.py) in Flax nnx, with attention as a parameter.

The layers do not depend on how keys and values are stored: each calls
`attend(q, k, v, state, layer)` and passes on the state that it returns. Serving passes the paged
cache as the state (`Llama.__call__`), so that prefill, chunked prefill and decode are the same code
on a ragged batch; training passes no state (`Llama.dense`).

The arithmetic follows transformers: rotary embeddings that pair dimension i with i + D/2, norms and
logits in float32.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

import jax_kvpage

from .config import LlamaConfig
from .linear import Linear, normal, product

__all__ = ["Attend", "Llama", "dense_causal_attention", "rotate"]

# cos and sin of the angles, float32 [T, 1, D / 2]
Rotation = tuple[jax.Array, jax.Array]

# (q [..., T, Hq, D], k and v [..., T, Hkv, D], state, layer) -> (out [..., T, Hq, D], state)
Attend = Callable[[jax.Array, jax.Array, jax.Array, Any, int], tuple[jax.Array, Any]]


class RMSNorm(nnx.Module):
    """Root mean square norm over the last axis, computed in float32."""

    def __init__(self, size: int, eps: float, dtype: jnp.dtype) -> None:
        self.scale = nnx.Param(jnp.ones(size, dtype))
        self.eps = eps

    def __call__(self, x: jax.Array) -> jax.Array:
        wide = x.astype(jnp.float32)
        wide = wide * jax.lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + self.eps)
        # Equal ranks, for `jax.numpy_rank_promotion("raise")`; also for the angles below.
        return wide.astype(x.dtype) * jnp.expand_dims(self.scale[...], tuple(range(x.ndim - 1)))


class Attention(nnx.Module):
    """Grouped-query attention: projections, norms of queries and keys (Qwen3) and rotary embedding
    around an `Attend` function.
    """

    def __init__(
        self,
        config: LlamaConfig,
        layer: int,
        dtype: jnp.dtype,
        rngs: nnx.Rngs | None,
        std_out: float,
    ) -> None:
        heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
        size, dim, bias = config.hidden_size, config.head_dim, config.attention_bias
        self.head_dim = dim
        self.rotates = config.rotates(layer)
        parts = (heads * dim, kv_heads * dim, kv_heads * dim)
        self.qkv_proj = Linear(size, parts, bias, dtype, rngs, 0.02)
        output_bias = bias and config.family.output_bias
        self.o_proj = Linear(heads * dim, (size,), output_bias, dtype, rngs, std_out)
        norms = config.family.qk_norm
        self.q_norm = nnx.data(RMSNorm(dim, config.rms_norm_eps, dtype) if norms else None)
        self.k_norm = nnx.data(RMSNorm(dim, config.rms_norm_eps, dtype) if norms else None)

    def __call__(
        self, x: jax.Array, rotation: Rotation, attend: Attend, state: Any, layer: int
    ) -> tuple[jax.Array, Any]:
        shape = (*x.shape[:-1], -1, self.head_dim)
        q, k, v = (part.reshape(shape) for part in self.qkv_proj(x))
        if self.q_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        if self.rotates:
            q, k = rotate(q, rotation), rotate(k, rotation)
        out, state = attend(q, k, v, state, layer)
        (out,) = self.o_proj(out.reshape(*x.shape[:-1], -1))
        return out, state


class MLP(nnx.Module):
    """The gated feed-forward network: down(silu(gate(x)) * up(x))."""

    def __init__(
        self, config: LlamaConfig, dtype: jnp.dtype, rngs: nnx.Rngs | None, std_out: float
    ) -> None:
        size, inner, bias = config.hidden_size, config.intermediate_size, config.mlp_bias
        self.gate_up_proj = Linear(size, (inner, inner), bias, dtype, rngs, 0.02)
        self.down_proj = Linear(inner, (size,), bias, dtype, rngs, std_out)

    def __call__(self, x: jax.Array) -> jax.Array:
        gate, up = self.gate_up_proj(x)
        (out,) = self.down_proj(jax.nn.silu(gate) * up)
        return out


class Layer(nnx.Module):
    """One transformer layer. Attributes have the checkpoint's names, except for fused projections
    (`qkv_proj`, `gate_up_proj`).
    """

    def __init__(
        self, config: LlamaConfig, layer: int, dtype: jnp.dtype, rngs: nnx.Rngs | None
    ) -> None:
        # GPT-2's initialization: weights of projections that write to the residual stream are
        # smaller in deeper models.
        std_out = 0.02 / (2 * config.num_hidden_layers) ** 0.5
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps, dtype)
        self.self_attn = Attention(config, layer, dtype, rngs, std_out)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps, dtype)
        self.mlp = MLP(config, dtype, rngs, std_out)

    def __call__(
        self, x: jax.Array, rotation: Rotation, attend: Attend, state: Any, layer: int
    ) -> tuple[jax.Array, Any]:
        out, state = self.self_attn(self.input_layernorm(x), rotation, attend, state, layer)
        x = x + out
        return x + self.mlp(self.post_attention_layernorm(x)), state


class Llama(nnx.Module):
    """A Llama language model.

    Args:
      config: The model's configuration.
      dtype: Type of the weights and of the arithmetic between norms.
      rngs: Source of the random weights; None gives zeros. Under `nnx.eval_shape` none are created.
    """

    def __init__(
        self, config: LlamaConfig, *, dtype: jnp.dtype = jnp.float32, rngs: nnx.Rngs | None
    ) -> None:
        self.config = config
        shape = (config.vocab_size, config.hidden_size)
        self.embed_tokens = nnx.Param(normal(shape, 0.02, dtype, rngs))
        self.layers = nnx.List(
            [Layer(config, index, dtype, rngs) for index in range(config.num_hidden_layers)]
        )
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps, dtype)
        head = None
        if not config.tie_word_embeddings:
            head = nnx.Param(normal(shape, 0.02, dtype, rngs))
        self.lm_head = nnx.data(head)

    def __call__(
        self,
        tokens: jax.Array,
        cache: jax_kvpage.KVCache,
        batch: jax_kvpage.Batch,
        *,
        rows: jax.Array | None = None,
        implementation: str | None = None,
    ) -> tuple[jax.Array, jax_kvpage.KVCache]:
        """Runs a ragged batch of new tokens with the paged cache.

        The caller advances the cache, so that a step can be repeated or measured.

        Args:
          tokens: int32 `[T]`, the new tokens of all sequences, as described by `batch`.
          cache: The cache before these tokens, with room mapped for them.
          batch: Which slot owns which tokens.
          rows: int32 `[n]`, the tokens whose logits to compute (None: all T). For a prompt, usually
            only the last token's logits are needed.
          implementation: As for `jax_kvpage.update_and_attend`.

        Returns:
          Logits, float32 `[n, vocab]`, and the cache with the tokens' keys and values.
        """

        def attend(
            q: jax.Array, k: jax.Array, v: jax.Array, cache: jax_kvpage.KVCache, layer: int
        ) -> tuple[jax.Array, jax_kvpage.KVCache]:
            return jax_kvpage.update_and_attend(
                q,
                k,
                v,
                cache,
                batch,
                layer=layer,
                sliding_window=self.config.window(layer),
                implementation=implementation,
            )

        positions = jax_kvpage.positions(cache, batch, num_tokens=tokens.shape[0])
        dynamic = self.config.rope.kind == "dynamic"
        lengths = _lengths_after(positions, batch) if dynamic else None
        x, cache = self._hidden(tokens, positions, lengths, attend, cache)
        return self.logits(x if rows is None else x[rows]), cache

    def dense(self, tokens: jax.Array) -> jax.Array:
        """Logits, float32 `[..., T, vocab]`, of complete sequences `[..., T]` without a cache, for
        training.
        """

        def attend(
            q: jax.Array, k: jax.Array, v: jax.Array, state: None, layer: int
        ) -> tuple[jax.Array, None]:
            return dense_causal_attention(q, k, v, state, layer, window=self.config.window(layer))

        positions = jnp.arange(tokens.shape[-1], dtype=jnp.int32)
        lengths = jnp.full_like(positions, tokens.shape[-1])
        x, _ = self._hidden(tokens, positions, lengths, attend, None)
        return self.logits(x)

    def _hidden(
        self,
        tokens: jax.Array,
        positions: jax.Array,
        lengths: jax.Array | None,
        attend: Attend,
        state: Any,
    ) -> tuple[jax.Array, Any]:
        rope = self.config.rope
        angles = rope.angles(positions, lengths, self.config.head_dim)
        rotation = jnp.cos(angles), jnp.sin(angles)
        if rope.attention_factor != 1.0:
            rotation = tuple(part * rope.attention_factor for part in rotation)
        x = self.embed_tokens[...][tokens]
        for index, layer in enumerate(self.layers):
            x, state = layer(x, rotation, attend, state, index)
        return self.norm(x), state

    def logits(self, x: jax.Array) -> jax.Array:
        """Logits, float32 `[..., vocab]`, of the last layer's output after its norm, `[...,
        hidden]`.
        """
        head = self.embed_tokens if self.lm_head is None else self.lm_head
        return product(x, head[...], jnp.float32)


def rotate(x: jax.Array, rotation: Rotation) -> jax.Array:
    """Applies rotary embedding to x `[..., T, H, D]`; dimension i is paired with i + D / 2."""
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    cos, sin = rotation
    turned = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return turned.astype(x.dtype)


def _lengths_after(positions: jax.Array, batch: jax_kvpage.Batch) -> jax.Array:
    """The length of each token's sequence after this batch, int32 `[T]`."""
    # Not batch.last_rows, which has several rows per sequence when guesses are verified.
    after = positions[jnp.maximum(batch.query_offsets[1:] - 1, 0)] + 1
    rows = jnp.arange(positions.shape[0], dtype=jnp.int32)
    owner = jnp.searchsorted(batch.query_offsets[1:], rows, side="right")
    return after[jnp.minimum(owner, after.shape[0] - 1)]  # padding has no owner


def dense_causal_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    state: None,
    layer: int,
    *,
    window: int | None = None,
) -> tuple[jax.Array, None]:
    """Causal attention over complete sequences in plain, differentiable jnp: an `Attend` without
    state. With `window`, a token attends to itself and the `window` - 1 tokens before it.
    """
    del layer
    *lead, tokens, heads, dim = q.shape
    kv_heads = k.shape[-2]
    # Heads first, with the query heads of a group as rows, gives two matrix products for each KV
    # head.
    q = jnp.moveaxis(q * dim**-0.5, -2, -3).reshape(*lead, kv_heads, -1, dim)
    k, v = jnp.moveaxis(k, -2, -3), jnp.moveaxis(v, -2, -3)
    scores = jnp.einsum("...qd,...sd->...qs", q, k, preferred_element_type=jnp.float32)
    scores = scores.reshape(*lead, heads, tokens, tokens)
    causal = jnp.tril(jnp.ones((tokens, tokens), bool))
    if window is not None:
        causal &= ~jnp.tril(causal, -window)
    weights = jax.nn.softmax(jnp.where(causal, scores, -jnp.inf), axis=-1).astype(v.dtype)
    out = jnp.einsum("...qs,...sd->...qd", weights.reshape(*lead, kv_heads, -1, tokens), v)
    return jnp.moveaxis(out.reshape(*lead, heads, tokens, dim), -3, -2), state
