"""The example's Llama with replicas along a mesh axis (replica_llama.py has the program)."""

from __future__ import annotations

from mesh_rig import EIGHT_DEVICES
from subprocesses import run_python


def test_tokens_and_logits_are_those_of_one_device() -> None:
    run_python("import replica_llama; replica_llama.logits()", env=EIGHT_DEVICES, timeout=360)
