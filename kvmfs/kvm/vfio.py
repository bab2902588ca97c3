# SPDX-License-Identifier: GPL-2.0-or-later
"""kvm-vfio, the one device of KVM_CREATE_DEVICE on x86 (Linux: virt/kvm/vfio.c; devices/vfio.rst).

A client tells it about its VFIO groups.  Nothing here could let a host's device reach the guest, so it answers as in a
kernel whose VFIO is not loaded: there the device exists, and no file is one of VFIO's.
"""

from __future__ import annotations

import errno
import os
from typing import TYPE_CHECKING, Final

from kvmfs.errors import KvmError

if TYPE_CHECKING:
    from kvmfs.kvm.host import RequestLike
    from kvmfs.kvm.kvm_main import Vm

KVM_DEV_TYPE_VFIO: Final = 4
KVM_DEV_VFIO_FILE: Final = 1            # the only group; formerly KVM_DEV_VFIO_GROUP
KVM_DEV_VFIO_FILE_ADD: Final = 1
KVM_DEV_VFIO_FILE_DEL: Final = 2


def check_attr(group: int, attr: int) -> None:
    """``kvm_vfio_has_attr``.  ENXIO."""
    if group != KVM_DEV_VFIO_FILE or attr not in (KVM_DEV_VFIO_FILE_ADD, KVM_DEV_VFIO_FILE_DEL):
        raise KvmError(errno.ENXIO)


def set_attr(vm: Vm, req: RequestLike, group: int, attr: int, address: int) -> None:
    """``kvm_vfio_set_attr``.  ENXIO; EFAULT; EBADF: no descriptor; EINVAL: none of VFIO's; ENOENT: was not added."""
    check_attr(group, attr)
    fd = int.from_bytes(vm.host.memory.read(address, 4), "little", signed=True)
    if fd < 0:
        raise KvmError(errno.EBADF)
    _check_descriptor(vm, req, fd)
    raise KvmError(errno.EINVAL if attr == KVM_DEV_VFIO_FILE_ADD else errno.ENOENT)


def _check_descriptor(vm: Vm, req: RequestLike, fd: int) -> None:
    try:
        taken = vm.host.eventfd(req, fd)        # any descriptor is taken and looked at for this
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
    else:
        os.close(taken[0])
