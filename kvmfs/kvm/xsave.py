# SPDX-License-Identifier: GPL-2.0-or-later
"""Extended state: the XSAVE image and XCR0 (SDM vol. 1, ch. 13; Linux: arch/x86/kernel/fpu, x86.c).

The engine has the components x87 and SSE.  An image in the uncompacted format is the FXSAVE area of 512 bytes,
the XSAVE header of 64 and nothing else; its size here is always that of ``struct kvm_xsave``.
"""

from __future__ import annotations

import errno
import struct
from typing import TYPE_CHECKING

from kvmfs.abi.structs import KvmXcrs
from kvmfs.errors import KvmError
from kvmfs.kvm.cpuid import SUPPORTED_XCR0

if TYPE_CHECKING:
    from kvmfs.kvm.kvm_main import Vcpu

XSAVE_SIZE = 4096               # bytes: KVM_CAP_XSAVE2, sizeof(struct kvm_xsave)
XFEATURE_FP, XFEATURE_SSE = 1, 2
KVM_MAX_XCRS = 16

_FP_HEAD, _MXCSR, _ST, _XMM, _PADDING = slice(0, 24), slice(24, 32), slice(32, 160), slice(160, 416), 416
_SW_RESERVED, _HEADER, _END = 464, 512, 576
_MXCSR_INIT = struct.pack("<II", 0x1F80, 0xFFFF)        # MXCSR and its mask
_FP_INIT = struct.pack("<H", 0x37F).ljust(24, b"\0")
_MXCSR_RESERVED = 0xFFFF0000


def get_xsave(vcpu: Vcpu) -> bytes:
    """KVM_GET_XSAVE, KVM_GET_XSAVE2 (api.rst 4.42, 4.134): 4096 bytes.

    A component in its initial state is left out of XSTATE_BV, as hardware's init optimization does.
    """
    image = vcpu.cpu.fxsave()
    out = bytearray(XSAVE_SIZE)
    out[0:_PADDING] = image[0:_PADDING]
    features = 0
    if image[_FP_HEAD] != _FP_INIT or any(image[_ST]):
        features |= XFEATURE_FP
    if image[_MXCSR][:4] != _MXCSR_INIT[:4] or any(image[_XMM]):
        features |= XFEATURE_SSE
    # The kernel says in the first word reserved for software what the host has.
    struct.pack_into("<Q", out, _SW_RESERVED, SUPPORTED_XCR0)
    struct.pack_into("<Q", out, _HEADER, features)
    return bytes(out)


def set_xsave(vcpu: Vcpu, data: bytes | memoryview) -> None:
    """KVM_SET_XSAVE (api.rst 4.43) from at least 576 bytes.

    EINVAL: a component that the host has not, the compacted format, reserved bytes of the header or reserved
    bits of MXCSR that are not 0.  A component that XSTATE_BV leaves out gets its initial state.
    """
    image = bytes(data[:_END])
    features, xcomp_bv = struct.unpack_from("<QQ", image, _HEADER)
    if features & ~SUPPORTED_XCR0 or xcomp_bv or any(image[_HEADER + 16:_END]):
        raise KvmError(errno.EINVAL)
    if features and struct.unpack_from("<I", image, 24)[0] & _MXCSR_RESERVED:
        raise KvmError(errno.EINVAL)
    fp, sse = features & XFEATURE_FP, features & XFEATURE_SSE
    fx = (image[_FP_HEAD] if fp else _FP_INIT) + (image[_MXCSR] if sse else _MXCSR_INIT)
    fx += (image[_ST] if fp else bytes(128)) + (image[_XMM] if sse else bytes(256))
    vcpu.cpu.fxrstor(fx.ljust(512, b"\0"))


def set_xcr(vcpu: Vcpu, index: int, value: int) -> bool:
    """``__kvm_set_xcr``: write an extended control register; False: #GP."""
    if index or not value & XFEATURE_FP or value & ~(vcpu.arch.cpuid.supported_xcr0 | XFEATURE_FP):
        return False
    vcpu.cpu.xcr0 = value
    vcpu.cpu.commit_state()
    vcpu.arch.cpuid_changed = True
    return True


def get_xcrs(vcpu: Vcpu) -> KvmXcrs:
    """KVM_GET_XCRS (api.rst 4.44): XCR0 is the only one."""
    xcrs = KvmXcrs(nr_xcrs=1)
    xcrs.xcrs[0].value = vcpu.cpu.xcr0
    return xcrs


def set_xcrs(vcpu: Vcpu, xcrs: KvmXcrs) -> None:
    """KVM_SET_XCRS (api.rst 4.45).  EINVAL: flags, too many, or a value that XSETBV would refuse.

    Others than XCR0 are passed over.
    """
    if xcrs.nr_xcrs > KVM_MAX_XCRS or xcrs.flags:
        raise KvmError(errno.EINVAL)
    for xcr in xcrs.xcrs[:xcrs.nr_xcrs]:
        if xcr.xcr == 0:
            if not set_xcr(vcpu, 0, xcr.value):
                raise KvmError(errno.EINVAL)
            return
