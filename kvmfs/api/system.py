# SPDX-License-Identifier: GPL-2.0-or-later
"""ioctls on the node itself (Linux: kvm_dev_ioctl, kvm_arch_dev_ioctl).

A handler copies in, checks, acts and copies out, in the kernel's order; KvmError carries the errno.  Creating
a VM is the daemon's: it starts a worker.
"""

from __future__ import annotations

import errno
import struct
from collections.abc import Sequence
from typing import TYPE_CHECKING

from kvmfs.abi.exits import KVM_API_VERSION
from kvmfs.abi.flags import KVM_X86_XCOMP_GUEST_SUPP
from kvmfs.abi.x86 import KVM_MAX_CPUID_ENTRIES
from kvmfs.errors import KvmError
from kvmfs.kvm import caps, cpuid, cpuid_supported, hyperv_cpuid, mce, msr_lists
from kvmfs.kvm.kvm_main import VCPU_MMAP_SIZE

if TYPE_CHECKING:
    from kvmfs.kvm.cpuid import CpuidEntry
    from kvmfs.kvm.host import Memory, RequestLike
    from kvmfs.kvm.kvm_main import Kvm

_CPUID_HEADER = struct.Struct("<II")    # nent, padding
_MSRS_HEADER = struct.Struct("<II")     # nmsrs, pad
_DEVICE_ATTR = struct.Struct("<IIQQ")   # flags, group, attr, addr
_LIST_HEADER = struct.Struct("<I")      # nmsrs


def get_api_version(kvm: Kvm, req: RequestLike) -> int:
    """KVM_GET_API_VERSION (api.rst 4.1): 12.  EINVAL: an argument."""
    if req.arg:
        raise KvmError(errno.EINVAL)
    return KVM_API_VERSION


def check_extension(kvm: Kvm, req: RequestLike) -> int:
    """KVM_CHECK_EXTENSION (api.rst 4.4): the capability's value; 0 for what is absent or unknown."""
    return caps.check_extension(kvm.profile, req.arg, shares_run=kvm.shares_run)


def get_vcpu_mmap_size(kvm: Kvm, req: RequestLike) -> int:
    """KVM_GET_VCPU_MMAP_SIZE (api.rst 4.5): bytes of a vCPU's shared area.  EINVAL: an argument."""
    if req.arg:
        raise KvmError(errno.EINVAL)
    return VCPU_MMAP_SIZE


def x86_get_mce_cap_supported(kvm: Kvm, req: RequestLike) -> bytes:
    """KVM_X86_GET_MCE_CAP_SUPPORTED (api.rst 4.103): what a client may set in IA32_MCG_CAP."""
    return struct.pack("<Q", mce.supported_cap(kvm.vendor.name))


def get_supported_cpuid(kvm: Kvm, req: RequestLike) -> bytes:
    """KVM_GET_SUPPORTED_CPUID (api.rst 4.46).  E2BIG, header unchanged: nent is too small; EFAULT."""
    nent, padding = _CPUID_HEADER.unpack(req.data)
    entries = cpuid_supported.supported(kvm.vendor.name)
    if nent < len(entries):
        raise KvmError(errno.E2BIG)
    return _cpuid_out(kvm.memory_of(req), req.arg, entries, padding)


def get_emulated_cpuid(kvm: Kvm, req: RequestLike) -> bytes:
    """KVM_GET_EMULATED_CPUID (api.rst 4.88): as GET_SUPPORTED_CPUID; EINVAL: padding in an entry is not 0.

    The kernel looks at the padding of all ``nent`` entries (256 at most) before it counts its own.
    """
    nent, padding = _CPUID_HEADER.unpack(req.data)
    if nent < 1:
        raise KvmError(errno.E2BIG)
    memory = kvm.memory_of(req)
    cpuid.check_emulated_padding(memory, req.arg, min(nent, KVM_MAX_CPUID_ENTRIES))
    entries = cpuid_supported.emulated(kvm.vendor.name)
    if nent < len(entries) + cpuid_supported.EMULATED_SPARE:
        raise KvmError(errno.E2BIG)
    return _cpuid_out(memory, req.arg, entries, padding)


def get_supported_hv_cpuid(kvm: Kvm, req: RequestLike) -> bytes:
    """KVM_GET_SUPPORTED_HV_CPUID on the node (KVM_CAP_SYS_HYPERV_CPUID).  E2BIG: room for too few entries; EFAULT."""
    nent, padding = _CPUID_HEADER.unpack(req.data)
    entries = kvm.profile.hyperv_cpuid(hyperv_cpuid.supported(lapic=True))
    if nent < len(entries):
        raise KvmError(errno.E2BIG)
    return _cpuid_out(kvm.memory_of(req), req.arg, entries, padding)


def _cpuid_out(memory: Memory, arg: int, entries: Sequence[CpuidEntry], padding: int) -> bytes:
    cpuid.store_entries(memory, arg, entries)
    return _CPUID_HEADER.pack(len(entries), padding)


def get_msr_index_list(kvm: Kvm, req: RequestLike) -> tuple[int, bytes]:
    """KVM_GET_MSR_INDEX_LIST (api.rst 4.3): E2BIG: too little room, and nmsrs says how much; EFAULT."""
    vendor = kvm.vendor.name
    return _list_out(kvm, req, (msr_lists.MSRS_TO_SAVE[vendor], kvm.profile.msrs(msr_lists.EMULATED_MSRS[vendor])))


def get_msr_feature_index_list(kvm: Kvm, req: RequestLike) -> tuple[int, bytes]:
    """KVM_GET_MSR_FEATURE_INDEX_LIST (api.rst 4.3): errors as GET_MSR_INDEX_LIST."""
    return _list_out(kvm, req, (tuple(msr_lists.FEATURE_VALUES[kvm.vendor.name]),))


def _list_out(kvm: Kvm, req: RequestLike, parts: tuple[tuple[int, ...], ...]) -> tuple[int, bytes]:
    """The kernel writes the count first, so that it stands whatever comes after."""
    room, = _LIST_HEADER.unpack(req.data)
    count = sum(map(len, parts))
    header = _LIST_HEADER.pack(count)
    if room < count:
        return -errno.E2BIG, header
    memory, address = kvm.memory_of(req), req.arg + _LIST_HEADER.size
    try:
        for part in parts:
            memory.write(address, struct.pack(f"<{len(part)}I", *part))
            address += 4 * len(part)
    except OSError:
        return -errno.EFAULT, header
    return 0, header


def get_msrs(kvm: Kvm, req: RequestLike) -> int:
    """KVM_GET_MSRS on the node (KVM_CAP_GET_MSR_FEATURES): how many feature MSRs could be read.

    E2BIG: 256 entries or more; EFAULT.
    """
    nmsrs, _ = _MSRS_HEADER.unpack(req.data)
    vendor = kvm.vendor.name
    return msr_lists.get_msrs(kvm.memory_of(req), req.arg, nmsrs,
                              lambda index: msr_lists.get_feature_msr(vendor, index))


def get_device_attr(kvm: Kvm, req: RequestLike) -> int:
    """KVM_GET_DEVICE_ATTR on the node (api.rst 4.80): an 8-byte value.  ENXIO: no such attribute; EFAULT."""
    _, group, attr, address = _DEVICE_ATTR.unpack(req.data)
    value = _device_attr(group, attr)
    kvm.memory_of(req).write(address, value.to_bytes(8, "little"))
    return 0


def has_device_attr(kvm: Kvm, req: RequestLike) -> int:
    """KVM_HAS_DEVICE_ATTR on the node (api.rst 4.81).  ENXIO: no such attribute."""
    _, group, attr, _ = _DEVICE_ATTR.unpack(req.data)
    _device_attr(group, attr)
    return 0


def _device_attr(group: int, attr: int) -> int:
    if group or attr != KVM_X86_XCOMP_GUEST_SUPP:
        raise KvmError(errno.ENXIO)
    return cpuid.SUPPORTED_XCR0
