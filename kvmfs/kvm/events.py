# SPDX-License-Identifier: GPL-2.0-or-later
"""Exceptions, interrupts and NMIs on their way into a guest, and KVM_GET/SET_VCPU_EVENTS.

In Linux this is part of arch/x86/kvm/x86.c.  An event is *pending* until it is given to the hardware and
*injected* from then until the guest has begun to handle it; when an entry is cut short, an injected event is
given again at the next one.
"""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING

from kvmfs.abi import exits as kx
from kvmfs.abi.structs import KvmVcpuEvents
from kvmfs.abi.x86 import (
    DB_VECTOR,
    DF_VECTOR,
    NMI_VECTOR,
    PF_VECTOR,
    UD_VECTOR,
    X86_EFLAGS_RF,
)
from kvmfs.errors import KvmError

if TYPE_CHECKING:
    from kvmfs.kvm.kvm_main import Vcpu
    from kvmfs.kvm.lapic import Lapic

GP_VECTOR, BP_VECTOR, OF_VECTOR, MC_VECTOR = 13, 3, 4, 18
_CONTRIBUTORY = frozenset((0, 10, 11, 12, GP_VECTOR))
_TRAPS = frozenset((DB_VECTOR, BP_VECTOR, OF_VECTOR))
_ABORTS = frozenset((DF_VECTOR, MC_VECTOR))
_SOFT = frozenset((BP_VECTOR, OF_VECTOR))
DR6_ACTIVE_LOW, DR6_BS = 0xFFFF0FF0, 1 << 14
DR7_GD = 1 << 13


class QueuedException:
    """``struct kvm_queued_exception``."""

    __slots__ = ("error_code", "has_error_code", "has_payload", "injected", "payload", "pending", "vector")

    def __init__(self) -> None:
        self.pending = self.injected = self.has_error_code = self.has_payload = False
        self.vector = self.error_code = self.payload = 0

    def clear(self) -> None:
        self.pending = self.injected = self.has_payload = False


class QueuedInterrupt:
    """``struct kvm_queued_interrupt``."""

    __slots__ = ("injected", "nr", "soft")

    def __init__(self) -> None:
        self.injected = self.soft = False
        self.nr = 0


def queue_interrupt(vcpu: Vcpu, vector: int, *, soft: bool = False) -> None:
    """``kvm_queue_interrupt``: the next entry delivers ``vector``."""
    interrupt = vcpu.arch.interrupt
    interrupt.injected, interrupt.nr, interrupt.soft = True, vector, soft
    vcpu.arch.event_request = True


def queue_exception(vcpu: Vcpu, vector: int, error_code: int | None = None, payload: int | None = None) -> None:
    """``kvm_multiple_exception``: queue an exception, or merge it with one on its way (SDM table 6-5).

    ``payload`` is the CR2 of a #PF or the DR6 bits of a #DB, delivered with the exception.
    """
    arch = vcpu.arch
    ex = arch.exception
    arch.event_request = True
    if ex.pending or ex.injected:
        if ex.vector == DF_VECTOR:
            arch.triple_fault = True
            return
        first = ex.vector in _CONTRIBUTORY
        second = vector in _CONTRIBUTORY
        if (first and second) or (ex.vector == PF_VECTOR and (second or vector == PF_VECTOR)):
            vector, error_code, payload = DF_VECTOR, 0, None
    ex.pending, ex.injected, ex.vector = True, False, vector
    ex.has_error_code, ex.error_code = error_code is not None, error_code or 0
    ex.has_payload, ex.payload = payload is not None, payload or 0


def inject_gp(vcpu: Vcpu, error_code: int = 0) -> None:
    """``kvm_inject_gp``."""
    queue_exception(vcpu, GP_VECTOR, error_code)


def inject_ud(vcpu: Vcpu) -> None:
    queue_exception(vcpu, UD_VECTOR)


def deliver_exception_payload(vcpu: Vcpu) -> None:
    """``kvm_deliver_exception_payload``: put the payload into CR2 or DR6."""
    ex = vcpu.arch.exception
    if not ex.has_payload:
        return
    if ex.vector == PF_VECTOR:
        vcpu.cpu.cr2 = ex.payload
    elif ex.vector == DB_VECTOR:
        dr6 = (vcpu.cpu.dr(6) & ~0xF) | DR6_ACTIVE_LOW | ex.payload
        vcpu.cpu.set_dr(6, dr6 ^ (ex.payload & DR6_ACTIVE_LOW))
    ex.has_payload, ex.payload = False, 0


def payload_quirk(vcpu: Vcpu) -> None:
    """``kvm_handle_exception_payload_quirk``: a client that does not know payloads sees CR2 and DR6 filled."""
    ex = vcpu.arch.exception
    if not vcpu.vm.arch.exception_payload_enabled and ex.pending and ex.has_payload:
        deliver_exception_payload(vcpu)


def process_nmi(vcpu: Vcpu) -> None:
    """``process_nmi``: at most two NMIs wait, one while another is being handled."""
    arch = vcpu.arch
    if arch.nmi_queued:
        limit = 1 if vcpu.cpu.nmi_masked or arch.nmi_injected else 2
        arch.nmi_pending = min(arch.nmi_pending + take_queued_nmis(vcpu), limit)
        arch.event_request = True


def take_queued_nmis(vcpu: Vcpu) -> int:
    """How many NMIs came; with a local APIC they come from any thread."""
    arch, apic = vcpu.arch, vcpu.arch.apic
    if apic is None:
        queued, arch.nmi_queued = arch.nmi_queued, 0
        return queued
    with apic.chip.lock:
        queued, arch.nmi_queued = arch.nmi_queued, 0
    return queued


def queue_nmi(vcpu: Vcpu) -> None:
    """``kvm_inject_nmi`` by a client, which holds the vCPU's mutex."""
    apic = vcpu.arch.apic
    if apic is None:
        vcpu.arch.nmi_queued += 1
    else:
        with apic.chip.lock:
            vcpu.arch.nmi_queued += 1
    vcpu.arch.event_request = True


def interrupt_allowed(vcpu: Vcpu) -> bool:
    """IF is set and no STI or MOV SS shadow holds interrupts off."""
    return bool(vcpu.cpu.interrupt_allowed)


def needs_reinjection(vcpu: Vcpu) -> bool:
    """``kvm_event_needs_reinjection``."""
    arch = vcpu.arch
    return arch.exception.injected or arch.interrupt.injected or arch.nmi_injected


def ready_for_interrupt_injection(vcpu: Vcpu) -> bool:
    """``kvm_vcpu_ready_for_interrupt_injection``: kvm_run's field of that name."""
    return (interrupt_allowed(vcpu) and not needs_reinjection(vcpu) and not vcpu.arch.exception.pending
            and (vcpu.arch.apic is None or vcpu.arch.apic.accepts_dm_intr()))


def _give_exception(vcpu: Vcpu) -> None:
    ex = vcpu.arch.exception
    if ex.vector in _SOFT:
        from kvmfs.kvm import emulate  # which imports this module

        vcpu.cpu.inject_exception(ex.vector, soft=True, length=emulate.insn_length(vcpu))
        return
    vcpu.cpu.inject_exception(ex.vector, ex.error_code if ex.has_error_code else None)


def check_and_inject_events(vcpu: Vcpu) -> None:
    """``kvm_check_and_inject_events``: hand the most important event to the CPU for the coming entry."""
    arch, cpu = vcpu.arch, vcpu.cpu
    ex = arch.exception
    arch.event_request = False
    process_nmi(vcpu)
    if ex.injected:
        _give_exception(vcpu)
    elif ex.pending:
        pass                    # it is given below, before anything else
    elif arch.nmi_injected:
        cpu.inject_nmi()
        arch.stat.nmi_injections += 1
    elif arch.interrupt.injected:
        _give_interrupt(vcpu)
    can_inject = not needs_reinjection(vcpu)
    if ex.pending:
        if ex.vector not in _TRAPS and ex.vector not in _ABORTS:
            from kvmfs.kvm import regs  # which imports this module

            regs.set_rflags(vcpu, regs.get_rflags(vcpu) | X86_EFLAGS_RF)
            if arch.apic is None:               # otherwise somebody else may have asked meanwhile
                arch.event_request = False
        deliver_exception_payload(vcpu)
        if ex.vector == DB_VECTOR and cpu.dr(7) & DR7_GD:
            from kvmfs.kvm import guest_debug

            cpu.set_dr(7, cpu.dr(7) & ~DR7_GD)
            guest_debug.update_breakpoints(vcpu)
        _give_exception(vcpu)
        ex.pending, ex.injected = False, True
        can_inject = False
    if arch.nmi_pending and can_inject and not arch.guest_debug & kx.KVM_GUESTDBG_BLOCKIRQ:
        cpu.inject_nmi()
        arch.stat.nmi_injections += 1
        if cpu.nmi_masked or cpu.interrupt_shadow:
            arch.nmi_window = True          # pending still; the CPU takes it when the guest's IRET lets it
        else:
            arch.nmi_pending -= 1
            arch.nmi_injected = True
            can_inject = False
    if arch.apic is not None and not arch.guest_debug & kx.KVM_GUESTDBG_BLOCKIRQ:
        _inject_from_controllers(vcpu, arch.apic, can_inject)
    arch.given = ex.injected or arch.nmi_injected or arch.interrupt.injected or arch.nmi_window


def _inject_from_controllers(vcpu: Vcpu, apic: Lapic, can_inject: bool) -> None:
    """Take an interrupt of the in-kernel controllers, or ask for a window for it."""
    cpu, interrupt = vcpu.cpu, vcpu.arch.interrupt
    with apic.chip.lock:
        if not apic.cpu_has_interrupt():
            return
        if can_inject and cpu.interrupt_allowed:
            vector = apic.cpu_get_interrupt()
            if vector >= 0:
                interrupt.injected, interrupt.nr, interrupt.soft = True, vector, False
                cpu.inject_interrupt(vector)
                vcpu.arch.stat.irq_injections += 1
        if apic.cpu_has_interrupt():
            cpu.set_interrupt_window(True)


def _give_interrupt(vcpu: Vcpu) -> None:
    cpu, vector = vcpu.cpu, vcpu.arch.interrupt.nr
    vcpu.arch.stat.irq_injections += 1
    if cpu.interrupt_allowed:
        cpu.inject_interrupt(vector)
    else:
        # SVM's EVENTINJ does not ask for IF; the client was told whether the guest is ready.
        cpu.inject_exception(vector, None)


def complete_events(vcpu: Vcpu) -> None:
    """``svm_complete_interrupts``: what was delivered is done; what was not is given again next time."""
    arch = vcpu.arch
    left = {injection.kind for injection in vcpu.cpu.pending_injection()}
    arch.exception.injected = arch.exception.injected and not left.isdisjoint(("exception", "soft"))
    arch.nmi_injected = arch.nmi_injected and "nmi" in left
    arch.interrupt.injected = arch.interrupt.injected and not left.isdisjoint(("interrupt", "exception"))
    if arch.nmi_window:
        arch.nmi_window = False
        arch.nmi_pending -= "nmi" not in left
    arch.given = False
    if left:
        vcpu.cpu.cancel_injection()
    if left or arch.nmi_pending:
        arch.event_request = True


# ---- KVM_GET_VCPU_EVENTS, KVM_SET_VCPU_EVENTS (api.rst 4.31, 4.32) --------------------------------------

_VALID_FLAGS = (kx.KVM_VCPUEVENT_VALID_NMI_PENDING | kx.KVM_VCPUEVENT_VALID_SIPI_VECTOR
                | kx.KVM_VCPUEVENT_VALID_SHADOW | kx.KVM_VCPUEVENT_VALID_SMM
                | kx.KVM_VCPUEVENT_VALID_PAYLOAD | kx.KVM_VCPUEVENT_VALID_TRIPLE_FAULT)


def get_vcpu_events(vcpu: Vcpu) -> KvmVcpuEvents:
    """The pending and injected events of a vCPU that is not running."""
    arch, ev = vcpu.arch, KvmVcpuEvents()
    ex, vm = arch.exception, vcpu.vm.arch
    process_nmi(vcpu)
    payload_quirk(vcpu)
    if ex.vector not in _SOFT:
        ev.exception.injected = ex.injected
        ev.exception.pending = ex.pending
        if not vm.exception_payload_enabled:
            ev.exception.injected |= ex.pending
    ev.exception.nr = ex.vector
    ev.exception.has_error_code = ex.has_error_code
    ev.exception.error_code = ex.error_code
    ev.exception_has_payload = ex.has_payload
    ev.exception_payload = ex.payload
    ev.interrupt.injected = arch.interrupt.injected and not arch.interrupt.soft
    ev.interrupt.nr = arch.interrupt.nr
    ev.interrupt.shadow = vcpu.vm.vendor.interrupt_shadow(vcpu)
    ev.nmi.injected = arch.nmi_injected
    ev.nmi.pending = arch.nmi_pending
    ev.nmi.masked = vcpu.cpu.nmi_masked
    ev.smi.latched_init = arch.apic is not None and arch.apic.pending_events & 1
    ev.flags = (kx.KVM_VCPUEVENT_VALID_NMI_PENDING | kx.KVM_VCPUEVENT_VALID_SHADOW
                | kx.KVM_VCPUEVENT_VALID_SMM)
    if vm.exception_payload_enabled:
        ev.flags |= kx.KVM_VCPUEVENT_VALID_PAYLOAD
    if vm.triple_fault_event:
        ev.triple_fault.pending = arch.triple_fault
        ev.flags |= kx.KVM_VCPUEVENT_VALID_TRIPLE_FAULT
    return ev


def set_vcpu_events(vcpu: Vcpu, ev: KvmVcpuEvents) -> None:
    """Replace the events.  EINVAL: unknown flags, an exception that is none, SMM (absent here)."""
    arch, vm = vcpu.arch, vcpu.vm.arch
    flags = ev.flags
    if flags & ~_VALID_FLAGS:
        raise KvmError(errno.EINVAL)
    injected, pending, has_payload = ev.exception.injected, ev.exception.pending, ev.exception_has_payload
    if flags & kx.KVM_VCPUEVENT_VALID_PAYLOAD:
        if not vm.exception_payload_enabled:
            raise KvmError(errno.EINVAL)
        if pending:
            injected = 0
        else:
            has_payload = 0
    else:
        pending = has_payload = 0
    if (injected or pending) and (ev.exception.nr > 31 or ev.exception.nr == NMI_VECTOR):
        raise KvmError(errno.EINVAL)
    process_nmi(vcpu)
    ex = arch.exception
    ex.injected, ex.pending, ex.vector = bool(injected), bool(pending), ev.exception.nr
    ex.has_error_code, ex.error_code = bool(ev.exception.has_error_code), ev.exception.error_code
    ex.has_payload, ex.payload = bool(has_payload), ev.exception_payload
    arch.interrupt.injected = bool(ev.interrupt.injected)
    arch.interrupt.nr, arch.interrupt.soft = ev.interrupt.nr, bool(ev.interrupt.soft)
    if flags & kx.KVM_VCPUEVENT_VALID_SHADOW:
        vcpu.cpu.interrupt_shadow = ev.interrupt.shadow & 3
        arch.mov_ss_rip = vcpu.cpu.rip if ev.interrupt.shadow & kx.KVM_X86_SHADOW_INT_MOV_SS else None
    arch.nmi_injected = bool(ev.nmi.injected)
    if flags & kx.KVM_VCPUEVENT_VALID_NMI_PENDING:
        arch.nmi_pending, arch.nmi_queued = 0, ev.nmi.pending
    vcpu.cpu.nmi_masked = bool(ev.nmi.masked)
    if flags & kx.KVM_VCPUEVENT_VALID_SIPI_VECTOR and arch.apic is not None:
        arch.apic.sipi_vector = ev.sipi_vector
    # Linux, too, has taken the events above when it refuses what follows.
    if flags & kx.KVM_VCPUEVENT_VALID_SMM and (ev.smi.smm or ev.smi.pending or ev.smi.smm_inside_nmi):
        raise KvmError(errno.EINVAL)
    if flags & kx.KVM_VCPUEVENT_VALID_SMM and arch.apic is not None:
        with arch.apic.chip.lock:
            arch.apic.pending_events = arch.apic.pending_events & ~1 | bool(ev.smi.latched_init)
    if flags & kx.KVM_VCPUEVENT_VALID_TRIPLE_FAULT:
        if not vm.triple_fault_event:
            raise KvmError(errno.EINVAL)
        arch.triple_fault = bool(ev.triple_fault.pending)
    arch.event_request = arch.entry_check = True
