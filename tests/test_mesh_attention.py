"""Ops on the cache of a pool over a mesh (mesh_attention.py has the programs)."""

from __future__ import annotations

import pytest
from mesh_rig import EIGHT_DEVICES
from subprocesses import run_python

_kinds = pytest.mark.parametrize("kind", ["Auto", "Explicit"])


@_kinds
def test_attention_is_that_of_one_device_and_gathers_nothing(kind: str) -> None:
    run_python(f"import mesh_attention; mesh_attention.plain_jit({kind!r})", env=EIGHT_DEVICES)


@_kinds
def test_ops_in_shard_map_options_and_refusals(kind: str) -> None:
    run_python(
        f"""
        import mesh_attention
        mesh_attention.in_shard_map({kind!r})
        mesh_attention.options({kind!r})
        mesh_attention.refusals({kind!r})
        """,
        env=EIGHT_DEVICES,
    )


@pytest.mark.parametrize("addressing", ["slots", "table"])
def test_forks_with_a_dropped_beginning(addressing: str) -> None:
    run_python(
        f"""
        import jax.numpy as jnp
        import mesh_decoding
        for dtype in jnp.float32, jnp.float8_e4m3fn:
            mesh_decoding.forks_with_a_dropped_beginning(dtype, {addressing!r})
        """,
        env=EIGHT_DEVICES,
    )
