"""Sampling: which tokens may be chosen, how often, and that a token depends only on seed, sequence
and position.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from llama.sampling import Sampling, sample

_DRAWS = 4000


@functools.partial(jax.jit, static_argnums=3)
def _sample(logits: jax.Array, ids: jax.Array, positions: jax.Array, how: Sampling) -> jax.Array:
    return sample(logits, ids, positions, how)


def _draws(logits: list[float], how: Sampling) -> np.ndarray:
    """Returns how often each token of one row of logits is drawn over many positions."""
    rows = jnp.tile(jnp.asarray(logits, jnp.float32), (_DRAWS, 1))
    chosen = _sample(rows, jnp.zeros(_DRAWS, jnp.int32), jnp.arange(_DRAWS), how)
    return np.bincount(np.asarray(chosen), minlength=len(logits)) / _DRAWS


def test_greedy_takes_the_largest() -> None:
    logits = jax.random.normal(jax.random.key(0), (5, 33))
    chosen = _sample(logits, jnp.arange(5), jnp.arange(5), Sampling())
    np.testing.assert_array_equal(chosen, jnp.argmax(logits, -1))
    assert chosen.dtype == jnp.int32


def test_draws_follow_the_softmax_at_the_temperature() -> None:
    logits = [2.0, 1.0, 0.0, -1.0]
    for temperature in (0.5, 1.0, 2.0):
        expected = jax.nn.softmax(jnp.asarray(logits) / temperature)
        found = _draws(logits, Sampling(temperature, seed=1))
        np.testing.assert_allclose(found, expected, atol=0.03)


def test_top_k_keeps_k_tokens() -> None:
    found = _draws([0.0, 0.3, 0.1, 0.2], Sampling(1.0, top_k=2))
    assert found[0] == found[2] == 0
    assert found[1] > 0.4
    assert found[3] > 0.4
    assert np.all(_draws([0.0, 0.3, 0.1, 0.2], Sampling(1.0, top_k=9)) > 0)


def test_top_p_keeps_the_smallest_set_that_reaches_p() -> None:
    logits = np.log([0.5, 0.3, 0.15, 0.05]).tolist()
    for p, kept in ((0.4, 1), (0.6, 2), (0.81, 3), (0.96, 4), (1e-6, 1)):
        found = _draws(logits, Sampling(1.0, top_p=p))
        assert np.flatnonzero(found).tolist() == list(range(kept)), p


def _drawn(rows: list[list[float]], how: Sampling) -> list[np.ndarray]:
    """Returns `_draws` of several rows of logits, with one compiled program."""
    count = 1000
    logits = jnp.repeat(jnp.asarray(rows, jnp.float32), count, axis=0)
    chosen = _sample(
        logits, jnp.zeros(len(logits), jnp.int32), jnp.arange(len(logits)) % count, how
    )
    return [
        np.bincount(part, minlength=len(rows[0])) / count
        for part in np.split(np.asarray(chosen), len(rows))
    ]


# Regression: token 0 was drawn whenever logits / temperature overflowed, or p was below every
# probability.
@pytest.mark.parametrize("temperature", [5e-324, 1e-45, 1e-40, 1.1e-38, 1.2e-38, 1e-30])
def test_a_low_temperature_takes_the_most_likely(temperature: float) -> None:
    rows = [[-3.0, 0.5, 1.0, 0.9], [-2e38, 0.0, 1e38, 0.0], [-9.0, -8.5, -8.0, -8.0001]]
    for found in _drawn(rows, Sampling(temperature, seed=2)):
        assert found.tolist() == [0, 0, 1, 0]


@pytest.mark.parametrize("temperature", [1e30, 3e38, 1e39, 1e308])
def test_a_high_temperature_takes_any(temperature: float) -> None:
    (found,) = _drawn([[-30.0, 0.5, 100.0, -np.inf]], Sampling(temperature, seed=2))
    np.testing.assert_allclose(found, [1 / 3, 1 / 3, 1 / 3, 0], atol=0.06)


@pytest.mark.parametrize("temperature", [5e-324, 1e-40, 1e-30])
def test_equals_are_drawn_alike_however_cold(temperature: float) -> None:
    rows = [[0.0, 2.0, -np.inf, 2.0], [-np.inf, np.inf, 1e38, np.inf]]
    for found in _drawn(rows, Sampling(temperature, top_p=0.99)):
        np.testing.assert_allclose(found, [0, 0.5, 0, 0.5], atol=0.06)


@pytest.mark.parametrize(
    ("p", "temperature", "top_k"),
    [(5e-324, 0.7, 0), (1e-45, 1.0, 3), (1e-40, 1e-40, 0), (1.2e-38, 1.0, 0), (1e-30, 5e-324, 3)],
)
def test_any_top_p_keeps_the_most_likely(p: float, temperature: float, top_k: int) -> None:
    first, second = _drawn(
        [[0.1, 0.2, 0.7, 0.3], [0.0, 2.0, 1.0, 2.0]], Sampling(temperature, top_k, p)
    )
    assert first.tolist() == [0, 0, 1, 0]
    assert np.flatnonzero(second).tolist() == [1, 3]  # tokens tied with the last one kept stay


def test_top_k_is_applied_before_top_p() -> None:
    logits = np.log([0.4, 0.3, 0.2, 0.1]).tolist()
    # Of the first two, the larger has 0.57 of the mass.
    assert np.flatnonzero(_draws(logits, Sampling(1.0, top_k=2, top_p=0.55))).tolist() == [0]


def test_a_token_depends_on_its_sequence_and_position_alone() -> None:
    how = Sampling(1.0, seed=3)
    logits = jax.random.normal(jax.random.key(1), (8, 64))
    ids, positions = jnp.arange(8) % 3, 10 + jnp.arange(8)
    together = np.asarray(_sample(logits, ids, positions, how))
    order = np.random.default_rng(0).permutation(8)
    shuffled = _sample(logits[order], ids[order], positions[order], how)
    np.testing.assert_array_equal(shuffled, together[order])
    for row in range(8):
        part = slice(row, row + 1)
        assert _sample(logits[part], ids[part], positions[part], how)[0] == together[row]


def test_seed_sequence_and_position_all_matter() -> None:
    rows = jnp.zeros((64, 1000))
    zero, count = jnp.zeros(64, jnp.int32), jnp.arange(64)
    first = np.asarray(_sample(rows, zero, count, Sampling(1.0)))
    assert len(set(first.tolist())) > 50
    assert len(set(np.asarray(_sample(rows, count, zero, Sampling(1.0))).tolist())) > 50
    assert np.mean(first == np.asarray(_sample(rows, zero, count, Sampling(1.0, seed=1)))) < 0.1
    assert np.mean(first == np.asarray(_sample(rows, zero + 1, count, Sampling(1.0)))) < 0.1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"temperature": -0.1}, "temperature must be 0 .* got -0.1"),
        ({"temperature": float("nan")}, "temperature must be 0"),
        ({"temperature": float("inf")}, "temperature must be 0"),
        ({"top_k": -1}, "top_k must be 0 .* got -1"),
        ({"top_p": 0.0}, "top_p must be above 0 .* got 0.0"),
        ({"top_p": 1.5}, "top_p must be above 0 .* got 1.5"),
        ({"seed": -1}, "seed must be from 0 .* got -1"),
    ],
)
def test_settings_that_mean_nothing(arguments: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Sampling(**arguments)
