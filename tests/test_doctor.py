"""python -m jax_kvpage: its report on the build and the machine, and its exit status."""

from __future__ import annotations

import pathlib
import tomllib
import types
from typing import Any

import jax
import pytest

import jax_kvpage
from jax_kvpage import __main__ as doctor
from jax_kvpage import _cuda, _doctor, _native


def _card(**changes: Any) -> types.SimpleNamespace:
    card = {
        "ordinal": 0,
        "name": "NVIDIA H100",
        "compute_capability": (9, 0),
        "multiprocessors": 132,
        "total_bytes": 80 << 30,
        "virtual_memory": True,
        "granularity": 2 << 20,
        "problem": "",
    }
    return types.SimpleNamespace(**card | changes)


def _driver(monkeypatch: pytest.MonkeyPatch, *cards: Any, version: int = 13000) -> None:
    report = types.SimpleNamespace(driver_version=version, problem="", devices=list(cards))
    monkeypatch.setattr(_native, "cuda_report", lambda: report)


def test_this_machine(capsys: pytest.CaptureFixture[str]) -> None:
    assert doctor.main() == 0
    text = capsys.readouterr().out
    assert "All well" in text
    for row in ("built: CUDA backend", "CUDA driver", "CPU kernels", "vm.max_map_count"):
        assert row in text


def test_the_real_report_has_what_the_doctor_reads() -> None:
    report = _native.cuda_report()
    assert bool(report.problem) == (report.driver_version == 0)
    for card in report.devices:
        assert card.name
        assert card.total_bytes > 0
        assert card.granularity % (64 << 10) == 0


@pytest.mark.parametrize("built", [True, False])
def test_a_card(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], built: bool
) -> None:
    monkeypatch.setattr(_cuda, "BUILT", built)
    monkeypatch.setattr(_cuda, "ARCHITECTURES", "80-real,90a-real,90-virtual" if built else "")
    monkeypatch.delenv("XLA_PYTHON_CLIENT_MEM_FRACTION", raising=False)
    monkeypatch.delenv("XLA_PYTHON_CLIENT_PREALLOCATE", raising=False)
    _driver(monkeypatch, _card(), _card(ordinal=1, name="Tesla V100", compute_capability=(7, 0)))
    assert doctor.main() == 0
    text = capsys.readouterr().out
    assert "for CUDA 13.0" in text
    assert "NVIDIA H100, compute capability 9.0, 81,920 MiB, blocks are multiples of 2 MiB" in text
    assert "V100, compute capability 7.0, 81,920 MiB; too old: 8.0" in text
    assert "75% of the GPU when it starts (the default)" in text
    assert ("yes, for 80 real, 90a real, 90 virtual" in text) == built
    assert ("JAX_KVPAGE_CUDA=ON" in text) != built


@pytest.mark.parametrize(
    ("version", "text"),
    [
        (
            12080,
            "driver is for CUDA 12.8, older than the toolkit of this build (13.1), and does not",
        ),
        (13000, "older than the toolkit of this build (13.1): it runs the machine code"),
        (13010, ""),
        (13020, ""),
        (14000, ""),
    ],
)
def test_an_old_driver(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], version: int, text: str
) -> None:
    monkeypatch.setattr(_cuda, "BUILT", True)
    monkeypatch.setattr(_cuda, "TOOLKIT", 13010)
    monkeypatch.setattr(_cuda, "ARCHITECTURES", "90a-real")
    _driver(monkeypatch, _card(), version=version)
    assert doctor.main() == 0
    found = capsys.readouterr().out
    assert "yes, for 90a real, with the toolkit of CUDA 13.1" in found
    assert ("older than the toolkit" in found) == bool(text)
    assert text in found
    release = f"{version // 1000}.{version % 1000 // 10}"
    assert (f"update the driver, or build jax_kvpage with nvcc {release}" in found) == bool(text)


def test_cards_that_cannot_be_used(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(_cuda, "BUILT", True)
    _driver(
        monkeypatch,
        _card(virtual_memory=False, granularity=0),
        _card(ordinal=1, problem="cuDeviceGetName of device 1 failed"),
    )
    assert doctor.main() == 0
    text = capsys.readouterr().out
    assert "no virtual memory management" in text
    assert "cuDeviceGetName of device 1 failed" in text
    assert "without a usable GPU" in text


def test_a_broken_backend(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken(*_: Any, **__: Any) -> Any:
        raise RuntimeError("no memory today")

    monkeypatch.setattr(_doctor, "KVPool", broken)
    assert doctor.main() == 1
    text = capsys.readouterr().out
    assert "fails: no memory today" in text
    assert "broken here: please report" in text
    assert "All well" not in text


@pytest.mark.parametrize(
    ("variables", "text"),
    [
        ({}, "75% of the GPU when it starts (the default)"),
        ({"XLA_PYTHON_CLIENT_MEM_FRACTION": ".4"}, "40% of the GPU when it starts"),
        ({"XLA_CLIENT_MEM_FRACTION": ".3"}, "30% of the GPU when it starts"),
        ({"XLA_PYTHON_CLIENT_PREALLOCATE": "false"}, "on demand"),
        ({"XLA_PYTHON_CLIENT_ALLOCATOR": "platform"}, "nothing ahead of time"),
    ],
)
def test_preallocation(
    monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], text: str
) -> None:
    for name in ("MEM_FRACTION", "PREALLOCATE", "ALLOCATOR"):
        monkeypatch.delenv(f"XLA_PYTHON_CLIENT_{name}", raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert text in _cuda.preallocation()


@pytest.mark.parametrize("blocks", ["1", "cuda"])
def test_a_build_without_the_fake_driver_says_so(
    monkeypatch: pytest.MonkeyPatch, blocks: str
) -> None:
    monkeypatch.delattr(_native, "fake_driver", raising=False)
    monkeypatch.setenv("JAX_KVPAGE_FAKE_DRIVER", blocks)
    with pytest.raises(ValueError, match=r"has no fake driver: .*JAX_KVPAGE_TESTING=ON"):
        _cuda.place_of(jax.devices("cpu")[0])


def test_the_version_is_that_of_the_project() -> None:
    project = tomllib.loads((pathlib.Path(__file__).parents[1] / "pyproject.toml").read_text())
    wanted = {project["project"]["version"], "0+uninstalled"}  # the latter from a build folder
    assert jax_kvpage.__version__ in wanted
    assert ("jax_kvpage", jax_kvpage.__version__) in _doctor.examine().rows
