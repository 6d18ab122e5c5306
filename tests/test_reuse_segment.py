"""reuse_segment: segments that are copied to other positions, with their keys rotated."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from harness import Rig
from mistakes import fails
from numpy.typing import NDArray
from sharing_rig import filled, pool_of, spec_of

import jax_kvpage as kvp
from jax_kvpage.ops.copy_rotated import copy_rotated

_DIM, _LAYERS = 64, 2
_FREQUENCIES = (1e4 ** (-np.arange(_DIM // 2) / (_DIM // 2))).astype(np.float32)
_DTYPES = [jnp.float32, jnp.bfloat16, jnp.float16, jnp.int8, jnp.float8_e4m3fn]


def _reuse(rig: Rig, *copy: Any, inv_freq: Any = _FREQUENCIES, **options: Any) -> None:
    rig.cache = rig.pool.reuse_segment(rig.cache, *copy, inv_freq=inv_freq, **options)


def _read(rig: Rig, slot: int) -> NDArray[Any]:
    """Returns a slot's keys and values, [2, layers, tokens, heads, dim], with their exact bits."""
    length = int(rig.cache.lengths[slot])
    layers = [kvp.read_kv(rig.cache, slot, layer) for layer in range(_LAYERS)]
    return np.stack([np.stack([x[i][0, :length] for x in layers]) for i in range(2)])


def _rotated(
    keys: NDArray[Any], angles: NDArray[np.float64], interleaved: bool = False
) -> NDArray[np.float64]:
    """Rotates keys [..., D] by angles [..., pairs], in float64."""
    pairs = angles.shape[-1]
    out = np.asarray(keys, np.float64).copy()
    first, second = slice(0, pairs), slice(pairs, 2 * pairs)
    if interleaved:
        first, second = slice(0, 2 * pairs, 2), slice(1, 2 * pairs, 2)
    x, y = out[..., first].copy(), out[..., second].copy()
    out[..., first] = x * np.cos(angles) - y * np.sin(angles)
    out[..., second] = y * np.cos(angles) + x * np.sin(angles)
    return out


def _error_bound(want: NDArray[np.float64], dtype: object) -> NDArray[np.float64]:
    """Returns the error bound of each element of rows that were rounded to the storage dtype
    once.
    """
    if dtype in (jnp.int8, jnp.float8_e4m3fn):
        top = np.abs(want).max(axis=-1, keepdims=True)
        if dtype == jnp.int8:
            return np.broadcast_to(1.001 * top / 254, want.shape)
        return 1.001 * np.maximum(np.abs(want) / 16, top / 448 / 1024) + 1e-6
    digits = {jnp.float32: 22, jnp.bfloat16: 8, jnp.float16: 11}[dtype]
    return np.abs(want) * 2.0**-digits + 2e-6


@pytest.mark.parametrize("dtype", _DTYPES, ids=lambda d: d.__name__)
def test_keys_are_rotated_and_values_copied(make_pool, layout: str, dtype: object) -> None:
    """Across blocks, to later and to earlier positions."""
    rig, source = filled(pool_of(make_pool, spec_of(layout, dtype), 256), 50)
    target = rig.acquire(80)
    rig.write({target: 7})
    before, old = _read(rig, source), _read(rig, target)
    _reuse(rig, target, source, 5, 40)
    _reuse(rig, target, source, 49, 1)
    assert np.asarray(rig.cache.lengths)[target] == 48
    got = _read(rig, target)
    np.testing.assert_array_equal(_read(rig, source), before)
    np.testing.assert_array_equal(got[:, :, :7], old)
    for begin, at, n in [(5, 7, 40), (49, 47, 1)]:
        tokens = slice(at, at + n)
        np.testing.assert_array_equal(got[1, :, tokens], before[1, :, begin : begin + n])
        angles = (at - begin) * _FREQUENCIES.astype(np.float64)
        want = _rotated(before[0, :, begin : begin + n], angles)
        error = np.abs(np.asarray(got[0, :, tokens], np.float64) - want)
        assert (error <= _error_bound(want, dtype)).all(), error.max()
        assert np.abs(want - before[0, :, begin : begin + n]).max() > 0.5
    rig.pool.check(rig.cache)


@pytest.mark.parametrize("dtype", _DTYPES, ids=lambda d: d.__name__)
def test_the_same_position_keeps_the_bits(make_pool, layout: str, dtype: object) -> None:
    rig, source = filled(pool_of(make_pool, spec_of(layout, dtype), 256), 50)
    target = rig.acquire(50)
    rig.write({target: 9})
    _reuse(rig, target, source, 9, 41)
    np.testing.assert_array_equal(_read(rig, target)[:, :, 9:], _read(rig, source)[:, :, 9:])


def test_there_and_back(make_pool, layout: str) -> None:
    rig, source = filled(pool_of(make_pool, spec_of(layout), 256), 60)
    there, back = rig.acquire(200), rig.acquire(200)
    rig.write({there: 131})
    _reuse(rig, there, source, 0, 60)
    rig.pool.commit(there, range(191))
    _reuse(rig, back, there, 131, 60)
    got, want = _read(rig, back), _read(rig, source)
    np.testing.assert_array_equal(got[1], want[1])
    np.testing.assert_allclose(got[0], want[0], atol=3e-6)


@pytest.mark.parametrize("interleaved", [False, True])
def test_rotation_is_that_of_rope_at_the_new_positions(make_pool, interleaved: bool) -> None:
    """Partial rotary embedding, with frequencies per layer, which are 0 in one layer. Attention is
    relative, so a lone segment gives what it gave at its old positions.
    """
    rig, source = filled(pool_of(make_pool, spec_of("fused"), 256), 3)
    frequencies = np.stack([_FREQUENCIES[:24], np.zeros(24, np.float32)])
    raw, values = rig.random_kv(rig.max_tokens)

    def rope(positions: NDArray[Any]) -> NDArray[np.float64]:
        angles = positions[None, :, None, None] * frequencies[:, None, None].astype(np.float64)
        return _rotated(raw, angles, interleaved)

    positions = np.arange(rig.max_tokens)
    rig.pool.extend(source, 60)
    rig.write_kv([(source, rig.max_tokens)], rope(3 + positions).astype(np.float32), values)
    rig.pool.commit(source, range(rig.max_tokens))
    target = rig.acquire(200)
    rig.write({target: 150})
    _reuse(rig, target, source, 3, rig.max_tokens, inv_freq=frequencies, interleaved=interleaved)
    got = _read(rig, target)[0, :, 150:]
    np.testing.assert_allclose(got, rope(150 + positions), atol=5e-6)
    np.testing.assert_array_equal(got[1], _read(rig, source)[0, 1, 3:])  # not rotated: same bits


def test_several_copies_in_one_call(make_pool, layout: str) -> None:
    rig, source = filled(pool_of(make_pool, spec_of(layout), 256), 40)
    targets = [rig.acquire(60) for _ in range(3)]
    rig.write(dict.fromkeys(targets, 4))
    _reuse(rig, targets, [source] * 3, [0, 4, 39], [40, 5, 0])
    assert np.asarray(rig.cache.lengths)[targets].tolist() == [44, 9, 4]
    one = rig.acquire(60)
    rig.write_kv([(one, 4)], *rig.random_kv(rig.max_tokens))
    _reuse(rig, one, source, 0, 40)
    np.testing.assert_array_equal(_read(rig, one)[:, :, 4:], _read(rig, targets[0])[:, :, 4:])
    _reuse(rig, [], [], [], [])


def test_large_segments_are_copied_by_several_threads(make_pool, layout: str) -> None:
    rig, source = filled(pool_of(make_pool, spec_of(layout), 256), 200)
    target = rig.acquire(256)
    rig.write({target: 3})
    _reuse(rig, target, source, 1, 199)
    want, got = _read(rig, source)[:, :, 1:], _read(rig, target)[:, :, 3:]
    np.testing.assert_array_equal(got[1], want[1])
    angles = 2 * _FREQUENCIES.astype(np.float64)
    np.testing.assert_allclose(got[0], _rotated(want[0], angles), atol=2e-6)


def test_a_program_may_scan_over_copies(make_pool, layout: str) -> None:
    """The op in a jitted scan, three tokens per step, equals a single copy."""
    rig, source = filled(pool_of(make_pool, spec_of(layout), 256), 40)
    parts, whole = rig.acquire(60), rig.acquire(60)
    frequencies = np.stack([_FREQUENCIES] * _LAYERS)

    @jax.jit
    def scanned(cache: kvp.KVCache, begins: jax.Array) -> kvp.KVCache:
        def step(cache: kvp.KVCache, begin: jax.Array) -> tuple[kvp.KVCache, None]:
            copy = jnp.stack([source, parts, begin, 3, 0])[None].astype(jnp.int32)
            return copy_rotated(cache, cache.handle, copy, frequencies), None

        return jax.lax.scan(step, cache, begins)[0]

    rig.cache = scanned(rig.cache, jnp.arange(6, 36, 3, dtype=jnp.int32))
    _reuse(rig, whole, source, 6, 30)
    np.testing.assert_array_equal(_read(rig, parts), _read(rig, whole))


def test_a_sequence_goes_on_behind_a_segment(make_pool, layout: str) -> None:
    """Appended tokens attend to copied tokens as to any others."""
    rig, source = filled(pool_of(make_pool, spec_of(layout), 256), 30)
    target = rig.acquire(60)
    _reuse(rig, target, source, 10, 20)
    for layer, (k, v) in enumerate(zip(*_read(rig, target), strict=True)):
        rig.model.append(target, layer, k, v)
    rig.model.advance(target, 20)
    rig.check_lengths()
    out, _, want, _ = rig.step([(target, 3), (source, 0)])
    np.testing.assert_allclose(out[:, :3], want[:, :3], atol=1e-4)


@pytest.mark.parametrize(
    ("copy", "error", "match"),
    [
        ((1, 0, 30, 11), ValueError, "slot 0: 41 tokens wanted, 40 committed"),
        ((1, 0, -1, 2), ValueError, "neither number may be negative"),
        ((1, 0, 0, -1), ValueError, "neither number may be negative"),
        ((1, 9, 0, 1), kvp.KVPageError, "slot 9 is free"),
        ((9, 0, 0, 1), kvp.KVPageError, "slot 9 is free"),
        ((1, 99, 0, 1), ValueError, "slot 99 does not exist"),
        ((0, 0, 0, 1), ValueError, "source and the target"),
        (([1, 1], [0, 0], [0, 1], [1, 1]), ValueError, "target of two copies"),
        (([1, 2], [0], [0], [1]), ValueError, "2 of slot, 1 of source"),
    ],
)
def test_refused_copies(make_pool, copy: Any, error: type[Exception], match: str) -> None:
    rig, source = filled(pool_of(make_pool, spec_of("fused"), 256), 40)
    assert [source, rig.acquire(60), rig.acquire(60)] == [0, 1, 2]
    with pytest.raises(error, match=match):
        _reuse(rig, *copy)
    rig.check_lengths()


@pytest.mark.parametrize(
    "inv_freq",
    [np.ones(33), np.ones((3, 4)), np.float32(1), np.ones(4, np.int32), [1.0, np.inf]],
    ids=lambda x: str(np.shape(x)),
)
def test_refused_frequencies(make_pool, inv_freq: Any) -> None:
    rig, source = filled(pool_of(make_pool, spec_of("fused"), 256), 40)
    target = rig.acquire(60)
    with pytest.raises(ValueError, match="reuse_segment: inv_freq: wanted"):
        _reuse(rig, target, source, 0, 4, inv_freq=inv_freq)


def test_what_programs_refuse(make_pool, layout: str) -> None:
    rig, source = filled(pool_of(make_pool, spec_of(layout), 256), 40)
    target = rig.acquire(32)
    rig.write({target: 10})

    def refused(match: str, *copy: int) -> None:
        fails(match, lambda: rig.pool.reuse_segment(rig.cache, *copy, inv_freq=_FREQUENCIES))
        rig.cache = rig.pool.cache()
        rig.check_lengths()

    refused("33 tokens wanted, 32 mapped", target, source, 0, 23)
    rig.pool.commit(source, [7])
    refused("slot 0: 41 tokens wanted, written in layers 0..1: 40", target, source, 40, 1)
    rig.pool.commit(target, range(12))
    refused("12 tokens are committed, but it has 10", target, source, 0, 4)
    old = rig.cache
    _reuse(rig, target, source, 0, 4)
    rig.model.append(target, 0, *_read(rig, target)[:, 0, 10:])
    rig.model.append(target, 1, *_read(rig, target)[:, 1, 10:])
    rig.model.advance(target, 4)
    fails("stale cache", lambda: rig.pool.reuse_segment(old, target, source, 0, 1, inv_freq=[1.0]))
    rig.cache = rig.pool.cache()
    rig.check_lengths()


def test_dropped_and_shared_tokens(make_pool, layout: str) -> None:
    rig, source = filled(pool_of(make_pool, spec_of(layout), 256), 70)
    target = rig.acquire(60)
    rig.cache = rig.pool.drop_before(rig.cache, source, 40)
    with pytest.raises(kvp.KVPageError, match="those below 32 were dropped"):
        _reuse(rig, target, source, 31, 4)
    _reuse(rig, target, source, 32, 4)
    rig.pool.check(rig.cache)
    assert np.asarray(rig.cache.lengths)[target] == 4


def test_the_caller_must_be_the_caches_pool(make_pool) -> None:
    rig, source = filled(pool_of(make_pool, spec_of("fused"), 256), 40)
    other, slot = filled(pool_of(make_pool, spec_of("fused"), 256), 40)
    target = other.acquire(50)
    assert (source, slot) == (0, 0)
    fails(
        "is pool|belongs|of pool|another pool",
        lambda: other.pool.reuse_segment(rig.cache, target, slot, 0, 4, inv_freq=_FREQUENCIES),
    )


def test_transformations_are_refused(make_pool) -> None:
    rig, source = filled(pool_of(make_pool, spec_of("fused"), 256), 40)
    target = rig.acquire(50)
    cache, frequencies = rig.cache, np.stack([_FREQUENCIES] * _LAYERS)
    rows = jnp.asarray([[[source, target, 0, 1, 0]]] * 2, jnp.int32)
    with pytest.raises(ValueError, match=r"reuse_segment: copy segments outside of vmap"):
        jax.vmap(lambda r: copy_rotated(cache, cache.handle, r, frequencies).lengths)(rows)
    with pytest.raises(ValueError, match="cannot be traced"):
        jax.jit(lambda c: rig.pool.reuse_segment(c, target, source, 0, 1, inv_freq=_FREQUENCIES))(
            cache
        )
    with pytest.raises(ValueError, match=r"(?s)copies: wanted int32 \[n=1, 5\].*inv_freq: wanted"):
        copy_rotated(cache, cache.handle, rows[0, :, :4], frequencies[:1])
    with pytest.raises(ValueError, match="has 40 pairs, but a key has 64 elements"):
        copy_rotated(cache, cache.handle, rows[0], np.ones((_LAYERS, 40), np.float32))
