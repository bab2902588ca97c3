# SPDX-License-Identifier: GPL-2.0-or-later
"""The vCPU's side of the in-kernel interrupt controllers: taking interrupts, halting, INIT and SIPI.

Linux: arch/x86/kvm/irq.c and the parts of x86.c that depend on lapic_in_kernel().  A vCPU without a local APIC
here never comes to this module, but for the functions that say so.
"""

from __future__ import annotations

import errno
import threading
import time
from collections.abc import Callable
from typing import TYPE_CHECKING

from kvmfs.abi import exits as kx
from kvmfs.abi.apic import IOAPIC_MEM_LENGTH
from kvmfs.abi.flags import KVM_PIT_SPEAKER_DUMMY
from kvmfs.abi.x86 import IO_APIC_DEFAULT_PHYS_BASE, KVM_MAX_IRQ_ROUTES
from kvmfs.errors import KvmError
from kvmfs.kvm import events
from kvmfs.kvm.i8254 import PIT_PORT, PIT_PORTS, SPEAKER_PORT, SPEAKER_PORTS, Pit, Speaker
from kvmfs.kvm.i8259 import Pic
from kvmfs.kvm.irq_comm import Irqchip
from kvmfs.kvm.lapic import Lapic
from kvmfs.kvm.lapic_core import PENDING_INIT, PENDING_SIPI
from kvmfs.kvm.steal_time import record_steal_time

if TYPE_CHECKING:
    from kvmfs.kvm.host import RequestLike
    from kvmfs.kvm.kvm_main import Vcpu, Vm

SEG_CS = 1
APIC_BUS_CYCLE_LIMIT = ((1 << 64) - 1) // (((1 << 32) - 1) * 128)
X2APIC_API_USE_32BIT_IDS, X2APIC_API_DISABLE_BROADCAST_QUIRK = 1, 2
X2APIC_API_VALID_FLAGS = X2APIC_API_USE_32BIT_IDS | X2APIC_API_DISABLE_BROADCAST_QUIRK


# ---- making the controllers ------------------------------------------------------------------------------

def create_irqchip(vm: Vm) -> None:
    """KVM_CREATE_IRQCHIP (api.rst 4.24).  EEXIST: there is one; EINVAL: there are vCPUs already."""
    with vm.lock:
        if vm.arch.irqchip is not None:
            raise KvmError(errno.EEXIST)
        if vm.created_vcpus:
            raise KvmError(errno.EINVAL)
        chip = Irqchip(vm, split=False)
        pic, ioapic = chip.pic, chip.ioapic
        if pic is not None and ioapic is not None:
            with vm.slots_lock:
                for port, count in Pic.PORTS:
                    vm.pio_bus.register_readable(port, count, pic)
                vm.mmio_bus.register_readable(IO_APIC_DEFAULT_PHYS_BASE, IOAPIC_MEM_LENGTH, ioapic)
        vm.arch.irqchip = chip


def enable_split_irqchip(vm: Vm, pins: int) -> None:
    """KVM_ENABLE_CAP of KVM_CAP_SPLIT_IRQCHIP: only local APICs, ``pins`` GSIs for the client's I/O APIC.

    EINVAL: more than KVM_MAX_IRQ_ROUTES pins; EEXIST: there is an irqchip, or a vCPU.
    """
    with vm.lock:
        if pins > KVM_MAX_IRQ_ROUTES:
            raise KvmError(errno.EINVAL)
        if vm.arch.irqchip is not None or vm.created_vcpus:
            raise KvmError(errno.EEXIST)
        vm.arch.irqchip = Irqchip(vm, split=True, reserved_pins=pins)


def enable_x2apic_api(vm: Vm, flags: int) -> None:
    """KVM_ENABLE_CAP of KVM_CAP_X2APIC_API.  EINVAL: unknown flags."""
    if flags & ~X2APIC_API_VALID_FLAGS:
        raise KvmError(errno.EINVAL)
    if flags & X2APIC_API_USE_32BIT_IDS:
        vm.arch.x2apic_format = True
    if flags & X2APIC_API_DISABLE_BROADCAST_QUIRK:
        vm.arch.x2apic_broadcast_quirk_disabled = True


def set_apic_bus_cycle(vm: Vm, nanoseconds: int) -> None:
    """KVM_ENABLE_CAP of KVM_CAP_X86_APIC_BUS_CYCLES_NS.  EINVAL: 0, too many, or vCPUs exist; ENXIO: no irqchip."""
    if not nanoseconds or nanoseconds > APIC_BUS_CYCLE_LIMIT:
        raise KvmError(errno.EINVAL)
    with vm.lock:
        if vm.arch.irqchip is None:
            raise KvmError(errno.ENXIO)
        if vm.created_vcpus:
            raise KvmError(errno.EINVAL)
        vm.arch.irqchip.bus_cycle_ns = nanoseconds


def create_pit(vm: Vm, flags: int) -> None:
    """KVM_CREATE_PIT2 (api.rst 4.71).  EEXIST; ENOENT: there is no PIC here."""
    with vm.lock:
        chip = vm.arch.irqchip
        if chip is not None and chip.pit is not None:
            raise KvmError(errno.EEXIST)
        if chip is None or chip.split:
            raise KvmError(errno.ENOENT)
        with chip.lock:
            pit = Pit(chip)
            chip.pit = pit
        with vm.slots_lock:
            vm.pio_bus.register_readable(PIT_PORT, PIT_PORTS, pit)
            if flags & KVM_PIT_SPEAKER_DUMMY:
                vm.pio_bus.register_readable(SPEAKER_PORT, SPEAKER_PORTS, Speaker(pit))


def create_lapic(vcpu: Vcpu) -> None:
    """A new vCPU of a VM with an irqchip gets its local APIC; all but the boot CPU wait for INIT and SIPI."""
    chip = vcpu.vm.arch.irqchip
    if chip is None:
        return
    with chip.lock:
        vcpu.arch.apic = vcpu.arch.msrs.apic = Lapic(vcpu, chip)
    if vcpu.vcpu_id != vcpu.vm.arch.bsp_vcpu_id:
        vcpu.arch.mp_state = kx.KVM_MP_STATE_UNINITIALIZED


# ---- interrupts ------------------------------------------------------------------------------------------

def interrupt(vcpu: Vcpu, apic: Lapic, vector: int) -> None:
    """KVM_INTERRUPT with an irqchip: only where the PIC is the client's.  ENXIO, EEXIST."""
    if apic.chip.pic is not None:
        raise KvmError(errno.ENXIO)
    if apic.external_vector is not None:
        raise KvmError(errno.EEXIST)
    apic.external_vector = vector
    vcpu.arch.event_request = True


# ---- running and halting ---------------------------------------------------------------------------------

def has_events(vcpu: Vcpu, apic: Lapic) -> bool:
    """``kvm_vcpu_has_events``: what ends a halt."""
    arch = vcpu.arch
    if apic.pending_events or arch.pv_unhalted or arch.exception.pending or arch.nmi_queued:
        return True
    if arch.hyperv is not None and arch.hyperv.synic.pending:
        return True
    if arch.nmi_pending and not vcpu.cpu.nmi_masked and not vcpu.cpu.interrupt_shadow:
        return True
    if not events.interrupt_allowed(vcpu):
        return False
    with apic.chip.lock:
        return apic.cpu_has_interrupt()


def runnable(vcpu: Vcpu, apic: Lapic) -> bool:
    """``kvm_arch_vcpu_runnable``."""
    return vcpu.arch.mp_state == kx.KVM_MP_STATE_RUNNABLE or has_events(vcpu, apic)


def emulate_halt(vcpu: Vcpu, apic: Lapic) -> int:
    """HLT was stepped over: the vCPU's thread waits in the next round.  Returns 1."""
    if has_events(vcpu, apic):
        vcpu.arch.pv_unhalted = False
    else:
        vcpu.arch.mp_state = kx.KVM_MP_STATE_HALTED
    return 1


def wait_for_event(vcpu: Vcpu, apic: Lapic, stop: Callable[[], bool]) -> bool:
    """``kvm_vcpu_block``: sleep until the vCPU can run, its timer expired, or ``stop`` says so (a signal).

    Returns whether it slept at all.
    """
    wake, stat, waited = apic.wake, vcpu.arch.stat, False
    vcpu.lane.halted = True
    stat.blocking = 1
    try:
        while True:
            wake.clear()
            if runnable(vcpu, apic) or apic.timer.has_pending or stop():
                return waited
            waited = True
            apic.chip.timers.sleep(wake)
    finally:
        stat.blocking = 0


def block(vcpu: Vcpu, apic: Lapic, stop: Callable[[], bool]) -> int:
    """``vcpu_block``.  Returns 1: the caller looks at signals and comes back."""
    arch = vcpu.arch
    if not runnable(vcpu, apic):
        halted, start = arch.mp_state == kx.KVM_MP_STATE_HALTED, time.monotonic_ns()
        waited = wait_for_event(vcpu, apic, stop)
        if waited and halted:
            arch.stat.waited(time.monotonic_ns() - start)
        if not runnable(vcpu, apic):
            return 1
        arch.stat.halt_wakeup += waited
        if arch.steal_time.msr:
            vcpu.request_work(record_steal_time)
    accept_events(vcpu, apic)
    if arch.mp_state in (kx.KVM_MP_STATE_HALTED, kx.KVM_MP_STATE_AP_RESET_HOLD):
        arch.pv_unhalted = False
        arch.mp_state = kx.KVM_MP_STATE_RUNNABLE
    return 1


def enter_or_block(vcpu: Vcpu, apic: Lapic, stop: Callable[[], bool], enter: Callable[[], int]) -> int:
    """One round of ``vcpu_run`` for a vCPU with a local APIC; ``enter`` goes into the guest."""
    arch = vcpu.arch
    if arch.mp_state != kx.KVM_MP_STATE_RUNNABLE:
        result = block(vcpu, apic, stop)
    else:
        apic.thread = threading.get_ident()
        apic.in_guest = True            # from here on whoever has an event for us kicks
        try:
            if apic.pending_events:
                accept_events(vcpu, apic)
                if arch.mp_state != kx.KVM_MP_STATE_RUNNABLE:
                    return 1
            if apic.eoi_exit is not None and _report_eoi(vcpu, apic):
                return 0
            if apic.scan_request:
                with apic.chip.lock:
                    apic.scan()
            _inject_timer(apic)         # it may have fired while the client had the vCPU
            result = enter()
        finally:
            apic.in_guest = False
    if result > 0:
        _inject_timer(apic)
    return result


def _inject_timer(apic: Lapic) -> None:
    """``kvm_inject_pending_timer_irqs``."""
    if apic.timer.pending and apic.timer.has_pending:
        with apic.chip.lock:
            apic.timer.inject()


def _report_eoi(vcpu: Vcpu, apic: Lapic) -> bool:
    """KVM_EXIT_IOAPIC_EOI, if the client's I/O APIC still wants to know of that vector."""
    vector, apic.eoi_exit = apic.eoi_exit, None
    if vector is None or not apic.handled >> vector & 1:
        return False
    vcpu.run[8:12] = kx.KVM_EXIT_IOAPIC_EOI.to_bytes(4, "little")
    vcpu.run[32] = vector
    return True


def run_uninitialized(vcpu: Vcpu, apic: Lapic, req: RequestLike, stop: Callable[[], bool]) -> int:
    """KVM_RUN of a vCPU that waits for INIT: -EAGAIN after it came, -EINTR for a signal."""
    if vcpu.run[1]:                     # immediate_exit
        return -errno.EINTR
    wait_for_event(vcpu, apic, stop)
    accept_events(vcpu, apic)
    if req.interrupted:
        vcpu.arch.stat.signal_exits += 1
        vcpu.run[8:12] = kx.KVM_EXIT_INTR.to_bytes(4, "little")
        return -errno.EINTR
    return -errno.EAGAIN


def accept_events(vcpu: Vcpu, apic: Lapic) -> None:
    """``kvm_apic_accept_events``: INIT resets the vCPU, SIPI starts one that waits for it."""
    from kvmfs.kvm.x86 import vcpu_reset  # which imports this

    with apic.chip.lock:
        pending, apic.pending_events = apic.pending_events, 0
    arch = vcpu.arch
    if pending & PENDING_INIT:
        vcpu_reset(vcpu, init_event=True)
        boot = arch.apic_base & 1 << 8
        arch.mp_state = kx.KVM_MP_STATE_RUNNABLE if boot else kx.KVM_MP_STATE_INIT_RECEIVED
    if pending & PENDING_SIPI and arch.mp_state == kx.KVM_MP_STATE_INIT_RECEIVED:
        vector, vendor = apic.sipi_vector, vcpu.vm.vendor
        code = vendor.get_segment(vcpu, SEG_CS)
        code.selector, code.base = vector << 8, vector << 12
        vendor.set_segment(vcpu, SEG_CS, code)
        vcpu.cpu.rip = 0
        vcpu.cpu.commit_state()
        arch.mp_state = kx.KVM_MP_STATE_RUNNABLE


# ---- KVM_GET_MP_STATE, KVM_SET_MP_STATE (api.rst 4.38, 4.39) --------------------------------------------

_NEED_APIC = frozenset((kx.KVM_MP_STATE_UNINITIALIZED, kx.KVM_MP_STATE_HALTED, kx.KVM_MP_STATE_AP_RESET_HOLD,
                        kx.KVM_MP_STATE_INIT_RECEIVED, kx.KVM_MP_STATE_SIPI_RECEIVED))


def get_mp_state(vcpu: Vcpu) -> int:
    """Also without an irqchip, where it is always RUNNABLE."""
    arch = vcpu.arch
    if arch.apic is not None:
        accept_events(vcpu, arch.apic)
        if arch.mp_state in (kx.KVM_MP_STATE_HALTED, kx.KVM_MP_STATE_AP_RESET_HOLD) and arch.pv_unhalted:
            return kx.KVM_MP_STATE_RUNNABLE
    return arch.mp_state


def set_mp_state(vcpu: Vcpu, state: int) -> None:
    """EINVAL: no such state, or one that only a local APIC here can leave."""
    arch, apic = vcpu.arch, vcpu.arch.apic
    if state != kx.KVM_MP_STATE_RUNNABLE and (apic is None or state not in _NEED_APIC):
        raise KvmError(errno.EINVAL)
    if apic is not None and state == kx.KVM_MP_STATE_SIPI_RECEIVED:
        with apic.chip.lock:
            apic.pending_events |= PENDING_SIPI
        state = kx.KVM_MP_STATE_INIT_RECEIVED
    arch.mp_state = state
    arch.event_request = True
