"""ProcessPool: the pools of this process's devices, whose decisions match all other processes.

Each process has the compiled pools of its own devices and makes the same calls. A call that can
fail in a single process (because it takes memory from the system, or its program can fail) ends
with an agreement of all processes: it stands everywhere or nowhere. Other calls are compared
afterwards.
"""

import contextlib
import functools
import hashlib
import types
from collections.abc import Callable, Sequence
from typing import Any, TypeVar, cast

import jax
import numpy as np

from jax_kvpage import _native
from jax_kvpage.errors import KVPageError
from jax_kvpage.sharding.agreement import Agreement, Verdict
from jax_kvpage.sharding.shards import ShardedDecision, ShardedPool

__all__ = ["ProcessPool", "failure_of", "raised_elsewhere"]

_COUNTS = ("wanted", "free", "draining", "reclaimable")
# Byte counts that are totals over all devices in the mesh.
_BYTES = ("virtual_bytes", "physical_bytes", "block_bytes")


def failure_of(error: Any) -> dict[str, Any]:
    """Describes an exception, or a claim that is not ok, to other processes."""
    if isinstance(error, _native.StatusError):
        code, reason, message = error.args
        return {"code": code.name, "reason": reason.name, "message": message}
    if isinstance(error, BaseException):
        return {"raised": f"{type(error).__name__}: {str(error)[:500]}"}
    named = {"code": error.code.name, "reason": error.reason.name, "message": error.message}
    return {**named, **{name: int(getattr(error, name)) for name in _COUNTS}}


def _raised(op: str, verdict: Verdict) -> Any:
    """Returns the failure of another process as a claim, or raises it."""
    failure, where = dict(verdict.failure), f"process {verdict.process}"
    if "raised" in failure:
        raise KVPageError(f"{op}: {where} failed, and nothing has changed: {failure['raised']}")
    code = getattr(_native.Code, failure.pop("code"))
    reason = getattr(_native.Reason, failure.pop("reason"))
    message = f"{where}: {failure.pop('message')}"
    if not failure:
        raise _native.StatusError(code, reason, message)
    return types.SimpleNamespace(ok=False, code=code, reason=reason, message=message, **failure)


def raised_elsewhere(op: str, verdict: Verdict) -> Exception:
    """Returns the exception for a call that failed in another process, without a claim."""
    why = verdict.failure.get("raised") or verdict.failure.get("message", "")
    return jax.errors.JaxRuntimeError(f"{op}: process {verdict.process}: {why}")


_Method = TypeVar("_Method", bound=Callable[..., Any])


def _recorded(method: _Method) -> _Method:
    """Decorates a method whose calls and results are compared among the processes."""
    name = method.__name__

    @functools.wraps(method)
    def call(self: "ProcessPool", *args: Any) -> Any:
        given = [self.named(arg) for arg in args if not isinstance(arg, ShardedDecision)]
        if given and isinstance(given[0], str) and given[0].isidentifier():
            self.agreement.record(*given)  # the name of the call that users know
        else:
            self.agreement.record(name, *given)
        try:
            result = method(self, *args)
        except BaseException as error:
            if not self.agreement.heard:  # the other processes do not know: compared later
                self.agreement.note(f"{name} raised {type(error).__name__}")
            raise
        if not self.agreement.heard:
            self.agreement.note(name, getattr(result, "ok", result), shown=False)
        return result

    return cast(_Method, call)


class ProcessPool(ShardedPool):
    """`ShardedPool` in one of several processes.

    Args:
        shards: a pool for each device of this process, new and with the same spec.
        agreement: agreement with the other processes.
        devices: number of devices in all processes.
    """

    def __init__(self, shards: Sequence[Any], agreement: Agreement, devices: int) -> None:
        super().__init__(shards)
        self.agreement = agreement
        # Minimum and maximum length of each slot when the newest generation began.
        self.lengths: tuple[list[int], list[int]] = ([], [])
        self._devices = devices
        self._spaces: dict[str, int] = {}
        self._deciding = False

    def named(self, argument: Any) -> Any:
        """Normalizes an argument of a call to what all processes would write.

        A namespace may have a random name, like an engine's. Only which calls use the same one
        matters, so it is replaced by a number.
        """
        if isinstance(argument, str) and argument.startswith("="):
            return f"namespace {self._spaces.setdefault(argument, len(self._spaces))}"
        return argument

    # ---- calls that can fail in one process alone ----

    def _alike(
        self,
        op: str,
        attempt: Callable[[int], Any],
        undo: Callable[[Sequence[int]], None],
        told: Callable[[int, Any], Any],
        settle: bool = True,
    ) -> Any:
        """Makes the same call on every shard of all processes; all or none."""
        if not settle:  # the result follows from earlier decisions
            return super()._alike(op, attempt, undo, told, settle)
        self._deciding = True
        try:
            for _ in range(2):
                self.settle()
                done, result = self._attempt(attempt)
                try:
                    verdict = self._agree(op, done, result, told)
                except BaseException:
                    undo(done)
                    raise
                if verdict.kind in ("same", "refused"):
                    if isinstance(result, BaseException):
                        raise result
                    return result[0]
                undo(done)
                self._give_back(forget=verdict.kind == "differ")
                if verdict.kind == "failed":
                    return self._failed(op, result, verdict)
            raise KVPageError(
                f"{op}: the processes would decide differently: {verdict.text}. Nothing has "
                "changed. Release the pool's slots, or make a new pool"
            )
        finally:
            self._deciding = False

    def _attempt(self, attempt: Callable[[int], Any]) -> tuple[list[int], Any]:
        """Returns the shards that were called, and their results or the exception of one."""
        done: list[int] = []
        try:
            results = []
            for i in range(len(self.shards)):
                done.append(i)
                results.append(attempt(i))
        except BaseException as error:  # published first, then raised
            return done, error
        return done, results

    def _agree(
        self, op: str, done: Sequence[int], result: Any, told: Callable[[int, Any], Any]
    ) -> Verdict:
        if isinstance(result, BaseException):
            # If the first shard refuses, nothing has changed.
            refused = isinstance(result, _native.StatusError) and len(done) == 1
            state = "refused" if refused else "failed"
            return self.agreement.decide(op, state, failure=failure_of(result))
        failed = [one for one in result if not getattr(one, "ok", True)]
        if failed:
            state = "refused" if len(failed) == len(result) else "failed"
            return self.agreement.decide(op, state, failure=failure_of(failed[0]))
        decided = [repr(told(i, one)) for i, one in enumerate(result)]
        text = decided[0] if len(set(decided)) == 1 else f"differs between devices {decided}"
        digest = hashlib.blake2b(text.encode(), digest_size=16).hexdigest()
        return self.agreement.decide(op, "done", told=f"{text[:200]} #{digest}")

    def _failed(self, op: str, result: Any, verdict: Verdict) -> Any:
        """Returns or raises the failure of a call: this process's, or another's."""
        if isinstance(result, BaseException):
            raise result
        own = [one for one in result if not getattr(one, "ok", True)]
        return own[0] if own else _raised(op, verdict)

    def undo(self, decision: ShardedDecision) -> None:
        """See `_native.Pool`."""
        if decision.edits and not self._deciding:  # all have agreed, but this process reverts
            self.agreement.note("undo", decision.edits)
        super().undo(decision)

    @_recorded
    def extend(self, slots: list[int], num_tokens: list[int]) -> Any:
        """See `_native.Pool`."""
        rows = {row.slot: row for row in self.shards[0].rows()}
        there = [rows[slot] for slot in slots if slot in rows and not rows[slot].draining]
        if len(there) == len(slots) and all(
            row.reserved >= wanted for row, wanted in zip(there, num_tokens, strict=True)
        ):
            return super()._alike(  # takes nothing from the system
                "extend",
                lambda i: self.shards[i].extend(slots, num_tokens),
                lambda done: None,
                lambda i, claim: claim.ok,
                settle=False,
            )

        def undo(done: Sequence[int]) -> None:
            for row in there:
                for i in done:
                    self.shards[i].retract(row.slot, row.reserved, row.committed)

        return self._alike(
            "extend",
            lambda i: self.shards[i].extend(slots, num_tokens),
            undo,
            lambda i, claim: claim.ok,
        )

    def resize(self, capacity_bytes: int) -> Any:
        """Changes the budget to the smallest that a process asks for, in bytes of all devices."""
        before = self.shards[0].numbers()
        size = before.blocks_total * before.block_bytes
        self.agreement.record("resize")
        wanted = self.agreement.decide("resize", "done", numbers=[capacity_bytes]).least[0]

        def undo(done: Sequence[int]) -> None:
            for i in done:
                with contextlib.suppress(_native.StatusError):
                    self.shards[i].resize(size)

        return self._alike(
            "resize",
            lambda i: self.shards[i].resize(wanted // self._devices),
            undo,
            lambda i, claim: claim.ok,
        )

    def _freeing(self, op: str, told: Callable[[int, Any], Any], *args: Any) -> int:
        """Makes a call that frees memory and cannot be undone."""
        self.agreement.record(op, *args)
        return int(
            self._alike(op, lambda i: getattr(self.shards[i], op)(*args), lambda done: None, told)
        )

    def evict(self, blocks: int) -> int:
        """See `_native.Pool`."""
        return self._freeing("evict", lambda i, freed: freed, blocks)

    def trim(self) -> int:
        """See `_native.Pool`. Returns what this process's first device freed."""
        return self._freeing("trim", lambda i, freed: None)

    def pin(self, space: str, ids: Any, share: float, seconds: float) -> int:
        """See `_native.Pool`.

        Raises:
            ValueError: the pin would expire at a different moment in each process.
        """
        if seconds >= 0:
            raise ValueError(
                f"pin: ttl: a pin cannot end by itself, after {seconds:g} s, in a pool over several"
                " processes, whose clocks differ: leave ttl out, and unpin in all processes"
            )
        return self._pin(space, ids, share, seconds)

    @_recorded
    def _pin(self, *args: Any) -> int:
        return super().pin(*args)

    acquire = _recorded(ShardedPool.acquire)
    fork = _recorded(ShardedPool.fork)
    acquire_prefix = _recorded(ShardedPool.acquire_prefix)
    truncate = _recorded(ShardedPool.truncate)
    drop_before = _recorded(ShardedPool.drop_before)

    # ---- calls whose result follows from what all processes know ----

    start_edits = _recorded(ShardedPool.start_edits)
    commit = _recorded(ShardedPool.commit)
    find_prefix = _recorded(ShardedPool.find_prefix)
    unpin = _recorded(ShardedPool.unpin)
    hint = _recorded(ShardedPool.hint)
    can_acquire = _recorded(ShardedPool.can_acquire)

    # ---- queries ----

    def numbers(self) -> Any:
        """Byte counts are totals of all devices, assuming that each has as much as this process's.

        Calls and waits are those of this process.
        """
        numbers, here = super().numbers(), len(self.shards)
        for name in _BYTES:
            setattr(numbers, name, getattr(numbers, name) * self._devices // here)
        return numbers

    # ---- the whole pool ----

    # A program may fail in one process only, and the call that starts it may then raise there. That
    # process starts a new generation; the others meet it in `check`, which fails there.

    def meet(self, wait: Callable[[], None]) -> None:
        """Waits for a program together with all processes.

        Raises:
            Exception: the program failed here or, as a JaxRuntimeError, in another process.
        """
        self.agreement.record("check")
        try:
            wait()
        except Exception as error:
            self.agreement.decide("check", "failed", failure=failure_of(error))
            raise
        verdict = self.agreement.decide("check", "done")
        if verdict.kind == "failed":
            raise raised_elsewhere("check", verdict)

    def new_generation(self) -> list[tuple[int, int, list[int]]]:
        """Starts a generation in all processes: number, epoch and lengths of each shard here."""
        why = {"raised": "has begun a new generation of caches, after a program that failed there"}
        self.agreement.record("check")
        while self.agreement.decide("check", "renew", failure=why).kind != "same":
            self.agreement.record("check")
        generation = super().new_generation()
        lengths = np.asarray([lengths for *_, lengths in generation])
        bounds = [*lengths.min(axis=0).tolist(), *lengths.max(axis=0).tolist()]
        self.agreement.record("cache")
        verdict = self.agreement.decide("cache", "done", numbers=bounds)
        half = len(bounds) // 2
        self.lengths = verdict.least[:half], verdict.most[half:]
        return generation

    def close(self) -> None:
        """See `_native.Pool`. The other processes are notified, but not waited for."""
        if not self.closed:
            self.agreement.close()
        super().close()
