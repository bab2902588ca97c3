# SPDX-License-Identifier: GPL-2.0-or-later
"""From an ioctl's number to its handler: the table of kvmfs.abi bound to the modules of this package.

A number finds its handler in two steps: its line in the table names a function, and the module of the level
(system, vm, vcpu, device) has that function, or this KVM is one without it.
"""

from __future__ import annotations

import errno
from collections import defaultdict
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import TYPE_CHECKING, Any

from kvmfs.abi.ioctls import KVM_IRQ_LINE, KVM_IRQ_LINE_STATUS, KVM_SIGNAL_MSI, TABLE, Level
from kvmfs.api import device, system, vcpu, vm
from kvmfs.api.taps import Handler, Handlers, Result, Tap, TappedHandlers, tapped
from kvmfs.errors import KvmError
from kvmfs.kvm import x86
from kvmfs.kvm.kvm_main import DEVICE_INODE, VCPU_INODE, VCPU_STATS_INODE, VM_INODE, VM_STATS_INODE

if TYPE_CHECKING:
    from kvmfs.kvm.host import RequestLike
    from kvmfs.kvm.kvm_main import Kvm, Vm
    from kvmfs.kvm.profile import Profile

KVM_RUN, KVM_CREATE_VM = 0xAE80, 0xAE01
# They change nothing but what the vCPUs' local APICs are told, who see to it by themselves.
_INTERRUPTS = frozenset((KVM_IRQ_LINE, KVM_IRQ_LINE_STATUS, KVM_SIGNAL_MSI))


def bind(level: Level, module: ModuleType, profile: Profile) -> dict[int, Handler]:
    """The handlers of one level by ioctl number, as far as the profile's kernel has them."""
    absent = profile.no_ioctls.get(level, ())
    return {entry.number: getattr(module, entry.handler) for entry in TABLE
            if level in entry.levels and hasattr(module, entry.handler) and entry.number not in absent}


class SystemDispatcher:
    """ioctls on the node.  Unknown numbers: EINVAL (``kvm_dev_ioctl``)."""

    def __init__(self, kvm: Kvm, create_vm: Callable[[Any, int], Result]) -> None:
        self._kvm, self._create_vm = kvm, create_vm
        self._bound = {**bind(Level.SYSTEM, system, kvm.profile), KVM_CREATE_VM: self._create}
        self._handlers: Handlers = self._bound

    def tap(self, taps: Sequence[Tap]) -> None:
        """From now on every ioctl goes through these, the last one first."""
        self._handlers = TappedHandlers(Level.SYSTEM, self._bound, taps) if taps else self._bound

    def ioctl(self, req: Any) -> Result:
        """A channel's handler."""
        handler = self._handlers.get(req.cmd)
        if handler is None:
            raise KvmError(errno.EINVAL)
        return handler(self._kvm, req)

    def _create(self, kvm: Kvm, req: Any) -> Result:
        if req.arg:                     # KVM_X86_DEFAULT_VM is the only type (KVM_CAP_VM_TYPES)
            raise KvmError(errno.EINVAL)
        return self._create_vm(req, req.arg)


class VmDispatcher:
    """ioctls on a VM's files: the VM itself, its vCPUs and devices, told apart by inode."""

    def __init__(self, vm_: Vm) -> None:
        self.vm = vm_
        self._bound = {level: bind(level, module, vm_.profile)
                       for level, module in ((Level.VM, vm), (Level.VCPU, vcpu), (Level.DEVICE, device))}
        self._bound[Level.VCPU].pop(KVM_RUN, None)
        self._tids: set[int] = set()
        self._counts: defaultdict[int, int] = defaultdict(int)  # calls by number
        self.tap(())

    def tap(self, taps: Sequence[Tap]) -> None:
        """From now on every ioctl goes through these, the last one first."""
        tables: list[Handlers] = [TappedHandlers(level, handlers, taps) if taps else handlers
                                  for level, handlers in self._bound.items()]
        self._vm_handlers, self._vcpu_handlers, self._device_handlers = tables
        self._run = tapped(Level.VCPU, x86.ioctl_run, taps)
        self.vm.lanes.enabled = not taps
        self.vm.stop_lanes()

    def counts(self) -> dict[int, int]:
        """How many calls of each number there were."""
        counts = dict(self._counts)
        runs = sum(v.lane.info.runs for v in self.vm.vcpus)
        if runs:
            counts[KVM_RUN] = counts.get(KVM_RUN, 0) + runs
        return counts

    def ioctl(self, req: Any) -> Result:
        """A channel's handler.

        Another address space than the VM's: EIO.  Unknown numbers: ENOTTY on a VM, EINVAL on a vCPU.
        """
        vm_ = self.vm
        self._counts[req.cmd] += 1
        if req.tid not in self._tids:
            self._admit(req.tid, req.nodeid)
        if vm_.dead:
            raise KvmError(errno.EIO)
        if req.nodeid >= VCPU_INODE:
            try:
                v = vm_.vcpus[req.nodeid - VCPU_INODE]
            except IndexError:                  # statistics, which have no ioctl
                raise KvmError(errno.ENOTTY) from None
            mutex = v.mutex.lock                # kvm_vcpu_ioctl: every one of them waits for it
            if not mutex.acquire(False):
                vm_.host.may_block()
                mutex.acquire()
            try:
                if v.lane.words[0] and not v.lane.claim(False):
                    vm_.host.may_block()
                    v.lane.claim(True)
                if req.cmd == KVM_RUN:
                    if req.arg:
                        raise KvmError(errno.EINVAL)
                    result = self._run(v, req)
                    if result == 0:
                        v.lane.arm(req.tid)
                    return result
                handler = self._vcpu_handlers.get(req.cmd)
                if handler is None:
                    raise KvmError(errno.EINVAL)
                return handler(v, req)
            finally:
                mutex.release()
        if req.cmd in _INTERRUPTS:
            return self._vm_ioctl(vm_, req)
        vm_.stop_lanes()
        try:
            return self._vm_ioctl(vm_, req)
        finally:
            vm_.stop_lanes()                    # a vCPU may have been armed meanwhile

    def _vm_ioctl(self, vm_: Vm, req: Any) -> Result:
        if req.nodeid == VM_INODE:
            handler = self._vm_handlers.get(req.cmd)
        elif req.nodeid == DEVICE_INODE:
            handler = self._device_handlers.get(req.cmd)
        else:
            handler = None                      # statistics
        if handler is None:
            raise KvmError(errno.ENOTTY)
        return handler(vm_, req)

    def go_on(self, req: Any) -> Result:
        """A channel's handler for a KVM_RUN that kvmfs.kvm.fastpath has begun.  The vCPU is this thread's."""
        v = self.vm.vcpus[req.nodeid - VCPU_INODE]
        result = -1
        try:
            if self.vm.dead:
                raise KvmError(errno.EIO)
            result = x86.ioctl_run(v, req, v.lane.begun)
            return result
        finally:
            if result != 0 or not v.lane.arm(req.tid):
                v.lane.release()

    def _admit(self, tid: int, nodeid: int) -> None:
        if not self.vm.host.owns(tid):
            stats = nodeid == VM_STATS_INODE or nodeid >= VCPU_STATS_INODE
            raise KvmError(errno.ENOTTY if stats else errno.EIO)
        if len(self._tids) > 4096:      # thread ids of the dead; asking again costs little
            self._tids.clear()
        self._tids.add(tid)

    def interrupt(self, req: RequestLike) -> None:
        """The client's thread has a signal while ``req`` is being served."""
        if req.cmd == KVM_RUN and VCPU_INODE <= req.nodeid < VCPU_STATS_INODE:
            self.vm.vcpus[req.nodeid - VCPU_INODE].kick()
