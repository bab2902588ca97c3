# SPDX-License-Identifier: GPL-2.0-or-later
"""KVM_RUN: what it refuses, and small guests."""

from __future__ import annotations

import ctypes
import errno as E
import signal
import struct
import threading

from kvmfs.abi.ioctls import Level
from kvmfs.abi.structs import KvmDirtyLog, KvmGuestDebug, KvmInterrupt, KvmRegs, KvmRun, KvmSregs

from .model import Trial, buffer, case
from .vcpu_cpuid import set_cpuid2, set_supported_cpuid
from .wire import PAGE, Memory

VM, VCPU = Level.VM, Level.VCPU
EXIT_IO, EXIT_DEBUG, EXIT_HLT, EXIT_MMIO, EXIT_IRQ_WINDOW, EXIT_SHUTDOWN, EXIT_INTR = 2, 4, 5, 6, 7, 8, 10
EXIT_INTERNAL_ERROR, EXIT_RDMSR, EXIT_WRMSR = 17, 29, 30


@case("KVM_RUN", VCPU, "what is refused")
def refused(t: Trial) -> None:
    run = t.kvm_run(t.vcpu)
    run.immediate_exit = 1
    t.errno("an argument", t.ioctl(t.vcpu, "KVM_RUN", 1), E.EINVAL)
    run.kvm_valid_regs = 1 << 40
    t.errno("unknown kvm_valid_regs", t.ioctl(t.vcpu, "KVM_RUN"), E.EINVAL)
    run.kvm_valid_regs, run.kvm_dirty_regs = 0, 1 << 40
    t.errno("unknown kvm_dirty_regs", t.ioctl(t.vcpu, "KVM_RUN"), E.EINVAL)
    run.kvm_dirty_regs, run.cr8 = 0, 16
    t.errno("cr8 above 15", t.ioctl(t.vcpu, "KVM_RUN"), E.EINVAL)
    run.cr8 = 0
    t.errno("immediate_exit", t.ioctl(t.vcpu, "KVM_RUN"), E.EINTR)


@case("KVM_RUN", VCPU, "immediate exit", "IMMEDIATE_EXIT")
def immediate_exit(t: Trial) -> None:
    """It returns at once, and the shared area holds the vCPU's state."""
    run, sregs = t.kvm_run(t.vcpu), KvmSregs()
    run.immediate_exit, run.cr8 = 1, 3
    t.errno("EINTR", t.ioctl(t.vcpu, "KVM_RUN"), E.EINTR)
    t.need("the registers", t.ioctl(t.vcpu, "KVM_GET_SREGS", sregs))
    t.equal("cr8 was taken", sregs.cr8, 3)
    t.equal("cr8 stays", run.cr8, 3)
    t.equal("apic_base", run.apic_base, sregs.apic_base)
    t.equal("if_flag", run.if_flag, 0)
    regs = KvmRegs()
    t.need("rip", t.ioctl(t.vcpu, "KVM_GET_REGS", regs))
    t.equal("no instruction was executed", regs.rip, 0xFFF0)


@case("KVM_RUN", VCPU, "registers in kvm_run", "SYNC_REGS")
def sync_regs(t: Trial) -> None:
    run = t.kvm_run(t.vcpu)
    valid = t.has("SYNC_REGS")
    t.equal("registers, special ones, events", valid & 7, 7)
    run.immediate_exit, run.kvm_valid_regs = 1, valid
    t.errno("immediate exit", t.ioctl(t.vcpu, "KVM_RUN"), E.EINTR)
    t.equal("rip came out", run.s.regs.regs.rip, 0xFFF0)
    t.equal("cr0 came out", run.s.regs.sregs.cr0, 0x60000010)
    run.s.regs.regs.rbx, run.kvm_dirty_regs = 0x1234, 1
    t.errno("immediate exit again", t.ioctl(t.vcpu, "KVM_RUN"), E.EINTR)
    regs = KvmRegs()
    t.need("the registers", t.ioctl(t.vcpu, "KVM_GET_REGS", regs))
    t.equal("rbx went in", regs.rbx, 0x1234)
    t.equal("what was taken is marked clean", run.kvm_dirty_regs, 0)


# ---- guests -------------------------------------------------------------------------------------------------


def real_mode(t: Trial, code: bytes, *, start: int = 0x1000) -> tuple[KvmRun, Memory]:
    """A vCPU in real mode with 64 KiB of memory (slot 0, dirty-logged) and ``code`` at ``start``; stack below it."""
    memory = t.memory(16 * PAGE)
    memory.write(start, code)
    t.need("memory", t.slot(t.vm, 0, 0, memory, 1))
    sregs = KvmSregs()
    t.need("get", t.ioctl(t.vcpu, "KVM_GET_SREGS", sregs))
    sregs.cs.selector = sregs.cs.base = 0
    t.need("real mode", t.ioctl(t.vcpu, "KVM_SET_SREGS", sregs))
    t.need("start", t.ioctl(t.vcpu, "KVM_SET_REGS", KvmRegs(rip=start, rsp=start, rflags=2)))
    return t.kvm_run(t.vcpu), memory


def registers(t: Trial) -> KvmRegs:
    """KVM_GET_REGS."""
    regs = KvmRegs()
    t.need("registers", t.ioctl(t.vcpu, "KVM_GET_REGS", regs))
    return regs


@case("KVM_RUN", VCPU, "hlt", guest=True)
def hlt(t: Trial) -> None:
    run, _ = real_mode(t, b"\xb8\x34\x12\xf4\xf4")                 # mov $0x1234,%ax; hlt; hlt
    t.ok("run", t.ioctl(t.vcpu, "KVM_RUN"))
    t.equal("exit", run.exit_reason, EXIT_HLT)
    regs = registers(t)
    t.equal("rax and rip", (regs.rax, regs.rip), (0x1234, 0x1004))
    t.ok("again", t.ioctl(t.vcpu, "KVM_RUN"))
    t.equal("rip after the second", (run.exit_reason, registers(t).rip), (EXIT_HLT, 0x1005))


@case("KVM_RUN", VCPU, "ports", guest=True)
def ports(t: Trial) -> None:
    run, _ = real_mode(t, b"\xb8\x5a\x00\xe6\x42\xe4\x43\xf4")     # mov $0x5a,%ax; out %al,$0x42; in $0x43,%al; hlt
    at = ctypes.addressof(run)
    t.ok("run", t.ioctl(t.vcpu, "KVM_RUN"))
    t.equal("OUT", (run.exit_reason, run.io.direction, run.io.size, run.io.port, run.io.count), (EXIT_IO, 1, 1, 0x42, 1))
    t.equal("its data", ctypes.string_at(at + run.io.data_offset, 1), b"\x5a")
    t.ok("run", t.ioctl(t.vcpu, "KVM_RUN"))
    t.equal("IN", (run.exit_reason, run.io.direction, run.io.size, run.io.port, run.io.count), (EXIT_IO, 0, 1, 0x43, 1))
    ctypes.memset(at + run.io.data_offset, 0x77, 1)
    t.ok("run", t.ioctl(t.vcpu, "KVM_RUN"))
    t.equal("the byte arrived", (run.exit_reason, registers(t).rax & 0xFF), (EXIT_HLT, 0x77))


@case("KVM_RUN", VCPU, "mmio", guest=True)
def mmio(t: Trial) -> None:
    # mov $0x2000,%ax; mov %ax,%ds; movb $9,(0) ; mov (1),%al; hlt
    run, _ = real_mode(t, b"\xb8\x00\x20\x8e\xd8\xc6\x06\x00\x00\x09\xa0\x01\x00\xf4")
    t.ok("run", t.ioctl(t.vcpu, "KVM_RUN"))
    t.equal("store", (run.exit_reason, run.mmio.phys_addr, run.mmio.len, run.mmio.is_write, run.mmio.data[0]),
            (EXIT_MMIO, 0x20000, 1, 1, 9))
    t.ok("run", t.ioctl(t.vcpu, "KVM_RUN"))
    t.equal("load", (run.exit_reason, run.mmio.phys_addr, run.mmio.len, run.mmio.is_write), (EXIT_MMIO, 0x20001, 1, 0))
    run.mmio.data[0] = 0x33
    t.ok("run", t.ioctl(t.vcpu, "KVM_RUN"))
    t.equal("the byte arrived", (run.exit_reason, registers(t).rax & 0xFF), (EXIT_HLT, 0x33))


@case("KVM_RUN", VCPU, "shutdown", guest=True)
def shutdown(t: Trial) -> None:
    run, _ = real_mode(t, b"\x0f\x01\x1e\x08\x10\x0f\x0b\x90" + bytes(8))      # lidt (0x1008), limit 0; ud2
    t.ok("run", t.ioctl(t.vcpu, "KVM_RUN"))
    t.equal("a triple fault", run.exit_reason, EXIT_SHUTDOWN)


@case("KVM_RUN", VCPU, "signal", guest=True)
def interrupted(t: Trial) -> None:
    run, _ = real_mode(t, b"\xeb\xfe")                             # a loop
    old = signal.signal(signal.SIGUSR1, lambda *_: None)
    signal.siginterrupt(signal.SIGUSR1, True)
    try:
        timer = threading.Timer(0.05, signal.pthread_kill, (threading.get_ident(), signal.SIGUSR1))
        timer.start()
        t.errno("EINTR", t.ioctl(t.vcpu, "KVM_RUN"), E.EINTR)
        timer.join()
    finally:
        signal.signal(signal.SIGUSR1, old)
    t.equal("exit", run.exit_reason, EXIT_INTR)


@case("KVM_INTERRUPT", VCPU, "delivered", guest=True)
def interrupt(t: Trial) -> None:
    run, memory = real_mode(t, b"\xfb\x90\xf4" + bytes(13) + b"\xb9\x07\x00\xf4")   # sti; nop; hlt ... mov $7,%cx; hlt
    memory.write(4 * 0x21, struct.pack("<HH", 0x1010, 0))
    run.request_interrupt_window = 1
    t.ok("run", t.ioctl(t.vcpu, "KVM_RUN"))
    t.equal("the window opens", (run.exit_reason, run.ready_for_interrupt_injection), (EXIT_IRQ_WINDOW, 1))
    run.request_interrupt_window = 0
    t.ok("queue", t.ioctl(t.vcpu, "KVM_INTERRUPT", KvmInterrupt(irq=0x21)))
    t.ok("run", t.ioctl(t.vcpu, "KVM_RUN"))
    t.equal("the handler ran", (run.exit_reason, registers(t).rcx), (EXIT_HLT, 7))


@case("KVM_SET_CPUID2", VCPU, "after the guest ran", "EXT_CPUID", guest=True)
def cpuid_after_run(t: Trial) -> None:
    entries = set_supported_cpuid(t, t.vcpu)
    real_mode(t, b"\xf4")
    t.ok("run", t.ioctl(t.vcpu, "KVM_RUN"))
    t.ok("the same table", set_cpuid2(t, t.vcpu, entries))
    last = entries[-1]
    t.errno("another", set_cpuid2(t, t.vcpu, [*entries[:-1], (*last[:3], last[3] ^ 0x100, *last[4:])]), E.EINVAL)


@case("KVM_GET_DIRTY_LOG", VM, "the guest's stores", guest=True)
def dirty_log(t: Trial) -> None:
    real_mode(t, b"\xc6\x06\x00\x30\x01\xc6\x06\x00\x50\x01\xf4")  # movb $1,(0x3000); movb $1,(0x5000); hlt
    t.ok("run", t.ioctl(t.vcpu, "KVM_RUN"))
    bitmap = buffer(8)
    log = KvmDirtyLog(slot=0, dirty_bitmap=ctypes.addressof(bitmap))
    t.ok("the log", t.ioctl(t.vm, "KVM_GET_DIRTY_LOG", log))
    # The code's page, too: Linux maps what the guest comes to first writable, and so dirty.
    t.equal("three pages", int.from_bytes(bytes(bitmap), "little"), 1 << 1 | 1 << 3 | 1 << 5)
    t.ok("again", t.ioctl(t.vm, "KVM_GET_DIRTY_LOG", log))
    t.equal("it was cleared", bytes(bitmap), bytes(8))


@case("KVM_SET_GUEST_DEBUG", VCPU, "single step", "SET_GUEST_DEBUG", guest=True)
def single_step(t: Trial) -> None:
    run, _ = real_mode(t, b"\x90\x90\xf4")
    t.ok("single step", t.ioctl(t.vcpu, "KVM_SET_GUEST_DEBUG", KvmGuestDebug(control=3)))
    for pc in (0x1001, 0x1002):
        t.ok("run", t.ioctl(t.vcpu, "KVM_RUN"))
        t.equal(f"stop at {pc:#x}", (run.exit_reason, run.debug.arch.exception, run.debug.arch.pc), (EXIT_DEBUG, 1, pc))
        t.true("dr6 has BS", run.debug.arch.dr6 & 0x4000)
