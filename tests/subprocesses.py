"""Runs Python code in a separate process, for tests that one process cannot run twice or
survive.
"""

from __future__ import annotations

import os
import pathlib
import subprocess
import sys
import textwrap
from collections.abc import Mapping, Sequence

_TESTS = pathlib.Path(__file__).resolve().parent


def command_of(
    code: str, arguments: Sequence[str], env: Mapping[str, str] | None
) -> tuple[list[str], dict[str, str]]:
    return [sys.executable, "-c", textwrap.dedent(code), *arguments], {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(_TESTS), *sys.path]),
        # Not the current folder: a checkout has the package there, without its compiled module.
        "PYTHONSAFEPATH": "1",
        **(env or {}),
    }


def start_python(code: str, *arguments: str, talk: bool = False) -> subprocess.Popen[str]:
    """Runs `code` like `run_python`, but without waiting. The caller must end and close it.

    Args:
        code: Source code; may be indented.
        *arguments: Its sys.argv[1:].
        talk: Whether its standard input is a pipe.
    """
    command, env = command_of(code, arguments, None)
    stdin = subprocess.PIPE if talk else None
    return subprocess.Popen(command, env=env, stdin=stdin, stdout=subprocess.PIPE, text=True)


def run_python(
    code: str,
    *arguments: str,
    env: Mapping[str, str] | None = None,
    prefix: Sequence[str] = (),
    timeout: float = 180,
) -> subprocess.CompletedProcess[str]:
    """Runs `code` with the tests folder on the path, and asserts that it exits with 0.

    Args:
        code: Source code; may be indented.
        *arguments: Its sys.argv[1:].
        env: Variables to add to the environment.
        prefix: Command prefix for the interpreter.
        timeout: Seconds after which a hanging process is killed and the test fails.
    """
    command, variables = command_of(code, arguments, env)
    done = subprocess.run(
        [*prefix, *command],
        env=variables,
        capture_output=True,
        text=True,
        timeout=timeout,
    )
    assert done.returncode == 0, f"exit status {done.returncode}\n{done.stdout}\n{done.stderr}"
    return done
