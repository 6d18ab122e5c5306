"""Choosing the next token: greedy, temperature, top-k, top-p.

Used by the programs of --scan; `jax_kvpage.serving` has its own sampling, with the same random
numbers. The random key of a token depends only on the seed, the sequence and the position. The text
of a sequence therefore does not depend on the rest of the batch, or on whether steps were repeated,
or the sequence was stalled or restarted.
"""

import dataclasses

import jax
import jax.numpy as jnp

__all__ = ["Sampling", "sample", "seed_of_prompt"]

# Compiled programs may treat subnormal numbers as zero, and may replace a division by a product
# with the reciprocal, so both must be normal. At the upper end all finite logits are equal anyway.
_SMALLEST_TEMPERATURE = float(jnp.finfo(jnp.float32).tiny)
_LARGEST_TEMPERATURE = 2.0**126


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How to choose tokens. Static in compiled programs.

    Attributes:
      temperature: 0 takes the most likely token, the first one if there are several; otherwise
        logits are divided by it. Below the smallest normal float32 (1.2e-38), one of the most
        likely tokens is chosen at random; there is rarely more than one.
      top_k: Sample from the k most likely tokens; 0 for all.
      top_p: Sample from the smallest set of most likely tokens whose probabilities reach p; 1 for
        all. The most likely token is always included.
      seed: Seed of the random numbers.
      num_samples: Number of sequences for each prompt: sequence ids count the samples of the first
        prompt, then those of the second, and so on.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0
    num_samples: int = 1

    def __post_init__(self) -> None:
        if not 0.0 <= self.temperature < float("inf"):
            raise ValueError(f"temperature must be 0 (greedy) or more, got {self.temperature}")
        if self.top_k < 0:
            raise ValueError(f"top_k must be 0 (all) or more, got {self.top_k}")
        if not 0.0 < self.top_p <= 1.0:
            raise ValueError(f"top_p must be above 0 and at most 1, got {self.top_p}")
        if not 0 <= self.seed < 2**32:
            raise ValueError(f"seed must be from 0 to 2**32 - 1, got {self.seed}")

    def seed_of(self, sequence: int) -> int:
        """The seed for a sequence's prompt in `jax_kvpage.serving.SamplingParams`."""
        return seed_of_prompt(self.seed, sequence // self.num_samples)


def seed_of_prompt(seed: int, number: int) -> int:
    """The seed of one of several prompts, from that of the run."""
    return (seed + number) % 2**32


def sample(
    logits: jax.Array, sequence_ids: jax.Array, positions: jax.Array, sampling: Sampling
) -> jax.Array:
    """Chooses the next token of each sequence.

    Args:
      logits: float32 `[n, vocab]`.
      sequence_ids: int32 `[n]`, unique for each request of the run.
      positions: int32 `[n]`, the position of the new token.
      sampling: How to choose.

    Returns:
      int32 `[n]`.
    """
    if sampling.temperature == 0.0:
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)
    logits = _scale(logits, sampling.temperature)
    logits = _keep_top_p(_keep_top_k(logits, sampling.top_k), sampling.top_p)

    def draw(row: jax.Array, sequence: jax.Array, position: jax.Array) -> jax.Array:
        # As in `jax_kvpage.serving`: a seed for each prompt, then the number of the sample.
        prompt, number = jnp.divmod(sequence, jnp.int32(sampling.num_samples))
        key = jax.random.key(jnp.uint32(sampling.seed) + prompt.astype(jnp.uint32))
        key = jax.random.fold_in(jax.random.fold_in(key, number), position)
        return jax.random.categorical(key, row)

    return jax.vmap(draw)(logits, sequence_ids, positions).astype(jnp.int32)


def _scale(logits: jax.Array, temperature: float) -> jax.Array:
    """Divides logits `[n, vocab]` by a temperature above 0, with the maximum of each row at 0.

    Subtracting the maximum first keeps the largest logit finite at low temperatures, while the
    others go to -inf; it does not change the result of sampling.
    """
    top = jnp.max(logits, axis=-1, keepdims=True)
    # An infinite maximum minus itself would be NaN.
    below = jnp.where(logits == top, 0.0, logits - top)
    if temperature < _SMALLEST_TEMPERATURE:
        return jnp.where(below == 0.0, 0.0, -jnp.inf)
    return below / min(temperature, _LARGEST_TEMPERATURE)


def _keep_top_k(logits: jax.Array, k: int) -> jax.Array:
    """Sets all logits `[n, vocab]` but the k largest to -inf; ties with the k-th are kept."""
    if k == 0 or k >= logits.shape[-1]:
        return logits
    smallest = jax.lax.top_k(logits, k)[0][:, -1:]
    return jnp.where(logits < smallest, -jnp.inf, logits)


def _keep_top_p(logits: jax.Array, p: float) -> jax.Array:
    """Sets logits `[n, vocab]` outside the smallest set of mass p to -inf; always keeps the largest
    one.
    """
    if p >= 1.0:
        return logits
    ordered = jnp.sort(logits, axis=-1, descending=True)
    probabilities = jax.nn.softmax(ordered, axis=-1)
    before = jnp.cumsum(probabilities, axis=-1) - probabilities
    # Set explicitly for the first, where `0 < p` may be false: a subnormal p may become zero.
    kept = (before < p).at[:, 0].set(True)
    smallest = jnp.min(jnp.where(kept, ordered, jnp.inf), axis=-1, keepdims=True)
    return jnp.where(logits < smallest, -jnp.inf, logits)
