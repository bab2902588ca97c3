# SPDX-License-Identifier: GPL-2.0-or-later
"""Guests of a few instructions: what they do reaches the client, and what the client does reaches them."""

from __future__ import annotations

import ctypes
import errno as E
import os
import signal
import struct
import threading

from kvmfs.abi.ioctls import Level
from kvmfs.abi.structs import (
    KvmCoalescedMmioZone,
    KvmIoeventfd,
    KvmMsrFilter,
    KvmMsrFilterRange,
    KvmRegs,
    KvmRun,
    KvmSregs,
    KvmVcpuEvents,
)

from .model import Trial, buffer, case
from .vcpu_cpuid import set_cpuid2, set_supported_cpuid
from .vcpu_regs import long_mode
from .vcpu_run import (
    EXIT_HLT,
    EXIT_INTERNAL_ERROR,
    EXIT_INTR,
    EXIT_IO,
    EXIT_MMIO,
    EXIT_RDMSR,
    EXIT_WRMSR,
    real_mode,
    registers,
)
from .vm import enable
from .wire import PAGE

VM, VCPU = Level.VM, Level.VCPU
DS_2000 = b"\xb8\x00\x20\x8e\xd8"               # mov $0x2000,%ax; mov %ax,%ds
MSR_INVALID, MSR_UNKNOWN, MSR_FILTER = 1, 2, 4


def _until_hlt(t: Trial, run: KvmRun, *, port: int, give: bytes = b"") -> bytes:
    """Run to HLT; returns what went out to ``port``, and feeds what comes in from it."""
    out, at = b"", ctypes.addressof(run)
    for _ in range(64):
        t.need("run", t.ioctl(t.vcpu, "KVM_RUN"))
        if run.exit_reason == EXIT_HLT:
            return out
        if run.exit_reason != EXIT_IO:
            break
        t.equal("port and size", (run.io.port, run.io.size), (port, 1))
        if run.io.direction:
            out += ctypes.string_at(at + run.io.data_offset, run.io.count)
        else:
            ctypes.memmove(at + run.io.data_offset, give[:run.io.count], run.io.count)
            give = give[run.io.count:]
    t.failed("the guest halts", f"exit {run.exit_reason}", f"exit {EXIT_HLT}")
    return out


@case("KVM_RUN", VCPU, "string output", guest=True)
def outs(t: Trial) -> None:
    run, memory = real_mode(t, b"\xb9\x05\x00\xbe\x00\x20\xba\x42\x00\xfc\xf3\x6e\xf4")     # rep outsb of 5 bytes
    memory.write(0x2000, b"hello")
    t.equal("every byte, in order", _until_hlt(t, run, port=0x42), b"hello")
    regs = registers(t)
    t.equal("cx and si", (regs.rcx, regs.rsi), (0, 0x2005))


@case("KVM_RUN", VCPU, "string input", guest=True)
def ins(t: Trial) -> None:
    run, memory = real_mode(t, b"\xb9\x05\x00\xbf\x00\x21\xba\x43\x00\xfc\xf3\x6c\xf4")     # rep insb of 5 bytes
    _until_hlt(t, run, port=0x43, give=b"world")
    t.equal("in memory", memory.read(0x2100, 6), b"world\0")
    regs = registers(t)
    t.equal("cx and di", (regs.rcx, regs.rdi), (0, 0x2105))


@case("KVM_RUN", VCPU, "immediate exit completes an output", "IMMEDIATE_EXIT", guest=True)
def completion(t: Trial) -> None:
    run, _ = real_mode(t, b"\xe4\x43\xf4")                          # in $0x43,%al; hlt
    t.need("run", t.ioctl(t.vcpu, "KVM_RUN"))
    t.equal("IN", (run.exit_reason, registers(t).rip), (EXIT_IO, 0x1000))
    ctypes.memset(ctypes.addressof(run) + run.io.data_offset, 0x21, 1)
    run.immediate_exit = 1
    t.errno("EINTR", t.ioctl(t.vcpu, "KVM_RUN"), E.EINTR)
    regs = registers(t)
    t.equal("the byte is in, the next instruction was not executed", (regs.rax & 0xFF, regs.rip), (0x21, 0x1002))


@case("KVM_RUN", VCPU, "long mode", "EXT_CPUID", guest=True)
def long_guest(t: Trial) -> None:
    run, memory = real_mode(t, b"\x48\xb8" + struct.pack("<Q", 0x1122334455667788) + b"\x49\x89\xc7\xf4")   # …,%rax; mov %rax,%r15
    set_supported_cpuid(t, t.vcpu)
    for at, value in ((0x3000, 0x4003), (0x4000, 0x5003), (0x5000, 0x83)):
        memory.write(at, struct.pack("<Q", value))
    sregs = KvmSregs()
    t.need("get", t.ioctl(t.vcpu, "KVM_GET_SREGS", sregs))
    long_mode(sregs, 0x3000)
    t.need("set", t.ioctl(t.vcpu, "KVM_SET_SREGS", sregs))
    t.need("run", t.ioctl(t.vcpu, "KVM_RUN"))
    regs = registers(t)
    t.equal("it halts", (run.exit_reason, regs.rip), (EXIT_HLT, 0x100E))
    t.equal("rax and r15", (regs.rax, regs.r15), (0x1122334455667788,) * 2)


@case("KVM_RUN", VCPU, "no memory to execute", guest=True)
def no_memory(t: Trial) -> None:
    run, _ = real_mode(t, b"\xea\x00\x00\x00\x40")                  # ljmp $0x4000,$0
    t.need("run", t.ioctl(t.vcpu, "KVM_RUN"))
    t.equal("emulation failed", (run.exit_reason, run.internal.suberror), (EXIT_INTERNAL_ERROR, 1))


@case("KVM_RUN", VCPU, "read-only memory", "READONLY_MEM", guest=True)
def read_only(t: Trial) -> None:
    run, _ = real_mode(t, DS_2000 + b"\xa0\x00\x00\xc6\x06\x04\x00\x09\xf4")       # mov (0),%al; movb $9,(4); hlt
    rom = t.memory(PAGE)
    rom.write(0, b"\x6b")
    t.need("read-only memory", t.slot(t.vm, 1, 0x20000, rom, 2))
    t.need("run", t.ioctl(t.vcpu, "KVM_RUN"))
    t.equal("the store is the client's", (run.exit_reason, run.mmio.phys_addr, run.mmio.is_write, run.mmio.data[0]),
            (EXIT_MMIO, 0x20004, 1, 9))
    t.equal("the load was memory's", registers(t).rax & 0xFF, 0x6B)
    t.need("run", t.ioctl(t.vcpu, "KVM_RUN"))
    t.equal("nothing was stored", (run.exit_reason, rom.read(4, 1)), (EXIT_HLT, b"\0"))


@case("KVM_RUN", VCPU, "registers in kvm_run after the guest ran", "SYNC_REGS", guest=True)
def synced(t: Trial) -> None:
    run, _ = real_mode(t, b"\x43\xf4\x43\xf4")                      # inc %bx; hlt; inc %bx; hlt
    run.kvm_valid_regs = 1
    t.need("run", t.ioctl(t.vcpu, "KVM_RUN"))
    t.equal("they came out", (run.s.regs.regs.rip, run.s.regs.regs.rbx), (0x1002, 1))
    run.s.regs.regs.rbx, run.kvm_dirty_regs = 0x40, 1
    t.need("run", t.ioctl(t.vcpu, "KVM_RUN"))
    t.equal("and went in", (run.s.regs.regs.rip, run.s.regs.regs.rbx), (0x1004, 0x41))


@case("KVM_RUN", VCPU, "vcpus in two threads", guest=True)
def two(t: Trial) -> None:
    run, memory = real_mode(t, b"\xf0\xff\x06\x00\x30\xe2\xf9\xf4")     # 1: lock incw (0x3000); loop 1b; hlt
    second = t.new_vcpu(t.vm, 1)
    sregs = KvmSregs()
    t.need("get", t.ioctl(t.vcpu, "KVM_GET_SREGS", sregs))
    t.need("set", t.ioctl(second, "KVM_SET_SREGS", sregs))
    for vcpu in (t.vcpu, second):
        t.need("start", t.ioctl(vcpu, "KVM_SET_REGS", KvmRegs(rip=0x1000, rcx=10000, rflags=2)))
    results = []
    threads = [threading.Thread(target=lambda vcpu=vcpu: results.append(t.ioctl(vcpu, "KVM_RUN"))) for vcpu in (t.vcpu, second)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    t.equal("both ended", [result.value for result in results], [0, 0])
    t.equal("both halted", (run.exit_reason, t.kvm_run(second).exit_reason), (EXIT_HLT, EXIT_HLT))
    t.equal("no increment was lost", struct.unpack("<H", memory.read(0x3000, 2))[0], 20000)


# ---- events -------------------------------------------------------------------------------------------------


@case("KVM_NMI", VCPU, "delivered", "USER_NMI", guest=True)
def nmi(t: Trial) -> None:
    run, memory = real_mode(t, b"\xf4\xf4" + bytes(14) + b"\xb9\x05\x00\xf4")       # hlt … mov $5,%cx; hlt
    memory.write(4 * 2, struct.pack("<HH", 0x1010, 0))
    t.need("run", t.ioctl(t.vcpu, "KVM_RUN"))
    t.ok("NMI", t.ioctl(t.vcpu, "KVM_NMI"))
    t.need("run", t.ioctl(t.vcpu, "KVM_RUN"))
    t.equal("the handler ran", (run.exit_reason, registers(t).rcx), (EXIT_HLT, 5))
    state = KvmVcpuEvents()
    t.need("the events", t.ioctl(t.vcpu, "KVM_GET_VCPU_EVENTS", state))
    t.equal("none is pending, and they are blocked until IRET", (state.nmi.pending, state.nmi.masked), (0, 1))


@case("KVM_SET_VCPU_EVENTS", VCPU, "an exception is delivered", "VCPU_EVENTS", guest=True)
def exception(t: Trial) -> None:
    run, memory = real_mode(t, b"\xf4" + bytes(15) + b"\xb9\x06\x00\xf4")           # hlt … mov $6,%cx; hlt
    memory.write(4 * 13, struct.pack("<HH", 0x1010, 0))
    state = KvmVcpuEvents()
    state.exception.injected, state.exception.nr = 1, 13
    t.need("set", t.ioctl(t.vcpu, "KVM_SET_VCPU_EVENTS", state))
    t.need("run", t.ioctl(t.vcpu, "KVM_RUN"))
    t.equal("the handler ran", (run.exit_reason, registers(t).rcx), (EXIT_HLT, 6))


@case("KVM_SET_SIGNAL_MASK", VCPU, "a signal that only the guest's time lets through", guest=True)
def signal_mask(t: Trial) -> None:
    run, _ = real_mode(t, b"\xeb\xfe")                              # a loop
    mask = buffer(12, struct.pack("<IQ", 8, 0))
    t.need("nothing is blocked while the guest runs", t.ioctl(t.vcpu, "KVM_SET_SIGNAL_MASK", mask))
    old = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR1})
    try:
        signal.pthread_kill(threading.get_ident(), signal.SIGUSR1)
        t.errno("EINTR", t.ioctl(t.vcpu, "KVM_RUN"), E.EINTR)
        t.equal("exit", run.exit_reason, EXIT_INTR)
        t.true("the signal is still pending", signal.sigtimedwait({signal.SIGUSR1}, 0) is not None)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, old)


# ---- MSRs, CPUID --------------------------------------------------------------------------------------------


@case("KVM_ENABLE_CAP", VM, "msrs in user space", "ENABLE_CAP_VM", "X86_USER_SPACE_MSR", guest=True)
def user_msr(t: Trial) -> None:
    # mov $0xdead0000,%ecx; rdmsr; mov %eax,%ebx; wrmsr; hlt
    run, _ = real_mode(t, b"\x66\xb9\x00\x00\xad\xde\x0f\x32\x66\x89\xc3\x0f\x30\xf4")
    t.need("enable", enable(t, t.vm, "X86_USER_SPACE_MSR", MSR_INVALID | MSR_UNKNOWN))
    t.need("run", t.ioctl(t.vcpu, "KVM_RUN"))
    t.equal("RDMSR", (run.exit_reason, run.msr.index, run.msr.reason, run.msr.error), (EXIT_RDMSR, 0xDEAD0000, MSR_UNKNOWN, 0))
    run.msr.data = 0x5566
    t.need("run", t.ioctl(t.vcpu, "KVM_RUN"))
    t.equal("WRMSR", (run.exit_reason, run.msr.index, run.msr.data), (EXIT_WRMSR, 0xDEAD0000, 0x5566))
    t.need("run", t.ioctl(t.vcpu, "KVM_RUN"))
    t.equal("the guest has the value", (run.exit_reason, registers(t).rbx), (EXIT_HLT, 0x5566))


@case("KVM_X86_SET_MSR_FILTER", VM, "a denied msr", "X86_MSR_FILTER", "X86_USER_SPACE_MSR", guest=True)
def filtered(t: Trial) -> None:
    run, _ = real_mode(t, b"\x66\xb9\x74\x01\x00\x00\x0f\x32\xf4")  # mov $0x174,%ecx; rdmsr; hlt
    bitmap, denied = buffer(8), KvmMsrFilter()
    denied.ranges[0] = KvmMsrFilterRange(flags=1, base=0x174, nmsrs=1, bitmap=ctypes.addressof(bitmap))
    t.need("enable", enable(t, t.vm, "X86_USER_SPACE_MSR", MSR_FILTER))
    t.need("filter", t.ioctl(t.vm, "KVM_X86_SET_MSR_FILTER", denied))
    t.need("run", t.ioctl(t.vcpu, "KVM_RUN"))
    t.equal("RDMSR", (run.exit_reason, run.msr.index, run.msr.reason), (EXIT_RDMSR, 0x174, MSR_FILTER))
    run.msr.data = 0x77
    t.need("run", t.ioctl(t.vcpu, "KVM_RUN"))
    t.equal("the guest has the value", (run.exit_reason, registers(t).rax), (EXIT_HLT, 0x77))


@case("KVM_SET_CPUID2", VCPU, "the guest sees it", "EXT_CPUID", guest=True)
def guest_cpuid(t: Trial) -> None:
    run, _ = real_mode(t, b"\x66\x31\xc0\x0f\xa2\xf4")              # xor %eax,%eax; cpuid; hlt
    t.need("a table", set_cpuid2(t, t.vcpu, [(0, 0, 0, 7, 0x11111111, 0x22222222, 0x33333333, 0, 0, 0)]))
    t.need("run", t.ioctl(t.vcpu, "KVM_RUN"))
    regs = registers(t)
    t.equal("eax ebx ecx edx", (run.exit_reason, regs.rax, regs.rbx, regs.rcx, regs.rdx),
            (EXIT_HLT, 7, 0x11111111, 0x22222222, 0x33333333))


# ---- without an exit ----------------------------------------------------------------------------------------


@case("KVM_REGISTER_COALESCED_MMIO", VM, "stores go to the ring", "COALESCED_MMIO", guest=True)
def coalesced(t: Trial) -> None:
    run, _ = real_mode(t, DS_2000 + b"\xc6\x06\x08\x00\x09\xf4")   # movb $9,(8); hlt
    t.need("a zone", t.ioctl(t.vm, "KVM_REGISTER_COALESCED_MMIO", KvmCoalescedMmioZone(addr=0x20000, size=0x1000)))
    t.need("run", t.ioctl(t.vcpu, "KVM_RUN"))
    t.equal("no exit for the store", run.exit_reason, EXIT_HLT)
    ring = ctypes.addressof(run) + t.has("COALESCED_MMIO") * PAGE
    first, last, where, size, _, byte = struct.unpack("<IIQIIB", ctypes.string_at(ring, 25))
    t.equal("first and last", (first, last), (0, 1))
    t.equal("the store", (where, size, byte), (0x20008, 1, 9))


@case("KVM_IOEVENTFD", VM, "a store signals it", "IOEVENTFD", guest=True)
def ioeventfd(t: Trial) -> None:
    # mov $3,%al; out %al,$0x50; mov $4,%al; out %al,$0x50; movb $1,(8); hlt
    run, _ = real_mode(t, DS_2000 + b"\xb0\x03\xe6\x50\xb0\x04\xe6\x50\xc6\x06\x08\x00\x01\xf4")
    port, store = (t.keep(os.eventfd(0, os.EFD_NONBLOCK)) for _ in range(2))
    t.need("a port's", t.ioctl(t.vm, "KVM_IOEVENTFD", KvmIoeventfd(addr=0x50, len=1, fd=port, datamatch=3, flags=3)))
    t.need("an address's", t.ioctl(t.vm, "KVM_IOEVENTFD", KvmIoeventfd(addr=0x20008, len=1, fd=store)))
    t.need("run", t.ioctl(t.vcpu, "KVM_RUN"))
    t.equal("another value is an exit", (run.exit_reason, run.io.port), (EXIT_IO, 0x50))
    t.need("run", t.ioctl(t.vcpu, "KVM_RUN"))
    t.equal("the store is none", run.exit_reason, EXIT_HLT)
    t.equal("both were signalled once", (_count(port), _count(store)), (1, 1))


def _count(fd: int) -> int:
    try:
        return os.eventfd_read(fd)
    except BlockingIOError:
        return 0


@case("KVM_SET_USER_MEMORY_REGION", VM, "memory that is moved and deleted", "USER_MEMORY", guest=True)
def moved(t: Trial) -> None:
    code = DS_2000 + b"\xa0\x00\x00\xf4" + DS_2000 + b"\xa0\x00\x00\xf4" + DS_2000 + b"\xa0\x00\x00\xf4"   # mov (0),%al; hlt
    run, _ = real_mode(t, code)
    one, other = t.memory(PAGE), t.memory(PAGE)
    one.write(0, b"\x01")
    other.write(0, b"\x02")
    t.need("at 0x20000", t.slot(t.vm, 1, 0x20000, one))
    t.need("run", t.ioctl(t.vcpu, "KVM_RUN"))
    t.equal("the first memory", (run.exit_reason, registers(t).rax & 0xFF), (EXIT_HLT, 1))
    t.need("moved away", t.slot(t.vm, 1, 0x40000, one))
    t.need("another in its place", t.slot(t.vm, 2, 0x20000, other))
    t.need("run", t.ioctl(t.vcpu, "KVM_RUN"))
    t.equal("the second memory", (run.exit_reason, registers(t).rax & 0xFF), (EXIT_HLT, 2))
    region = buffer(32, struct.pack("<IIQQQ", 2, 0, 0x20000, 0, 0))
    t.need("deleted", t.ioctl(t.vm, "KVM_SET_USER_MEMORY_REGION", region))
    t.need("run", t.ioctl(t.vcpu, "KVM_RUN"))
    t.equal("nothing is there", (run.exit_reason, run.mmio.phys_addr), (EXIT_MMIO, 0x20000))


@case("KVM_RUN", VCPU, "the client's stores are seen", guest=True)
def stores_seen(t: Trial) -> None:
    """Data, and code that has been executed before."""
    run, memory = real_mode(t, b"\xb0\x01\xf4\xeb\xfb")             # 1: mov $1,%al; hlt; jmp 1b
    t.need("run", t.ioctl(t.vcpu, "KVM_RUN"))
    t.equal("as it was", (run.exit_reason, registers(t).rax & 0xFF), (EXIT_HLT, 1))
    memory.write(0x1001, b"\x2a")
    t.need("run", t.ioctl(t.vcpu, "KVM_RUN"))
    t.equal("as it is", (run.exit_reason, registers(t).rax & 0xFF), (EXIT_HLT, 0x2A))
