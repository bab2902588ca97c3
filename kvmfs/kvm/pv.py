# SPDX-License-Identifier: GPL-2.0-or-later
"""What KVM offers to guests that know it (Documentation/virt/kvm/x86/{cpuid,msr}.rst)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from kvmfs.abi.para import KVM_CPUID_FEATURES

if TYPE_CHECKING:
    from kvmfs.kvm.kvm_main import Vcpu


def guest_pv_has(vcpu: Vcpu, feature: int) -> bool:
    """May the guest use paravirtual feature number ``feature``?

    Always, unless the client has KVM_CAP_ENFORCE_PV_FEATURE_CPUID on: then what the guest's CPUID offers.
    """
    arch = vcpu.arch
    if not arch.enforce_pv_cpuid:
        return True
    base = arch.cpuid.kvm_base
    entry = arch.cpuid.find(base | KVM_CPUID_FEATURES & 0xFF) if base else None
    return entry is not None and bool(entry.eax >> feature & 1)
