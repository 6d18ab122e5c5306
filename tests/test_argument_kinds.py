"""Arguments that used to be wrapped, ignored, or refused with an error of another library."""

from __future__ import annotations

import pathlib
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from pool_checks import make_spec

import jax_kvpage as kvp

_NO_TEXT = "\ud800"  # UTF-8 cannot encode it


@pytest.fixture
def pool() -> Iterator[kvp.KVPool]:
    with kvp.KVPool(make_spec(), "2MiB") as made:
        yield made


@pytest.mark.parametrize(
    ("name", "call"),
    [
        ("find_prefix: namespace", lambda pool: pool.find_prefix([1, 2], _NO_TEXT)),
        ("pin: namespace", lambda pool: pool.pin([1, 2], _NO_TEXT)),
        ("export_blocks: fingerprint", lambda pool: pool.export_blocks(0, fingerprint=_NO_TEXT)),
    ],
)
def test_texts_that_cannot_be_encoded_are_named(
    pool: kvp.KVPool, name: str, call: Callable[[kvp.KVPool], Any]
) -> None:
    with pytest.raises(ValueError, match=f"{name}: wanted text that UTF-8 can encode"):
        call(pool)


def test_bools_are_no_token_ids_wherever_they_stand(pool: kvp.KVPool) -> None:
    for ids in ([True, 5], [5, True], [5, False, 7], [0, 1, np.bool_(True)]):
        with pytest.raises(ValueError, match="wanted an int"):
            pool.find_prefix(ids)
    assert pool.find_prefix([5, 0, 1]) == 0


def test_numbers_of_numpy_are_numbers(pool: kvp.KVPool) -> None:
    pool.pin([1, 2], ttl=np.int64(5), max_share=np.float32(0.5))
    with pytest.raises(ValueError, match="ttl: wanted a number from 0 to inf"):
        pool.pin([1, 2], ttl=10**400)
    with pytest.raises(ValueError, match="max_share: wanted"):
        pool.pin([1, 2], max_share=float("nan"))


def test_flags_are_bools(pool: kvp.KVPool) -> None:
    slot, cache = pool.acquire(pool.cache(), 5)
    wrong: Any = "no"
    with pytest.raises(ValueError, match="block_map: owners: wanted True or False, got str 'no'"):
        pool.block_map(slot, owners=wrong)
    q = jnp.zeros((1, 4, pool.spec.head_dim))
    with pytest.raises(ValueError, match="return_lse: wanted True or False, got str 'no'"):
        kvp.paged_attention(q, cache, kvp.Batch.decode([slot]), layer=0, return_lse=wrong)


def test_write_ahead_needs_a_store() -> None:
    with pytest.raises(ValueError, match="write_ahead: give a store too"):
        kvp.KVPool(make_spec(), "2MiB", write_ahead=0.5)


def test_forks_of_slots_that_do_not_exist(pool: kvp.KVPool) -> None:
    slot, cache = pool.acquire(pool.cache(), 5)
    most = pool.spec.max_slots
    with pytest.raises(ValueError, match=f"fork: slot: wanted an int from 0 to {most - 1}"):
        pool.fork(cache, most, 0)
    with pytest.raises(kvp.OutOfSlots, match=f"2147483647 slots wanted, {most} in all") as caught:
        pool.fork(cache, slot, 2**31 - 1)
    assert caught.value.wanted == 2**31 - 1
    assert pool.fork(cache, slot, 0)[0] == []


@pytest.mark.parametrize("value", [1e39, 3e38, 1e-60, 10**400, float("nan")])
@pytest.mark.parametrize("option", ["scale", "logits_soft_cap"])
def test_options_must_fit_float32(pool: kvp.KVPool, option: str, value: float) -> None:
    slot, cache = pool.acquire(pool.cache(), 5)
    options: dict[str, Any] = {option: value}
    with pytest.raises(ValueError, match=f"{option}: wanted a positive number that float32"):
        kvp.paged_attention(
            jnp.zeros((1, 4, pool.spec.head_dim)),
            cache,
            kvp.Batch.decode([slot]),
            layer=0,
            **options,
        )


def test_read_kv_names_slots_that_are_not_integers(pool: kvp.KVPool) -> None:
    for slots in ([0.5], jnp.zeros(1), np.asarray([True])):
        with pytest.raises(ValueError, match="slots: wanted"):
            kvp.read_kv(pool.cache(), slots, 0)


def _with_tables(**changed: Any) -> jax.Array:
    pages = jnp.arange(4, dtype=jnp.float32)[:, None, None, None] * jnp.ones((4, 16, 1, 8), "f4")
    arguments: dict[str, Any] = {
        "q": jnp.ones((2, 1, 8), jnp.float32),
        "k_pages": pages,
        "v_pages": pages,
        "block_tables": np.asarray([[0, 1], [2, 3]]),
        "lengths": np.asarray([20, 30]),
    }
    out: jax.Array = kvp.paged_attention_with_tables(**(arguments | changed))
    return out


@pytest.mark.parametrize("x64", [False, True])
def test_tables_of_host_integers(x64: bool) -> None:
    with jax.enable_x64(x64):
        wide = _with_tables(query_offsets=[0, 1, 2])
        narrow = _with_tables(
            block_tables=np.asarray([[0, 1], [2, 3]], np.int32),
            lengths=np.asarray([20, 30], np.int32),
            query_offsets=np.asarray([0, 1, 2], np.int32),
        )
        np.testing.assert_array_equal(wide, narrow)
        for name, value in (
            ("block_tables", np.asarray([[2**32 + 1, 1], [2, 3]])),
            ("lengths", np.asarray([2**32 + 1, 30])),
            ("query_offsets", np.asarray([0, 1, 2**32 + 2])),
        ):
            with pytest.raises(ValueError, match=f"{name}: wanted integers that fit int32"):
                _with_tables(**{name: value})
        with pytest.raises(ValueError, match=r"kv_layout: wanted 'NHD' or 'HND', got .'NHD'."):
            _with_tables(kv_layout=["NHD"])


def test_windows_of_a_scan_with_64_bits(pool: kvp.KVPool) -> None:
    slot, cache = pool.acquire(pool.cache(), 8)
    batch, dim = kvp.Batch.from_lengths([slot], [8]), pool.spec.head_dim
    k = jax.random.normal(jax.random.key(0), (8, pool.spec.num_kv_heads, dim))
    q = jax.random.normal(jax.random.key(1), (8, 2 * pool.spec.num_kv_heads, dim))
    cache = kvp.append_kv(cache, k, k, batch, layer=0)
    cache = kvp.append_kv(cache, k, k, batch, layer=1)

    def attend(window: Any, layer: Any) -> jax.Array:
        out = kvp.paged_attention(q, cache, batch, layer=layer, sliding_window=window)
        assert isinstance(out, jax.Array)
        return out

    expected = [attend(3, 0), attend(None, 1)]
    np.testing.assert_array_equal(attend(np.asarray(3), 0), expected[0])
    with jax.enable_x64(True):
        _, found = jax.lax.scan(
            lambda carry, xs: (carry, attend(*xs)), 0, (jnp.asarray([3, 0]), jnp.arange(2))
        )
    np.testing.assert_array_equal(found, jnp.stack(expected))


def test_paths_that_are_no_directories(tmp_path: pathlib.Path) -> None:
    file = tmp_path / "file"
    file.write_text("")
    for path in (file, file / "below", file / "far" / "below"):
        with pytest.raises(kvp.KVPageError, match=r"file"):
            kvp.BlockStore(path)
    wrong: list[Any] = [3, "a\0b", b"bytes", _NO_TEXT, None]
    for path in wrong:
        with pytest.raises(ValueError, match="path: wanted the path of a directory"):
            kvp.BlockStore(path)
    with pytest.raises(ValueError, match="fingerprint: wanted text that UTF-8 can encode"):
        kvp.BlockStore(tmp_path / "store", fingerprint=_NO_TEXT)


def test_scattered_values_fit_their_type(pool: kvp.KVPool) -> None:
    slot, _ = pool.acquire(pool.cache(), 5)
    made = kvp.spread(pool, [slot], [2], num_tokens=4)
    for values in ([2**40, 1], np.asarray([2**63, 1], np.uint64)):
        with pytest.raises(ValueError, match="scatter: values: wanted integers that fit int32"):
            made.scatter(values)
    for fill in (0.5, 2**31, True):
        with pytest.raises(ValueError, match="scatter: fill: wanted an int"):
            made.scatter([5, 1], fill=fill)
    assert made.scatter([5, 1], fill=-1).tolist() == [5, 1, -1, -1]
    assert made.scatter(np.asarray([0.5, 1]), fill=0.25).tolist() == [0.5, 1, 0.25, 0.25]


def test_ages_of_files_are_numbers(tmp_path: pathlib.Path) -> None:
    assert kvp.store.prune(tmp_path, older_than=np.int64(5)) == []
    wrong: list[Any] = ["1h", True, -1, float("nan")]
    for age in wrong:
        with pytest.raises(ValueError, match="older_than: wanted at least 0 seconds"):
            kvp.store.prune(tmp_path, older_than=age)
