# SPDX-License-Identifier: GPL-2.0-or-later
"""Machine checks: KVM_X86_SETUP_MCE, KVM_X86_SET_MCE, KVM_X86_GET_MCE_CAP_SUPPORTED (Linux: x86.c).

The bank registers themselves are MSRs: kvmfs.kvm.msrs.
"""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING

from kvmfs.abi import msrs as M
from kvmfs.abi.apic import APIC_LVTCMCI
from kvmfs.abi.x86 import CR4_MCE, KVM_MAX_MCE_BANKS
from kvmfs.errors import KvmError
from kvmfs.kvm import events

if TYPE_CHECKING:
    from kvmfs.abi.structs import KvmX86Mce
    from kvmfs.kvm.kvm_main import Vcpu

M64 = (1 << 64) - 1
MCI_STATUS_S, MCI_STATUS_AR = 1 << 56, 1 << 55      # signalled; action required
BANKS, EXTENDED_COUNT = 0xFF, 0xFF0000              # of IA32_MCG_CAP: any number may be asked for


def supported_cap(vendor: str) -> int:
    """What a client may set in IA32_MCG_CAP besides the bank counts (``kvm_caps.supported_mce_cap``)."""
    cap = M.MCG_CTL_P | M.MCG_SER_P
    return cap | M.MCG_LMCE_P | M.MCG_CMCI_P if vendor == "intel" else cap


def setup(vcpu: Vcpu, mcg_cap: int) -> None:
    """``kvm_vcpu_ioctl_x86_setup_mce``.  EINVAL: no bank or over 32 of them, or a capability that is absent."""
    banks = mcg_cap & BANKS
    if not 0 < banks <= KVM_MAX_MCE_BANKS:
        raise KvmError(errno.EINVAL)
    if mcg_cap & ~(supported_cap(vcpu.vm.vendor.name) | BANKS | EXTENDED_COUNT):
        raise KvmError(errno.EINVAL)
    vcpu.arch.msrs.setup_mce(mcg_cap)
    if vcpu.arch.apic is not None:
        vcpu.arch.apic.after_set_mcg_cap()


def inject(vcpu: Vcpu, mce: KvmX86Mce) -> None:
    """``kvm_vcpu_ioctl_x86_set_mce``.  EINVAL: no such bank, or the status is not valid.

    A corrected error is only logged in its bank, so is one that asks for no action (UCNA), which also raises the
    APIC's CMCI where the guest wants that of the bank; an uncorrected one raises #MC, or shuts the guest down when it
    cannot take one.  The bank is written as hardware would: what was there first counts more.
    """
    msrs = vcpu.arch.msrs
    if mce.bank >= msrs.mcg_cap & BANKS or not mce.status & M.MCI_STATUS_VAL:
        raise KvmError(errno.EINVAL)
    ctl = M.MSR_IA32_MC0_CTL + 4 * mce.bank
    uncorrected = bool(mce.status & M.MCI_STATUS_UC)
    if uncorrected and not mce.mcg_status and not mce.status & (M.MCI_STATUS_PCC | MCI_STATUS_S | MCI_STATUS_AR):
        msrs.log_mce(ctl, mce.status, mce.addr, mce.misc)
        msrs.mcg_status = mce.mcg_status
        apic = vcpu.arch.apic
        if apic is not None and msrs.cmci_enabled(mce.bank):
            apic.local_deliver(APIC_LVTCMCI)
        return
    if uncorrected and (not msrs.mce_enabled or msrs.bank_register(ctl) != M64):
        return                                          # reporting is off
    if uncorrected and (msrs.mcg_status & M.MCG_STATUS_MCIP or not vcpu.cpu.cr4 & CR4_MCE):
        vcpu.arch.triple_fault = True
        return
    old = msrs.bank_register(ctl + 1)
    if not uncorrected and old & M.MCI_STATUS_VAL and old & M.MCI_STATUS_UC:
        msrs.log_overflow(ctl)
        return
    over = M.MCI_STATUS_OVER if old & M.MCI_STATUS_VAL else 0
    msrs.log_mce(ctl, mce.status | over, mce.addr, mce.misc)
    if uncorrected:
        msrs.mcg_status = mce.mcg_status
        events.queue_exception(vcpu, events.MC_VECTOR)
