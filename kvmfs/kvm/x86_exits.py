# SPDX-License-Identifier: GPL-2.0-or-later
"""What is done about an exit of the engine, by its kind: port and MMIO accesses, and what the vendors' tables know.

Each handler returns 1 to go on with the guest, 0 to return to the client with kvm_run filled in, or -errno.  An access
that the client answers goes on at the next KVM_RUN, with ``arch.complete_userspace_io``.
"""

from __future__ import annotations

import errno
import struct
from functools import partial
from typing import TYPE_CHECKING, Final

from kvmfs.abi import exits as kx
from kvmfs.abi.flags import KVM_X86_QUIRK_OUT_7E_INC_RIP
from kvmfs.cpu.cpu import (
    EXIT_FETCH,
    EXIT_IO_IN,
    EXIT_IO_OUT,
    EXIT_MMIO_READ,
    EXIT_MMIO_WRITE,
    EXIT_NONE,
    EXIT_SVM,
    EXIT_UNKNOWN,
)
from kvmfs.kvm import iodev
from kvmfs.kvm.emulate import bytes_beyond_page, prepare_emulation_failure
from kvmfs.kvm.host import current_cpu
from kvmfs.kvm.regs import linear_rip
from kvmfs.kvm.steal_time import record_steal_time
from kvmfs.vendor.handle_exit import EXIT_HANDLERS

if TYPE_CHECKING:
    from collections.abc import Callable

    from kvmfs.kvm.kvm_main import Vcpu

# Offsets in struct kvm_run.
EXIT_REASON, UNION, _MMIO_DATA, PIO_DATA = 8, 32, 40, 4096
set_reason = struct.Struct("<I").pack_into
# From EXIT_REASON: exit_reason; direction, size, port, count, data_offset.  What is between them x86._post_run_save fills.
_set_io_exit = struct.Struct("<I20xBBHIQ").pack_into
_set_mmio = struct.Struct("<Q8sIB").pack_into           # phys_addr, data, len, is_write

def _exit_none(vcpu: Vcpu) -> int:
    if vcpu.arch.steal_time.msr:            # perhaps the guest's tick comes, in which it looks
        vcpu.request_work(record_steal_time)
    return 1


def _exit_svm(vcpu: Vcpu) -> int:
    code, reasons = vcpu.cpu.exit.code, vcpu.arch.stat.reasons
    reasons[code] = reasons.get(code, 0) + 1
    handler = EXIT_HANDLERS.get(code)
    if handler is not None:
        return handler(vcpu)
    run = vcpu.run
    set_reason(run, EXIT_REASON, kx.KVM_EXIT_INTERNAL_ERROR)
    struct.pack_into("<IIQQ", run, UNION, kx.KVM_INTERNAL_ERROR_UNEXPECTED_EXIT_REASON, 2,
                     code, current_cpu())
    return 0


def _exit_io_in(vcpu: Vcpu) -> int:
    port, size, count, string = vcpu.cpu.io_exit()
    if string:
        vcpu.arch.stat.insn_emulation += 1
    if vcpu.vm.pio_bus.may_read(port):
        data = iodev.read_ports(vcpu, port, size, count)
        if data is not None:
            return _further(vcpu, vcpu.cpu.complete_io_in(data))
    _set_io_exit(vcpu.run, EXIT_REASON, kx.KVM_EXIT_IO, kx.KVM_EXIT_IO_IN, size, port, count, PIO_DATA)
    vcpu.arch.complete_userspace_io = complete_io_in
    return 0


def complete_io_in(vcpu: Vcpu) -> int:
    """The client has put an IN's data into kvm_run."""
    cpu = vcpu.cpu
    e = cpu.exit
    if _moved(vcpu):
        return 1
    return _further(vcpu, cpu.complete_io_in(vcpu.run[PIO_DATA:PIO_DATA + e.size * e.count]))


def _exit_io_out(vcpu: Vcpu) -> int:
    cpu, run, arch = vcpu.cpu, vcpu.run, vcpu.arch
    port, size, count, string = cpu.io_exit()
    length = size * count
    if string:
        arch.stat.insn_emulation += 1
    if vcpu.vm.pio_bus.may_write(port) and vcpu.vm.pio_bus.write(vcpu, port, bytes(cpu.data[:length])):
        return _further(vcpu, cpu.complete_io_out())
    if length == 1:
        run[PIO_DATA] = cpu.data[0]
    else:
        run[PIO_DATA:PIO_DATA + length] = cpu.data[:length]
    _set_io_exit(run, EXIT_REASON, kx.KVM_EXIT_IO, kx.KVM_EXIT_IO_OUT, size, port, count, PIO_DATA)
    if port == 0x7E and not string and not vcpu.vm.arch.disabled_quirks & KVM_X86_QUIRK_OUT_7E_INC_RIP:
        cpu.complete_io_out()                       # clients of old count on it: the guest is past the instruction
        return 0
    arch.complete_userspace_io = complete_io_out
    return 0


def complete_io_out(vcpu: Vcpu) -> int:
    """An OUT is over."""
    return 1 if _moved(vcpu) else _further(vcpu, vcpu.cpu.complete_io_out())


def _moved(vcpu: Vcpu) -> bool:
    """Has the client moved the guest away from its IN or OUT?  Then that is not stepped over."""
    before, vcpu.arch.pio_linear_rip = vcpu.arch.pio_linear_rip, None
    if before is None or before == linear_rip(vcpu):
        return False
    vcpu.cpu.forget_io()
    return True


def _exit_mmio_read(vcpu: Vcpu) -> int:
    e, run, arch = vcpu.cpu.exit, vcpu.run, vcpu.arch
    slot = vcpu.vm.memslots.find(e.gpa)
    if slot is not None:
        vcpu.cpu.forget_io()
        # A slot that comes or goes at this moment: the guest looks again.  Or one whose memory the client has not mapped.
        return 1 if slot.backed(e.gpa) else -errno.EFAULT
    if arch.apic is not None or vcpu.vm.mmio_bus.readable:
        data = iodev.read_mmio(vcpu, e.gpa, e.size)
        if data is not None:
            return _further(vcpu, vcpu.cpu.complete_mmio_read(data))
    size = bytes_beyond_page(vcpu, e.size) if e.info1 else e.size
    set_reason(run, EXIT_REASON, kx.KVM_EXIT_MMIO)
    _set_mmio(run, UNION, e.gpa, bytes(8), size, 0)
    arch.complete_userspace_io = complete_mmio_read
    arch.stat.mmio_exits += 1
    return 0


def complete_mmio_read(vcpu: Vcpu) -> int:
    """The client has put a read's data into kvm_run."""
    cpu, slots = vcpu.cpu, vcpu.vm.memslots
    data = vcpu.run[_MMIO_DATA:_MMIO_DATA + cpu.exit.size]
    slot = slots.find(cpu.exit.gpa)
    if slot is None:
        return next_round(vcpu, cpu.complete_mmio_read(data))
    # A slot came while the client answered; the answer counts, not what is in the slot.
    with slots.hidden(slot):
        kind = cpu.complete_mmio_read(data)
    return next_round(vcpu, kind)


def _exit_mmio_write(vcpu: Vcpu) -> int:
    cpu, run, arch = vcpu.cpu, vcpu.run, vcpu.arch
    e = cpu.exit
    slot = vcpu.vm.memslots.find(e.gpa)
    data = bytes(cpu.data[:e.size])
    if slot is not None and not slot.readonly:
        if slot.backed(e.gpa, write=True):      # it has come since the guest stored there, or is about to go
            vcpu.vm.memslots.write(e.gpa, data)
            vcpu.vm.engine.invalidate(e.gpa, e.size)
            return next_fragment(vcpu)
        cpu.forget_io()
        return -errno.EFAULT
    if (arch.apic is not None and arch.apic.write(vcpu, e.gpa, data)) or (
            vcpu.vm.mmio_bus.ranges and vcpu.vm.mmio_bus.write(vcpu, e.gpa, data)):
        return next_fragment(vcpu)
    set_reason(run, EXIT_REASON, kx.KVM_EXIT_MMIO)
    _set_mmio(run, UNION, e.gpa, data, e.size, 1)
    arch.complete_userspace_io = next_fragment
    arch.stat.mmio_exits += 1
    return 0


def next_round(vcpu: Vcpu, kind: int) -> int:
    """A read is completed; ``kind``: the further exit of its instruction, if there is one."""
    stat = vcpu.arch.stat
    if kind == EXIT_MMIO_READ:
        stat.mmio_exits -= 1                    # a further part of one access is no exit of its own
    elif kind == EXIT_MMIO_WRITE:
        stat.insn_emulation += 1                # KVM emulates a read-modify-write a second time
    return _further(vcpu, kind)


def next_fragment(vcpu: Vcpu) -> int:
    """A write is completed: what else does its instruction write?"""
    return after_fragment(vcpu, vcpu.cpu.complete())


def after_fragment(vcpu: Vcpu, kind: int) -> int:
    """The same; ``kind``: the further exit of that instruction, if there is one."""
    if kind == EXIT_MMIO_WRITE:
        vcpu.arch.stat.mmio_exits -= 1
    return _further(vcpu, kind)


def _further(vcpu: Vcpu, kind: int) -> int:
    """A completed access may be followed by another one of the same instruction."""
    return HANDLERS[kind](vcpu) if kind else 1


def _exit_fetch(vcpu: Vcpu) -> int:
    gpa = vcpu.cpu.exit.gpa
    slot = vcpu.vm.memslots.find(gpa)
    if slot is not None and slot.backed(gpa):
        return 1                                # a slot that has come since
    return prepare_emulation_failure(vcpu)


def _exit_unknown(vcpu: Vcpu) -> int:
    e = vcpu.cpu.exit
    write = e.info1 != 0
    slot = vcpu.vm.memslots.find(e.gpa)
    if slot is None or (write and slot.readonly):
        return prepare_emulation_failure(vcpu)
    return 1 if slot.backed(e.gpa, write=write) else -errno.EFAULT


def tap_exits(tap: Callable[[Vcpu, int], None] | None) -> None:
    """From now on ``tap`` is told of every exit of this process's guests, by its kind, before it is handled; None: no more."""
    for kind, handler in _PLAIN.items():
        HANDLERS[kind] = handler if tap is None else partial(_tapped_exit, tap, kind, handler)


def is_tapped() -> bool:
    """Is there such a tap?"""
    return HANDLERS[EXIT_NONE] is not _exit_none


def _tapped_exit(tap: Callable[[Vcpu, int], None], kind: int, handler: Callable[[Vcpu], int], vcpu: Vcpu) -> int:
    tap(vcpu, kind)
    return handler(vcpu)


_PLAIN: Final[dict[int, Callable[[Vcpu], int]]] = {
    EXIT_NONE: _exit_none,
    EXIT_SVM: _exit_svm,
    EXIT_IO_IN: _exit_io_in,
    EXIT_IO_OUT: _exit_io_out,
    EXIT_MMIO_READ: _exit_mmio_read,
    EXIT_MMIO_WRITE: _exit_mmio_write,
    EXIT_FETCH: _exit_fetch,
    EXIT_UNKNOWN: _exit_unknown,
}
HANDLERS = dict(_PLAIN)
