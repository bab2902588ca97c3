# SPDX-License-Identifier: GPL-2.0-or-later
"""KVM_CREATE_DEVICE, and the ioctls on the descriptor that it makes (Linux: kvm_device_ioctl)."""

from __future__ import annotations

import errno
import struct
from typing import TYPE_CHECKING

from kvmfs.errors import KvmError
from kvmfs.kvm import vfio
from kvmfs.kvm.kvm_main import DEVICE_INODE

if TYPE_CHECKING:
    from kvmfs.kvm.host import RequestLike
    from kvmfs.kvm.kvm_main import Vm

KVM_CREATE_DEVICE_TEST = 1
_CREATE_DEVICE = struct.Struct("<III")          # type, fd, flags
_FD_AT = 4
_DEVICE_ATTR = struct.Struct("<IIQQ")           # flags, group, attr, addr
RELEASE_PATIENCE = 0.02                         # seconds


def create_device(vm: Vm, req: RequestLike) -> int | None:
    """KVM_CREATE_DEVICE (api.rst 4.79).  ENODEV: another type than kvm-vfio; EBUSY: the VM has one; EMFILE, ENFILE."""
    # Under kvmfs run the request comes without its data.
    kind, _, flags = _CREATE_DEVICE.unpack(req.data or vm.host.memory.read(req.arg, _CREATE_DEVICE.size))
    if kind != vfio.KVM_DEV_TYPE_VFIO:
        raise KvmError(errno.ENODEV)
    if flags & KVM_CREATE_DEVICE_TEST:
        return 0
    vm.host.may_block()
    with vm.create_lock:
        # FUSE tells of a close(2) when that has returned: who then makes the next one must not meet the old one.
        if not vm.vfio.acquire(timeout=RELEASE_PATIENCE):
            raise KvmError(errno.EBUSY)
        try:
            vm.host.graft(req, "kvm-vfio", DEVICE_INODE, None, store=req.arg + _FD_AT)
        except OSError:                         # the client has been told
            vm.vfio.release()
    return None


def set_device_attr(vm: Vm, req: RequestLike) -> int:
    """KVM_SET_DEVICE_ATTR on kvm-vfio.  See :func:`kvmfs.kvm.vfio.set_attr`."""
    _, group, attr, address = _DEVICE_ATTR.unpack(req.data)
    vm.host.may_block()
    vfio.set_attr(vm, req, group, attr, address)
    return 0


def get_device_attr(vm: Vm, req: RequestLike) -> int:
    """KVM_GET_DEVICE_ATTR on kvm-vfio: EPERM, it has nothing to tell."""
    raise KvmError(errno.EPERM)


def has_device_attr(vm: Vm, req: RequestLike) -> int:
    """KVM_HAS_DEVICE_ATTR on kvm-vfio.  ENXIO: no such attribute."""
    _, group, attr, _ = _DEVICE_ATTR.unpack(req.data)
    vfio.check_attr(group, attr)
    return 0
