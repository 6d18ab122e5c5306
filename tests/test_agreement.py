"""The messages that processes exchange about a decision; threads stand in for processes here."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest

import jax_kvpage as kvp
from jax_kvpage.sharding import agreement
from jax_kvpage.sharding.agreement import TIMEOUT, Agreement, Verdict

_COUNT = 3


class _Store:
    """Stands in for `KeyValueStore`; shared by all processes."""

    def __init__(self) -> None:
        self.values: dict[str, str] = {}
        self._changed = threading.Condition()

    def put(self, key: str, text: str) -> None:
        with self._changed:
            assert key not in self.values
            self.values[key] = text
            self._changed.notify_all()

    def get(self, key: str, seconds: float) -> str | None:
        with self._changed:
            self._changed.wait_for(lambda: key in self.values, seconds)
            return self.values.get(key)

    def delete(self, folder: str) -> None:
        with self._changed:
            self.values = {k: v for k, v in self.values.items() if not k.startswith(folder)}


class _Rig:
    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.store = _Store()
        monkeypatch.setattr(agreement, "KeyValueStore", lambda: self.store)
        monkeypatch.setenv(TIMEOUT, "0.4")
        self.members = []
        for index in range(_COUNT):
            monkeypatch.setattr(agreement, "_made", agreement.collections.Counter())
            monkeypatch.setattr(agreement.jax, "process_index", lambda index=index: index)
            self.members.append(Agreement(range(_COUNT)))

    def all(self, call: Callable[[int, Agreement], Any]) -> list[Any]:
        """Returns each process's result of a call, or its exception."""

        def one(index: int) -> Any:
            try:
                return call(index, self.members[index])
            except kvp.KVPageError as error:
                return error

        with ThreadPoolExecutor(_COUNT) as executor:
            return list(executor.map(one, range(_COUNT)))


@pytest.fixture
def rig(monkeypatch: pytest.MonkeyPatch) -> _Rig:
    return _Rig(monkeypatch)


def test_numbers_are_brought_together_and_old_messages_deleted(rig: _Rig) -> None:
    rng = np.random.default_rng(0)
    for _ in range(200):
        numbers = rng.integers(0, 9, (_COUNT, 4))

        def decide(index: int, member: Agreement, numbers: Any = numbers) -> Verdict:
            member.record("call", [1, 2], np.arange(3))
            return member.decide("call", "done", "equal", numbers=numbers[index])

        wanted = Verdict("same", least=[*numbers.min(0)], most=[*numbers.max(0)])
        assert rig.all(decide) == [wanted] * _COUNT
    assert len(rig.store.values) < 64 * _COUNT


def test_failures_name_the_first_process_that_has_one(rig: _Rig) -> None:
    def decide(failed: dict[int, tuple[str, Any]]) -> list[Any]:
        def one(index: int, member: Agreement) -> Verdict:
            member.record("call")
            state, why = failed.get(index, ("done", None))
            return member.decide("call", state, failure={"reason": why, "message": str(index)})

        return rig.all(one)

    for failed, kind, process in (
        ({1: ("failed", "a"), 2: ("failed", "b")}, "failed", 1),
        ({0: ("refused", "a"), 2: ("refused", "a")}, "failed", 0),  # refused, but not by all
        (dict.fromkeys(range(_COUNT), ("refused", "a")), "refused", 0),
        ({0: ("refused", "a"), 1: ("refused", "a"), 2: ("refused", "b")}, "failed", 0),
        (dict.fromkeys(range(_COUNT), ("failed", "a")), "failed", 0),
        (dict.fromkeys(range(_COUNT), ("renew", "a")), "same", 0),
        ({2: ("renew", "a")}, "failed", 2),
    ):
        for verdict in decide(failed):
            assert (verdict.kind, verdict.process) == (kind, process)


@pytest.mark.parametrize(
    "arguments",
    [([1], [1], [2]), (np.int32([1]), np.int32([1]), np.int64([1])), (None, 0, None)],
    ids=["values", "types", "kinds"],
)
def test_calls_that_differ_end_all(rig: _Rig, arguments: tuple[Any, ...]) -> None:
    def differ(index: int, member: Agreement) -> Verdict:
        member.record("call", arguments[index])
        member.record("last")
        return member.decide("last", "done")

    for _ in range(2):  # the error is permanent
        for error in rig.all(differ):
            assert isinstance(error, kvp.KVPageError)
            assert "process 2: call(" in str(error)


def test_different_decisions_are_told(rig: _Rig) -> None:
    def decide(index: int, member: Agreement) -> Verdict:
        member.record("call")
        return member.decide("call", "done", told=f"slot {index // 2}")

    for verdict in rig.all(decide):
        assert (verdict.kind, verdict.text) == (
            "differ", "process 0: slot 0; process 1: slot 0; process 2: slot 1")  # fmt: skip


@pytest.mark.parametrize("absent", range(_COUNT))
@pytest.mark.parametrize("closes", [False, True])
def test_nobody_waits_for_ever(rig: _Rig, absent: int, closes: bool) -> None:
    def decide(index: int, member: Agreement) -> Verdict | None:
        if index == absent:
            if closes:
                member.close()
            return None
        member.record("call")
        return member.decide("call", "done")

    begin = time.monotonic()
    errors = [error for error in rig.all(decide) if error is not None]
    assert time.monotonic() - begin < (0.4 if closes else 5)
    assert len(errors) == _COUNT - 1
    said = "closed the pool" if closes else "has not made this call"
    for error in errors:
        assert f"process {absent} {said}" in str(error)


@pytest.mark.parametrize("text", ["soon", "0", "-1", "nan"])
def test_a_time_limit_that_is_none(rig: _Rig, monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    monkeypatch.setenv(TIMEOUT, text)
    with pytest.raises(ValueError, match=f"{TIMEOUT}: wanted a number of seconds"):
        Agreement(range(_COUNT))
