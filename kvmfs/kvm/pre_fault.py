# SPDX-License-Identifier: GPL-2.0-or-later
"""KVM_PRE_FAULT_MEMORY: guest memory is made present before a guest touches it (api.rst 4.143)."""

from __future__ import annotations

import ctypes
import errno
from typing import TYPE_CHECKING

from kvmfs.errors import KvmError
from kvmfs.kvm.memslots import PAGE_MASK

if TYPE_CHECKING:
    from kvmfs.kvm.host import RequestLike
    from kvmfs.kvm.kvm_main import Vcpu, Vm

CHUNK = 2 << 20                 # bytes between looks at signals: Linux looks after every mapping, at most a large page
_MADV_POPULATE_READ = 22
_libc = ctypes.CDLL(None, use_errno=True)
_libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]


def pre_fault_memory(vcpu: Vcpu, req: RequestLike, gpa: int, size: int, flags: int) -> tuple[int, int]:
    """``kvm_vcpu_pre_fault_memory``: the (gpa, size) that is left, after at least one page was done.

    EINVAL: flags, a part of a page, no bytes, a range that wraps; EINTR: a signal; ENOENT: no slot; EFAULT: a slot
    whose memory the client has not mapped.  The last three only for the first page.
    """
    end = gpa + size
    if flags or gpa & PAGE_MASK or size & PAGE_MASK or not gpa < end < 1 << 64:
        raise KvmError(errno.EINVAL)
    at = gpa
    while at < end:
        error = errno.EINTR
        if not req.interrupted:
            done, error = _populate(vcpu.vm, at, min(end, (at | CHUNK - 1) + 1))
            at += done
        if error:
            if at == gpa:
                raise KvmError(error)
            break
    return at, end - at


def _populate(vm: Vm, gpa: int, end: int) -> tuple[int, int]:
    """(bytes done from ``gpa`` on, the errno at which that ended or 0)."""
    with vm.slots_lock:
        slot = vm.memslots.find(gpa)
        if slot is None:
            return 0, errno.ENOENT
        offset = gpa - slot.gpa
        for at, length, *_ in slot.memory.pieces if slot.memory is not None else ():
            if slot.memory is not None and at <= offset < at + length:
                size = min(end - gpa, at + length - offset)
                failed = _libc.madvise(slot.memory.address + offset, size, _MADV_POPULATE_READ)
                if failed and ctypes.get_errno() == errno.EFAULT:       # behind the end of the file
                    return 0, errno.EFAULT
                return size, 0
        return 0, errno.EFAULT
