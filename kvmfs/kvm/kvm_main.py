# SPDX-License-Identifier: GPL-2.0-or-later
"""VMs and vCPUs: what virt/kvm/kvm_main.c does for every architecture."""

from __future__ import annotations

import errno
import mmap
import os
import threading
from collections.abc import Callable
from typing import TYPE_CHECKING

from kvmfs.cpu.engine import Engine
from kvmfs.errors import KvmError
from kvmfs.kvm import eventfd, kvmclock, x86
from kvmfs.kvm.fastpath import Lanes, VcpuMutex
from kvmfs.kvm.iodev import IoBus
from kvmfs.kvm.memslots import MemSlots
from kvmfs.kvm.profile import DEFAULT
from kvmfs.kvm.profile import load as load_profile

if TYPE_CHECKING:
    from kvmfs.kvm.coalesced_mmio import CoalescedZone
    from kvmfs.kvm.eventfd import IoEventFd, Irqfd
    from kvmfs.kvm.host import Host, Memory, RequestLike
    from kvmfs.vendor.ops import KvmX86Ops

KVM_MAX_VCPUS = 1024
KVM_MAX_VCPU_IDS = 4 * KVM_MAX_VCPUS
VCPU_MMAP_SIZE = 3 * 4096       # kvm_run, the PIO data page, the coalesced MMIO ring
MAX_GPA_BITS = 40              # of the engine, and of the physical addresses that CPUID offers

VM_INODE = 2
VM_STATS_INODE = 3
DEVICE_INODE = 4
VCPU_INODE = 0x100              # + the vCPU's index
VCPU_STATS_INODE = 0x10000      # likewise


class Kvm:
    """The system level: what a descriptor of the node itself stands for."""

    def __init__(self, vendor: KvmX86Ops, memory_of: Callable[[RequestLike], Memory], *, shares_run: bool = True,
                 profile: str = DEFAULT) -> None:
        self.vendor = vendor
        self.shares_run = shares_run    # VMs' kvm_run areas are shared memory
        self.memory_of = memory_of
        self.profile = load_profile(profile)


class Vm:
    """``struct kvm``.

    ``lock`` is kvm->lock (vCPU creation, capabilities), ``slots_lock`` orders changes of the memory slots,
    ``create_lock`` makes vCPUs appear one at a time.
    """

    def __init__(self, vendor: KvmX86Ops, host: Host, profile: str = DEFAULT) -> None:
        self.vendor, self.host = vendor, host
        self.profile = load_profile(profile)
        self.lock, self.slots_lock, self.create_lock = threading.Lock(), threading.Lock(), threading.Lock()
        self.engine = Engine()
        self.mmio_bus, self.pio_bus, self.ccw_bus = IoBus(), IoBus(), IoBus()
        self.coalesced_zones: list[CoalescedZone] = []
        self.ioeventfds: list[IoEventFd] = []
        self.irqfds: dict[int, Irqfd] = {}      # by the eventfd's id
        self.memslots = MemSlots(self.engine, 1 << MAX_GPA_BITS)
        self.created_vcpus = 0
        self.vcpus: list[Vcpu] = []
        self.lanes = Lanes(VCPU_INODE, KVM_MAX_VCPUS)
        self.max_vcpus = KVM_MAX_VCPUS
        self.arch = x86.VmArch(self)
        self.vfio = threading.Lock()    # held while there is a kvm-vfio device
        self.dead = False
        self.mirrored = False       # guest memory is copied at each KVM_RUN (the client is traced)

    def adopt(self, host: Host) -> None:
        """A VM that was made ahead, in another process, becomes that host's and begins now."""
        self.host = host
        self.arch.clock = kvmclock.VmClock()

    def mirror_in(self) -> None:
        """Bring the client's changes into guest memory that cannot be shared with it."""
        for hva, size in self.host.mirror_in():
            for slot in self.memslots:
                start, end = max(hva, slot.hva), min(hva + size, slot.hva + slot.size)
                if start < end:
                    self.engine.invalidate(slot.gpa + start - slot.hva, end - start)

    def create_vcpu(self, vcpu_id: int) -> Vcpu:
        """``kvm_vm_ioctl_create_vcpu`` up to the descriptor (api.rst 4.7).

        EINVAL: id not below KVM_MAX_VCPU_IDS, or too many vCPUs; EEXIST: that id is taken.
        The caller makes the vCPU reachable with :meth:`online_vcpu`, or undoes it with :meth:`drop_vcpu`.
        """
        if vcpu_id >= KVM_MAX_VCPU_IDS:
            raise KvmError(errno.EINVAL)
        with self.lock:
            if self.created_vcpus >= self.max_vcpus:
                raise KvmError(errno.EINVAL)
            x86.vcpu_precreate(self, vcpu_id)
            self.created_vcpus += 1
        try:
            if any(v.vcpu_id == vcpu_id for v in self.vcpus):
                raise KvmError(errno.EEXIST)
            return Vcpu(self, vcpu_id, len(self.vcpus))
        except BaseException:
            with self.lock:
                self.created_vcpus -= 1
            raise

    def online_vcpu(self, vcpu: Vcpu) -> None:
        """The vCPU is complete: others may find it."""
        self.vcpus.append(vcpu)
        x86.vcpu_postcreate(vcpu)

    def drop_vcpu(self, vcpu: Vcpu) -> None:
        """Creation failed after :meth:`create_vcpu`."""
        kvmclock.forget_vcpu(vcpu)
        vcpu.close()
        with self.lock:
            self.created_vcpus -= 1

    def request_all(self, request: Callable[[Vcpu], None]) -> None:
        """``kvm_make_all_cpus_request``: each vCPU does it before it enters its guest the next time."""
        for vcpu in self.vcpus:
            vcpu.request_work(request)
            vcpu.kick()

    def kick_all(self) -> None:
        """Every vCPU leaves the guest and looks at its requests."""
        for vcpu in self.vcpus:
            vcpu.kick()

    def stop_lanes(self) -> None:
        """Something has changed for all vCPUs: Python looks at it before any of them runs again."""
        for vcpu in self.vcpus:
            vcpu.lane.stop()

    def suspend(self) -> None:
        """All vCPUs leave the guest and wait (``kvm_suspend``); their guests will know."""
        kvmclock.suspend_notifier(self)
        self.arch.resumed.clear()
        self.kick_all()

    def resume(self, slept: int = 0) -> None:
        """vCPUs go on (``kvm_resume``).  ``slept``: nanoseconds since they should have stopped."""
        if slept:
            kvmclock.resumed(self)
        self.arch.resumed.set()

    def destroy(self) -> None:
        """``kvm_destroy_vm``: nobody holds a descriptor any more."""
        self.dead = True
        self.arch.resumed.set()
        self.kick_all()
        eventfd.release(self)
        self.arch.hyperv.close()
        if self.arch.irqchip is not None:
            self.arch.irqchip.close()
        for vcpu in self.vcpus:
            vcpu.close()
        self.memslots.close()
        self.engine.close()


class Vcpu:
    """``struct kvm_vcpu``: ``mutex`` is held for every ioctl on it; ``lane`` is its way around Python.

    ``run`` is the client's kvm_run area.
    """

    def __init__(self, vm: Vm, vcpu_id: int, index: int) -> None:
        self.vm, self.vcpu_id, self.index = vm, vcpu_id, index
        self.inode = VCPU_INODE + index
        self.creator = vm.host.creator          # the thread that made it (task_pid_nr)
        self.mutex = VcpuMutex()
        self.run_fd = os.memfd_create(f"kvm-vcpu:{vcpu_id}", os.MFD_CLOEXEC)
        rings = vm.memslots.dirty_rings
        size = VCPU_MMAP_SIZE if rings is None else rings.offset + rings.size
        os.ftruncate(self.run_fd, size)
        self.run_map = mmap.mmap(self.run_fd, size)
        self.run = memoryview(self.run_map)[:VCPU_MMAP_SIZE]
        self.cpu = vm.engine.create_cpu(index)
        self.sigset: int | None = None          # KVM_SET_SIGNAL_MASK's mask
        self.request: RequestLike | None = None  # the KVM_RUN being served
        self._wake: threading.Event | None = None   # set while the guest's HLT waits here
        self.copy_run = False                   # no passthrough: kvm_run is copied at each KVM_RUN
        self.arch = x86.VcpuArch()
        self.dirty_ring = None if rings is None else rings.open(self)
        self.lane = self.mutex.lane = vm.lanes.add(self)
        x86.vcpu_create(self)

    def request_work(self, request: Callable[[Vcpu], None]) -> None:
        """``kvm_make_request``: done by this vCPU before its next entry; twice is once."""
        if request not in self.arch.requests:
            self.arch.requests.append(request)
        self.lane.stop()

    def kick(self) -> None:
        """``kvm_vcpu_kick``: leave the guest soon; harmless when not in it."""
        self.lane.stop()
        self.cpu.kick()
        wake = self._wake
        if wake is not None:
            wake.set()
        if self.arch.apic is not None:
            self.arch.apic.wake.set()

    def halt(self) -> None:
        """The guest's CPU stands still until somebody kicks it (KVM_X86_DISABLE_EXITS_HLT).

        It then goes on behind its HLT, also when nothing came for it: guests look for themselves.
        """
        wake = threading.Event()
        self._wake = wake
        run, req = self.run, self.request
        # Whoever kicked before there was something to wake has left a reason.
        if not (self.arch.requests or self.arch.event_request or run[0] or self.vm.dead
                or not self.vm.arch.resumed.is_set() or (req is not None and req.interrupted)):
            wake.wait()
        self._wake = None
        self.cpu.suspect_code()     # whoever woke it may have written memory before

    def close(self) -> None:
        fd, self.run_fd = self.run_fd, -1       # a creation that failed and the VM's end may meet here
        if fd >= 0:
            self.vm.lanes.remove(self.index)
            if self.dirty_ring is not None:
                self.dirty_ring.close()
            self.run.release()
            self.run_map.close()
            os.close(fd)
