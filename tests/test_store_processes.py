"""Several processes save, spill, evict, fetch and swap in one directory at the same time."""

from __future__ import annotations

import pathlib
import subprocess
import time
from collections.abc import Iterator

import pytest
from covering import num_cases
from load_rig import LENGTH, LIMIT, WRITERS
from prefix_rig import spec_of
from subprocesses import start_python

from jax_kvpage.store import list_files

CODE = "import sys, load_rig; load_rig.load(*sys.argv[1:3], int(sys.argv[3]), float(sys.argv[4]))"


@pytest.fixture
def processes() -> Iterator[list[subprocess.Popen[str]]]:
    started: list[subprocess.Popen[str]] = []
    yield started
    for process in started:
        process.kill()
        process.wait()
        if process.stdout is not None:
            process.stdout.close()


def _line(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.readline().strip()


def _size(path: pathlib.Path) -> int:
    """Returns the bytes of all block files."""
    sizes = []
    for file in path.glob("*.safetensors"):
        try:
            sizes.append(file.stat().st_size)
        except FileNotFoundError:
            continue
    return sum(sizes)


def test_processes_share_a_directory_under_load(
    tmp_path: pathlib.Path, processes: list[subprocess.Popen[str]]
) -> None:
    """Every hit has the right tokens, the limit holds, and killing one process disturbs no
    other.
    """
    seconds = num_cases(3, 30)
    for seed in range(3):
        processes.append(start_python(CODE, str(tmp_path), "fused", str(seed), str(seconds)))
    for process in processes:
        assert _line(process) == "ready"
    victim = processes[-1]
    begun, largest = time.monotonic(), 0
    while any(process.poll() is None for process in processes[:-1]):
        largest = max(largest, _size(tmp_path))
        if time.monotonic() > begun + seconds / 2:
            victim.kill()
        time.sleep(0.002)
    assert victim.wait() < 0
    spec = spec_of("fused").resolve("cpu")
    file = LENGTH * spec.token_bytes + 8192
    # Concurrent writes of several processes may exceed the limit.
    assert 0 < largest <= LIMIT + len(processes) * WRITERS * file
    for process in processes[:-1]:
        assert process.wait() == 0
        memory_hits, store_hits, written = map(int, _line(process).split())
        assert memory_hits > 0
        assert store_hits > 0
        assert written > 0
    files = list_files(tmp_path, verify=True)
    assert files
    assert [found for found in files if found.problem is not None] == []
