"""Fixtures and options that all test files share.

`--refuse-skips` (or JAX_KVPAGE_REFUSE_SKIPS=1) turns skipped tests into failures, so that a run
which must have every optional package does not stay green on tests that never ran.
`--require-fake-driver` (or JAX_KVPAGE_REQUIRE_FAKE_DRIVER=1) does the same for tests marked
fake_driver, which are otherwise deselected if the build has no fake driver.
`--exhaustive` (or JAX_KVPAGE_TEST_EXHAUSTIVE=1) runs all cases of all tests (covering.py).
"""

from __future__ import annotations

import gc
import os
import pathlib
import sys
from collections.abc import Callable, Generator, Iterator
from typing import Any

import compiling
import covering
import jax
import pytest
from hypothesis import HealthCheck, settings

_ROOT = pathlib.Path(__file__).resolve().parent.parent
for _folder in (_ROOT / "tests", _ROOT / "examples"):
    if str(_folder) not in sys.path:
        sys.path.insert(0, str(_folder))

# The first example of a shape compiles a program, so a deadline per example would mostly measure
# the compiler.
settings.register_profile(
    "jax_kvpage",
    deadline=None,
    derandomize=True,
    print_blob=True,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
settings.register_profile("explore", parent=settings.get_profile("jax_kvpage"), derandomize=False)
settings.load_profile(os.environ.get("JAX_KVPAGE_HYPOTHESIS_PROFILE", "jax_kvpage"))


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--refuse-skips",
        action="store_true",
        default=os.environ.get("JAX_KVPAGE_REFUSE_SKIPS", "") not in ("", "0"),
        help="report a skipped test as a failure",
    )
    parser.addoption(
        "--require-fake-driver",
        action="store_true",
        default=os.environ.get("JAX_KVPAGE_REQUIRE_FAKE_DRIVER", "") not in ("", "0"),
        help="fail in a build without the fake driver (JAX_KVPAGE_TESTING=ON has it)",
    )
    parser.addoption(
        "--exhaustive",
        action="store_true",
        default=covering.is_exhaustive(),
        help="all random cases and combinations of parameters, with XLA's optimizations",
    )
    parser.addoption(
        "--gpu-platform",
        choices=("cuda", "cpu"),
        default="cuda",
        help="where tests marked gpu run; cpu tries the tests themselves",
    )


@pytest.fixture
def shared_programs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Engines of the same model and shape share compiled programs, to save time."""
    import serving_rig  # imports the engine, which most files do not need

    serving_rig.share_programs(monkeypatch)


def _has_gpu(config: pytest.Config) -> bool:
    try:
        return bool(jax.devices(config.getoption("--gpu-platform")))
    except RuntimeError:
        return False


def _has_gpus(config: pytest.Config) -> bool:
    return _has_gpu(config) and len(jax.devices(config.getoption("--gpu-platform"))) > 1


def _has_fake_driver(config: pytest.Config) -> bool:
    from jax_kvpage import _native

    if hasattr(_native, "fake_driver"):
        return True
    if config.getoption("--require-fake-driver"):
        raise pytest.UsageError(
            "--require-fake-driver: this build of jax_kvpage has no fake driver: "
            "install it with -C cmake.define.JAX_KVPAGE_TESTING=ON"
        )
    return False


def _is_exhaustive(config: pytest.Config) -> bool:
    return bool(config.getoption("--exhaustive"))


def _runs_on_fake_driver() -> bool:
    return os.environ.get("JAX_KVPAGE_FAKE_DRIVER", "0") not in ("", "0")


def pytest_configure(config: pytest.Config) -> None:
    if _runs_on_fake_driver() and config.getoption("numprocesses", None):
        raise pytest.UsageError(
            "JAX_KVPAGE_FAKE_DRIVER with -n: only a run in one process checks the driver at its end"
        )
    if config.getoption("--require-fake-driver"):
        _has_fake_driver(config)  # under pytest-xdist, only this call reports the error
    # torch's threads spin while they wait for each other, which costs more than they gain.
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    # Through the environment, so that processes started by tests see it too.
    os.environ[covering.VARIABLE] = "1" if config.getoption("--exhaustive") else "0"
    compiling.configure(config)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Deselects tests whose marker names something absent, and those outside the default subset.

    Deselected tests neither run nor count as skipped.
    """
    left_out = set(covering.dropped_by_default(items))
    ways = {
        "gpu": _has_gpu,
        "gpus": _has_gpus,
        "fake_driver": _has_fake_driver,
        "exhaustive": _is_exhaustive,
    }
    for marker, is_here in ways.items():
        marked = [item for item in items if item.get_closest_marker(marker)]
        if marked and not is_here(config):
            left_out.update(marked)
    config.hook.pytest_deselected(items=[item for item in items if item in left_out])
    items[:] = [item for item in items if item not in left_out]


def pytest_collection_finish() -> None:
    _set_aside_what_lives()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    if report.skipped and item.config.getoption("--refuse-skips"):
        report.outcome = "failed"
        report.longrepr = f"{item.nodeid} skipped under --refuse-skips: {report.longrepr}"
    return report


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report(
    collector: pytest.Collector,
) -> Generator[None, pytest.CollectReport, pytest.CollectReport]:
    report = yield
    if report.skipped and collector.config.getoption("--refuse-skips"):
        report.outcome = "failed"
        report.longrepr = f"{collector.nodeid} skipped under --refuse-skips: {report.longrepr}"
    return report


def pytest_sessionfinish(session: pytest.Session) -> None:
    """On the fake driver, fails the run if anything is left alive or a driver rule was broken."""
    if not _runs_on_fake_driver():
        return
    from jax_kvpage import _native

    gc.unfreeze()
    gc.collect()
    counts, violation = _native.fake_driver.report()
    left = ", ".join(f"{count} {name}" for name, count in counts.items() if count)
    if left:
        print(f"\nfake driver: {left} at the end of the run. {violation}")
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def _set_aside_what_lives() -> None:
    """Collects all garbage and exempts the survivors from later collections: scanning modules and
    traced programs takes longer than most tests.
    """
    gc.unfreeze()
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True, scope="module")
def clean_up() -> Iterator[None]:
    """Drops the compiled programs of a test file when it ends: all together they take several GiB.
    Programs that several files need are in the session's cache on disk.
    """
    yield
    jax.clear_caches()
    _set_aside_what_lives()


@pytest.fixture
def make_pool() -> Iterator[Callable[..., Any]]:
    """Returns a factory of pools that are closed when the test ends, even if it fails."""
    import jax_kvpage as kvp

    pools: list[kvp.KVPool] = []

    def make(spec: kvp.CacheSpec, capacity: str | int = "16MiB", **options: Any) -> kvp.KVPool:
        pool = kvp.KVPool(spec, capacity, **options)
        pools.append(pool)
        return pool

    yield make
    gc.collect()  # views that a test dropped must not make its pool's close wait
    for pool in pools:
        pool.close()


@pytest.fixture(params=["fused", "per_layer"])
def layout(request: pytest.FixtureRequest) -> str:
    """The layout of the pool; the test runs with each."""
    return request.param


@pytest.fixture
def store(tmp_path: pathlib.Path) -> Iterator[Any]:
    """An open `BlockStore` in the test's directory."""
    import jax_kvpage as kvp

    with kvp.BlockStore(tmp_path) as opened:
        yield opened
