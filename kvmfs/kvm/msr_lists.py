# SPDX-License-Identifier: GPL-2.0-or-later
"""The MSR lists of the system level, and the loop that reads or writes a client's list of MSRs.

Linux: msrs_to_save, emulated_msrs, msr_based_features and msr_io in arch/x86/kvm/x86.c; api.rst 4.3, 4.18,
4.19.

The lists are true: each MSR in them can be read and written back.  Left out against Linux, because what they
stand for is absent: PMU, Intel PT, SPEC_CTRL, XFD and UMWAIT; branch records; SMBASE (no SMM); VMX
capabilities and VIRT_SPEC_CTRL.
"""

from __future__ import annotations

import errno
import struct
from collections.abc import Callable
from typing import TYPE_CHECKING

from kvmfs.abi import msrs as M
from kvmfs.abi.x86 import MAX_IO_MSRS
from kvmfs.errors import KvmError

if TYPE_CHECKING:
    from kvmfs.kvm.host import Memory
    from kvmfs.kvm.msrs import MsrFile

TSC_RATIO_DEFAULT = 1 << 32                 # 1.0
MSRS_HEADER_SIZE = 8                        # struct kvm_msrs: nmsrs, pad
_ENTRY = struct.Struct("<IIQ")              # struct kvm_msr_entry: index, reserved, data

# The engine checks every access in software before it is made and never gives the processor the guest's page
# tables: what those attacks need does not happen.
ARCH_CAPABILITIES = (M.ARCH_CAP_RDCL_NO | M.ARCH_CAP_SKIP_VMENTRY_L1DFLUSH | M.ARCH_CAP_MDS_NO
                     | M.ARCH_CAP_PSCHANGE_MC_NO)

# Event selectors and counters of K7 and P6: without a PMU they read as 0 and writes are dropped.
LEGACY_PMU_MSRS = (
    *range(M.MSR_K7_EVNTSEL0, M.MSR_K7_PERFCTR3 + 1), M.MSR_P6_PERFCTR0, M.MSR_P6_PERFCTR1, M.MSR_P6_EVNTSEL0,
    M.MSR_P6_EVNTSEL1)

_SAVED_BASE = (
    M.MSR_IA32_SYSENTER_CS, M.MSR_IA32_SYSENTER_ESP, M.MSR_IA32_SYSENTER_EIP, M.MSR_STAR, M.MSR_CSTAR,
    M.MSR_KERNEL_GS_BASE, M.MSR_SYSCALL_MASK, M.MSR_LSTAR, M.MSR_IA32_TSC, M.MSR_IA32_CR_PAT,
)
MSRS_TO_SAVE: dict[str, tuple[int, ...]] = {
    "intel": (*_SAVED_BASE, M.MSR_IA32_FEAT_CTL, M.MSR_TSC_AUX, M.MSR_IA32_DEBUGCTLMSR),
    "amd": (*_SAVED_BASE, M.MSR_VM_HSAVE_PA, M.MSR_TSC_AUX, M.MSR_IA32_DEBUGCTLMSR),
}
"""vendor → MSRs that the hardware has, first part of KVM_GET_MSR_INDEX_LIST."""

_CLOCK_MSRS = (
    M.MSR_KVM_SYSTEM_TIME, M.MSR_KVM_WALL_CLOCK, M.MSR_KVM_SYSTEM_TIME_NEW, M.MSR_KVM_WALL_CLOCK_NEW)
_HYPERV_MSRS = (
    M.HV_X64_MSR_GUEST_OS_ID, M.HV_X64_MSR_HYPERCALL, M.HV_X64_MSR_TIME_REF_COUNT, M.HV_X64_MSR_REFERENCE_TSC,
    M.HV_X64_MSR_TSC_FREQUENCY, M.HV_X64_MSR_APIC_FREQUENCY, *range(M.HV_X64_MSR_CRASH_P0, M.HV_X64_MSR_CRASH_CTL + 1),
    M.HV_X64_MSR_RESET, M.HV_X64_MSR_VP_INDEX, M.HV_X64_MSR_VP_RUNTIME, M.HV_X64_MSR_SCONTROL,
    M.HV_X64_MSR_STIMER0_CONFIG, M.HV_X64_MSR_VP_ASSIST_PAGE, M.HV_X64_MSR_REENLIGHTENMENT_CONTROL,
    M.HV_X64_MSR_TSC_EMULATION_CONTROL, M.HV_X64_MSR_TSC_EMULATION_STATUS, M.HV_X64_MSR_TSC_INVARIANT_CONTROL,
    M.HV_X64_MSR_SYNDBG_OPTIONS, *range(M.HV_X64_MSR_SYNDBG_CONTROL, M.HV_X64_MSR_SYNDBG_PENDING_BUFFER + 1))
_PV_MSRS = (
    M.MSR_KVM_ASYNC_PF_EN, M.MSR_KVM_STEAL_TIME, M.MSR_KVM_PV_EOI_EN, M.MSR_KVM_ASYNC_PF_INT, M.MSR_KVM_ASYNC_PF_ACK)
KVM_MSRS = _CLOCK_MSRS + _PV_MSRS
_KVM_LISTED = _CLOCK_MSRS + _HYPERV_MSRS + _PV_MSRS
KVM_MSRS_LAST = (M.MSR_KVM_POLL_CONTROL,)

EMULATED_MSRS: dict[str, tuple[int, ...]] = {
    "intel": (*_KVM_LISTED, M.MSR_IA32_TSC_ADJUST, M.MSR_IA32_TSC_DEADLINE, M.MSR_IA32_ARCH_CAPABILITIES,
              M.MSR_IA32_PERF_CAPABILITIES,
              M.MSR_IA32_MISC_ENABLE, M.MSR_IA32_MCG_STATUS, M.MSR_IA32_MCG_CTL, M.MSR_IA32_MCG_EXT_CTL,
              M.MSR_SMI_COUNT, M.MSR_PLATFORM_INFO, M.MSR_MISC_FEATURES_ENABLES, M.MSR_IA32_POWER_CTL,
              M.MSR_IA32_UCODE_REV, M.MSR_K7_HWCR, *KVM_MSRS_LAST),
    "amd": (*_KVM_LISTED, M.MSR_IA32_TSC_ADJUST, M.MSR_IA32_TSC_DEADLINE, M.MSR_IA32_ARCH_CAPABILITIES,
            M.MSR_IA32_PERF_CAPABILITIES, M.MSR_IA32_MISC_ENABLE,
            M.MSR_IA32_MCG_STATUS, M.MSR_IA32_MCG_CTL, M.MSR_SMI_COUNT, M.MSR_PLATFORM_INFO,
            M.MSR_MISC_FEATURES_ENABLES,
            M.MSR_AMD64_TSC_RATIO, M.MSR_IA32_POWER_CTL, M.MSR_IA32_UCODE_REV, M.MSR_K7_HWCR, *KVM_MSRS_LAST),
}
"""vendor → MSRs that KVM makes up, second part of KVM_GET_MSR_INDEX_LIST."""

FEATURE_VALUES: dict[str, dict[int, int]] = {
    "intel": {M.MSR_IA32_UCODE_REV: 1 << 32, M.MSR_IA32_ARCH_CAPABILITIES: ARCH_CAPABILITIES,
              M.MSR_IA32_PERF_CAPABILITIES: 0},
    "amd": {M.MSR_AMD64_DE_CFG: M.MSR_AMD64_DE_CFG_LFENCE_SERIALIZE, M.MSR_IA32_UCODE_REV: 0x01000065,
            M.MSR_IA32_ARCH_CAPABILITIES: ARCH_CAPABILITIES, M.MSR_IA32_PERF_CAPABILITIES: 0},
}
"""vendor → {feature MSR: value}, in the order of KVM_GET_MSR_FEATURE_INDEX_LIST."""

_VMX_MSRS = range(M.MSR_IA32_VMX_BASIC, M.MSR_IA32_VMX_VMFUNC + 1)


def index_list(vendor: str) -> tuple[int, ...]:
    """What KVM_GET_MSR_INDEX_LIST gives."""
    return MSRS_TO_SAVE[vendor] + EMULATED_MSRS[vendor]


def get_feature_msr(vendor: str, index: int) -> int | None:
    """``do_get_feature_msr``: a feature MSR's value, 0 for one of the index list, None for others."""
    value = FEATURE_VALUES[vendor].get(index)
    if value is not None:
        return value
    return 0 if index in MSRS_TO_SAVE[vendor] or index in EMULATED_MSRS[vendor] else None


def is_immutable_feature_msr(index: int) -> bool:
    """Fixed once the vCPU has run (``kvm_is_immutable_feature_msr``); the microcode revision is not."""
    return index in _VMX_MSRS or index in (M.MSR_AMD64_DE_CFG, M.MSR_IA32_ARCH_CAPABILITIES,
                                           M.MSR_IA32_PERF_CAPABILITIES)


def do_get_msr(msrs: MsrFile, index: int) -> int | None:
    """One entry of KVM_GET_MSRS on a vCPU; None: the list ends here."""
    return msrs.get(index, host_initiated=True)


def do_set_msr(msrs: MsrFile, index: int, value: int, *, has_run: bool) -> bool:
    """One entry of KVM_SET_MSRS; False: the list ends here."""
    if has_run and is_immutable_feature_msr(index):
        return do_get_msr(msrs, index) == value
    return msrs.set(index, value, host_initiated=True)


def get_msrs(memory: Memory, arg: int, nmsrs: int, read: Callable[[int], int | None]) -> int:
    """KVM_GET_MSRS (``msr_io``): fill in the entries after the header at ``arg``; returns how many could be
    read.

    ``read``: the value of an MSR, None where the list ends.  E2BIG: 256 entries or more; EFAULT.
    """
    entries = _load(memory, arg, nmsrs)
    done = 0
    for position, (index, reserved, _) in enumerate(entries):
        value = read(index)
        entries[position] = index, reserved, value or 0     # the one that failed reads as 0
        if value is None:
            break
        done += 1
    if entries:
        memory.write(arg + MSRS_HEADER_SIZE, b"".join(_ENTRY.pack(*entry) for entry in entries))
    return done


def set_msrs(memory: Memory, arg: int, nmsrs: int, write: Callable[[int, int], bool]) -> int:
    """KVM_SET_MSRS (``msr_io``): write the entries after the header at ``arg``; returns how many were
    written.

    ``write``: False where the list ends.  E2BIG: 256 entries or more; EFAULT.
    """
    done = 0
    for index, _, value in _load(memory, arg, nmsrs):
        if not write(index, value):
            break
        done += 1
    return done


def _load(memory: Memory, arg: int, nmsrs: int) -> list[tuple[int, int, int]]:
    if nmsrs >= MAX_IO_MSRS:
        raise KvmError(errno.E2BIG)
    raw = memory.read(arg + MSRS_HEADER_SIZE, nmsrs * _ENTRY.size) if nmsrs else b""
    return list(_ENTRY.iter_unpack(raw))
