"""Agreement: how the processes of a pool agree on a decision.

Every process makes the same calls in the same order and decides by itself. For a call that can fail
in a single process, each process publishes the call and its outcome; the first process compares
them, and its verdict says for all whether the decision stands. Calls whose result follows from what
all processes know are only recorded: a running hash of them is compared at the next decision.

Messages go through the key-value store of JAX's coordination service, so they neither wait for
programs nor queue behind them.
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

# Environment variable: seconds that a process waits for the others in a call.
TIMEOUT = "JAX_KVPAGE_PROCESS_TIMEOUT"
_DEFAULT_TIMEOUT = 300.0  # as long as JAX waits for processes to start and stop

_SLICE = 0.5  # seconds between runs of signal handlers during a wait
_KEPT = 32  # decisions whose keys are deleted together
_SHOWN = 8  # maximum calls and list items that an error shows

# Distinguishes pools over the same processes: all processes create them in the same order.
_made: collections.Counter[tuple[int, ...]] = collections.Counter()


@dataclasses.dataclass(frozen=True)
class Verdict:
    """The result of the first process's comparison.

    Attributes:
        kind: "same": all have decided alike; "refused": all have failed alike, and nothing has
            changed; "failed": one has failed, so the decision must be undone; "differ": all would
            continue, but in different ways; "diverged": the calls differ; "lost": a process does
            not answer. After the last two, the pool is unusable.
        process: the process that failed.
        failure: the failure that it published.
        text: text for an error.
        least: elementwise minimum of the processes' numbers, if "same".
        most: elementwise maximum.
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
    """Encodes an argument of a call for the hash."""
    if isinstance(value, np.ndarray):
        return f"{value.dtype}{value.shape}".encode() + value.tobytes()
    if isinstance(value, (list, tuple)) and any(isinstance(each, np.ndarray) for each in value):
        return b"[" + b",".join(map(_packed, value)) + b"]"
    return repr(value).encode()


def _shown(value: Any) -> str:
    """Formats an argument for an error, with only the first of many items."""
    if isinstance(value, (list, np.ndarray)) and len(value) > _SHOWN:
        return f"[{', '.join(map(_shown, value[:_SHOWN]))}, ... ({len(value)} in all)]"
    return repr(value)


class Agreement:
    """One process's view of the calls on a pool.

    Args:
        processes: indices of all processes that have devices of the pool, ascending.

    Raises:
        ValueError: the timeout in the environment is invalid.
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
        self.heard = False  # whether the newest call has ended with a verdict

    # ---- recorded calls and decisions ----

    def record(self, op: str, *args: Any) -> None:
        """Adds a call to what is compared at the next decision.

        Raises:
            PoolClosed: the pool was closed by this process, or this process is a fork of its
                creator.
            KVPageError: the processes have diverged before.
        """
        if self._closed or os.getpid() != self._pid:
            why = (
                "closed" if self._closed else "a parent process's, and cannot be used after a fork"
            )
            raise PoolClosed(f"{op}: the pool is {why}: make a new one")
        if self._broken:
            raise KVPageError(self._broken)
        self.note(op, *args)
        self.heard = False

    def note(self, op: str, *args: Any, shown: bool = True) -> None:
        """Adds the outcome of a call to what is compared.

        Args:
            op: name of the call.
            *args: its arguments or its result.
            shown: whether errors list it among the calls.
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
        """Publishes the outcome of a call here, and returns the verdict on all outcomes.

        Args:
            op: name of the call, which must be recorded already.
            state: "done"; "refused": it failed and changed nothing; "failed": it failed; "renew":
                see `ProcessPool.new_generation`.
            told: outcome that must be equal in all processes.
            failure: why it failed.
            numbers: numbers whose minimum and maximum are computed.

        Returns:
            The verdict; never "diverged" or "lost".

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
            # The first process may itself time out on another process, and must be able to report
            # that.
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
        """Announces that this process makes no more calls; does not wait for the others."""
        if not self._broken and os.getpid() == self._pid:
            self._leave(f"process {self._own} closed the pool or failed before this call")
        self._closed = True

    def _leave(self, text: str) -> None:
        """Ends this process's participation; the others learn of it in their next call."""
        record = {"op": "end", "hash": "", "recent": [text], "state": "done"}
        key = self._key(self._count, self._own)
        if self._own == self.processes[0]:
            key = self._key(self._count, "verdict")
            record = dataclasses.asdict(Verdict("diverged", text=text))
        with contextlib.suppress(RuntimeError):  # jax.distributed was already shut down
            self._store.put(key, json.dumps(record))
        self._broken = text

    # ---- the first process compares ----

    def _judge(self, number: int, op: str, own: dict[str, Any]) -> Verdict:
        verdict = Verdict(
            "lost",
            text=f"{op}: process {self._own} was interrupted before it received the other "
            "processes' part of this call: the pool can no longer be used, end the processes",
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
            # All have published this decision, so nobody reads earlier ones any more.
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
            f": it is busy with something else, or has ended. Calls of process {self._own} since "
            f"the last decision: {', '.join(self._recent)}. All processes must make the same calls "
            "on a pool in the same order; this pool can no longer be used: end the processes"
        )
        if process == self.processes[0]:  # the first process reports it in its verdict instead
            self._leave(text)
        raise KVPageError(text)

    def _unreachable(self, op: str, error: Exception) -> KVPageError:
        first = str(error).splitlines()[0]
        self._broken = (
            f"{op}: the coordination service of jax.distributed does not answer, so the processes "
            f"can no longer agree on calls: end them ({first})"
        )
        return KVPageError(self._broken)


def _compare(op: str, records: dict[int, dict[str, Any]]) -> Verdict:
    """Returns the verdict on the records of all processes."""
    own = next(iter(records.values()))
    if any((r["op"], r["hash"]) != (own["op"], own["hash"]) for r in records.values()):
        calls = "; ".join(f"process {p}: {', '.join(r['recent'])}" for p, r in records.items())
        return Verdict(
            "diverged",
            text=f"{op}: the processes have made different calls since their last decision: "
            f"{calls}. All must make the same calls on a pool in the same order, with the same "
            "arguments. Their pools now differ and can no longer be used: end the processes",
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
    """Returns why a call failed, without the message, which may name the process's own pool."""
    return {name: value for name, value in record["failure"].items() if name != "message"}
