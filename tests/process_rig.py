"""Programs in several processes on this machine, joined by `jax.distributed`.

Tests start them with `run_processes`; what runs in each begins with `join`.
"""

from __future__ import annotations

import contextlib
import socket
import subprocess
import textwrap
import time
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import jax
from subprocesses import command_of

# Seconds until a dead process is noticed, and until the others must have ended (see README).
HEARTBEAT = 10
SHUTDOWN = 60  # a process waits for others that still compute what it has finished
END_WITHIN = HEARTBEAT + 20


class Ended(NamedTuple):
    """How a process ended: exit status and output."""

    status: int
    out: str
    err: str


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])


def join(index: int, count: int, port: int, devices: int = 1) -> None:
    """Joins the test's processes: `devices` CPU devices here, and those of the other processes."""
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.config.update("jax_num_cpu_devices", devices)
    jax.distributed.initialize(
        f"127.0.0.1:{port}",
        count,
        index,
        initialization_timeout=60,
        heartbeat_timeout_seconds=HEARTBEAT,
        shutdown_timeout_seconds=SHUTDOWN,
    )


@contextlib.contextmanager
def started(
    code: str, count: int = 2, devices: int = 1, timeout: float = 60
) -> Iterator[list[subprocess.Popen[str]]]:
    """Runs `code` in `count` processes, which are killed at the end of the block.

    Args:
        code: Runs after `join`; `index` is the number of the process.
        count: Number of processes.
        devices: Devices per process.
        timeout: Seconds that a process waits for the other processes in a call.
    """
    port, processes = free_port(), []
    begin = "from process_rig import join; import sys; index = int(sys.argv[1])"
    try:
        for index in range(count):
            text = f"{begin}\njoin(index, {count}, {port}, {devices})\n{textwrap.dedent(code)}"
            more = {"JAX_KVPAGE_PROCESS_TIMEOUT": str(timeout)}
            command, env = command_of(text, [str(index)], more)
            pipe = subprocess.PIPE
            processes.append(
                subprocess.Popen(command, env=env, stdout=pipe, stderr=pipe, text=True)
            )
        yield processes
    finally:
        for process in processes:
            process.kill()
            process.communicate()


def ended(processes: Sequence[subprocess.Popen[str]], within: float) -> list[Ended]:
    """Waits for all processes; if one hangs, fails the test with the output of all."""
    until, found, late = time.monotonic() + within, [], []
    for index, process in enumerate(processes):
        try:
            out, err = process.communicate(timeout=max(until - time.monotonic(), 0.1))
        except subprocess.TimeoutExpired:
            late.append(index)
            process.kill()
            out, err = process.communicate()
        found.append(Ended(process.returncode, out, err))
    assert not late, f"processes {late} have not ended within {within} s: {found}"
    return found


def run_processes(
    code: str, count: int = 2, devices: int = 1, timeout: float = 60, within: float = 240
) -> list[str]:
    """Runs `code` like `started`, asserts that all processes exit with 0, and returns their
    output.
    """
    with started(code, count, devices, timeout) as processes:
        found = ended(processes, within)
    text = "\n".join(f"--- process {i}: {e.status}\n{e.out}{e.err}" for i, e in enumerate(found))
    assert all(each.status == 0 for each in found), text
    return [each.out for each in found]
