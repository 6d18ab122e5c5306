"""Agreement: what the processes of a pool tell each other about a decision.

Every process makes the same calls in the same order and decides by itself. For a call that can fail
in one process alone, each publishes what it was asked and what came of it; the first process
compares, and its verdict says for all of them whether the decision stands. Calls whose result
follows from what all processes know are only recorded: a running hash of them goes with the next
decision.

The messages go through the key-value store of JAX's coordination service, so that they neither wait
for programs nor queue behind them.
"""

import collections
import contextlib
import dataclasses
import hashlib
import json
import os
import time
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from jax_kvpage._compat import KeyValueStore
from jax_kvpage.errors import KVPageError, PoolClosed

__all__ = ["TIMEOUT", "Agreement", "Verdict"]

# Seconds that a process waits for the others' part in a call, from the environment.
TIMEOUT = "JAX_KVPAGE_PROCESS_TIMEOUT"
_DEFAULT_TIMEOUT = 300.0  # as JAX waits for processes to come and go

_SLICE = 0.5  # seconds after which a wait lets signal handlers run
_KEPT = 32  # decisions whose keys are deleted together
_SHOWN = 8  # calls since the last decision, and items of a list, that an error shows

# How pools over the same processes are told apart: all processes make them in the same order.
_made: collections.Counter[tuple[int, ...]] = collections.Counter()


@dataclasses.dataclass(frozen=True)
class Verdict:
    """What the first process has found.

    Attributes:
        kind: "same": all have decided alike; "refused": all have failed alike, and nothing has
            changed; "failed": one has failed, the decision is to be taken back; "differ": all
            would go on, but in different ways; "diverged": the calls differ, and "lost": a process
            does not answer, after which the pool is of no use.
        process: the process that has failed.
        failure: its reason, as it published it.
        text: what an error says.
        least: the elementwise minimum of the processes' numbers, of "same".
        most: the maximum.
    """

    kind: str
    process: int = 0
    failure: dict[str, Any] = dataclasses.field(default_factory=dict)
    text: str = ""
    least: list[int] = dataclasses.field(default_factory=list)
    most: list[int] = dataclasses.field(default_factory=list)


def _timeout() -> float:
    text = os.environ.get(TIMEOUT, "")
    try:
        seconds = float(text) if text else _DEFAULT_TIMEOUT
    except ValueError:
        seconds = -1.0
    if not 0 < seconds < 1e6:
        raise ValueError(f"{TIMEOUT}: wanted a number of seconds above 0, got {text!r}")
    return seconds


def _packed(value: Any) -> bytes:
    """An argument of a call, for the hash."""
    if isinstance(value, np.ndarray):
        return f"{value.dtype}{value.shape}".encode() + value.tobytes()
    if isinstance(value, (list, tuple)) and any(isinstance(each, np.ndarray) for each in value):
        return b"[" + b",".join(map(_packed, value)) + b"]"
    return repr(value).encode()


def _shown(value: Any) -> str:
    """The same for an error, with no more than the first of many tokens."""
    if isinstance(value, (list, np.ndarray)) and len(value) > _SHOWN:
        return f"[{', '.join(map(_shown, value[:_SHOWN]))}, ... ({len(value)} in all)]"
    return repr(value)


class Agreement:
    """The calls of one pool, as one process sees them.

    Args:
        processes: numbers of all processes that have devices of the pool, ascending.

    Raises:
        ValueError: a timeout in the environment that is none.
    """

    def __init__(self, processes: Sequence[int]) -> None:
        self.processes = list(processes)
        self._own = jax.process_index()
        self._timeout = _timeout()
        self._store = KeyValueStore()
        key = tuple(self.processes)
        self._name = f"jax_kvpage/{'-'.join(map(str, key))}/{_made[key]}"
        _made[key] += 1
        self._count = 0  # decisions so far
        self._hash = hashlib.blake2b(digest_size=16)
        self._recent: collections.deque[str] = collections.deque(maxlen=_SHOWN)
        self._broken = ""
        self._closed = False
        self._pid = os.getpid()
        self.heard = False  # whether the newest call has ended in a verdict

    # ---- what all processes are to do alike ----

    def record(self, op: str, *args: Any) -> None:
        """Adds a call to what is compared at the next decision.

        Raises:
            PoolClosed: by this process; or it is a fork of the one that has made the pool.
            KVPageError: the processes have diverged before.
        """
        if self._closed or os.getpid() != self._pid:
            why = "closed" if self._closed else "of another process, which this one was forked from"
            raise PoolClosed(f"{op}: the pool is {why}: make a new one")
        if self._broken:
            raise KVPageError(self._broken)
        self.note(op, *args)
        self.heard = False

    def note(self, op: str, *args: Any, shown: bool = True) -> None:
        """Adds what has come of a call to what is compared.

        Args:
            op: the call.
            *args: its arguments, or its result.
            shown: whether an error is to list it among the calls.
        """
        self._hash.update(b"\0".join([op.encode(), *map(_packed, args), b"\n"]))
        if not shown:
            return
        text = ", ".join(map(_shown, args)).replace("\n", " ")
        self._recent.append(f"{op}({text if len(text) <= 120 else text[:117] + '...'})")

    def decide(
        self,
        op: str,
        state: str,
        told: str = "",
        failure: dict[str, Any] | None = None,
        numbers: Sequence[int] = (),
    ) -> Verdict:
        """Publishes what a call has come to here, and hears what it has come to everywhere.

        Args:
            op: the call, which was recorded.
            state: "done"; "refused": it failed, and has changed nothing; "failed": it failed;
                "renew": see `ProcessPool.new_generation`.
            told: what must be equal in all processes.
            failure: why it failed.
            numbers: to take the minimum and maximum of.

        Returns:
            The verdict, which is not "diverged" or "lost".

        Raises:
            KVPageError: the processes have made different calls, or one does not answer.
        """
        record = {
            "op": op,
            "hash": self._hash.hexdigest(),
            "recent": list(self._recent),
            "state": state,
            "told": told,
            "failure": failure or {},
            "numbers": [int(n) for n in numbers],
        }
        number, self._count = self._count, self._count + 1
        if self._own == self.processes[0]:
            verdict = self._judge(number, op, record)
        else:
            self._put(op, self._key(number, self._own), record)
            # The first process may wait for another one first, and is to say so.
            until = time.monotonic() + 1.1 * self._timeout + 1
            answer = self._get(op, self._key(number, "verdict"), self.processes[0], until)
            verdict = Verdict(**answer)
        self._recent.clear()
        self.heard = True
        if verdict.kind in ("diverged", "lost"):
            self._broken = verdict.text
            raise KVPageError(verdict.text)
        return verdict

    def close(self) -> None:
        """Tells the other processes that this one makes no more calls; does not wait for them."""
        if not self._broken and os.getpid() == self._pid:
            self._leave(f"process {self._own} has closed the pool, or has failed, before this call")
        self._closed = True

    def _leave(self, text: str) -> None:
        """Ends this process's part; the others learn of it in their next call."""
        record = {"op": "end", "hash": "", "recent": [text], "state": "done"}
        key = self._key(self._count, self._own)
        if self._own == self.processes[0]:
            key = self._key(self._count, "verdict")
            record = dataclasses.asdict(Verdict("diverged", text=text))
        with contextlib.suppress(RuntimeError):  # jax.distributed was shut down before
            self._store.put(key, json.dumps(record))
        self._broken = text

    # ---- the first process compares ----

    def _judge(self, number: int, op: str, own: dict[str, Any]) -> Verdict:
        verdict = Verdict(
            "lost",
            text=f"{op}: process {self._own} was interrupted before it knew the other processes' "
            "part in this call: the pool is of no use any more, end the processes",
        )
        try:
            records = {self._own: own}
            until = time.monotonic() + self._timeout
            for process in self.processes[1:]:
                records[process] = self._get(op, self._key(number, process), process, until)
            verdict = _compare(op, records)
        except KVPageError as error:
            verdict = Verdict("lost", text=str(error))
        finally:  # also after a KeyboardInterrupt: the others wait for it
            self._broken = verdict.text if verdict.kind == "lost" else ""
            self._put(op, self._key(number, "verdict"), dataclasses.asdict(verdict))
        if number % _KEPT == 0 and number:
            # All have published this decision, so nobody reads those before it any more.
            self._store.delete(f"{self._name}/{number // _KEPT - 1}/")
        return verdict

    # ---- messages ----

    def _key(self, number: int, who: int | str) -> str:
        return f"{self._name}/{number // _KEPT}/{number}/{who}"

    def _put(self, op: str, key: str, value: dict[str, Any]) -> None:
        try:
            self._store.put(key, json.dumps(value))
        except RuntimeError as error:
            raise self._unreachable(op, error) from None

    def _get(self, op: str, key: str, process: int, until: float) -> dict[str, Any]:
        while (left := until - time.monotonic()) > 0:
            try:
                text = self._store.get(key, min(left, _SLICE))
            except RuntimeError as error:
                raise self._unreachable(op, error) from None
            if text is not None:
                answer: dict[str, Any] = json.loads(text)
                return answer
        text = (
            f"{op}: process {process} has not made this call within {self._timeout:g} s ({TIMEOUT})"
            f": it works on something else, or is gone. Calls of process {self._own} since the "
            f"last decision: {', '.join(self._recent)}. All processes must make the same calls on "
            "a pool in the same order; this one is of no use any more: end the processes"
        )
        if process == self.processes[0]:  # else this process is the first: its verdict tells them
            self._leave(text)
        raise KVPageError(text)

    def _unreachable(self, op: str, error: Exception) -> KVPageError:
        first = str(error).splitlines()[0]
        self._broken = (
            f"{op}: the coordination service of jax.distributed does not answer, so that the "
            f"processes cannot decide together any more: end them ({first})"
        )
        return KVPageError(self._broken)


def _compare(op: str, records: dict[int, dict[str, Any]]) -> Verdict:
    """The verdict on what all processes have published."""
    own = next(iter(records.values()))
    if any((r["op"], r["hash"]) != (own["op"], own["hash"]) for r in records.values()):
        calls = "; ".join(f"process {p}: {', '.join(r['recent'])}" for p, r in records.items())
        return Verdict(
            "diverged",
            text=f"{op}: the processes have made different calls since their last decision: "
            f"{calls}. All must make the same calls on a pool in the same order, with the same "
            "arguments; what each of them has decided differs, and the pool is of no use any more",
        )
    failed = {p: r for p, r in records.items() if r["state"] != "done"}
    if failed and not all(r["state"] == "renew" for r in records.values()):
        process, first = next(iter(failed.items()))
        alike = all(
            r["state"] == "refused" and _reason(r) == _reason(first) for r in failed.values()
        )
        kind = "refused" if alike and len(failed) == len(records) else "failed"
        return Verdict(kind, process=process, failure=first["failure"])
    if any(r["told"] != own["told"] for r in records.values()):
        told = "; ".join(f"process {p}: {r['told']}" for p, r in records.items())
        return Verdict("differ", text=told)
    numbers = [r["numbers"] for r in records.values()]
    return Verdict(
        "same",
        least=[min(each) for each in zip(*numbers, strict=True)],
        most=[max(each) for each in zip(*numbers, strict=True)],
    )


def _reason(record: dict[str, Any]) -> dict[str, Any]:
    """Why a call has failed, without the words, which may name the process's own pool."""
    return {name: value for name, value in record["failure"].items() if name != "message"}
