# SPDX-License-Identifier: GPL-2.0-or-later
"""A tap that tells of each ioctl, as raw bytes; who reads it decodes them by the table.

A record is one JSON object: ``op`` "ioctl"; ``time`` and ``took`` in ns (since 1970, and duration); ``tid``; ``fd`` "system",
"vm", "vcpu:N" (the vCPU's id), "device"; ``vm`` the VM's number; ``cmd`` and ``arg``; ``in``, ``out`` the struct before and after,
``array`` what is behind a flexible one, ``run`` and ``io`` the start of kvm_run and of its data page after KVM_RUN, all in
hexadecimal digits; ``result``, or -errno; ``fault`` the rule that made it so; ``lost`` how many could not be delivered before.
"""

from __future__ import annotations

import ctypes
import time
from collections.abc import Callable
from typing import Any, Final

from kvmfs.abi.ioctls import BY_NUMBER, KVM_RUN, Level, Payload
from kvmfs.api.taps import Handler, Result

ARRAY_LIMIT: Final = 4096       # bytes of a flexible array
DATA_LIMIT: Final = 4096
RUN_BYTES: Final = 288          # kvm_run up to the end of the exits' union

_NAMES: Final = {Level.SYSTEM: "system", Level.VM: "vm", Level.DEVICE: "device"}


class Tracer:
    """``send`` delivers a record's fields; it raises BlockingIOError when the reader is too slow, OSError when it is gone."""

    def __init__(self, send: Callable[..., None], gone: Callable[[], None], vm: int = -1) -> None:
        self._send, self._gone, self._vm = send, gone, vm
        self._lost = 0

    def __call__(self, level: Level, handler: Handler, subject: Any, req: Any) -> Result:
        """The handler; then the record."""
        entry = BY_NUMBER.get(req.cmd)
        memory = _memory(level, subject, req)
        before = bytes(req.data[:DATA_LIMIT])
        pointed = entry is not None and entry.payload is Payload.POINTER and entry.struct is not None
        size = ctypes.sizeof(entry.struct) if entry is not None and entry.struct is not None else 0
        if pointed or (not before and req.cmd >> 30 & 1):
            before = _read(memory, req.arg, min(size, DATA_LIMIT))
        began, clock = time.time_ns(), time.perf_counter_ns()
        outcome: Result = None
        error = 0
        try:
            outcome = handler(subject, req)
        except OSError as failure:
            error = failure.errno or 5
            raise
        finally:
            took = time.perf_counter_ns() - clock
            result, out = _split(outcome)
            context = req.context
            fields: dict[str, Any] = {
                "time": began, "took": took, "tid": req.tid, "vm": self._vm, "cmd": req.cmd, "arg": req.arg,
                "fd": _NAMES.get(level) or f"vcpu:{subject.vcpu_id}",
                "result": -error if error else context if outcome is None and isinstance(context, int) else result}
            if before:
                fields["in"] = before.hex()
            if pointed and req.cmd != KVM_RUN:
                out = _read(memory, req.arg, min(size, DATA_LIMIT))
            if out:
                fields["out"] = bytes(out[:DATA_LIMIT]).hex()
            if entry is not None and entry.payload is Payload.FLEX:
                fields["array"] = _array(memory, req.arg + size).hex()
            if req.cmd == KVM_RUN and level is Level.VCPU:
                fields["run"] = bytes(subject.run[:RUN_BYTES]).hex()
                fields["io"] = bytes(subject.run[4096:4096 + 64]).hex()
            if isinstance(context, str):
                fields["fault"] = context
            self.tell("ioctl", fields)
        return outcome

    def tell(self, op: str, fields: dict[str, Any]) -> None:
        """Deliver one record, or count it as lost."""
        if self._lost:
            fields["lost"] = self._lost
        try:
            self._send(op, **fields)
            self._lost = 0
        except BlockingIOError:
            self._lost += 1
        except OSError:
            self._gone()


def _memory(level: Level, subject: Any, req: Any) -> Any:
    if level is Level.SYSTEM:
        return subject.memory_of(req)
    return (subject.vm if level is Level.VCPU else subject).host.memory


def _read(memory: Any, address: int, size: int) -> bytes:
    try:
        return bytes(memory.read(address, size)) if size else b""
    except (OSError, OverflowError, ValueError):
        return b""


def _array(memory: Any, address: int) -> bytes:
    """What can be read from there, up to a limit: how long the array is only its header says."""
    first = _read(memory, address, ARRAY_LIMIT)
    return first or _read(memory, address, min(ARRAY_LIMIT, -address % 4096))


def _split(outcome: Result) -> tuple[int, bytes]:
    if outcome is None:
        return 0, b""
    if isinstance(outcome, int):
        return outcome, b""
    if isinstance(outcome, tuple):
        return outcome[0], bytes(outcome[1])
    return 0, bytes(outcome)
