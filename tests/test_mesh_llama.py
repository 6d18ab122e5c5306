"""The example's Llama over several devices (mesh_llama.py has the programs)."""

from __future__ import annotations

import decode_llama
import pytest
from mesh_rig import EIGHT_DEVICES
from subprocesses import run_python


@pytest.mark.parametrize(
    "program", ["logits", pytest.param("command", marks=pytest.mark.exhaustive)]
)
def test_logits_and_text_are_those_of_one_device(program: str) -> None:
    run_python(f"import mesh_llama; mesh_llama.{program}()", env=EIGHT_DEVICES, timeout=600)


@pytest.mark.parametrize(
    ("options", "wanted"),
    [
        ("--mesh sp=2", "must be tp=N, dp=N or dp=N,tp=N, got 'sp=2'"),
        ("--mesh dp=2,dp=2", "must be tp=N"),
        ("--mesh tp=0", "tp must be 1 or more"),
        ("--mesh dp=2 --scan 4", "leave out dp or --scan"),
        ("--mesh dp=2 --coordinator a:1 --num-processes 2", "leave out dp or --coordinator"),
        ("--mesh tp=2 --draft model", "leave out --draft"),
    ],
)
def test_options_that_do_not_go_together(
    options: str, wanted: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as raised:
        decode_llama.main(options.split())
    assert raised.value.code == 2
    assert wanted in capsys.readouterr().err
