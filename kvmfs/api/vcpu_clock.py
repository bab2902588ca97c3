# SPDX-License-Identifier: GPL-2.0-or-later
"""ioctls for a vCPU's TSC and kvmclock, and its machine checks."""

from __future__ import annotations

import errno
import struct
from typing import TYPE_CHECKING

from kvmfs.abi.flags import KVM_VCPU_TSC_CTRL, KVM_VCPU_TSC_OFFSET
from kvmfs.abi.structs import KvmX86Mce
from kvmfs.errors import KvmError
from kvmfs.kvm import kvmclock, mce, tsc

if TYPE_CHECKING:
    from kvmfs.kvm.host import RequestLike
    from kvmfs.kvm.kvm_main import Vcpu

_U64 = struct.Struct("<Q")
_DEVICE_ATTR = struct.Struct("<IIQQ")           # flags, group, attr, addr
U32_MAX = (1 << 32) - 1


def set_tsc_khz(vcpu: Vcpu, req: RequestLike) -> int:
    """KVM_SET_TSC_KHZ (api.rst 4.55); 0: the host's.  EINVAL: TSC scaling cannot make it."""
    khz = req.arg & U32_MAX
    if khz >= vcpu.vm.vendor.tsc_scaling.max_khz or not kvmclock.set_tsc_khz(vcpu, khz or tsc.tsc_khz()):
        raise KvmError(errno.EINVAL)
    return 0


def get_tsc_khz(vcpu: Vcpu, req: RequestLike) -> int:
    """KVM_GET_TSC_KHZ (api.rst 4.56)."""
    return vcpu.arch.clock.virtual_tsc_khz


def kvmclock_ctrl(vcpu: Vcpu, req: RequestLike) -> int:
    """KVM_KVMCLOCK_CTRL (api.rst 4.79): the guest sees that it was paused.  EINVAL: it has no kvmclock."""
    if not kvmclock.set_guest_paused(vcpu):
        raise KvmError(errno.EINVAL)
    return 0


def _attribute(req: RequestLike) -> int:
    """The address of the value.  ENXIO: not KVM_VCPU_TSC_OFFSET of KVM_VCPU_TSC_CTRL."""
    _, group, attr, address = _DEVICE_ATTR.unpack(req.data)
    if group != KVM_VCPU_TSC_CTRL or attr != KVM_VCPU_TSC_OFFSET:
        raise KvmError(errno.ENXIO)
    return int(address)


def has_device_attr(vcpu: Vcpu, req: RequestLike) -> int:
    """KVM_HAS_DEVICE_ATTR on a vCPU (devices/vcpu.rst 4.1).  ENXIO."""
    _attribute(req)
    return 0


def get_device_attr(vcpu: Vcpu, req: RequestLike) -> int:
    """KVM_GET_DEVICE_ATTR on a vCPU.  ENXIO, EFAULT."""
    vcpu.vm.host.memory.write(_attribute(req), _U64.pack(kvmclock.get_tsc_offset(vcpu)))
    return 0


def set_device_attr(vcpu: Vcpu, req: RequestLike) -> int:
    """KVM_SET_DEVICE_ATTR on a vCPU.  ENXIO, EFAULT."""
    offset, = _U64.unpack(vcpu.vm.host.memory.read(_attribute(req), _U64.size))
    kvmclock.set_tsc_offset(vcpu, offset)
    return 0


def x86_setup_mce(vcpu: Vcpu, req: RequestLike) -> int:
    """KVM_X86_SETUP_MCE (api.rst 4.104).  EINVAL: see kvmfs.kvm.mce."""
    mce.setup(vcpu, _U64.unpack(req.data)[0])
    return 0


def x86_set_mce(vcpu: Vcpu, req: RequestLike) -> int:
    """KVM_X86_SET_MCE (api.rst 4.105).  EINVAL: see kvmfs.kvm.mce."""
    mce.inject(vcpu, KvmX86Mce.from_buffer_copy(req.data))
    return 0
