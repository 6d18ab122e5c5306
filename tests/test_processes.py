"""Pools over the devices of several processes on this machine (process_programs.py and
process_llama.py have the programs).
"""

from __future__ import annotations

import json
import subprocess

import decode_llama
import pytest
from process_rig import free_port, run_processes
from subprocesses import command_of

_EXAMPLE = "import decode_llama, sys; sys.exit(decode_llama.main())"


@pytest.mark.parametrize(
    ("count", "devices"),
    [
        (2, 2),
        pytest.param(2, 1, marks=pytest.mark.exhaustive),
        pytest.param(4, 1, marks=pytest.mark.exhaustive),
    ],
)
def test_host_calls_and_attention(count: int, devices: int) -> None:
    outputs = run_processes(
        """
        import process_programs as p
        p.attention()
        p.verbs()
        p.churn(120)
        p.failures()
        p.out_of_blocks()
        p.failed_programs()
        p.a_sum_behind_an_op_that_fails()
        p.refusals()
        """,
        count,
        devices,
    )
    churned = [[line for line in out.splitlines() if line.startswith("[(")] for out in outputs]
    assert churned[0] != []
    assert all(each == churned[0] for each in churned)


@pytest.mark.exhaustive  # compiles the engine three times
def test_the_engine_says_the_same_as_on_one_device() -> None:
    outputs = run_processes("import process_llama as p; p.tokens()")
    said = [[line for line in out.splitlines() if line.startswith("tokens")] for out in outputs]
    assert said[0] == said[1] != []


@pytest.mark.exhaustive  # compiles the whole example three times
def test_the_example_says_the_same_as_in_one_process(capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--json", "--prompt", "A class is", "--max-new-tokens", "12", "--mesh", "tp=2"]
    address = f"localhost:{free_port()}"
    started = []
    for index in range(2):
        own = ["--coordinator", address, "--num-processes", "2", "--process-id", str(index)]
        command, env = command_of(_EXAMPLE, [*options, *own], None)
        started.append(subprocess.Popen(command, env=env, stdout=subprocess.PIPE, text=True))
    outputs = [process.communicate(timeout=400)[0] for process in started]
    assert [process.returncode for process in started] == [0, 0]
    assert outputs[1] == ""
    assert decode_llama.main(options[:-2]) == 0
    wanted, got = json.loads(capsys.readouterr().out), json.loads(outputs[0])
    assert got["sequences"] == wanted["sequences"]
    assert got["capacity"] == wanted["capacity"]


@pytest.mark.parametrize(
    ("options", "wanted"),
    [
        ("--mesh tp=2 --coordinator h:1", "--coordinator and --num-processes (2 or more)"),
        ("--mesh tp=2 --num-processes 2", "--coordinator and --num-processes (2 or more)"),
        ("--mesh tp=3 --coordinator h:1 --num-processes 2", "must divide the devices"),
        ("--mesh tp=2 --coordinator h:1 --num-processes 2 --process-id 2", "from 0 to 1, got 2"),
        ("--mesh tp=2 --coordinator h:1 --num-processes 2 --chat", "one process only"),
    ],
)
def test_options_of_the_example_that_do_not_go_together(
    options: str, wanted: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as raised:
        decode_llama.main(options.split())
    assert raised.value.code == 2
    assert wanted in capsys.readouterr().err
