# SPDX-License-Identifier: GPL-2.0-or-later
"""The parameters of Linux's modules kvm, kvm_amd and kvm_intel that say something about this machine (module_param in
virt/kvm and arch/x86/kvm).  Programs look for them in /sys/module before they open the node.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from kvmfs.kvm.lapic_timer import MIN_TIMER_PERIOD
from kvmfs.kvm.tsc import TSC_TOLERANCE_PPM

_KVM: Final = {
    "eager_page_split": "N",            # the engine has no second-level page tables of its own: nothing to split,
    "tdp_mmu": "N",
    "mmio_caching": "N",
    "nx_huge_pages": "N",
    "nx_huge_pages_recovery_period_ms": "0",
    "nx_huge_pages_recovery_ratio": "0",
    "enable_pmu": "N",
    "enable_virt_at_load": "Y",
    "enable_vmware_backdoor": "N",
    "force_emulation_prefix": "0",
    "halt_poll_ns": "0",
    "ignore_msrs": "N",
    "lapic_timer_advance": "N",
    "min_timer_period_us": str(MIN_TIMER_PERIOD // 1000),
    "mitigate_smt_rsb": "N",
    "pi_inject_timer": "0",
    "tsc_tolerance_ppm": str(TSC_TOLERANCE_PPM),
}
_KVM_AMD: Final = {
    "avic": "N",
    "lbrv": "0",
    "nested": "0",
    "npt": "Y",
    "nrips": "1",
    "pause_filter_count": "0",
    "pause_filter_thresh": "0",
    "sev": "N",
    "sev_es": "N",
    "sev_snp": "N",
    "tsc_scaling": "1",
    "vgif": "0",
    "vls": "0",
    "vnmi": "N",
}
_KVM_INTEL: Final = {
    "allow_smaller_maxphyaddr": "N",
    "emulate_invalid_guest_state": "Y",
    "enable_apicv": "N",
    "enable_ipiv": "N",
    "enable_shadow_vmcs": "N",
    "ept": "Y",
    "nested": "N",
    "ple_gap": "0",
    "ple_window": "0",
    "pml": "Y",
    "preemption_timer": "N",
    "sgx": "N",
    "unrestricted_guest": "Y",
}
_VENDORS: Final = {"amd": ("kvm_amd", _KVM_AMD), "intel": ("kvm_intel", _KVM_INTEL)}


def module_parameters(vendor: str) -> Mapping[str, Mapping[str, str]]:
    """For each module that would be loaded: its parameters, as their files in /sys read, without the newline."""
    name, parameters = _VENDORS[vendor]
    return {"kvm": _KVM, name: parameters}
