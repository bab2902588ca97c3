# SPDX-License-Identifier: GPL-2.0-or-later
"""Exits that have to do with debugging: #DB, #BP, MOV to and from debug registers."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from kvmfs.abi.x86 import CR4_DE
from kvmfs.kvm import events, guest_debug, regs
from kvmfs.kvm.debugregs import set_dr
from kvmfs.kvm.emulate import complete_insn_gp, decode, fetch

if TYPE_CHECKING:
    from kvmfs.kvm.kvm_main import Vcpu

EXIT_READ_DR0, EXIT_WRITE_DR0, EXIT_DB, EXIT_BP = 0x20, 0x30, 0x41, 0x43
_M32 = (1 << 32) - 1


def _handle_dr(vcpu: Vcpu) -> int:
    """``handle_dr``, ``dr_interception``: the engine has checked the privilege level."""
    cpu = vcpu.cpu
    op = decode(vcpu, fetch(vcpu))
    index = op.modrm >> 3 & 7
    if index in (4, 5):
        if cpu.cr4 & CR4_DE:
            events.inject_ud(vcpu)
            return 1
        index += 2
    detected = guest_debug.general_detect(vcpu)
    if detected is not None:
        return detected
    register = op.modrm & 7 | (op.rex & 1) << 3
    ok = True
    if cpu.exit.code < EXIT_WRITE_DR0:
        cpu.set_gpr(register, cpu.dr(index))
    else:
        value = cpu.gpr(register)
        ok = set_dr(vcpu, index, value if regs.is_64_bit_mode(vcpu) else value & _M32)
    return complete_insn_gp(vcpu, ok, op.prefix_length + 3)


DEBUG_EXITS: dict[int, Callable[[Vcpu], int]] = {
    EXIT_DB: guest_debug.db_interception,
    EXIT_BP: guest_debug.bp_interception,
    **dict.fromkeys(range(EXIT_READ_DR0, EXIT_READ_DR0 + 8), _handle_dr),
    **dict.fromkeys(range(EXIT_WRITE_DR0, EXIT_WRITE_DR0 + 8), _handle_dr),
}
