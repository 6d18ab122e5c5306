"""Sequences over several devices (mesh_sequence.py has the programs)."""

from __future__ import annotations

import pytest
from covering import is_exhaustive
from mesh_rig import EIGHT_DEVICES
from subprocesses import run_python


def test_attention_is_that_of_one_device_and_only_results_are_summed() -> None:
    run_python("import mesh_sequence; mesh_sequence.attention((2, 8))", env=EIGHT_DEVICES)


@pytest.mark.parametrize("size", [2, 4, 8] if is_exhaustive() else [4])
def test_a_sequence_that_is_too_long_for_one_device(size: int) -> None:
    run_python(f"import mesh_sequence; mesh_sequence.long_sequence({size})", env=EIGHT_DEVICES)


@pytest.mark.parametrize("size", [2, 4, 8] if is_exhaustive() else [4])
@pytest.mark.parametrize(
    ("dtype", "atol"), [("int8", 3e-6), *([("bfloat16", 2e-2)] if is_exhaustive() else [])]
)
def test_storage_of_less_precision(size: int, dtype: str, atol: float) -> None:
    run_python(
        f"""
        import jax.numpy as jnp, mesh_sequence
        mesh_sequence.attention(({size},), jnp.{dtype}, {atol})
        """,
        env=EIGHT_DEVICES,
    )


@pytest.mark.parametrize("kind", ["Auto", "Explicit"] if is_exhaustive() else ["Auto"])
def test_ops_in_shard_map(kind: str) -> None:
    run_python(f"import mesh_sequence; mesh_sequence.in_shard_map({kind!r})", env=EIGHT_DEVICES)


def test_failures_and_refusals() -> None:
    run_python(
        """
        import mesh_sequence
        mesh_sequence.failed_calls()
        mesh_sequence.failed_programs()
        mesh_sequence.refusals()
        """,
        env=EIGHT_DEVICES,
    )


def test_llama_over_devices_says_the_same() -> None:
    sizes = (2, 4, 8) if is_exhaustive() else (4,)
    run_python(f"import mesh_sequence_llama; mesh_sequence_llama.text({sizes})", env=EIGHT_DEVICES)


@pytest.mark.exhaustive  # compiles many programs
def test_the_engine_over_spread_sequences() -> None:
    run_python(
        """
        import pytest, sequence_engine as programs, serving_rig
        programs.compiled()
        with pytest.MonkeyPatch.context() as patch:
            serving_rig.share_programs(patch)
            programs.outputs()
            programs.longer_than_a_device()
            programs.cancellations()
            programs.refusals()
        """,
        env=EIGHT_DEVICES,
        timeout=360,
    )
