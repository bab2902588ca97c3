# SPDX-License-Identifier: GPL-2.0-or-later
"""Debug registers as instructions and clients write them (SDM vol. 3, ch. 18; Linux: arch/x86/kvm/regs.c).

The CPU holds the guest's own DR0-DR7.  Which breakpoints are in force, the guest's or a debugger's, is
kvmfs.kvm.guest_debug's.
"""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING

from kvmfs.abi import cpuid as C
from kvmfs.abi import x86 as X
from kvmfs.abi.structs import KvmDebugregs
from kvmfs.errors import KvmError
from kvmfs.kvm import events, guest_debug

if TYPE_CHECKING:
    from kvmfs.kvm.kvm_main import Vcpu


def dr6_fixed(vcpu: Vcpu) -> int:
    """Bits of DR6 that read as 1 whatever is written."""
    fixed = X.DR6_FIXED_1
    if not vcpu.arch.cpuid.has(C.X86_FEATURE_RTM):
        fixed |= X.DR6_RTM
    if not vcpu.arch.cpuid.has(C.X86_FEATURE_BUS_LOCK_DETECT):
        fixed |= X.DR6_BUS_LOCK
    return fixed


def set_dr(vcpu: Vcpu, index: int, value: int) -> bool:
    """``kvm_set_dr``: MOV to DR0-DR7 (4 and 5 mean 6 and 7); False: #GP, a bit above 31 in DR6 or DR7."""
    if index < 4:
        vcpu.cpu.set_dr(index, value)
    elif value >> 32:
        return False
    elif index in (4, 6):
        vcpu.cpu.set_dr(6, value & X.DR6_VOLATILE | dr6_fixed(vcpu))
    else:
        vcpu.cpu.set_dr(7, value & X.DR7_VOLATILE | X.DR7_FIXED_1)
    guest_debug.update_breakpoints(vcpu)
    return True


def get_debugregs(vcpu: Vcpu) -> KvmDebugregs:
    """KVM_GET_DEBUGREGS (api.rst 4.33)."""
    events.payload_quirk(vcpu)
    regs, cpu = KvmDebugregs(), vcpu.cpu
    for i in range(4):
        regs.db[i] = cpu.dr(i)
    regs.dr6, regs.dr7 = cpu.dr(6), cpu.dr(7)
    return regs


def set_debugregs(vcpu: Vcpu, regs: KvmDebugregs) -> None:
    """KVM_SET_DEBUGREGS (api.rst 4.34).  EINVAL: flags, or a bit above 31 in DR6 or DR7.

    Other reserved bits are taken as they come.
    """
    if regs.flags or regs.dr6 >> 32 or regs.dr7 >> 32:
        raise KvmError(errno.EINVAL)
    cpu = vcpu.cpu
    for i in range(4):
        cpu.set_dr(i, regs.db[i])
    cpu.set_dr(6, regs.dr6)
    cpu.set_dr(7, regs.dr7)
    guest_debug.update_breakpoints(vcpu)
