"""Runs a piece of Python in a separate process, for tests that one process cannot run twice or
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
        # Not the current folder: in a checkout it holds the package without its compiled part.
        "PYTHONSAFEPATH": "1",
        **(env or {}),
    }


def start_python(code: str, *arguments: str, talk: bool = False) -> subprocess.Popen[str]:
    """Runs `code` as `run_python` does, and does not wait. The caller ends and closes it.

    Args:
        code: source, may be indented.
        *arguments: its sys.argv[1:].
        talk: whether its standard input is a pipe.
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
        code: source, may be indented.
        *arguments: its sys.argv[1:].
        env: variables to add to the environment.
        prefix: a command to run the interpreter under.
        timeout: seconds after which a process that hangs is killed and the test fails.
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
