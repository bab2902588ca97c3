# SPDX-License-Identifier: GPL-2.0-or-later
"""Model-specific registers (Linux: kvm_set_msr_common, kvm_get_msr_common, svm_*_msr, vmx_*_msr).

A :class:`MsrFile` holds those of one vCPU that are nothing but values, with the rules for writing them.
Those that are part of the CPU's state go through the vendor's :class:`CpuMsrs`.  What is not known here
raises #GP in the guest: an MSR that keeps whatever is written would pass for a feature (a PMU, for one) that
is not there.

``host_initiated`` tells the client's KVM_GET_MSRS and KVM_SET_MSRS from the guest's RDMSR and WRMSR: the
client may write what is read-only, and see what the guest's CPUID hides.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Protocol

from kvmfs.abi import cpuid as C
from kvmfs.abi import msrs as M
from kvmfs.abi.flags import KVM_X86_QUIRK_MISC_ENABLE_NO_MWAIT, KVM_X86_QUIRK_STUFF_FEATURE_MSRS
from kvmfs.abi.svm import SVM_VM_CR_SVM_DISABLE, SVM_VM_CR_SVM_LOCK
from kvmfs.abi.x86 import KVM_MAX_MCE_BANKS
from kvmfs.kvm import mtrr
from kvmfs.kvm.msr_lists import (
    FEATURE_VALUES,
    KVM_MSRS,
    KVM_MSRS_LAST,
    LEGACY_PMU_MSRS,
    TSC_RATIO_DEFAULT,
)

if TYPE_CHECKING:
    from kvmfs.kvm.cpuid import CpuidTable
    from kvmfs.kvm.lapic import Lapic

M64 = (1 << 64) - 1
M32 = (1 << 32) - 1
VIRT_BITS = 48
MSR_FSB_FREQ = 0xCD

MISC_ENABLE_RESET = M.MSR_IA32_MISC_ENABLE_BTS_UNAVAIL | M.MSR_IA32_MISC_ENABLE_PEBS_UNAVAIL
MISC_ENABLE_PMU_RO = M.MSR_IA32_MISC_ENABLE_BTS_UNAVAIL | M.MSR_IA32_MISC_ENABLE_PEBS_UNAVAIL
# What a client may set in IA32_FEAT_CTL, with or without the feature.
FEAT_CTL_HOST_BITS = (M.FEAT_CTL_LOCKED | M.FEAT_CTL_VMX_ENABLED_INSIDE_SMX
                      | M.FEAT_CTL_VMX_ENABLED_OUTSIDE_SMX | M.FEAT_CTL_LMCE_ENABLED)
HWCR_IGNORED = 1 << 3 | 1 << 6 | 1 << 8     # TLB cache disable, flush filter disable, IGNNE emulation
HWCR_WRITABLE = M.MSR_K7_HWCR_MCSTATUSWREN | M.MSR_K7_HWCR_TSC_FREQ_SEL
DEBUGCTL_IGNORED = M.DEBUGCTLMSR_LBR | M.DEBUGCTLMSR_BTF
VM_CR_BITS = 0x1F
VM_CR_LOCKED_BITS = SVM_VM_CR_SVM_LOCK | SVM_VM_CR_SVM_DISABLE
OSVW_LENGTH_RESET = 3                       # errata 298, 400 and 415 are known, none applies
MCI_CTL2_BITS = M.MCI_CTL2_CMCI_EN | M.MCI_CTL2_CMCI_THRESHOLD_MASK
_MC_CTL_RELAXED = 1 << 10 | 1               # may be clear where all ones are wanted (K8, UnixWare)

# MSRs that are a register of the CPU and no more: index → attribute of kvmfs.cpu.cpu.Cpu.
CPU_ATTRIBUTES: dict[int, str] = {
    M.MSR_STAR: "star", M.MSR_LSTAR: "lstar", M.MSR_CSTAR: "cstar", M.MSR_SYSCALL_MASK: "fmask",
    M.MSR_KERNEL_GS_BASE: "kernel_gs_base", M.MSR_TSC_AUX: "tsc_aux", M.MSR_IA32_SYSENTER_CS: "sysenter_cs",
    M.MSR_IA32_SYSENTER_ESP: "sysenter_esp", M.MSR_IA32_SYSENTER_EIP: "sysenter_eip",
}
# All that CpuMsrs must know: those, and four that touch more.
CPU_STATE_MSRS = frozenset((*CPU_ATTRIBUTES, M.MSR_EFER, M.MSR_FS_BASE, M.MSR_GS_BASE, M.MSR_IA32_TSC,
                            M.MSR_IA32_APICBASE))


PV_MSRS = frozenset((*KVM_MSRS, *KVM_MSRS_LAST))
# Those that Linux hands to its Hyper-V part, which does not know all of them.
HV_MSRS = frozenset((
    *range(M.HV_X64_MSR_GUEST_OS_ID, M.HV_X64_MSR_SINT15 + 1), *range(M.HV_X64_MSR_STIMER0_CONFIG, M.HV_X64_MSR_STIMER3_COUNT + 1),
    *range(M.HV_X64_MSR_SYNDBG_CONTROL, M.HV_X64_MSR_SYNDBG_PENDING_BUFFER + 1), M.HV_X64_MSR_SYNDBG_OPTIONS,
    *range(M.HV_X64_MSR_CRASH_P0, M.HV_X64_MSR_CRASH_CTL + 1), M.HV_X64_MSR_REENLIGHTENMENT_CONTROL,
    M.HV_X64_MSR_TSC_EMULATION_CONTROL, M.HV_X64_MSR_TSC_EMULATION_STATUS, M.HV_X64_MSR_TSC_INVARIANT_CONTROL))


class CpuMsrs(Protocol):
    """The MSRs in CPU_STATE_MSRS of one vCPU.  Values handed to ``write`` are checked and canonical
    already.
    """

    def read(self, index: int) -> int: ...

    def write(self, index: int, value: int, host_initiated: bool) -> bool:
        """False: #GP (EFER has rules that need the CPU's state)."""

    def adjust_tsc(self, delta: int) -> None:
        """Add ``delta`` (modulo 2**64) to the TSC's offset."""


class PvMsrs(Protocol):
    """KVM's own MSRs (PV_MSRS) of one vCPU."""

    def has(self, index: int) -> bool:
        """May this guest use it?"""

    def read(self, index: int) -> int | None: ...

    def write(self, index: int, value: int, host_initiated: bool) -> bool: ...


class HvMsrs(Protocol):
    """Hyper-V's MSRs (HV_MSRS) of one vCPU."""

    def read(self, index: int, host: bool) -> int | None: ...

    def write(self, index: int, value: int, host: bool) -> bool: ...


class MsrPolicy(Protocol):
    """What the client has decided for the VM with KVM_ENABLE_CAP."""

    @property
    def disabled_quirks(self) -> int: ...

    @property
    def guest_can_read_msr_platform_info(self) -> bool: ...


class _DefaultPolicy:
    disabled_quirks = 0
    guest_can_read_msr_platform_info = True


def canonical(address: int) -> int:
    """The address with bit 47 copied into all higher bits."""
    low = address & (1 << VIRT_BITS) - 1
    return low | (M64 & ~((1 << VIRT_BITS) - 1) if low >> (VIRT_BITS - 1) else 0)


def apic_base_valid(old: int, new: int, table: CpuidTable, host_initiated: bool) -> bool:
    """``kvm_apic_set_base``: may IA32_APIC_BASE go from ``old`` to ``new``?  Bit 11 enables, 10 is x2APIC."""
    reserved = (M64 << table.maxphyaddr) & M64 | 0x2FF
    if not table.has(C.X86_FEATURE_X2APIC):
        reserved |= M.X2APIC_ENABLE
    old_mode, new_mode = old >> 10 & 3, new >> 10 & 3       # 0 off, 1 invalid, 2 xAPIC, 3 x2APIC
    if new & reserved or new_mode == 1:
        return False
    return host_initiated or (old_mode, new_mode) not in ((3, 2), (0, 3))


class MsrFile:
    """The MSRs of one vCPU, with their values after RESET.

    ``vendor``: "intel" or "amd".  ``cpuid``: gives the vCPU's present table.  ``cpu``: the MSRs in CPU state.
    """

    def __init__(self, vendor: str, cpuid: Callable[[], CpuidTable], cpu: CpuMsrs,
                 policy: MsrPolicy | None = None, pv: PvMsrs | None = None, hv: HvMsrs | None = None) -> None:
        self.vendor = vendor
        self.cpuid_mirror_changed: Callable[[], None] = lambda: None     # called when CPUID.MWAIT is to change
        self._policy: MsrPolicy = policy if policy is not None else _DefaultPolicy()
        self._pv, self._hv = pv, hv
        self.apic: Lapic | None = None          # where the VM has an irqchip
        self.mcg_cap = KVM_MAX_MCE_BANKS
        self._cpuid, self._cpu = cpuid, cpu
        features = FEATURE_VALUES[vendor]
        self._values: dict[int, int] = dict.fromkeys(_ZERO_AT_RESET, 0)
        self._values |= {
            M.MSR_IA32_CR_PAT: M.MSR_IA32_CR_PAT_DEFAULT,
            M.MSR_IA32_MISC_ENABLE: MISC_ENABLE_RESET,
            M.MSR_PLATFORM_INFO: M.MSR_PLATFORM_INFO_CPUID_FAULT,
            M.MSR_IA32_UCODE_REV: features[M.MSR_IA32_UCODE_REV],
            M.MSR_IA32_ARCH_CAPABILITIES: features[M.MSR_IA32_ARCH_CAPABILITIES],
        }
        if vendor == "intel":
            self._values |= {M.MSR_IA32_FEAT_CTL: 0, M.MSR_IA32_MCG_EXT_CTL: 0}
        else:
            self._values |= {M.MSR_AMD64_DE_CFG: 0, M.MSR_VM_CR: 0, M.MSR_AMD64_TSC_RATIO: TSC_RATIO_DEFAULT,
                             M.MSR_AMD64_OSVW_ID_LENGTH: OSVW_LENGTH_RESET}
        if self._policy.disabled_quirks & KVM_X86_QUIRK_STUFF_FEATURE_MSRS:
            self._values |= {index: 0 for index in _STUFFED if index in self._values}

    # ---- reading ------------------------------------------------------------------------------------

    def get(self, index: int, *, host_initiated: bool) -> int | None:
        """The value, or None: the guest gets #GP, the client's KVM_GET_MSRS stops here."""
        if index in CPU_STATE_MSRS:
            return self._read_cpu(index)
        if self._pv is not None and index in PV_MSRS:
            return self._pv.read(index)
        if self._hv is not None and index in HV_MSRS:
            return self._hv.read(index, host_initiated)
        if index in _APIC_MSRS:
            return self._read_apic(index)
        if index in _OSVW and not self._cpuid().has(C.X86_FEATURE_OSVW):
            return None
        if not host_initiated and self._hidden(index):
            return None
        value = self._values.get(index)
        if value is not None:
            return value
        if index in _MC_BANKS:
            return self._get_mc_bank(index, host_initiated)
        if index == M.MSR_IA32_MCG_CAP:
            return self.mcg_cap
        return CONSTANTS.get(index)

    def _read_cpu(self, index: int) -> int:
        value = self._cpu.read(index)
        if index in _SYSENTER and self._truncates_sysenter():
            value &= M32
        return value

    def _read_apic(self, index: int) -> int | None:
        """The local APIC's, when it is in here: x2APIC registers, the TSC deadline."""
        if index == M.MSR_IA32_TSC_DEADLINE:
            return self.apic.timer.read_deadline() if self.apic is not None else 0
        return self.apic.read_msr(index) if self.apic is not None else None

    def _hidden(self, index: int) -> bool:
        """Does the guest's CPUID hide an MSR that its client may read?"""
        if index == M.MSR_IA32_MCG_CTL:
            return not self.mcg_cap & M.MCG_CTL_P
        if index == M.MSR_PLATFORM_INFO:
            return not self._policy.guest_can_read_msr_platform_info
        if index == M.MSR_IA32_MCG_EXT_CTL:
            return not self._values.get(M.MSR_IA32_FEAT_CTL, 0) & M.FEAT_CTL_LMCE_ENABLED
        feature = _NEEDS.get(index)
        return feature is not None and not self._cpuid().has(feature)

    def _get_mc_bank(self, index: int, host_initiated: bool) -> int | None:
        if not self._bank_exists(index) or (index in _MC_CTL2 and not self.mcg_cap & M.MCG_CMCI_P
                                            and not host_initiated):
            return None
        return self._values.get(index, 0)

    def _bank_exists(self, index: int) -> bool:
        banks = self.mcg_cap & 0xFF
        return index < (M.MSR_IA32_MC0_CTL2 + banks if index in _MC_CTL2 else M.MSR_IA32_MC0_CTL + 4 * banks)

    # ---- writing ------------------------------------------------------------------------------------

    def set(self, index: int, value: int, *, host_initiated: bool) -> bool:
        """Write; False: the guest gets #GP, the client's KVM_SET_MSRS stops here."""
        if self._pv is not None and index in PV_MSRS:
            return self._pv.write(index, value, host_initiated)
        if self._hv is not None and index in HV_MSRS:
            return self._hv.write(index, value, host_initiated)
        writer = _WRITERS.get(index)
        if writer is not None:
            return writer(self, index, value, host_initiated)
        return index in IGNORED_WRITES

    def is_unknown(self, index: int, *, write: bool) -> bool:
        """Of an access that failed: is it because there is no such MSR (KVM_MSR_RET_UNSUPPORTED)?"""
        if index in PV_MSRS:
            return self._pv is None or not self._pv.has(index)
        if index in HV_MSRS:
            return self._hv is None
        if index in _VENDORS_OWN and index not in self._values:
            return True
        if write:
            return index not in _WRITERS
        return (index not in self._values and index not in CPU_STATE_MSRS and index not in _MC_BANKS
                and index not in _OSVW and index not in _APIC_MSRS and index != M.MSR_IA32_MCG_CAP and index not in CONSTANTS)

    def _store(self, index: int, value: int, host_initiated: bool) -> bool:
        if index not in self._values:       # another vendor's
            return False
        self._values[index] = value
        return True

    def _store_by_host(self, index: int, value: int, host_initiated: bool) -> bool:
        return host_initiated and self._store(index, value, host_initiated)

    def _set_cpu(self, index: int, value: int, host_initiated: bool) -> bool:
        return self._cpu.write(index, value, host_initiated)

    def _set_x2apic(self, index: int, value: int, host_initiated: bool) -> bool:
        return self.apic is not None and self.apic.write_msr(index, value)

    def _set_tsc_deadline(self, index: int, value: int, host_initiated: bool) -> bool:
        if self.apic is not None:
            with self.apic.chip.lock:
                self.apic.timer.write_deadline(value)
        return True

    def _set_canonical(self, index: int, value: int, host_initiated: bool) -> bool:
        return value == canonical(value) and self._cpu.write(index, value, host_initiated)

    def _set_sysenter(self, index: int, value: int, host_initiated: bool) -> bool:
        value = value & M32 if self._truncates_sysenter() else canonical(value)
        return self._cpu.write(index, value, host_initiated)

    def _truncates_sysenter(self) -> bool:
        """AMD has no SYSENTER in long mode: ESP and EIP are 32 bits, unless the guest believes in an
        Intel.
        """
        return self.vendor == "amd" and self._cpuid().amd_compatible

    def _set_tsc_aux(self, index: int, value: int, host_initiated: bool) -> bool:
        table = self._cpuid()
        if not host_initiated and not table.has(C.X86_FEATURE_RDTSCP) and not table.has(C.X86_FEATURE_RDPID):
            return False
        if value >> 32 and not table.amd_compatible:
            return False
        return self._cpu.write(index, value & M32, host_initiated)

    def _set_apic_base(self, index: int, value: int, host_initiated: bool) -> bool:
        return (apic_base_valid(self._cpu.read(index), value, self._cpuid(), host_initiated)
                and self._cpu.write(index, value, host_initiated))

    def _set_tsc(self, index: int, value: int, host_initiated: bool) -> bool:
        if host_initiated:
            return self._cpu.write(index, value, True)
        delta = value - self._cpu.read(index) & M64
        self._cpu.adjust_tsc(delta)
        self._values[M.MSR_IA32_TSC_ADJUST] = self._values[M.MSR_IA32_TSC_ADJUST] + delta & M64
        return True

    def _set_tsc_adjust(self, index: int, value: int, host_initiated: bool) -> bool:
        if self._cpuid().has(C.X86_FEATURE_TSC_ADJUST):
            if not host_initiated:
                self._cpu.adjust_tsc(value - self._values[index] & M64)
            self._values[index] = value
        return True

    def _set_pat(self, index: int, value: int, host_initiated: bool) -> bool:
        return mtrr.pat_valid(value) and self._store(index, value, host_initiated)

    def _set_mtrr(self, index: int, value: int, host_initiated: bool) -> bool:
        return (mtrr.mtrr_valid(index, value, self._cpuid().maxphyaddr)
                and self._store(index, value, host_initiated))

    def _set_ucode_rev(self, index: int, value: int, host_initiated: bool) -> bool:
        if host_initiated:
            self._values[index] = value
        return True

    def _set_misc_enable(self, index: int, value: int, host_initiated: bool) -> bool:
        old = self._values[index]
        if not host_initiated:
            if (old ^ value) & MISC_ENABLE_PMU_RO:
                return False
            value = value & ~M.MSR_IA32_MISC_ENABLE_EMON | old & M.MSR_IA32_MISC_ENABLE_EMON
        if ((old ^ value) & M.MSR_IA32_MISC_ENABLE_MWAIT
                and self._policy.disabled_quirks & KVM_X86_QUIRK_MISC_ENABLE_NO_MWAIT):
            if not self._cpuid().has(C.X86_FEATURE_XMM3):
                return False
            self._values[index] = value
            self.cpuid_mirror_changed()
            return True
        return self._store(index, value, host_initiated)

    def _set_misc_features(self, index: int, value: int, host_initiated: bool) -> bool:
        if value & ~M.MSR_MISC_FEATURES_ENABLES_CPUID_FAULT or (
                value and not self._values[M.MSR_PLATFORM_INFO] & M.MSR_PLATFORM_INFO_CPUID_FAULT):
            return False
        return self._store(index, value, host_initiated)

    def _set_platform_info(self, index: int, value: int, host_initiated: bool) -> bool:
        if not host_initiated or (not value & M.MSR_PLATFORM_INFO_CPUID_FAULT and self.cpuid_fault_enabled):
            return False
        return self._store(index, value, host_initiated)

    def _set_hwcr(self, index: int, value: int, host_initiated: bool) -> bool:
        value &= ~HWCR_IGNORED
        if value & ~HWCR_WRITABLE:
            return False
        return self._store(index, value, host_initiated)

    def _set_debugctl(self, index: int, value: int, host_initiated: bool) -> bool:
        """Without branch records AMD's KVM drops every write, Intel's faults on what it does not know."""
        return self.vendor == "amd" or not value & ~DEBUGCTL_IGNORED

    def _set_feat_ctl(self, index: int, value: int, host_initiated: bool) -> bool:
        if self.vendor != "intel":
            return False
        lmce = M.FEAT_CTL_LMCE_ENABLED if self.mcg_cap & M.MCG_LMCE_P else 0
        if not host_initiated and (self._values[index] & M.FEAT_CTL_LOCKED or value & ~(M.FEAT_CTL_LOCKED | lmce)):
            return False
        return not value & ~FEAT_CTL_HOST_BITS and self._store(index, value, host_initiated)

    def _set_hsave_pa(self, index: int, value: int, host_initiated: bool) -> bool:
        if self.vendor != "amd":
            return True                                 # ignored
        if not host_initiated and value & (0xFFF | (M64 << self._cpuid().maxphyaddr)):
            return False
        return self._store(index, value & ~0xFFF, host_initiated)

    def _set_vm_cr(self, index: int, value: int, host_initiated: bool) -> bool:
        """``svm_set_vm_cr``: once SVMDIS is set, it and LOCK stay as they are."""
        if self.vendor != "amd" or value & ~VM_CR_BITS:
            return False
        old = self._values[index]
        if old & SVM_VM_CR_SVM_DISABLE:
            value = value & ~VM_CR_LOCKED_BITS | old & VM_CR_LOCKED_BITS
        self._values[index] = value
        return True

    def _set_tsc_ratio(self, index: int, value: int, host_initiated: bool) -> bool:
        """No TSC scaling: a client may write the reset value back, or 0 as QEMU 6.2 does, without effect."""
        return self.vendor == "amd" and host_initiated and value in (0, self._values[index])

    def _set_de_cfg(self, index: int, value: int, host_initiated: bool) -> bool:
        allowed = FEATURE_VALUES[self.vendor].get(index)
        return allowed is not None and not value & ~allowed and self._store(index, value, host_initiated)

    def _set_must_be_zero(self, index: int, value: int, host_initiated: bool) -> bool:
        return host_initiated and not value

    def _set_zero(self, index: int, value: int, host_initiated: bool) -> bool:
        return not value

    def _set_xss(self, index: int, value: int, host_initiated: bool) -> bool:
        return (host_initiated or self._cpuid().has(C.X86_FEATURE_XSAVES)) and not value

    def _set_osvw(self, index: int, value: int, host_initiated: bool) -> bool:
        return self._cpuid().has(C.X86_FEATURE_OSVW) and self._store(index, value, host_initiated)

    def _set_mcg_ext_ctl(self, index: int, value: int, host_initiated: bool) -> bool:
        """Local machine checks, on Intel where IA32_FEAT_CTL turns them on."""
        if (not host_initiated and self._hidden(index)) or value & ~M.MCG_EXT_CTL_LMCE_EN:
            return False
        return self._store(index, value, host_initiated)

    def _set_mcg_ctl(self, index: int, value: int, host_initiated: bool) -> bool:
        if not self.mcg_cap & M.MCG_CTL_P and (value or not host_initiated):
            return False
        return value in (0, M64) and self._store(index, value, host_initiated)

    def _set_mc_bank(self, index: int, value: int, host_initiated: bool) -> bool:
        """``set_msr_mce``: MCi_CTL, _STATUS, _ADDR, _MISC, and MCi_CTL2."""
        if not self._bank_exists(index):
            return False
        if index in _MC_CTL2:
            if (not self.mcg_cap & M.MCG_CMCI_P and (value or not host_initiated)) or value & ~MCI_CTL2_BITS:
                return False
        elif index & 3 == 0:
            if value and value | _MC_CTL_RELAXED != M64:
                return False
        elif index & 3 == 1 and value and not host_initiated and not self._may_set_mci_status():
            return False
        self._values[index] = value
        return True

    def _may_set_mci_status(self) -> bool:
        return self._cpuid().amd_compatible and bool(self._values[M.MSR_K7_HWCR] & M.MSR_K7_HWCR_MCSTATUSWREN)

    # ---- machine checks (kvmfs.kvm.mce) ---------------------------------------------------------------

    def setup_mce(self, mcg_cap: int) -> None:
        """KVM_X86_SETUP_MCE: banks with all reporting on."""
        self.mcg_cap = mcg_cap
        if mcg_cap & M.MCG_CTL_P:
            self._values[M.MSR_IA32_MCG_CTL] = M64
        for bank in range(mcg_cap & 0xFF):
            self._values[M.MSR_IA32_MC0_CTL + 4 * bank] = M64
            if mcg_cap & M.MCG_CMCI_P:
                self._values[M.MSR_IA32_MC0_CTL2 + bank] = 0

    @property
    def mce_enabled(self) -> bool:
        """IA32_MCG_CTL, where it exists, lets uncorrected errors be reported."""
        return not self.mcg_cap & M.MCG_CTL_P or self._values[M.MSR_IA32_MCG_CTL] == M64

    @property
    def mcg_status(self) -> int:
        return self._values[M.MSR_IA32_MCG_STATUS]

    @mcg_status.setter
    def mcg_status(self, value: int) -> None:
        self._values[M.MSR_IA32_MCG_STATUS] = value

    def bank_register(self, index: int) -> int:
        """A register of a bank, whoever may see it."""
        return self._values.get(index, 0)

    def cmci_enabled(self, bank: int) -> bool:
        """Does the guest want an interrupt for what is logged in the bank?"""
        return bool(self.mcg_cap & M.MCG_CMCI_P and self.bank_register(M.MSR_IA32_MC0_CTL2 + bank) & M.MCI_CTL2_CMCI_EN)

    def log_mce(self, ctl: int, status: int, addr: int, misc: int) -> None:
        """Write the three registers behind MCi_CTL (MSR number ``ctl``)."""
        self._values |= {ctl + 1: status, ctl + 2: addr, ctl + 3: misc}

    def log_overflow(self, ctl: int) -> None:
        """Another error came while the bank held one that counts more."""
        self._values[ctl + 1] |= M.MCI_STATUS_OVER

    # ---- what others ask ----------------------------------------------------------------------------

    @property
    def mwait_enabled(self) -> bool:
        """IA32_MISC_ENABLE's bit 18, which CPUID mirrors where a quirk is off."""
        return bool(self._values[M.MSR_IA32_MISC_ENABLE] & M.MSR_IA32_MISC_ENABLE_MWAIT)

    @property
    def cpuid_fault_enabled(self) -> bool:
        """Does CPUID raise #GP above CPL 0 (IA32_MISC_FEATURES_ENABLES)?"""
        return bool(self._values[M.MSR_MISC_FEATURES_ENABLES] & M.MSR_MISC_FEATURES_ENABLES_CPUID_FAULT)


_OSVW = frozenset((M.MSR_AMD64_OSVW_ID_LENGTH, M.MSR_AMD64_OSVW_STATUS))
_SYSENTER = frozenset((M.MSR_IA32_SYSENTER_ESP, M.MSR_IA32_SYSENTER_EIP))
# KVM_X86_QUIRK_STUFF_FEATURE_MSRS gives a new vCPU what the host has in these.
_STUFFED = frozenset((M.MSR_IA32_ARCH_CAPABILITIES, M.MSR_PLATFORM_INFO, M.MSR_IA32_PERF_CAPABILITIES,
                      M.MSR_IA32_UCODE_REV))
# Only one vendor's KVM knows these.
_VENDORS_OWN = frozenset((M.MSR_IA32_FEAT_CTL, M.MSR_IA32_MCG_EXT_CTL, M.MSR_AMD64_DE_CFG, M.MSR_VM_CR,
                          M.MSR_AMD64_TSC_RATIO))
_X2APIC = range(M.APIC_BASE_MSR, M.APIC_BASE_MSR + 0x100)
_APIC_MSRS = frozenset((*_X2APIC, M.MSR_IA32_TSC_DEADLINE))
_MC_CTL2 = range(M.MSR_IA32_MC0_CTL2, M.MSR_IA32_MC0_CTL2 + KVM_MAX_MCE_BANKS)
_MC_BANKS = frozenset((*range(M.MSR_IA32_MC0_CTL, M.MSR_IA32_MC0_CTL + 4 * KVM_MAX_MCE_BANKS), *_MC_CTL2))

_ZERO_AT_RESET = (
    M.MSR_IA32_TSC_ADJUST, M.MSR_IA32_PERF_CAPABILITIES, M.MSR_IA32_MCG_STATUS, M.MSR_IA32_MCG_CTL,
    M.MSR_SMI_COUNT, M.MSR_MISC_FEATURES_ENABLES, M.MSR_IA32_POWER_CTL, M.MSR_K7_HWCR, M.MSR_VM_HSAVE_PA,
    M.MSR_IA32_DEBUGCTLMSR, M.MSR_IA32_XSS, M.MSR_AMD64_OSVW_ID_LENGTH, M.MSR_AMD64_OSVW_STATUS,
    *mtrr.ALL_MSRS,
)
# Hidden from a guest without the feature.
_NEEDS: dict[int, C.Feature] = {
    M.MSR_IA32_ARCH_CAPABILITIES: C.X86_FEATURE_ARCH_CAPABILITIES,
    M.MSR_IA32_PERF_CAPABILITIES: C.X86_FEATURE_PDCM,
    M.MSR_IA32_XSS: C.X86_FEATURE_XSAVES,
    M.MSR_AMD64_TSC_RATIO: C.X86_FEATURE_TSCRATEMSR,
}

# Read as this whatever happens: what Linux answers so that guests which ask without looking find something
# sane.
CONSTANTS: dict[int, int] = {
    **dict.fromkeys((
        M.MSR_IA32_PLATFORM_ID, M.MSR_IA32_EBL_CR_POWERON, M.MSR_IA32_LASTBRANCHFROMIP,
        M.MSR_IA32_LASTBRANCHTOIP, M.MSR_IA32_LASTINTFROMIP, M.MSR_IA32_LASTINTTOIP,
        M.MSR_AMD64_SYSCFG, M.MSR_K8_TSEG_ADDR,
        M.MSR_K8_TSEG_MASK, M.MSR_K8_INT_PENDING_MSG, M.MSR_AMD64_NB_CFG, M.MSR_FAM10H_MMIO_CONF_BASE,
        M.MSR_AMD64_BU_CFG2, M.MSR_IA32_PERF_CTL, M.MSR_AMD64_DC_CFG, M.MSR_AMD64_TW_CFG, M.MSR_F15H_EX_CFG,
        M.MSR_RAPL_POWER_UNIT, M.MSR_PP0_ENERGY_STATUS, M.MSR_PP1_ENERGY_STATUS, M.MSR_PKG_ENERGY_STATUS,
        M.MSR_DRAM_ENERGY_STATUS, M.MSR_IA32_P5_MC_ADDR, M.MSR_IA32_P5_MC_TYPE, *LEGACY_PMU_MSRS), 0),
    M.MSR_MTRRcap: mtrr.MTRR_CAP,
    MSR_FSB_FREQ: 3,
    M.MSR_EBC_FREQUENCY_ID: 1 << 24,
    M.MSR_IA32_PERF_STATUS: 1000 | 4 << 40,
    M.MSR_K7_CLK_CTL: 0x20000000,
    M.MSR_IA32_BBL_CR_CTL3: 0xBE702111,
}
# Writing these does nothing.
IGNORED_WRITES = frozenset((
    M.MSR_AMD64_NB_CFG, M.MSR_IA32_UCODE_WRITE, M.MSR_AMD64_PATCH_LOADER, M.MSR_AMD64_BU_CFG2,
    M.MSR_AMD64_DC_CFG, M.MSR_AMD64_TW_CFG, M.MSR_F15H_EX_CFG, M.MSR_K7_CLK_CTL,
    M.MSR_IA32_BBL_CR_CTL3, *LEGACY_PMU_MSRS))

_Writer = Callable[[MsrFile, int, int, bool], bool]
_WRITERS: dict[int, _Writer] = {
    **dict.fromkeys((M.MSR_STAR, M.MSR_SYSCALL_MASK, M.MSR_IA32_SYSENTER_CS, M.MSR_EFER), MsrFile._set_cpu),
    **dict.fromkeys((M.MSR_FS_BASE, M.MSR_GS_BASE, M.MSR_KERNEL_GS_BASE, M.MSR_CSTAR, M.MSR_LSTAR),
                    MsrFile._set_canonical),
    **dict.fromkeys(_SYSENTER, MsrFile._set_sysenter),
    **dict.fromkeys(mtrr.ALL_MSRS, MsrFile._set_mtrr),
    **dict.fromkeys(_MC_BANKS, MsrFile._set_mc_bank),
    **dict.fromkeys(_OSVW, MsrFile._set_osvw),
    **dict.fromkeys((M.MSR_IA32_MCG_STATUS, M.MSR_IA32_POWER_CTL), MsrFile._store),
    **dict.fromkeys((M.MSR_IA32_ARCH_CAPABILITIES, M.MSR_SMI_COUNT), MsrFile._store_by_host),
    **dict.fromkeys((M.MSR_IA32_PERF_CAPABILITIES, M.MSR_IA32_PRED_CMD), MsrFile._set_must_be_zero),
    M.MSR_FAM10H_MMIO_CONF_BASE: MsrFile._set_zero,
    **dict.fromkeys(_X2APIC, MsrFile._set_x2apic),
    M.MSR_IA32_TSC_DEADLINE: MsrFile._set_tsc_deadline,
    M.MSR_TSC_AUX: MsrFile._set_tsc_aux,
    M.MSR_IA32_APICBASE: MsrFile._set_apic_base,
    M.MSR_IA32_TSC: MsrFile._set_tsc,
    M.MSR_IA32_TSC_ADJUST: MsrFile._set_tsc_adjust,
    M.MSR_IA32_CR_PAT: MsrFile._set_pat,
    M.MSR_IA32_UCODE_REV: MsrFile._set_ucode_rev,
    M.MSR_IA32_MISC_ENABLE: MsrFile._set_misc_enable,
    M.MSR_MISC_FEATURES_ENABLES: MsrFile._set_misc_features,
    M.MSR_PLATFORM_INFO: MsrFile._set_platform_info,
    M.MSR_K7_HWCR: MsrFile._set_hwcr,
    M.MSR_IA32_DEBUGCTLMSR: MsrFile._set_debugctl,
    M.MSR_IA32_FEAT_CTL: MsrFile._set_feat_ctl,
    M.MSR_IA32_XSS: MsrFile._set_xss,
    M.MSR_IA32_MCG_CTL: MsrFile._set_mcg_ctl,
    M.MSR_IA32_MCG_EXT_CTL: MsrFile._set_mcg_ext_ctl,
    M.MSR_VM_HSAVE_PA: MsrFile._set_hsave_pa,
    M.MSR_VM_CR: MsrFile._set_vm_cr,
    M.MSR_AMD64_TSC_RATIO: MsrFile._set_tsc_ratio,
    M.MSR_AMD64_DE_CFG: MsrFile._set_de_cfg,
}
