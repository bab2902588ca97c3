# SPDX-License-Identifier: GPL-2.0-or-later
"""What may be written to the memory type registers (Linux: arch/x86/kvm/mtrr.c; SDM vol. 3, 12.11).

The engine has no caches, so memory types have no effect: the registers hold what they are given.
"""

from __future__ import annotations

from kvmfs.abi import msrs as M

MTRR_CAP = 0x500 | M.KVM_NR_VAR_MTRR        # write combining and the fixed ranges exist, no SMRR
# Base and mask of variable range n: MTRR_PHYS_BASE0 + 2n and + 2n + 1.
VARIABLE_MSRS = tuple(range(M.MTRR_PHYS_BASE0, M.MTRR_PHYS_BASE0 + 2 * M.KVM_NR_VAR_MTRR))
FIXED_MSRS = (
    M.MSR_MTRRfix64K_00000, M.MSR_MTRRfix16K_80000, M.MSR_MTRRfix16K_A0000, M.MSR_MTRRfix4K_C0000,
    M.MSR_MTRRfix4K_C8000, M.MSR_MTRRfix4K_D0000, M.MSR_MTRRfix4K_D8000, M.MSR_MTRRfix4K_E0000,
    M.MSR_MTRRfix4K_E8000, M.MSR_MTRRfix4K_F0000, M.MSR_MTRRfix4K_F8000,
)
ALL_MSRS = (*VARIABLE_MSRS, *FIXED_MSRS, M.MSR_MTRRdefType)

_VALID_TYPES = frozenset((0, 1, 4, 5, 6))   # UC, WC, WT, WP, WB
_DEF_TYPE_BITS = 0xCFF                      # E, FE, type
_PAT_TYPES = frozenset((0, 1, 4, 5, 6, 7))  # as above, and UC-


def mtrr_valid(index: int, value: int, maxphyaddr: int) -> bool:
    """May ``value`` be written to memory type register ``index``, one of ALL_MSRS?"""
    if index == M.MSR_MTRRdefType:
        return not value & ~_DEF_TYPE_BITS and value & 0xFF in _VALID_TYPES
    if index in FIXED_MSRS:
        return _VALID_TYPES.issuperset(value.to_bytes(8, "little"))
    reserved = ((1 << 64) - (1 << maxphyaddr)) | (0x7FF if index & 1 else 0xF00)
    return not value & reserved and (bool(index & 1) or value & 0xFF in _VALID_TYPES)


def pat_valid(value: int) -> bool:
    """May ``value`` be written to IA32_PAT: eight memory types?"""
    return _PAT_TYPES.issuperset(value.to_bytes(8, "little"))
