# SPDX-License-Identifier: GPL-2.0-or-later
"""Instructions that the machine, not the CPU, carries out or steps over (Linux: emulate.c and its callers)."""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING, Any, NamedTuple

import capstone
from capstone import x86_const

from kvmfs.abi import exits as kx
from kvmfs.abi.x86 import X86_EFLAGS_TF
from kvmfs.kvm import events, guest_debug, mmu, regs
from kvmfs.vendor.ops import SEG_CS, SEG_DS, SEG_FS, SEG_GS, SEG_SS

if TYPE_CHECKING:
    from kvmfs.kvm.kvm_main import Vcpu

MAX_INSN = 15
_INTERNAL, _INTERNAL_DATA = 32, 40           # of kvm_run: internal.suberror, internal.data
_PREFIXES = frozenset((0x26, 0x2E, 0x36, 0x3E, 0x64, 0x65, 0x66, 0x67, 0xF0, 0xF2, 0xF3))


def skip_emulated_instruction(vcpu: Vcpu, length: int) -> int:
    """``kvm_skip_emulated_instruction``: go past it; who single-steps gets a #DB or KVM_EXIT_DEBUG.  1 or 0."""
    cpu = vcpu.cpu
    traced = cpu.rflags & X86_EFLAGS_TF
    cpu.skip_instruction(length)
    return guest_debug.do_singlestep(vcpu) if traced else 1


def complete_insn_gp(vcpu: Vcpu, ok: bool, length: int) -> int:
    """``kvm_complete_insn_gp``: step over the instruction, or make it raise #GP(0).  1, or 0 for KVM_EXIT_DEBUG."""
    if ok:
        return skip_emulated_instruction(vcpu, length)
    events.inject_gp(vcpu)
    return 1


def skip_intercepted(vcpu: Vcpu, length: int) -> int:
    """As skip_emulated_instruction, past the one that caused this exit; ``length``: without its prefixes."""
    return skip_emulated_instruction(vcpu, length + vcpu.cpu.exit.insn_len)


def complete_intercepted(vcpu: Vcpu, ok: bool, length: int) -> int:
    """As complete_insn_gp, for the one that caused this exit; ``length``: without its prefixes."""
    return complete_insn_gp(vcpu, ok, length + vcpu.cpu.exit.insn_len)


def fetch(vcpu: Vcpu) -> bytes:
    """The bytes at the guest's next instruction, up to 15; fewer where a page is missing."""
    return mmu.read_virtual(vcpu, regs.linear_rip(vcpu), MAX_INSN)


class Opcode(NamedTuple):
    """An instruction up to its ModRM byte."""

    prefix_length: int          # legacy prefixes and REX
    rex: int                    # 0 without a REX prefix
    opcode: bytes               # one byte, or 0f xx
    modrm: int                  # the byte behind the opcode, 0 at the end of what could be fetched


def decode(vcpu: Vcpu, code: bytes) -> Opcode:
    """Prefixes and opcode of the instruction in ``code`` by the vCPU's mode."""
    at = 0
    while at < len(code) and code[at] in _PREFIXES:
        at += 1
    rex = 0
    if at < len(code) and code[at] & 0xF0 == 0x40 and vcpu.cpu.segment(SEG_CS)[3] & 1 << 9:
        rex = code[at]
        at += 1
    size = 2 if code[at:at + 1] == b"\x0f" else 1
    end = at + size
    return Opcode(at, rex, code[at:end], code[end] if end < len(code) else 0)


def _disassemble(vcpu: Vcpu, code: bytes) -> capstone.CsInsn | None:
    big = vcpu.cpu.segment(SEG_CS)[3] & 1 << 10
    wide = regs.is_64_bit_mode(vcpu)
    mode = capstone.CS_MODE_64 if wide else capstone.CS_MODE_32 if big else capstone.CS_MODE_16
    disassembler = capstone.Cs(capstone.CS_ARCH_X86, mode)
    disassembler.detail = True
    return next(disassembler.disasm(code, vcpu.cpu.rip, 1), None)


def insn_length(vcpu: Vcpu) -> int:
    """Bytes of the instruction at the guest's rip; 0 when it is none."""
    insn = _disassemble(vcpu, fetch(vcpu))
    return 0 if insn is None else int(insn.size)


def _linear_address(vcpu: Vcpu, insn: capstone.CsInsn, operand: Any) -> int:
    """The linear address of a memory operand."""
    cpu, mem, wide = vcpu.cpu, operand.mem, regs.is_64_bit_mode(vcpu)
    offset = mem.disp
    for reg, scale in ((mem.base, 1), (mem.index, mem.scale)):
        if reg:
            offset += _register(vcpu, insn.reg_name(reg)) * scale
            if insn.reg_name(reg) == "rip":
                offset += insn.size
    offset &= (1 << 8 * insn.addr_size) - 1
    segment = SEG_SS if mem.base and insn.reg_name(mem.base) in _STACK_BASES else SEG_DS
    if mem.segment:
        segment = _SEGMENTS.index(insn.reg_name(mem.segment))
    base = cpu.segment(segment)[1] if not wide or segment in (SEG_FS, SEG_GS) else 0
    return int(base + offset) & ((1 << 64) - 1 if wide else (1 << 32) - 1)


def read_operand16(vcpu: Vcpu, code: bytes) -> tuple[int, int] | None:
    """The value of the instruction's 16-bit operand (a register or memory) and the instruction's length.

    None when it cannot be decoded or its memory not read.
    """
    insn = _disassemble(vcpu, code)
    if insn is None or not insn.operands:
        return None
    operand = insn.operands[0]
    if operand.type == x86_const.X86_OP_REG:
        return _register(vcpu, insn.reg_name(operand.reg)) & 0xFFFF, insn.size
    if operand.type != x86_const.X86_OP_MEM:
        return None
    data = mmu.read_virtual(vcpu, _linear_address(vcpu, insn, operand), 2)
    return (int.from_bytes(data, "little"), insn.size) if len(data) == 2 else None


def bytes_beyond_page(vcpu: Vcpu, limit: int) -> int:
    """How many bytes of the instruction's memory operand lie in the page behind the one that it begins in.

    ``limit``: the most that it can be, and the answer when it cannot be found out.
    """
    insn = _disassemble(vcpu, fetch(vcpu))
    for operand in insn.operands if insn is not None else ():
        if operand.type == x86_const.X86_OP_MEM:
            beyond = (_linear_address(vcpu, insn, operand) & 0xFFF) + operand.size - 0x1000
            if 0 < beyond < limit:
                return int(beyond)
    return limit


_SEGMENTS = ("es", "cs", "ss", "ds", "fs", "gs")
_STACK_BASES = frozenset(("bp", "ebp", "rbp", "sp", "esp", "rsp"))
_NAMES = ("ax", "cx", "dx", "bx", "sp", "bp", "si", "di")


def _register(vcpu: Vcpu, name: str) -> int:
    """A general register by the disassembler's name (ax, ebx, rcx, r8w, r9d, rip, ...)."""
    if name == "rip":
        return int(vcpu.cpu.rip)
    if name[0] == "r" and name[1:].rstrip("dw").isdigit():
        index, width = int(name[1:].rstrip("dw")), {"d": 32, "w": 16}.get(name[-1], 64)
    else:
        index, width = _NAMES.index(name[-2:]), {"r": 64, "e": 32}.get(name[0] if len(name) == 3 else "", 16)
    return int(vcpu.cpu.gpr(index)) & ((1 << width) - 1)


def prepare_emulation_failure(vcpu: Vcpu) -> int:
    """``handle_emulation_failure``: #UD for the guest's user code, an internal error for the client otherwise.

    kvm_run.emulation_failure: flags, the instruction's size and its bytes where they could be read, then five
    words about the exit (``prepare_emulation_failure_exit``; api.rst, KVM_EXIT_INTERNAL_ERROR).
    """
    vcpu.arch.stat.insn_emulation += 1
    vcpu.arch.stat.insn_emulation_fail += 1
    if not vcpu.vm.arch.exit_on_emulation_error:
        events.inject_ud(vcpu)
        if vcpu.vm.vendor.get_cpl(vcpu) != 0:
            return 1
    code = fetch(vcpu)
    run = vcpu.run
    struct.pack_into("<I", run, 8, kx.KVM_EXIT_INTERNAL_ERROR)
    flags = kx.KVM_INTERNAL_ERROR_EMULATION_FLAG_INSTRUCTION_BYTES if code else 0
    exit_info = vcpu.vm.vendor.exit_info(vcpu)
    start = 3 if code else 1
    struct.pack_into("<IIQ", run, _INTERNAL, kx.KVM_INTERNAL_ERROR_EMULATION, start + len(exit_info), flags)
    if code:
        struct.pack_into("<B15s", run, _INTERNAL_DATA + 8, len(code), code.ljust(15, b"\x90"))
    struct.pack_into("<5Q", run, _INTERNAL_DATA + 8 * start, *exit_info)
    return 0
