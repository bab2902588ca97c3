# SPDX-License-Identifier: GPL-2.0-or-later
"""A debugger outside the guest: KVM_SET_GUEST_DEBUG and KVM_EXIT_DEBUG (Linux: x86.c, vmx.c, svm.c).

The CPU reports every breakpoint of the debug registers in force and, where it is asked to, #DB and #BP.  Here
is decided whose they are: the guest gets its own, the client those of its KVM_SET_GUEST_DEBUG.
"""

from __future__ import annotations

import errno
import struct
from typing import TYPE_CHECKING

from kvmfs.abi import exits as kx
from kvmfs.abi import x86 as X
from kvmfs.errors import KvmError
from kvmfs.kvm import events, regs

if TYPE_CHECKING:
    from kvmfs.abi.structs import KvmGuestDebug
    from kvmfs.kvm.kvm_main import Vcpu

GUESTDBG_VALID_MASK = (kx.KVM_GUESTDBG_ENABLE | kx.KVM_GUESTDBG_SINGLESTEP | kx.KVM_GUESTDBG_USE_HW_BP
                       | kx.KVM_GUESTDBG_USE_SW_BP | kx.KVM_GUESTDBG_INJECT_BP | kx.KVM_GUESTDBG_INJECT_DB
                       | kx.KVM_GUESTDBG_BLOCKIRQ)
_OWN_DB = kx.KVM_GUESTDBG_SINGLESTEP | kx.KVM_GUESTDBG_USE_HW_BP
_DR_ALL = 0xFF
_DR_SPECIAL = 0xF0              # DR4-DR7 have bits that hardware fixes and the engine does not

_set_reason = struct.Struct("<I").pack_into
_set_exception = struct.Struct("<I").pack_into          # kvm_run.debug.arch from 32: exception, pad, pc, dr6, dr7
_set_pc = struct.Struct("<Q").pack_into
_EXIT_REASON, _EXCEPTION, _PC, _DR6, _DR7 = 8, 32, 40, 48, 56


def effective_dr7(vcpu: Vcpu) -> int:
    """DR7 as hardware has it: the debugger's while it uses hardware breakpoints, else the guest's."""
    arch = vcpu.arch
    return arch.debug_dr7 if arch.guest_debug & kx.KVM_GUESTDBG_USE_HW_BP else vcpu.cpu.dr(7)


def update_breakpoints(vcpu: Vcpu) -> None:
    """``kvm_update_dr0123``, ``kvm_update_dr7``: put the right breakpoints and intercepts in force."""
    cpu, arch = vcpu.cpu, vcpu.arch
    dr7, own = effective_dr7(vcpu), arch.guest_debug & kx.KVM_GUESTDBG_USE_HW_BP
    cpu.set_breakpoints(dr7, arch.debug_db if own else tuple(cpu.dr(i) for i in range(4)))
    if arch.guest_debug or dr7 & (X.DR7_BP_EN_MASK | X.DR7_GD):
        cpu.set_dr_intercepts(_DR_ALL, _DR_ALL)
    else:
        cpu.set_dr_intercepts(0, _DR_SPECIAL)


def _update_exception_bitmap(vcpu: Vcpu) -> None:
    """``update_exception_bitmap``: #DB of the guest itself needs no exit."""
    debug = vcpu.arch.guest_debug
    mask = 1 << events.BP_VECTOR if debug & kx.KVM_GUESTDBG_USE_SW_BP else 0
    if debug & _OWN_DB:
        mask |= 1 << X.DB_VECTOR
    vcpu.cpu.set_exception_intercepts(mask)


def set_guest_debug(vcpu: Vcpu, debug: KvmGuestDebug) -> None:
    """KVM_SET_GUEST_DEBUG (api.rst 4.87).  EBUSY: INJECT_DB or INJECT_BP while an exception is pending."""
    arch = vcpu.arch
    if debug.control & (kx.KVM_GUESTDBG_INJECT_DB | kx.KVM_GUESTDBG_INJECT_BP):
        if arch.exception.pending or arch.triple_fault:
            raise KvmError(errno.EBUSY)
        inject_db = debug.control & kx.KVM_GUESTDBG_INJECT_DB
        events.queue_exception(vcpu, X.DB_VECTOR if inject_db else events.BP_VECTOR)
    rflags = regs.get_rflags(vcpu)
    arch.guest_debug = debug.control if debug.control & kx.KVM_GUESTDBG_ENABLE else 0
    if arch.guest_debug & kx.KVM_GUESTDBG_USE_HW_BP:
        arch.debug_db = tuple(debug.arch.debugreg[:4])
        arch.debug_dr7 = debug.arch.debugreg[7]
    update_breakpoints(vcpu)
    if arch.guest_debug & kx.KVM_GUESTDBG_SINGLESTEP:
        arch.singlestep_rip = regs.linear_rip(vcpu)
    regs.set_rflags(vcpu, rflags)
    arch.entry_check = True
    _update_exception_bitmap(vcpu)


# ---- exits -----------------------------------------------------------------------------------------------

def debug_exit(vcpu: Vcpu, exception: int, dr6: int | None = None, dr7: int | None = None) -> int:
    """KVM_EXIT_DEBUG; what is None stays as it was in kvm_run.  Returns 0."""
    run = vcpu.run
    _set_reason(run, _EXIT_REASON, kx.KVM_EXIT_DEBUG)
    _set_exception(run, _EXCEPTION, exception)
    _set_pc(run, _PC, regs.linear_rip(vcpu))
    if dr6 is not None:
        _set_pc(run, _DR6, dr6)
    if dr7 is not None:
        _set_pc(run, _DR7, dr7)
    return 0


def do_singlestep(vcpu: Vcpu) -> int:
    """``kvm_vcpu_do_singlestep``: an instruction that was carried out here has been a step."""
    if vcpu.arch.guest_debug & kx.KVM_GUESTDBG_SINGLESTEP:
        return debug_exit(vcpu, X.DB_VECTOR, X.DR6_BS | X.DR6_ACTIVE_LOW)
    events.queue_exception(vcpu, X.DB_VECTOR, payload=X.DR6_BS)
    return 1


def db_interception(vcpu: Vcpu) -> int:
    """A #DB that has not reached the guest; the engine tells its cause as bits of DR6.

    RF is not set for an execution breakpoint (SDM vol. 3, 18.3.1.1): a debugger's comes again until the client moves
    on or sets RF itself.
    """
    cause = vcpu.cpu.exit.info2
    if vcpu.arch.guest_debug & _OWN_DB:
        vcpu.cpu.rflags &= ~X.X86_EFLAGS_RF             # the engine has set it
        return debug_exit(vcpu, X.DB_VECTOR, X.DR6_ACTIVE_LOW | cause, effective_dr7(vcpu))
    events.queue_exception(vcpu, X.DB_VECTOR, payload=cause)
    return 1


def bp_interception(vcpu: Vcpu) -> int:
    """INT3 while the debugger uses software breakpoints: rip is at it."""
    return debug_exit(vcpu, events.BP_VECTOR)


def general_detect(vcpu: Vcpu) -> int | None:
    """DR7.GD makes an access to a debug register raise #DB before it happens.  None: it is not set."""
    dr7 = effective_dr7(vcpu)
    if not dr7 & X.DR7_GD:
        return None
    if vcpu.arch.guest_debug & _OWN_DB:
        return debug_exit(vcpu, X.DB_VECTOR, X.DR6_BD | X.DR6_ACTIVE_LOW, dr7)
    events.queue_exception(vcpu, X.DB_VECTOR, payload=X.DR6_BD)
    return 1
