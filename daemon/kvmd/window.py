# SPDX-License-Identifier: GPL-2.0-or-later
"""The worker's part of what people can see and change from outside: states, memory, traces, faults.

The daemon has checked who asks.  Everything is an order on the worker's control link, answered in its thread.
"""

from __future__ import annotations

import logging
import socket
import time
from typing import TYPE_CHECKING, Any

from kvmd.link import Link, Message
from kvmfs.api.faults import Faults
from kvmfs.api.trace import Tracer
from kvmfs.cpu.cpu import EXIT_IO_IN, EXIT_IO_OUT, EXIT_NONE, EXIT_SVM
from kvmfs.kvm import debugfs
from kvmfs.kvm.kvm_main import Vcpu, Vm
from kvmfs.kvm.x86_exits import tap_exits

if TYPE_CHECKING:
    from kvmfs.api.dispatch import VmDispatcher
    from kvmfs.api.taps import Tap

log = logging.getLogger("kvmd.window")

MAX_ADDRESS = (1 << 64) - 1
OPS = ("describe", "statistics", "registers", "physical", "virtual", "fault", "trace", "untrace")


class Window:
    """Answers the orders OPS for one VM."""

    def __init__(self, vm: Vm, dispatcher: VmDispatcher, number: int) -> None:
        self._vm, self._dispatcher, self._number = vm, dispatcher, number
        self._faults: list[Tap] = []
        self._tracers: dict[int, Tracer] = {}           # of ioctls, by connection
        self._exit_tracers: dict[int, Tracer] = {}      # of the guest's exits

    def obey(self, message: Message) -> dict[str, Any]:
        """One order's answer.  Raises OSError, LinkError."""
        vm = self._vm
        match message.op:
            case "describe":
                return debugfs.describe(vm)
            case "statistics":
                return {**debugfs.statistics(vm),
                        "ioctls": {str(number): count for number, count in self._dispatcher.counts().items()}}
            case "registers":
                return debugfs.registers(self._vcpu(message))
            case "physical":
                at, size = message.integer("address", 0, MAX_ADDRESS), message.integer("size", 1, debugfs.MAX_READ)
                return {"data": debugfs.read_physical(vm, at, size).hex()}
            case "virtual":
                at, size = message.integer("address", 0, MAX_ADDRESS), message.integer("size", 1, debugfs.MAX_READ)
                return {"data": debugfs.read_virtual(self._vcpu(message), at, size).hex()}
            case "fault":
                self.set_faults(message.texts("rules"))
            case "trace":
                self._trace(message)
            case "untrace":
                self._untrace(message.integer("id"))
        return {}

    def _vcpu(self, message: Message) -> Vcpu:
        number = message.integer("vcpu", 0)
        for vcpu in list(self._vm.vcpus):
            if vcpu.vcpu_id == number:
                return vcpu
        raise OSError(2, f"VM {self._number} has no vCPU {number}")

    # ---- taps ---------------------------------------------------------------------------------------

    def set_faults(self, rules: list[str]) -> None:
        """From now on these rules are followed, and no others.  Raises RuleError."""
        self._faults = [Faults(rules, self._number)] if rules else []
        self._tap()

    def _tap(self) -> None:
        self._dispatcher.tap([*self._faults, *self._tracers.values()])
        tap_exits(self._tell_exit if self._exit_tracers else None)
        self._vm.stop_lanes()

    def _trace(self, message: Message) -> None:
        """Tell of every ioctl, or with ``exits`` of every exit of the guest, to the socket that comes with the order."""
        ident, exits = message.integer("id"), bool(message.integer("exits", 0, 1))
        link = Link(socket.socket(fileno=message.take_fds()[0]))
        tracers = self._exit_tracers if exits else self._tracers
        tracers[ident] = Tracer(link.send, lambda: self._untrace(ident), self._number)
        self._tap()

    def _untrace(self, ident: int) -> None:
        if self._exit_tracers.pop(ident, None) or self._tracers.pop(ident, None):
            self._tap()

    def _tell_exit(self, vcpu: Vcpu, kind: int) -> None:
        for tracer in list(self._exit_tracers.values()):
            tracer.tell("exit", exit_of(vcpu, kind, self._number))


def exit_of(vcpu: Vcpu, kind: int, number: int) -> dict[str, Any]:
    """The fields of a record "exit": what made the guest stop, before anything was done about it."""
    cpu = vcpu.cpu
    e = cpu.exit
    fields = {"time": time.time_ns(), "vm": number, "vendor": vcpu.vm.vendor.name, "vcpu": vcpu.vcpu_id, "kind": kind,
              "rip": int(cpu.rip)}
    if kind == EXIT_SVM:
        fields |= {"code": int(e.code), "info1": int(e.info1), "info2": int(e.info2)}
    elif kind in (EXIT_IO_IN, EXIT_IO_OUT):
        port, size, count, string = cpu.io_exit()
        fields |= {"port": port, "size": size, "count": count, "string": string}
    elif kind != EXIT_NONE:
        fields |= {"gpa": int(e.gpa), "size": int(e.size), "info1": int(e.info1)}
    return fields
