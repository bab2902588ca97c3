# SPDX-License-Identifier: GPL-2.0-or-later
"""What guest and local APIC tell each other through guest memory.

The client's virtual APIC page: task priority that a patched guest reads and writes in its own memory.

QEMU's option ROM for 32-bit guests uses it (Linux: kvm_lapic_sync_to_vapic and its neighbours in lapic.c).  The
word at the address: TPR, then bits 12-15 the class of the highest vector in service, bits 24-31 the highest one
requested.

The other one is the paravirtual EOI (:mod:`kvmfs.kvm.pv_eoi`).
"""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING

from kvmfs.abi import apic as A
from kvmfs.errors import KvmError
from kvmfs.kvm import pv_eoi

if TYPE_CHECKING:
    from kvmfs.kvm.kvm_main import Vcpu


def set_address(vcpu: Vcpu, address: int) -> None:
    """``kvm_lapic_set_vapic_addr``; 0: none.  EINVAL: no memory there."""
    if address:
        try:
            vcpu.vm.memslots.read(address, 4)
        except KvmError:
            raise KvmError(errno.EINVAL) from None
    vcpu.arch.vapic_addr = address
    vcpu.arch.update_apic_attention()


def sync_to_guest(vcpu: Vcpu) -> None:
    """Before an entry (``kvm_lapic_sync_to_vapic``): show the guest its APIC's priorities."""
    apic = vcpu.arch.apic
    if apic is None:
        return
    if not vcpu.arch.vapic_addr:
        return
    in_service, requested = max(apic.isr.bit_length() - 1, 0), max(apic.irr.bit_length() - 1, 0)
    word = apic.reg(A.APIC_TASKPRI) & 0xFF | (in_service & 0xF0) << 8 | requested << 24
    try:
        vcpu.vm.memslots.write(vcpu.arch.vapic_addr, word.to_bytes(4, "little"))
    except KvmError:
        pass                    # the slot is gone; Linux goes on, too


def sync_from_guest(vcpu: Vcpu) -> None:
    """After an exit (``kvm_lapic_sync_from_vapic``): the guest may have changed its task priority."""
    apic = vcpu.arch.apic
    if apic is None:
        return
    if vcpu.arch.pv_eoi.pending:
        pv_eoi.sync_from_guest(vcpu, apic)
    if not vcpu.arch.vapic_addr:
        return
    try:
        tpr = vcpu.vm.memslots.read(vcpu.arch.vapic_addr, 4)[0]
    except KvmError:
        return
    if tpr != apic.reg(A.APIC_TASKPRI) & 0xFF:
        apic.set_tpr(tpr)
