# SPDX-License-Identifier: GPL-2.0-or-later
"""The CPUID that this KVM offers, per vendor (Linux: kvm_set_cpu_caps, __do_cpuid_func).

Linux masks the host's CPUID with what KVM can do.  Here the engine is the host: Unicorn's TCG, whatever CPU
this runs on.  Offered is what it executes and what has booted Linux; the leaves are cut, filled and put in
order as Linux does with a CPU of that family.

Not offered though the engine's CPU model names them: AVX, FMA, F16C (not translated), ERMS and FSRM (REP
MOVSB is byte by byte: slow paths would be taken for fast ones), MONITOR, SVM (no nested guests), PMU leaves.
"""

from __future__ import annotations

import struct
from functools import cache

from kvmfs.abi import cpuid as C
from kvmfs.abi import para
from kvmfs.abi.flags import KVM_CPUID_FLAG_SIGNIFCANT_INDEX
from kvmfs.abi.para import KVM_CPUID_FEATURES, KVM_CPUID_SIGNATURE, KVM_SIGNATURE
from kvmfs.kvm import steal_time
from kvmfs.kvm.cpuid import (
    SUPPORTED_XCR0,
    CpuidEntry,
    xstate_required_size,
)

# KVM's paravirtual features, all that Linux has.
KVM_FEATURES = (
    para.KVM_FEATURE_CLOCKSOURCE, para.KVM_FEATURE_NOP_IO_DELAY, para.KVM_FEATURE_CLOCKSOURCE2, para.KVM_FEATURE_ASYNC_PF,
    para.KVM_FEATURE_PV_EOI, para.KVM_FEATURE_PV_UNHALT, para.KVM_FEATURE_PV_TLB_FLUSH,
    para.KVM_FEATURE_ASYNC_PF_VMEXIT, para.KVM_FEATURE_PV_SEND_IPI, para.KVM_FEATURE_POLL_CONTROL,
    para.KVM_FEATURE_PV_SCHED_YIELD, para.KVM_FEATURE_ASYNC_PF_INT, para.KVM_FEATURE_CLOCKSOURCE_STABLE_BIT)
MAX_BASIC_LEAF = 0xD
MAX_EXTENDED_LEAF = 0x80000008
PHYS_BITS, VIRT_BITS = 40, 48
CLFLUSH_LINE = 8                            # in units of 8 bytes

# Leaves whose subleaves are told apart by ECX (cpuid_function_is_indexed).
INDEXED_LEAVES = frozenset(
    (4, 7, 0xB, 0xD, 0xF, 0x10, 0x12, 0x14, 0x17, 0x18, 0x1D, 0x1E, 0x1F, 0x24, 0x8000001D))

# What the translator gets wrong is not offered: BMI1 and BMI2 (BEXTR, BZHI, PDEP, flags of BLSI), SSE4A (EXTRQ, INSERTQ).
_COMMON = (
    C.X86_FEATURE_FPU, C.X86_FEATURE_DE, C.X86_FEATURE_PSE, C.X86_FEATURE_TSC, C.X86_FEATURE_MSR,
    C.X86_FEATURE_PAE, C.X86_FEATURE_MCE, C.X86_FEATURE_CX8, C.X86_FEATURE_APIC, C.X86_FEATURE_SEP,
    C.X86_FEATURE_MTRR, C.X86_FEATURE_PGE, C.X86_FEATURE_MCA, C.X86_FEATURE_CMOV, C.X86_FEATURE_PAT,
    C.X86_FEATURE_PSE36, C.X86_FEATURE_CLFLUSH, C.X86_FEATURE_MMX, C.X86_FEATURE_FXSR, C.X86_FEATURE_XMM,
    C.X86_FEATURE_XMM2,
    C.X86_FEATURE_XMM3, C.X86_FEATURE_PCLMULQDQ, C.X86_FEATURE_SSSE3, C.X86_FEATURE_CX16,
    C.X86_FEATURE_XMM4_1,
    C.X86_FEATURE_XMM4_2, C.X86_FEATURE_X2APIC, C.X86_FEATURE_MOVBE, C.X86_FEATURE_POPCNT, C.X86_FEATURE_AES, C.X86_FEATURE_XSAVE,
    C.X86_FEATURE_RDRAND,
    C.X86_FEATURE_FSGSBASE, C.X86_FEATURE_TSC_ADJUST, C.X86_FEATURE_SMEP,
    C.X86_FEATURE_RDSEED, C.X86_FEATURE_ADX, C.X86_FEATURE_SMAP, C.X86_FEATURE_CLFLUSHOPT,
    C.X86_FEATURE_XSAVEOPT, C.X86_FEATURE_ARCH_CAPABILITIES,
    C.X86_FEATURE_LAHF_LM, C.X86_FEATURE_ABM, C.X86_FEATURE_3DNOWPREFETCH,
    C.X86_FEATURE_SYSCALL, C.X86_FEATURE_NX, C.X86_FEATURE_GBPAGES, C.X86_FEATURE_RDTSCP, C.X86_FEATURE_LM,
)
_INTEL = _COMMON
_AMD = (*_COMMON, C.X86_FEATURE_CMP_LEGACY, C.X86_FEATURE_CR8_LEGACY, C.X86_FEATURE_MMXEXT, C.X86_FEATURE_FXSR_OPT)
# AMD repeats these bits of leaf 1's EDX in leaf 0x80000001's: all of them but SEP, CLFLUSH, XMM, XMM2.
_AMD_ALIASES = 0x0183F3FF

FEATURES: dict[str, frozenset[C.Feature]] = {"intel": frozenset(_INTEL), "amd": frozenset(_AMD)}
"""vendor name → every feature bit that KVM_GET_SUPPORTED_CPUID sets."""

_VENDOR = {"intel": C.VENDOR_INTEL, "amd": C.VENDOR_AMD}
_SIGNATURE = {"intel": 0x000506E3,              # family 6, model 0x5e (Skylake), stepping 3
              "amd": 0x00800F12}                # family 0x17, model 1 (EPYC), stepping 2
_BRAND = {"intel": b"Intel Core Processor (Skylake, kvmfs)", "amd": b"AMD EPYC Processor (kvmfs)"}

# Cache leaves, the same for every vCPU.  Deterministic parameters (SDM, CPUID leaf 4): L1d and L1i of 32 KiB,
# L2 of 256 KiB, L3 of 8 MiB, one thread to each.
_INTEL_CACHES = ((0x121, 0x01C0003F, 0x3F, 0), (0x122, 0x01C0003F, 0x3F, 0),
                 (0x143, 0x00C0003F, 0x3FF, 0), (0x163, 0x03C0003F, 0x1FFF, 6))
# APM vol. 3, E.4.4 and E.4.5: TLBs; L1d 32 KiB, L1i 64 KiB, L2 512 KiB, L3 8 MiB.
_AMD_L1 = (0x01FF01FF, 0x01FF01FF, 0x20080140, 0x40040140)
_AMD_L2 = (0, 0x42004200, 0x02006140, 0x00408140)


def feature_word(vendor: str, leaf: int, subleaf: int, reg: int) -> int:
    """The offered feature bits of one register of a leaf (Linux: one word of kvm_cpu_caps)."""
    return sum(f.mask for f in FEATURES[vendor] if (f.leaf, f.subleaf, f.reg) == (leaf, subleaf, reg))


def _words(vendor: str, leaf: int, subleaf: int = 0) -> tuple[int, int, int, int]:
    eax, ebx, ecx, edx = (feature_word(vendor, leaf, subleaf, reg) for reg in (C.EAX, C.EBX, C.ECX, C.EDX))
    return eax, ebx, ecx, edx


def _entry(leaf: int, values: tuple[int, ...] = (0, 0, 0, 0), index: int = 0) -> CpuidEntry:
    flags = KVM_CPUID_FLAG_SIGNIFCANT_INDEX if leaf in INDEXED_LEAVES else 0
    return CpuidEntry(leaf, index, flags, *values)


def _name(vendor: str) -> tuple[int, int, int]:
    ebx, edx, ecx = struct.unpack("<3I", _VENDOR[vendor])
    return ebx, ecx, edx


def _basic(vendor: str, leaf: int) -> list[CpuidEntry]:
    """Entries of one leaf from 0 to MAX_BASIC_LEAF; those that Linux keeps empty are entries too."""
    if leaf == 0:
        return [_entry(0, (MAX_BASIC_LEAF, *_name(vendor)))]
    if leaf == 1:
        _, _, ecx, edx = _words(vendor, 1)
        return [_entry(1, (_SIGNATURE[vendor], CLFLUSH_LINE << 8, ecx, edx))]
    if leaf == 2 and vendor == "intel":
        return [_entry(2, (0x0000FF01, 0, 0, 0))]           # one call; caches: see leaf 4
    if leaf == 4 and vendor == "intel":
        caches = [_entry(4, values, i) for i, values in enumerate(_INTEL_CACHES)]
        return [*caches, _entry(4, index=len(caches))]
    if leaf == 6:
        return [_entry(6, (1 << 2, 0, 0, 0))]               # ARAT, as Linux always allows
    if leaf == 7:
        _, ebx, ecx, edx = _words(vendor, 7)
        return [_entry(7, (0, ebx, ecx, edx))]
    if leaf == 0xD:
        size = xstate_required_size(SUPPORTED_XCR0)
        return [_entry(0xD, (SUPPORTED_XCR0, size, size, 0)), _entry(0xD, _words(vendor, 0xD, 1), 1)]
    return [_entry(leaf)]


def _extended(vendor: str, leaf: int) -> CpuidEntry:
    """The entry of one leaf from 0x80000000 to MAX_EXTENDED_LEAF."""
    if leaf == 0x80000000:
        name = _name(vendor) if vendor == "amd" else (0, 0, 0)
        return _entry(leaf, (MAX_EXTENDED_LEAF, *name))
    if leaf == 0x80000001:
        _, _, ecx, edx = _words(vendor, leaf)
        if vendor == "amd":
            edx |= feature_word(vendor, 1, 0, C.EDX) & _AMD_ALIASES
            return _entry(leaf, (_SIGNATURE[vendor], 0, ecx, edx))
        return _entry(leaf, (0, 0, ecx, edx))
    if 0x80000002 <= leaf <= 0x80000004:
        start = 16 * (leaf - 0x80000002)
        return _entry(leaf, struct.unpack("<4I", _BRAND[vendor].ljust(48, b"\0")[start:start + 16]))
    if leaf == 0x80000005 and vendor == "amd":
        return _entry(leaf, _AMD_L1)
    if leaf == 0x80000006:
        return _entry(leaf, _AMD_L2 if vendor == "amd" else (0, 0, 0x01006040, 0))
    if leaf == 0x80000008:
        return _entry(leaf, (VIRT_BITS << 8 | PHYS_BITS, 0, 0, 0))
    return _entry(leaf)


def kvm_features() -> int:
    """EAX of leaf 0x40000001."""
    features = sum(1 << feature for feature in KVM_FEATURES)
    return features | steal_time.available() << para.KVM_FEATURE_STEAL_TIME


@cache
def supported(vendor: str) -> tuple[CpuidEntry, ...]:
    """The entries of KVM_GET_SUPPORTED_CPUID in Linux's order.  ``vendor``: "intel" or "amd"."""
    signature = struct.unpack("<3I", KVM_SIGNATURE)
    return (
        *(entry for leaf in range(MAX_BASIC_LEAF + 1) for entry in _basic(vendor, leaf)),
        *(_extended(vendor, leaf) for leaf in range(0x80000000, MAX_EXTENDED_LEAF + 1)),
        _entry(KVM_CPUID_SIGNATURE, (KVM_CPUID_FEATURES, *signature)),
        _entry(KVM_CPUID_FEATURES, (kvm_features(), 0, 0, 0)),
    )


@cache
def emulated(vendor: str) -> tuple[CpuidEntry, ...]:
    """The entries of KVM_GET_EMULATED_CPUID: MOVBE works whether or not the client sets its bit.

    Linux adds RDPID, which its emulator has and this engine has not.
    """
    return (
        _entry(0, (7, 0, 0, 0)),
        _entry(1, (0, 0, C.X86_FEATURE_MOVBE.mask, 0)),
        _entry(7),
    )


# KVM_GET_EMULATED_CPUID wants room for one entry more than it gives: to look at further leaves with.
EMULATED_SPARE = 1
