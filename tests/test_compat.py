"""The checks at import (platform and FFI version) and their messages."""

from __future__ import annotations

import pathlib

import pytest

from jax_kvpage import _compat, _native


def test_this_build_loads_here() -> None:
    running = _compat.running_ffi_api()
    assert running is not None
    _compat.check_ffi_api(tuple(_native.FFI_API_VERSION), running)
    assert _compat.load_native() is _native


@pytest.mark.parametrize("running", [(0, 3), (0, 4), None])
def test_older_builds_load(running: tuple[int, int] | None) -> None:
    _compat.check_ffi_api((0, 3), running)


@pytest.mark.parametrize("built", [(0, 4), (1, 0)])
def test_newer_builds_are_refused_with_both_versions(built: tuple[int, int]) -> None:
    with pytest.raises(
        ImportError, match=rf"FFI API {built[0]}\.{built[1]}.*implements 0\.3"
    ) as caught:
        _compat.check_ffi_api(built, (0, 3))
    assert "Reinstall jax_kvpage" in str(caught.value)


def test_linux_only() -> None:
    _compat.check_platform("linux")
    for platform in ("darwin", "win32"):
        with pytest.raises(ImportError, match=f"Linux only, this is '{platform}'"):
            _compat.check_platform(platform)


def test_a_missing_coordination_client_is_a_clear_error(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match=r"jax\.distributed\.initialize was not called"):
        _compat.KeyValueStore()
    monkeypatch.setattr(_compat.importlib, "import_module", lambda name: object())
    with pytest.raises(ValueError, match="gives no way to exchange decisions"):
        _compat.KeyValueStore()


def test_private_modules_of_jax_are_used_in_one_place() -> None:
    sources = pathlib.Path(_compat.__file__).parent.rglob("*.py")
    users = {path.name: path.read_text().count("jax._src") for path in sources}
    assert {name: count for name, count in users.items() if count} == {"_compat.py": 1}
