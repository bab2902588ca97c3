# SPDX-License-Identifier: GPL-2.0-or-later
"""ioctls for a vCPU's state beyond the registers that api.vcpu reads and writes."""

from __future__ import annotations

import errno
import struct
from typing import TYPE_CHECKING

from kvmfs.abi.structs import KvmDebugregs, KvmGuestDebug, KvmSregs2, KvmXcrs
from kvmfs.errors import KvmError
from kvmfs.kvm import debugregs, guest_debug, mmu, pre_fault, regs, vapic, xsave

if TYPE_CHECKING:
    from kvmfs.kvm.host import RequestLike
    from kvmfs.kvm.kvm_main import Vcpu

_TRANSLATION = struct.Struct("<QQBBB5s")         # linear, physical address, valid, writeable, usermode, pad
_PRE_FAULT = struct.Struct("<QQQ")                # gpa, size, flags; then 40 bytes padding
_TPR_ACCESS = struct.Struct("<II")               # enabled, flags; then 32 bytes reserved


def get_sregs2(vcpu: Vcpu, req: RequestLike) -> bytes:
    """KVM_GET_SREGS2."""
    return regs.get_sregs2(vcpu)


def set_sregs2(vcpu: Vcpu, req: RequestLike) -> int:
    """KVM_SET_SREGS2.  EINVAL: control registers that exclude each other, flags, PDPTRs without PAE paging."""
    regs.set_sregs2(vcpu, KvmSregs2.from_buffer_copy(req.data))
    return 0


def get_debugregs(vcpu: Vcpu, req: RequestLike) -> bytes:
    """KVM_GET_DEBUGREGS."""
    return bytes(debugregs.get_debugregs(vcpu))


def set_debugregs(vcpu: Vcpu, req: RequestLike) -> int:
    """KVM_SET_DEBUGREGS.  EINVAL: flags, or a bit above 31 in DR6 or DR7."""
    debugregs.set_debugregs(vcpu, KvmDebugregs.from_buffer_copy(req.data))
    return 0


def set_guest_debug(vcpu: Vcpu, req: RequestLike) -> int:
    """KVM_SET_GUEST_DEBUG.  EBUSY: an exception is to be injected and another one is pending."""
    guest_debug.set_guest_debug(vcpu, KvmGuestDebug.from_buffer_copy(req.data))
    return 0


def get_xcrs(vcpu: Vcpu, req: RequestLike) -> bytes:
    """KVM_GET_XCRS."""
    return bytes(xsave.get_xcrs(vcpu))


def set_xcrs(vcpu: Vcpu, req: RequestLike) -> int:
    """KVM_SET_XCRS.  EINVAL: flags, more than 16, or an XCR0 that XSETBV would refuse."""
    xsave.set_xcrs(vcpu, KvmXcrs.from_buffer_copy(req.data))
    return 0


def get_xsave(vcpu: Vcpu, req: RequestLike) -> bytes:
    """KVM_GET_XSAVE, KVM_GET_XSAVE2: 4096 bytes for both."""
    return xsave.get_xsave(vcpu)


get_xsave2 = get_xsave


def set_xsave(vcpu: Vcpu, req: RequestLike) -> int:
    """KVM_SET_XSAVE.  EINVAL: a component that is not there, the compacted format, reserved bits."""
    xsave.set_xsave(vcpu, req.data)
    return 0


def pre_fault_memory(vcpu: Vcpu, req: RequestLike) -> bytes:
    """KVM_PRE_FAULT_MEMORY: the request with the range that is left.

    Errors, in this order: EINVAL, EINTR, ENOENT no memory slot, EFAULT nothing mapped there; see pre_fault.
    """
    gpa, size, flags = _PRE_FAULT.unpack_from(req.data)
    gpa, size = pre_fault.pre_fault_memory(vcpu, req, gpa, size, flags)
    return _PRE_FAULT.pack(gpa, size, flags) + bytes(req.data[_PRE_FAULT.size:])


def translate(vcpu: Vcpu, req: RequestLike) -> bytes:
    """KVM_TRANSLATE (api.rst 4.15): by the guest's page tables; ``writeable`` is always 1, ``usermode`` 0."""
    linear, *_, pad = _TRANSLATION.unpack(req.data)
    if vcpu.vm.mirrored:
        vcpu.vm.mirror_in()         # the page tables may never have been here
    gpa = mmu.translate(vcpu, linear)
    physical = (1 << 64) - 1 if gpa is None else gpa
    return _TRANSLATION.pack(linear, physical, gpa is not None, 1, 0, pad)


def tpr_access_reporting(vcpu: Vcpu, req: RequestLike) -> bytes:
    """KVM_TPR_ACCESS_REPORTING: the request again.  EINVAL: flags.

    Only an in-kernel APIC reports accesses; Linux accepts the call without one as well.
    """
    enabled, flags = _TPR_ACCESS.unpack_from(req.data)
    if flags:
        raise KvmError(errno.EINVAL)
    vcpu.arch.tpr_access_reporting = bool(enabled)
    return bytes(req.data)


def set_vapic_addr(vcpu: Vcpu, req: RequestLike) -> int:
    """KVM_SET_VAPIC_ADDR.  EINVAL: the APIC is the client's, or there is no memory."""
    if vcpu.arch.apic is None:
        raise KvmError(errno.EINVAL)
    vapic.set_address(vcpu, int.from_bytes(req.data[:8], "little"))
    return 0
