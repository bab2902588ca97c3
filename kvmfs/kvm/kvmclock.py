# SPDX-License-Identifier: GPL-2.0-or-later
"""The guests' TSC and kvmclock (Linux: arch/x86/kvm/x86.c; Documentation/virt/kvm/x86/{timekeeping,msr}.rst).

A VM's *master clock* is one pair (TSC, nanoseconds) from which all its vCPUs count.  There is one as long as the
host keeps time by the TSC and the vCPUs' TSCs agree; then a guest may compare clocks of different vCPUs
(PVCLOCK_TSC_STABLE_BIT).  Otherwise each vCPU gets a pair of its own, time and again.
"""

from __future__ import annotations

import errno
import struct
import threading
import time
from typing import TYPE_CHECKING, NamedTuple

from kvmfs.abi import flags as F
from kvmfs.abi.para import (
    KVM_CLOCK_PAIRING_WALLCLOCK,
    KVM_EFAULT,
    KVM_EOPNOTSUPP,
    PVCLOCK_GUEST_STOPPED,
    PVCLOCK_TSC_STABLE_BIT,
)
from kvmfs.errors import KvmError
from kvmfs.kvm import tsc
from kvmfs.kvm.tsc import M32, M64, NSEC_PER_SEC, Scale, time_scale

if TYPE_CHECKING:
    from kvmfs.kvm.kvm_main import Vcpu, Vm

VALID_FLAGS = F.KVM_CLOCK_TSC_STABLE | F.KVM_CLOCK_REALTIME | F.KVM_CLOCK_HOST_TSC
REFRESH_NS = 10**6              # without a master clock: how old a vCPU's own pair may get
KVM_MSR_ENABLED = 1
_PAGE = 0x1000
_TIME_INFO = struct.Struct("<IIQQIbB2x")        # struct pvclock_vcpu_time_info
_FLAGS_OFFSET = 29
_WALL_CLOCK = struct.Struct("<III")             # version, sec, nsec
_PAIRING = struct.Struct("<qqQI36x")            # struct kvm_clock_pairing: sec, nsec, tsc, flags
_U32 = struct.Struct("<I")


class VmClock:
    """The time part of ``struct kvm_arch``; ``lock`` is tsc_write_lock."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.default_tsc_khz = tsc.tsc_khz()
        self.kvmclock_offset = -tsc.kvmclock_base()[0]
        self.use_master_clock = False
        self.master_kernel_ns = self.master_cycle_now = 0
        self.boot_vcpu_runs_old_kvmclock = False
        self.backwards_tsc_observed = False
        self.wall_clock = 0                     # MSR_KVM_WALL_CLOCK
        # The last TSC that somebody set, and the generation of vCPUs whose TSCs match.
        self.last_tsc_nsec = self.last_tsc_write = self.last_tsc_khz = self.last_tsc_offset = 0
        self.user_set_tsc = False
        self.cur_tsc_generation = self.cur_tsc_nsec = self.cur_tsc_write = self.cur_tsc_offset = 0
        self.nr_vcpus_matched_tsc = 0
        self._raw = tsc.clock_and_tsc(time.CLOCK_MONOTONIC_RAW)

    def tsc_set_back(self) -> int:
        """Cycles by which the TSC is behind where it would be had it never stopped; 0 when it is not.

        The raw clock stands still while the machine is suspended, and the TSC at least counts on from there,
        unless the suspend has reset it.
        """
        (ns_then, tsc_then), (ns, now) = self._raw, tsc.clock_and_tsc(time.CLOCK_MONOTONIC_RAW)
        self._raw = ns, now
        due = tsc_then + (ns - ns_then) * tsc.tsc_khz() // 10**6
        slack = tsc.tsc_khz() * 1000 + (due - tsc_then) // 10**5     # a second, and the error of tsc_khz
        return due - now if due - now > slack else 0


class VcpuClock:
    """The time part of ``struct kvm_vcpu_arch``."""

    def __init__(self) -> None:
        self.virtual_tsc_khz = 0
        self.virtual_tsc_scale = Scale(0, 0)    # nanoseconds to cycles
        self.this_tsc_generation = self.this_tsc_nsec = self.this_tsc_write = 0
        self.time = 0                           # MSR_KVM_SYSTEM_TIME
        self.pv_time_gpa: int | None = None     # where the guest wants its clock
        self.guest_stopped = False              # tell it that it was
        self.updated_ns = 0


class ClockData(NamedTuple):
    """``struct kvm_clock_data``."""

    clock: int
    flags: int
    realtime: int
    host_tsc: int


# ---- the TSC ---------------------------------------------------------------------------------------------

def set_tsc_khz(vcpu: Vcpu, khz: int) -> bool:
    """``kvm_set_tsc_khz``.  False: TSC scaling cannot make it.

    A frequency that is the host's, give or take 250 ppm, is the host's.
    """
    clock, host = vcpu.arch.clock, tsc.tsc_khz()
    clock.virtual_tsc_scale = time_scale(khz * 1000, NSEC_PER_SEC)
    clock.virtual_tsc_khz = khz
    low, high = (host * (10**6 + ppm) // 10**6 for ppm in (-tsc.TSC_TOLERANCE_PPM, tsc.TSC_TOLERANCE_PPM))
    scaling = vcpu.vm.vendor.tsc_scaling
    ratio = 1 << scaling.frac_bits if low <= khz <= high else scaling.ratio(khz)
    if ratio is None:
        return False
    vcpu.cpu.set_tsc_ratio(ratio, scaling.frac_bits)
    return True


def write_tsc_offset(vcpu: Vcpu, offset: int) -> None:
    """``kvm_vcpu_write_tsc_offset``."""
    vcpu.cpu.tsc_offset = offset & M64


def synchronize_tsc(vcpu: Vcpu, value: int | None) -> None:
    """``kvm_synchronize_tsc``: the client sets a vCPU's TSC, or (None) a new vCPU gets one.

    A new vCPU, a 0 and a value within a second of where the TSCs of the VM are now mean those TSCs: vCPUs that
    are set one after the other must not drift apart by the time that it takes.
    """
    clock, mine = vcpu.vm.arch.clock, vcpu.arch.clock
    data = value or 0
    with clock.lock:
        ns, host_tsc = tsc.kvmclock_base()
        offset = data - vcpu.cpu.scale_tsc(host_tsc) & M64
        synchronizing = False
        if mine.virtual_tsc_khz:
            if data == 0:
                synchronizing = True
            elif clock.user_set_tsc:
                expected = clock.last_tsc_write + mine.virtual_tsc_scale.apply(ns - clock.last_tsc_nsec)
                hz = mine.virtual_tsc_khz * 1000
                synchronizing = data < expected + hz and data + hz > expected
        if value is not None:
            clock.user_set_tsc = True
        matched = synchronizing and mine.virtual_tsc_khz == clock.last_tsc_khz
        if matched:
            offset = clock.cur_tsc_offset
        _note_tsc(vcpu, offset, data, ns, matched)


def _note_tsc(vcpu: Vcpu, offset: int, value: int, ns: int, matched: bool) -> None:
    """``__kvm_synchronize_tsc``."""
    clock, mine = vcpu.vm.arch.clock, vcpu.arch.clock
    clock.last_tsc_nsec, clock.last_tsc_write, clock.last_tsc_offset = ns, value, offset
    clock.last_tsc_khz = mine.virtual_tsc_khz
    write_tsc_offset(vcpu, offset)
    if not matched:
        clock.cur_tsc_generation += 1
        clock.cur_tsc_nsec, clock.cur_tsc_write, clock.cur_tsc_offset = ns, value, offset
        clock.nr_vcpus_matched_tsc = 0
    elif mine.this_tsc_generation != clock.cur_tsc_generation:
        clock.nr_vcpus_matched_tsc += 1
    mine.this_tsc_generation = clock.cur_tsc_generation
    mine.this_tsc_nsec, mine.this_tsc_write = clock.cur_tsc_nsec, clock.cur_tsc_write
    wanted = clock.nr_vcpus_matched_tsc + 1 == len(vcpu.vm.vcpus) and tsc.host_clock_is_tsc()
    if (clock.use_master_clock and not matched) or clock.use_master_clock != wanted:
        vcpu.request_work(update_masterclock)


def forget_vcpu(vcpu: Vcpu) -> None:
    """A vCPU whose creation failed does not count any more."""
    clock = vcpu.vm.arch.clock
    with clock.lock:
        if vcpu.arch.clock.this_tsc_generation == clock.cur_tsc_generation:
            clock.nr_vcpus_matched_tsc -= 1


def get_tsc_offset(vcpu: Vcpu) -> int:
    """KVM_VCPU_TSC_OFFSET: the guest's TSC less the host's, which is scaled, u64."""
    return int(vcpu.cpu.tsc_offset)


def set_tsc_offset(vcpu: Vcpu, offset: int) -> None:
    """KVM_VCPU_TSC_OFFSET (``kvm_arch_tsc_set_attr``)."""
    clock, khz = vcpu.vm.arch.clock, vcpu.arch.clock.virtual_tsc_khz
    with clock.lock:
        matched = bool(khz) and clock.last_tsc_khz == khz and clock.last_tsc_offset == offset
        ns, host_tsc = tsc.kvmclock_base()
        clock.user_set_tsc = True
        _note_tsc(vcpu, offset, vcpu.cpu.scale_tsc(host_tsc) + offset & M64, ns, matched)


# ---- the master clock ------------------------------------------------------------------------------------

def _update_gtod_copy(vm: Vm) -> None:
    """``pvclock_update_vm_gtod_copy``: a new pair, and whether all may count from it.  Caller has the lock."""
    clock = vm.arch.clock
    clock.master_kernel_ns, clock.master_cycle_now = tsc.kvmclock_base()
    clock.use_master_clock = (tsc.host_clock_is_tsc() and clock.nr_vcpus_matched_tsc + 1 == len(vm.vcpus)
                              and not clock.backwards_tsc_observed and not clock.boot_vcpu_runs_old_kvmclock)


def _end_update(vm: Vm) -> None:
    """``kvm_end_pvclock_update``: every vCPU tells its guest."""
    vm.request_all(guest_time_update)


def update_masterclock(vcpu: Vcpu) -> None:
    """KVM_REQ_MASTERCLOCK_UPDATE."""
    clock = vcpu.vm.arch.clock
    vcpu.vm.arch.hyperv.reference_tsc.request_update()
    with clock.lock:
        _update_gtod_copy(vcpu.vm)
    _end_update(vcpu.vm)


def _by_master_clock(clock: VmClock, host_tsc: int) -> int:
    """kvmclock at ``host_tsc``, as a guest would work it out."""
    scale = time_scale(NSEC_PER_SEC, tsc.tsc_khz() * 1000)
    passed = scale.apply(host_tsc - clock.master_cycle_now)
    return clock.master_kernel_ns + clock.kvmclock_offset + passed & M64


def get_kvmclock(vm: Vm) -> ClockData:
    """KVM_GET_CLOCK (``get_kvmclock``)."""
    clock = vm.arch.clock
    with clock.lock:
        if not clock.use_master_clock:
            return ClockData(tsc.kvmclock_base()[0] + clock.kvmclock_offset & M64, 0, 0, 0)
        realtime, host_tsc = tsc.clock_and_tsc(time.CLOCK_REALTIME)
        now = _by_master_clock(clock, host_tsc)
        if not vm.profile.clock_flags:
            return ClockData(now, F.KVM_CLOCK_TSC_STABLE, 0, 0)
        return ClockData(now, VALID_FLAGS, realtime, host_tsc)


def set_kvmclock(vm: Vm, data: ClockData) -> None:
    """KVM_SET_CLOCK (``kvm_vm_ioctl_set_clock``).  EINVAL: unknown flags."""
    if data.flags & ~(VALID_FLAGS if vm.profile.clock_flags else 0):
        raise KvmError(errno.EINVAL)
    clock, value = vm.arch.clock, data.clock
    vm.arch.hyperv.reference_tsc.request_update()
    with clock.lock:
        _update_gtod_copy(vm)
        if data.flags & F.KVM_CLOCK_REALTIME:
            value += max(0, time.time_ns() - data.realtime)     # never backwards
        now = clock.master_kernel_ns if clock.use_master_clock else tsc.kvmclock_base()[0]
        clock.kvmclock_offset = value - now
    _end_update(vm)


# ---- what the guest sees ---------------------------------------------------------------------------------

def guest_time_update(vcpu: Vcpu) -> None:
    """``kvm_guest_time_update``: KVM_REQ_CLOCK_UPDATE."""
    clock, mine = vcpu.vm.arch.clock, vcpu.arch.clock
    with clock.lock:
        stable, offset = clock.use_master_clock, clock.kvmclock_offset
        kernel_ns, host_tsc = ((clock.master_kernel_ns, clock.master_cycle_now) if stable else tsc.kvmclock_base())
    timestamp = vcpu.cpu.guest_tsc(host_tsc)
    mine.updated_ns = kernel_ns
    if mine.pv_time_gpa is not None:
        _write_time_info(vcpu, mine.pv_time_gpa, timestamp, kernel_ns + offset & M64, stable)
    reference = vcpu.vm.arch.hyperv.reference_tsc
    if reference.msr:
        reference.setup(timestamp, kernel_ns + offset & M64, _guest_scale(vcpu), stable=stable)


def refresh_guest_time(vcpu: Vcpu) -> None:
    """Before an entry without a master clock."""
    if tsc.kvmclock_base()[0] - vcpu.arch.clock.updated_ns > REFRESH_NS:
        guest_time_update(vcpu)


def needs_refresh(vcpu: Vcpu) -> bool:
    """Is :func:`refresh_guest_time` to be done at each entry?"""
    return vcpu.arch.clock.pv_time_gpa is not None and not vcpu.vm.arch.clock.use_master_clock


def _guest_scale(vcpu: Vcpu) -> Scale:
    """From cycles of the guest's TSC to nanoseconds."""
    return time_scale(NSEC_PER_SEC, vcpu.cpu.scale_tsc(tsc.tsc_khz()) * 1000)


def _write_time_info(vcpu: Vcpu, gpa: int, timestamp: int, system_time: int, stable: bool) -> None:
    """``kvm_setup_guest_pvclock``: other vCPUs may be reading, so the version is odd meanwhile."""
    mine, slots = vcpu.arch.clock, vcpu.vm.memslots
    scale = _guest_scale(vcpu)
    try:
        old = slots.read(gpa, _TIME_INFO.size)
        version = (_U32.unpack_from(old)[0] + 1 | 1) & M32
        slots.write(gpa, _U32.pack(version))
        flags = PVCLOCK_TSC_STABLE_BIT if stable else 0
        flags |= old[_FLAGS_OFFSET] & PVCLOCK_GUEST_STOPPED         # stays until the guest clears it
        if mine.guest_stopped:
            flags |= PVCLOCK_GUEST_STOPPED
            mine.guest_stopped = False
        slots.write(gpa, _TIME_INFO.pack(version, 0, timestamp, system_time, scale.mult, scale.shift, flags))
        slots.write(gpa, _U32.pack(version + 1 & M32))
    except KvmError:
        return                                  # no memory there (any more)
    vcpu.vm.engine.invalidate(gpa, _TIME_INFO.size)


def write_system_time(vcpu: Vcpu, value: int, *, old_msr: bool, host_initiated: bool) -> None:
    """MSR_KVM_SYSTEM_TIME and _NEW (``kvm_write_system_time``): bit 0 enables, the rest is the address."""
    clock, mine = vcpu.vm.arch.clock, vcpu.arch.clock
    if vcpu.vcpu_id == 0 and not host_initiated:
        if clock.boot_vcpu_runs_old_kvmclock != old_msr:
            vcpu.request_work(update_masterclock)
        clock.boot_vcpu_runs_old_kvmclock = old_msr
    mine.time = value
    vcpu.request_work(guest_time_update)
    gpa = value & ~KVM_MSR_ENABLED
    if not value & KVM_MSR_ENABLED:
        mine.pv_time_gpa = None
    elif gpa % _PAGE + _TIME_INFO.size <= _PAGE:
        mine.pv_time_gpa = gpa


def write_wall_clock(vm: Vm, gpa: int) -> None:
    """MSR_KVM_WALL_CLOCK and _NEW (``kvm_write_wall_clock``): the real time at which kvmclock was 0."""
    vm.arch.clock.wall_clock = gpa
    if not gpa:
        return
    slots = vm.memslots
    try:
        version, = _U32.unpack(slots.read(gpa, 4))
        version = version + (version & 1) + 1 & M32
        slots.write(gpa, _U32.pack(version))
        sec, nsec = divmod(_wall_clock_epoch(vm), NSEC_PER_SEC)
        slots.write(gpa, _WALL_CLOCK.pack(version, sec & M32, nsec))
        slots.write(gpa, _U32.pack(version + 1 & M32))
    except KvmError:
        return
    vm.engine.invalidate(gpa, _WALL_CLOCK.size)


def _wall_clock_epoch(vm: Vm) -> int:
    """``kvm_get_wall_clock_epoch``."""
    clock = vm.arch.clock
    with clock.lock:
        realtime, host_tsc = tsc.clock_and_tsc(time.CLOCK_REALTIME)
        if clock.use_master_clock:
            return realtime - _by_master_clock(clock, host_tsc) & M64
        return realtime - (tsc.kvmclock_base()[0] + clock.kvmclock_offset) & M64


def clock_pairing(vcpu: Vcpu, gpa: int, kind: int) -> int:
    """KVM_HC_CLOCK_PAIRING (``kvm_pv_clock_pairing``): the host's real time and the guest's TSC at one moment."""
    if kind != KVM_CLOCK_PAIRING_WALLCLOCK or not tsc.host_clock_is_tsc():
        return -KVM_EOPNOTSUPP
    realtime, host_tsc = tsc.clock_and_tsc(time.CLOCK_REALTIME)
    sec, nsec = divmod(realtime, NSEC_PER_SEC)
    data = _PAIRING.pack(sec, nsec, vcpu.cpu.guest_tsc(host_tsc), 0)
    try:
        vcpu.vm.memslots.write(gpa, data)
    except KvmError:
        return -KVM_EFAULT
    vcpu.vm.engine.invalidate(gpa, len(data))
    return 0


# ---- suspend ---------------------------------------------------------------------------------------------

def set_guest_paused(vcpu: Vcpu) -> bool:
    """``kvm_set_guest_paused``: the guest is to know that it was stopped.  False: it has no kvmclock."""
    if vcpu.arch.clock.pv_time_gpa is None:
        return False
    vcpu.arch.clock.guest_stopped = True
    vcpu.request_work(guest_time_update)
    return True


def suspend_notifier(vm: Vm) -> None:
    """``kvm_arch_suspend_notifier``."""
    with vm.lock:
        for vcpu in vm.vcpus:
            set_guest_paused(vcpu)


def resumed(vm: Vm) -> None:
    """The machine was suspended, or all VMs were (``kvm_arch_enable_virtualization_cpu``).

    Guests go on where the clock is now; a TSC that the suspend has set back is made up for.
    """
    suspend_notifier(vm)
    clock = vm.arch.clock
    with clock.lock:
        lost = clock.tsc_set_back()
        if lost:
            clock.backwards_tsc_observed = True
            clock.last_tsc_nsec = clock.last_tsc_write = 0
    for vcpu in vm.vcpus:
        if lost:
            vcpu.request_work(lambda v: write_tsc_offset(v, v.cpu.tsc_offset + v.cpu.scale_tsc(lost)))
        vcpu.request_work(update_masterclock)
        vcpu.kick()
