# SPDX-License-Identifier: GPL-2.0-or-later
"""The Hyper-V leaves that this KVM offers: KVM_GET_SUPPORTED_HV_CPUID (Linux: kvm_get_hv_cpuid; api.rst 4.118).

They are a list of their own, since KVM's own leaves have the same numbers; a client merges them as it likes.
"""

from __future__ import annotations

import struct
from contextlib import suppress
from functools import cache
from pathlib import Path

from kvmfs.abi import hyperv as H
from kvmfs.abi.x86 import KVM_MAX_VCPUS
from kvmfs.kvm.cpuid import CpuidEntry

_SMT = Path("/sys/devices/system/cpu/smt/control")
_VENDOR = struct.unpack("<3I", b"Linux KVM Hv")
_WINDOWS_2016 = 0x00003839, 0x000A0000      # build; version 10.0
SPINLOCK_RETRIES = 0xFFF                    # before a guest says HVCALL_NOTIFY_LONG_SPIN_WAIT
LOGICAL_PROCESSORS = 64

_FEATURES_EAX = (
    H.HV_MSR_VP_RUNTIME_AVAILABLE | H.HV_MSR_TIME_REF_COUNT_AVAILABLE | H.HV_MSR_SYNIC_AVAILABLE
    | H.HV_MSR_SYNTIMER_AVAILABLE | H.HV_MSR_APIC_ACCESS_AVAILABLE | H.HV_MSR_HYPERCALL_AVAILABLE
    | H.HV_MSR_VP_INDEX_AVAILABLE | H.HV_MSR_RESET_AVAILABLE | H.HV_MSR_REFERENCE_TSC_AVAILABLE
    | H.HV_ACCESS_FREQUENCY_MSRS | H.HV_ACCESS_REENLIGHTENMENT | H.HV_ACCESS_TSC_INVARIANT)
_FEATURES_EBX = H.HV_POST_MESSAGES | H.HV_SIGNAL_EVENTS | H.HV_ENABLE_EXTENDED_HYPERCALLS | H.HV_DEBUGGING
_FEATURES_EDX = (
    H.HV_X64_HYPERCALL_XMM_INPUT_AVAILABLE | H.HV_FEATURE_FREQUENCY_MSRS_AVAILABLE
    | H.HV_FEATURE_GUEST_CRASH_MSR_AVAILABLE | H.HV_X64_GUEST_DEBUGGING_AVAILABLE | H.HV_FEATURE_DEBUG_MSRS_AVAILABLE
    | H.HV_FEATURE_EXT_GVA_RANGES_FLUSH)
_RECOMMENDED = (
    H.HV_X64_REMOTE_TLB_FLUSH_RECOMMENDED | H.HV_X64_APIC_ACCESS_RECOMMENDED | H.HV_X64_RELAXED_TIMING_RECOMMENDED
    | H.HV_X64_EX_PROCESSOR_MASKS_RECOMMENDED | H.HV_DEPRECATING_AEOI_RECOMMENDED)


@cache
def smt_possible() -> bool:
    """``cpu_smt_possible``: may threads of one core run different vCPUs?  A process without rights must have asked before."""
    with suppress(OSError):
        return _SMT.read_text(encoding="ascii").strip() not in ("forceoff", "notsupported")
    return True


def supported(*, lapic: bool) -> tuple[CpuidEntry, ...]:
    """The entries, all of them.  ``lapic``: is the local APIC in here, or not known yet?

    Of the nested features, which need a nested guest, Linux says the same whether or not there can be one.
    """
    edx, recommended = _FEATURES_EDX, _RECOMMENDED
    if lapic:
        edx |= H.HV_STIMER_DIRECT_MODE_AVAILABLE
        recommended |= H.HV_X64_CLUSTER_IPI_RECOMMENDED
    if not smt_possible():
        recommended |= H.HV_X64_NO_NONARCH_CORESHARING
    return (
        CpuidEntry(H.HYPERV_CPUID_VENDOR_AND_MAX_FUNCTIONS, 0, 0, H.HYPERV_CPUID_SYNDBG_PLATFORM_CAPABILITIES, *_VENDOR),
        CpuidEntry(H.HYPERV_CPUID_INTERFACE, 0, 0, H.HYPERV_CPUID_SIGNATURE_EAX),
        CpuidEntry(H.HYPERV_CPUID_VERSION, 0, 0, *_WINDOWS_2016),
        CpuidEntry(H.HYPERV_CPUID_FEATURES, 0, 0, _FEATURES_EAX, _FEATURES_EBX, 0, edx),
        CpuidEntry(H.HYPERV_CPUID_ENLIGHTMENT_INFO, 0, 0, recommended, SPINLOCK_RETRIES),
        CpuidEntry(H.HYPERV_CPUID_IMPLEMENT_LIMITS, 0, 0, KVM_MAX_VCPUS, LOGICAL_PROCESSORS),
        CpuidEntry(H.HYPERV_CPUID_SYNDBG_VENDOR_AND_MAX_FUNCTIONS, 0, 0, 0, *_VENDOR),
        CpuidEntry(H.HYPERV_CPUID_SYNDBG_INTERFACE, 0, 0, H.HYPERV_VS_INTERFACE_EAX_SIGNATURE),
        CpuidEntry(H.HYPERV_CPUID_SYNDBG_PLATFORM_CAPABILITIES, 0, 0, H.HV_X64_SYNDBG_CAP_ALLOW_KERNEL_DEBUGGING),
        CpuidEntry(H.HYPERV_CPUID_NESTED_FEATURES, 0, 0, H.HV_X64_NESTED_DIRECT_FLUSH | H.HV_X64_NESTED_MSR_BITMAP,
                   H.HV_X64_NESTED_EVMCS1_PERF_GLOBAL_CTRL),
    )
