"""Sampling on the device, with separate parameters for each sequence.

All parameters are arrays, so that one program serves any mixture of them. Costly parts (sorting the
vocabulary, counting previous tokens) run only in steps in which a sequence needs them. Rows are
independent: the random numbers of a row depend only on the seed, the index of the continuation and
the position.
"""

import dataclasses

import jax
import jax.numpy as jnp

__all__ = [
    "NUM_FLOATS",
    "NUM_INTS",
    "RowParams",
    "Sampled",
    "SamplerState",
    "log_probabilities",
    "remember",
    "sample",
]

# Compiled programs may flush subnormal numbers to zero, and may divide by multiplying with the
# reciprocal, so both numbers must be normal. At the upper end, all finite logits are equal anyway.
_SMALLEST_TEMPERATURE = float(jnp.finfo(jnp.float32).tiny)
_LARGEST_TEMPERATURE = 2.0**126

_SEGMENT = 128  # tokens of a row that _argmax reduces together

NUM_FLOATS = 6
NUM_INTS = 6


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class SamplerState:
    """Device state between steps, indexed by scheduler row.

    Attributes:
        last: int32[rows]: the newest token.
        history: int32[rows, max_seq_len]: previous tokens of sequences with penalties.
    """

    last: jax.Array
    history: jax.Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class RowParams:
    """Sampling parameters of the sequences of a step.

    Attributes:
        floats: float32[NUM_FLOATS, S]: temperature, top_p, min_p, presence, frequency and
            repetition penalty.
        ints: int32[NUM_INTS, S]: top_k, seed, index, prompt tokens, position at which stop tokens
            are allowed, whether log probabilities are wanted.
        banned: int32[K, S]: tokens not allowed before that position, -1 for none.
        rows: int32[S]: scheduler row; out of range for padding.
        positions: int32[S]: the position that the new token will have.
        masks: int32[S, W + 1]: bits of the allowed tokens in the first W words; the last word is 0
            if the mask applies. None if no program of the engine uses masks.
    """

    floats: jax.Array
    ints: jax.Array
    banned: jax.Array
    rows: jax.Array
    positions: jax.Array
    masks: jax.Array | None = None


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Sampled:
    """Tokens and their log probabilities.

    Attributes:
        tokens: int32[S].
        valid: bool[S]: whether the logits contain no NaN. A failed CUDA op leaves NaN.
        details: int32[S, 2 + 2M]: log probabilities if requested; see `log_probabilities`.
    """

    tokens: jax.Array
    valid: jax.Array
    details: jax.Array


def sample(logits: jax.Array, params: RowParams, history: jax.Array, max_logprobs: int) -> Sampled:
    """Samples the next token of each sequence.

    Args:
        logits: float[S, vocabulary].
        params: parameters of the sequences.
        history: history from `SamplerState`, used for penalties.
        max_logprobs: M, a static value.
    """
    raw = logits.astype(jnp.float32)
    temperature, top_p, min_p, presence, frequency, repetition = params.floats
    top_k, seed, index, _, allowed, wanted = params.ints
    penalized = (presence != 0) | (frequency != 0) | (repetition != 1)
    # Padding has 0 for all parameters, but the neutral value of the repetition penalty is 1.
    penalized &= params.rows < history.shape[0]
    scores = jax.lax.cond(
        jnp.any(penalized), _penalize, lambda scores, params, history: scores, raw, params,
        history,
    )  # fmt: skip
    early = params.positions < allowed
    scores = jax.lax.cond(
        jnp.any(early & (params.banned >= 0).any(axis=0)),
        _ban, lambda scores, banned, early: scores, scores, params.banned, early,
    )  # fmt: skip
    if params.masks is not None:
        scores = jax.lax.cond(
            jnp.any(params.masks[:, -1] == 0),
            _keep_allowed, lambda scores, masks: scores, scores, params.masks,
        )  # fmt: skip
    greedy = _argmax(scores)

    def draw(scores: jax.Array) -> jax.Array:
        scaled = _scale(scores, temperature)
        filtered = jnp.any(((top_k > 0) | (top_p < 1)) & (temperature > 0))
        scaled = jax.lax.cond(
            filtered, _keep_top, lambda scaled, k, p: scaled, scaled, top_k, top_p
        )
        # The largest score is 0; log(0) keeps everything.
        scaled = jnp.where(scaled < jnp.log(min_p)[:, None], -jnp.inf, scaled)
        drawn = jax.vmap(_categorical)(scaled, seed, index, params.positions)
        return jnp.where(temperature > 0, drawn, greedy)

    tokens = jax.lax.cond(jnp.any(temperature > 0), draw, lambda scores: greedy, scores)
    valid = ~jnp.isnan(raw).any(axis=-1)
    details = jax.lax.cond(
        jnp.any(wanted > 0),
        lambda raw, tokens: log_probabilities(raw, tokens, max_logprobs),
        lambda raw, tokens: jnp.zeros((raw.shape[0], 2 + 2 * max_logprobs), jnp.int32),
        raw,
        tokens,
    )
    return Sampled(tokens, valid, details)


def remember(
    state: SamplerState, rows: jax.Array, positions: jax.Array, tokens: jax.Array
) -> SamplerState:
    """Returns the state with new tokens; see `RowParams` for rows and positions."""
    history = state.history.at[rows, positions].set(tokens, mode="drop")
    return SamplerState(state.last.at[rows].set(tokens, mode="drop"), history)


def log_probabilities(raw: jax.Array, tokens: jax.Array, most: int) -> jax.Array:
    """Log probabilities of one token and the most likely ones in each row of logits.

    Args:
        raw: float32[S, vocabulary]: logits.
        tokens: int32[S]: a token of each row.
        most: M, the number of most likely tokens.

    Returns:
        A single array to read back, int32[S, 2 + 2M], with floats as bits: the log probability of
        the token, its rank starting at 1, the most likely tokens, and their log probabilities.
    """
    logprobs = jax.nn.log_softmax(raw, axis=-1)
    chosen = jnp.take_along_axis(logprobs, tokens[:, None], axis=1)
    ranks = 1 + jnp.sum(logprobs > chosen, axis=-1, dtype=jnp.int32)
    values, ids = jax.lax.top_k(logprobs, most)
    own, others = (jax.lax.bitcast_convert_type(each, jnp.int32) for each in (chosen, values))
    return jnp.concatenate([own, ranks[:, None], ids.astype(jnp.int32), others], axis=1)


def _penalize(scores: jax.Array, params: RowParams, history: jax.Array) -> jax.Array:
    """Applies penalties to the scores [S, vocabulary] of tokens that a sequence contains."""
    presence, frequency, repetition = params.floats[3:]
    prompt = params.ints[3]
    ids = history.at[params.rows].get(mode="fill", fill_value=0)
    place = jnp.arange(ids.shape[1])[None]
    known = place < params.positions[:, None]
    produced = known & (place >= prompt[:, None])
    rows = jnp.arange(ids.shape[0])[:, None]
    zeros = jnp.zeros(scores.shape, jnp.int32)
    counts = zeros.at[rows, ids].add(produced.astype(jnp.int32))
    seen = zeros.at[rows, ids].add(known.astype(jnp.int32)) > 0
    factor = jnp.where(seen, repetition[:, None], 1.0)
    scores = jnp.where(scores > 0, scores / factor, scores * factor)
    scores -= frequency[:, None] * counts
    return scores - presence[:, None] * (counts > 0)


def _ban(scores: jax.Array, banned: jax.Array, early: jax.Array) -> jax.Array:
    """Excludes tokens [K, S] from the scores of sequences that are too short to end."""
    ids = jnp.where((banned >= 0) & early[None], banned, scores.shape[1])
    rows = jnp.arange(scores.shape[0])[None]
    return scores.at[rows, ids].set(-jnp.inf, mode="drop")


def _keep_allowed(scores: jax.Array, masks: jax.Array) -> jax.Array:
    """Sets the scores [S, vocabulary] of tokens outside a mask to -inf; see `RowParams`."""
    place = jnp.arange(scores.shape[1])
    word = jnp.minimum(place // 32, masks.shape[1] - 1)  # tokens beyond the mask use its last word
    allowed = (masks[:, word] >> (place % 32)) & 1
    return jnp.where(allowed == 1, scores, -jnp.inf)


def _scale(scores: jax.Array, temperature: jax.Array) -> jax.Array:
    """Divides scores [S, vocabulary] by a temperature, with the maximum of a row shifted to 0.

    The maximum is subtracted first, so that a low temperature drives the others towards -inf and
    keeps the maximum finite.
    """
    top = jnp.max(scores, axis=-1, keepdims=True)
    # An infinite maximum minus itself would be NaN.
    below = jnp.where(scores == top, 0.0, scores - top)
    divisor = jnp.clip(temperature, _SMALLEST_TEMPERATURE, _LARGEST_TEMPERATURE)[:, None]
    cold = temperature[:, None] < _SMALLEST_TEMPERATURE
    return jnp.where(cold, jnp.where(below == 0.0, 0.0, -jnp.inf), below / divisor)


def _keep_top(scores: jax.Array, top_k: jax.Array, top_p: jax.Array) -> jax.Array:
    """Sets scores [S, vocabulary] outside top_k, and then outside top_p, to -inf.

    Ties with the last kept token are kept, and so is always the most likely token.
    """
    ordered = jnp.sort(scores, axis=-1, descending=True)
    place = jnp.arange(scores.shape[1])[None]
    last = jnp.clip(jnp.where(top_k > 0, top_k, scores.shape[1]), 1, scores.shape[1]) - 1
    smallest = jnp.take_along_axis(ordered, last[:, None], axis=1)
    # Ties with the last top_k token are part of the distribution that top_p cuts.
    probabilities = jax.nn.softmax(jnp.where(ordered < smallest, -jnp.inf, ordered), axis=-1)
    before = jnp.cumsum(probabilities, axis=-1) - probabilities
    kept = (before < top_p[:, None]) | (place == 0) | (top_p >= 1)[:, None]
    cut = jnp.min(jnp.where(kept, ordered, jnp.inf), axis=-1, keepdims=True)
    return jnp.where(scores < jnp.maximum(smallest, cut), -jnp.inf, scores)


def _categorical(
    scores: jax.Array, seed: jax.Array, index: jax.Array, position: jax.Array
) -> jax.Array:
    key = jax.random.key(jax.lax.bitcast_convert_type(seed, jnp.uint32))
    key = jax.random.fold_in(jax.random.fold_in(key, index), position)
    # Draws like jax.random.categorical.
    return _argmax((scores + jax.random.gumbel(key, scores.shape, scores.dtype))[None])[0]


def _argmax(scores: jax.Array) -> jax.Array:
    """Like jnp.argmax over [S, vocabulary] without NaN, but 5 to 20 times faster on CPU.

    On CPU, XLA reduces (value, index) pairs one by one, but maxima in vector registers, so this
    first takes the maxima of segments.
    """
    size, width = scores.shape
    count = -(-width // _SEGMENT)
    padding = ((0, 0), (0, count * _SEGMENT - width))
    segments = jnp.pad(scores, padding, constant_values=-jnp.inf).reshape(size, count, _SEGMENT)
    best = jnp.argmax(jnp.max(segments, axis=-1), axis=-1)
    inside = jnp.argmax(jnp.take_along_axis(segments, best[:, None, None], axis=1)[:, 0], axis=-1)
    return (best * _SEGMENT + inside).astype(jnp.int32)
