# SPDX-License-Identifier: GPL-2.0-or-later
"""x87 and SSE state: struct kvm_fpu to and from the FXSAVE image (SDM vol. 1, 10.5; Linux: x86.c)."""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING

from kvmfs.abi.structs import KvmFpu

if TYPE_CHECKING:
    from kvmfs.kvm.kvm_main import Vcpu

_HEAD = struct.Struct("<HHBBHQQII")     # fcw fsw ftw(abridged) reserved fop rip rdp mxcsr mxcsr_mask


def get_fpu(vcpu: Vcpu) -> KvmFpu:
    """KVM_GET_FPU (api.rst 4.22): ``ftwx`` is the abridged tag word, one bit a register in use.

    As in Linux ``mxcsr`` is not filled in (0): KVM_GET_XSAVE has it.
    """
    image = vcpu.cpu.fxsave()
    fcw, fsw, ftw, _, fop, ip, dp, _, _ = _HEAD.unpack_from(image)
    out = bytearray(bytes(KvmFpu()))
    out[0:128] = image[32:160]
    struct.pack_into("<HHBBHQQ", out, 128, fcw, fsw, ftw, 0, fop, ip, dp)
    out[152:408] = image[160:416]
    return KvmFpu.from_buffer_copy(out)


def set_fpu(vcpu: Vcpu, fpu: KvmFpu) -> None:
    """KVM_SET_FPU (api.rst 4.23); MXCSR stays what it is."""
    data = bytes(fpu)
    fcw, fsw, ftw, _, fop, ip, dp = struct.unpack_from("<HHBBHQQ", data, 128)
    *_, mxcsr, mask = _HEAD.unpack_from(vcpu.cpu.fxsave())
    head = _HEAD.pack(fcw, fsw, ftw, 0, fop, ip, dp, mxcsr, mask)
    vcpu.cpu.fxrstor((head + data[0:128] + data[152:408]).ljust(512, b"\0"))
