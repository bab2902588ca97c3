# SPDX-License-Identifier: GPL-2.0-or-later
"""Paravirtual end of interrupt: the guest clears a bit in its memory instead of writing the APIC's EOI register.

Linux: pv_eoi_* and apic_sync_pv_eoi_* in lapic.c; Documentation/virt/kvm/x86/msr.rst, MSR_KVM_PV_EOI_EN.  Before an
entry with an event the bit is set if the interrupt in service may be ended that way.  If it is still set after the exit it is taken
back and the guest has to use the register; if the guest has cleared it, that was the EOI.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from kvmfs.abi.para import KVM_PV_EOI_DISABLED, KVM_PV_EOI_ENABLED
from kvmfs.errors import KvmError

if TYPE_CHECKING:
    from kvmfs.kvm.kvm_main import Vcpu
    from kvmfs.kvm.lapic import Lapic

KVM_MSR_ENABLED = 1


class PvEoi:
    """A vCPU's: ``msr`` is MSR_KVM_PV_EOI_EN; ``pending``: the guest has been offered to clear the bit."""

    __slots__ = ("gpa", "msr", "pending")

    def __init__(self) -> None:
        self.msr = self.gpa = 0
        self.pending = False

    @property
    def enabled(self) -> bool:
        return bool(self.msr & KVM_MSR_ENABLED)


def set_msr(vcpu: Vcpu, value: int, length: int = 1) -> bool:
    """``kvm_lapic_set_pv_eoi``: bit 0 enables, the rest is the address.  False: misaligned, or no memory there."""
    address = value & ~KVM_MSR_ENABLED
    if address & 3:
        return False
    arch = vcpu.arch
    if value & KVM_MSR_ENABLED:
        try:
            vcpu.vm.memslots.read(address, length)
        except KvmError:
            return False
        arch.pv_eoi.gpa = address
    arch.pv_eoi.msr = value
    arch.update_apic_attention()
    return True


def reset(vcpu: Vcpu) -> None:
    """RESET and INIT turn it off."""
    vcpu.arch.pv_eoi.msr = 0
    vcpu.arch.update_apic_attention()


def sync_to_guest(vcpu: Vcpu, apic: Lapic) -> None:
    """Before an entry with an event: may the guest end the interrupt in service without an exit?

    Not when another one waits, which that EOI would let in, when interrupts are nested, or when an I/O APIC wants to
    know of the end.
    """
    vector = apic.highest_isr_cache
    if vector < 0 or apic.irr or apic.handled >> vector & 1:
        return
    pv_eoi = vcpu.arch.pv_eoi
    if not pv_eoi.enabled:
        return
    try:
        vcpu.vm.memslots.write(pv_eoi.gpa, bytes((KVM_PV_EOI_ENABLED,)))
    except KvmError:
        return                      # the slot is gone: the guest uses the register
    pv_eoi.pending = True


def sync_from_guest(vcpu: Vcpu, apic: Lapic) -> None:
    """After an exit: did the guest end its interrupt?"""
    pv_eoi = vcpu.arch.pv_eoi
    if not pv_eoi.enabled:
        pv_eoi.pending = False
        return
    slots = vcpu.vm.memslots
    try:
        if slots.read(pv_eoi.gpa, 1)[0] & KVM_PV_EOI_ENABLED:
            slots.write(pv_eoi.gpa, bytes((KVM_PV_EOI_DISABLED,)))
            pv_eoi.pending = False
            return
        pv_eoi.pending = False
    except KvmError:
        pass                        # neither read nor written counts as done, and the bit may still be there
    with apic.chip.lock:
        apic.eoi()
