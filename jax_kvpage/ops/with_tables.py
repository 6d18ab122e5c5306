"""paged_attention_with_tables: attention over plain arrays and a block table, without a pool."""

from typing import Any, Literal

import jax
import jax.numpy as jnp

from jax_kvpage import reference
from jax_kvpage._arrays import as_int32
from jax_kvpage.ops import _attention, _batching, _lowering, _scratch
from jax_kvpage.ops._checks import FLOATS, INT32, Checker, check_arrays, results

__all__ = ["paged_attention_with_tables"]

_LAYOUTS = {"NHD": 0, "HND": 1}
_PAGE_DIMS = (("pages", "page_size", "Hkv", "D"), ("pages", "Hkv", "page_size", "D"))
_NAMES = (
    "q",
    "k_pages",
    "v_pages",
    "block_tables",
    "lengths of the sequences",
    "query_offsets",
    "sliding_window",
    "sinks",
    "alibi_slopes",
)

_NAME = "paged_attention_with_tables"


def _abstract(
    *avals: Any, kv_layout: int, return_lse: bool, problems: tuple[str, ...] = (), **_: Any
) -> list[Any]:
    q, k_pages, v_pages, tables, lengths, offsets, window, sinks, alibi = avals
    check = Checker(_NAME, problems)
    check.array("k_pages", k_pages, _PAGE_DIMS[kv_layout], FLOATS)
    check.array("v_pages", v_pages, _PAGE_DIMS[kv_layout], FLOATS)
    if k_pages.dtype != v_pages.dtype:
        check.add(f"v_pages: wanted the dtype of k_pages, {k_pages.dtype}, got {v_pages.dtype}")
    if 0 in (check.dims.get("page_size"), check.dims.get("Hkv"), check.dims.get("D")):
        check.add("k_pages: page_size, heads and head size must not be 0")
    check.array("block_tables", tables, ("S", "B"), INT32)
    check.array("lengths", lengths, ("S",), INT32)
    check.array("query_offsets", offsets, ("S+1",), INT32)
    _attention.check_attention(check, q, window, sinks, alibi)
    check.done()
    return results(avals, *_attention.results_of(q, return_lse))


attend_with_tables_p = _lowering.make_primitive(
    "attend_with_tables",
    _abstract,
    static=("scale", "soft_cap", "exact_weights", "kv_layout", "return_lse", "implementation"),
)


def paged_attention_with_tables(
    q: jax.Array,
    k_pages: jax.Array,
    v_pages: jax.Array,
    block_tables: jax.Array,
    lengths: jax.Array,
    *,
    query_offsets: jax.Array | None = None,
    scale: float | None = None,
    sliding_window: int | jax.Array | None = None,
    logits_soft_cap: float | None = None,
    sinks: jax.Array | None = None,
    alibi_slopes: jax.Array | None = None,
    kv_layout: Literal["NHD", "HND"] = "NHD",
    return_lse: bool = False,
    implementation: str | None = None,
) -> Any:
    """Attention over pages of K and V addressed by a block table, all ordinary JAX arrays.

    Purely functional: no pool and no side effects. Semantics are those of `paged_attention`.

    Args:
        q: [T, Hq, D], float32, bfloat16 or float16.
        k_pages: [pages, page_size, Hkv, D] ("NHD") or [pages, Hkv, page_size, D] ("HND").
        v_pages: like k_pages.
        block_tables: int32[S, B], page of each block of each sequence; entries beyond a sequence's
            length are ignored.
        lengths: int32[S], tokens of each sequence in the pages, including its new ones. New token i
            of n is at position length - n + i.
        query_offsets: int32[S+1], sequence s owns tokens query_offsets[s]:query_offsets[s+1]; None
            means a decode step, one token per sequence (T == S). Tokens past the last offset are
            padding.
        kv_layout: axis order of a page.
        scale, sliding_window, logits_soft_cap, sinks, alibi_slopes, return_lse: as in
            `paged_attention`.
        implementation: "cpu", "cuda", "xla" (pure JAX, every platform), or None, the best for the
            platform.

    Returns:
        out [T, Hq, D] in q's dtype; with return_lse also lse, float32 [T, Hq]. Padding tokens get 0
        and -inf.

    Raises:
        ValueError: unsupported arguments, all listed in one message.
        jax.errors.JaxRuntimeError: at run time on cpu: malformed offsets, lengths beyond the table,
            or a page number out of range.
    """
    arrays = {"k_pages": k_pages, "v_pages": v_pages, "block_tables": block_tables}
    check_arrays(_NAME, q=q, **arrays, lengths=lengths)
    block_tables = as_int32(f"{_NAME}: block_tables", block_tables)
    lengths = as_int32(f"{_NAME}: lengths", lengths)
    if query_offsets is not None:
        query_offsets = as_int32(f"{_NAME}: query_offsets", query_offsets)
    problems: list[str] = []
    options = _attention.operands(sliding_window, sinks, alibi_slopes, problems)
    head_dim = jnp.shape(q)[-1] if jnp.ndim(q) else 1
    params = _attention.params(
        head_dim, scale, logits_soft_cap, return_lse, implementation, problems
    )
    if not isinstance(kv_layout, str) or kv_layout not in _LAYOUTS:
        known = " or ".join(map(repr, _LAYOUTS))
        problems.append(f"kv_layout: wanted {known}, got {kv_layout!r}")
        kv_layout = "NHD"
    sequences = jnp.shape(lengths)[0] if jnp.ndim(lengths) else 0
    if query_offsets is None:
        query_offsets = jnp.arange(sequences + 1, dtype=jnp.int32)
        if jnp.ndim(q) and jnp.shape(q)[0] != sequences:
            problems.append(
                f"query_offsets: None means one token for each of the {sequences} sequences, but q "
                f"has {jnp.shape(q)[0]}"
            )
    operands = (q, k_pages, v_pages, block_tables, lengths, query_offsets, *options)
    params["kv_layout"] = _LAYOUTS[kv_layout]
    out, lse = _lowering.bind(attend_with_tables_p, _abstract, operands, params, problems)
    return (out, lse) if return_lse else out


def _attend_plain(*operands: Any, kv_layout: int, **params: Any) -> Any:
    q, k_pages, v_pages, tables, lengths, offsets, *options = operands

    def context(pages: Any) -> Any:
        pages = pages if kv_layout == 0 else jnp.swapaxes(pages, 1, 2)
        if pages.shape[0] == 0:  # JAX cannot gather from nothing
            pages = jnp.zeros((1, *pages.shape[1:]), pages.dtype)
        gathered = pages.at[jnp.maximum(tables, 0)].get(mode="clip")
        sequences, blocks, page_size, heads, dim = gathered.shape
        return gathered.reshape(sequences, blocks * page_size, heads, dim)

    starts = lengths - (offsets[1:] - offsets[:-1])
    active = jnp.ones(lengths.shape, bool)
    params.pop("exact_weights")  # weights are float32 here
    k, v = context(k_pages), context(v_pages)
    return reference.ragged_attention(q, k, v, starts, offsets, active, *options, **params)


_lowering.register_lowerings(
    attend_with_tables_p,
    name=_NAME,
    side_effect=False,
    xla=_attend_plain,
    xla_is_default=True,
    scratch=_scratch.attention_with_tables,
)
_lowering.refuse_differentiation(
    attend_with_tables_p, _NAME, "it is for inference, and its kernels have no gradients"
)

_batching.register(
    attend_with_tables_p,
    _batching.map_reader(_NAME, _NAMES, attend_with_tables_p.bind),
)
