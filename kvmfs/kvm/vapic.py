# SPDX-License-Identifier: GPL-2.0-or-later
"""What guest and local APIC tell each other through guest memory.

The client's virtual APIC page: task priority that a patched guest reads and writes in its own memory.

QEMU's option ROM for 32-bit guests uses it (Linux: kvm_lapic_sync_to_vapic and its neighbours in lapic.c).  The
word at the address: TPR, then bits 12-15 the class of the highest vector in service, bits 24-31 the highest one
requested.  KVM_EXIT_TPR_ACCESS shows the client which instructions are to be patched.

The other one is the paravirtual EOI (:mod:`kvmfs.kvm.pv_eoi`).
"""

from __future__ import annotations

import errno
import struct
from typing import TYPE_CHECKING

from kvmfs.abi import apic as A
from kvmfs.abi.exits import KVM_EXIT_TPR_ACCESS
from kvmfs.cpu.cpu import EXIT_MMIO_WRITE
from kvmfs.errors import KvmError
from kvmfs.kvm import pv_eoi

if TYPE_CHECKING:
    from kvmfs.kvm.kvm_main import Vcpu

_EXIT_REASON, _UNION = 8, 32         # of kvm_run
_set_reason = struct.Struct("<I").pack_into
_set_tpr_access = struct.Struct("<QI").pack_into        # rip, is_write


def set_address(vcpu: Vcpu, address: int) -> None:
    """``kvm_lapic_set_vapic_addr``; 0: none.  EINVAL: no memory there."""
    if address:
        try:
            vcpu.vm.memslots.read(address, 4)
        except KvmError:
            raise KvmError(errno.EINVAL) from None
    vcpu.arch.vapic_addr = address
    vcpu.arch.update_apic_attention()


def report_tpr_access(vcpu: Vcpu, *, is_write: bool) -> None:
    """``report_tpr_access``: the guest uses its APIC's register; the client is told before the next instruction."""
    arch, cpu = vcpu.arch, vcpu.cpu
    if not arch.tpr_access_reporting:
        return
    # A store is done when it is seen: the exit knows where it was.
    rip = cpu.exit.code if cpu.exit.kind == EXIT_MMIO_WRITE else cpu.rip
    _set_tpr_access(vcpu.run, _UNION, rip, is_write)
    arch.tpr_access_pending = True
    vcpu.request_work(_look)


def _look(vcpu: Vcpu) -> None:
    """A request, so that there is one: the exit is made after all others are served."""


def exit_tpr_access(vcpu: Vcpu) -> None:
    """KVM_EXIT_TPR_ACCESS."""
    vcpu.arch.tpr_access_pending = False
    _set_reason(vcpu.run, _EXIT_REASON, KVM_EXIT_TPR_ACCESS)


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
