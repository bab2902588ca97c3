# SPDX-License-Identifier: GPL-2.0-or-later
"""Structs that KVM shares with the guest in guest memory (asm/kvm_para.h, asm/pvclock-abi.h).

Re-exported by kvmfs.abi.structs.
"""

from ctypes import Array, c_uint8, c_uint32
from typing import Annotated

from .cstruct import S8, S64, U8, U32, U64, Structure, layout


@layout
class KvmStealTime(Structure):
    """struct kvm_steal_time (MSR_KVM_STEAL_TIME); `steal` in ns, `version` odd while written."""

    steal: U64
    version: U32
    flags: U32
    preempted: U8
    u8_pad: Annotated[Array[c_uint8], c_uint8 * 3]
    pad: Annotated[Array[c_uint32], c_uint32 * 11]


@layout
class KvmClockPairing(Structure):
    """struct kvm_clock_pairing (KVM_HC_CLOCK_PAIRING)."""

    sec: S64
    nsec: S64
    tsc: U64
    flags: U32
    pad: Annotated[Array[c_uint32], c_uint32 * 9]


@layout
class KvmVcpuPvApfData(Structure):
    """struct kvm_vcpu_pv_apf_data (MSR_KVM_ASYNC_PF_EN)."""

    flags: U32
    token: U32
    pad: Annotated[Array[c_uint8], c_uint8 * 56]


@layout
class PvclockVcpuTimeInfo(Structure):
    """struct pvclock_vcpu_time_info (MSR_KVM_SYSTEM_TIME), 32 bytes; `version` odd while written."""

    version: U32
    pad0: U32
    tsc_timestamp: U64
    system_time: U64
    tsc_to_system_mul: U32
    tsc_shift: S8
    flags: U8
    pad: Annotated[Array[c_uint8], c_uint8 * 2]


@layout
class PvclockWallClock(Structure):
    """struct pvclock_wall_clock (MSR_KVM_WALL_CLOCK)."""

    version: U32
    sec: U32
    nsec: U32
