# SPDX-License-Identifier: GPL-2.0-or-later
"""A VM with interrupt controllers, whose guests are flat 32-bit code on one or more vCPUs.

A guest counts interrupt ``v`` at COUNTS + 4 * v and finds the number of its CPU by its stack.  It ends with
OUT to port 0xf4.
"""

import contextlib
import struct
import threading
import time

from kvmfs.abi import ioctls as K
from kvmfs.kvm.cpuid_supported import supported
from kvmfs.kvm.kvm_main import VCPU_INODE, VM_INODE
from tests.unit.fake_client import ARG
from tests.unit.machine import CODE, Machine, Req

GDT, IDT, COUNTS, AP_START = 0x500, 0x1000, 0x3000, 0x9000
APIC, IOAPIC = 0xFEE00000, 0xFEC00000
FLAT = struct.pack("<4Q", 0, 0x00CF9B000000FFFF, 0x00CF93000000FFFF, 0)
TSC_DEADLINE = 1 << 24
PIC_INIT = """
    mov al, 0x11; out 0x20, al; out 0xa0, al
    mov al, 0x20; out 0x21, al; mov al, 0x28; out 0xa1, al
    mov al, 4; out 0x21, al; mov al, 2; out 0xa1, al
    mov al, 1; out 0x21, al; out 0xa1, al
"""
APIC_ON = f"mov dword ptr [{APIC + 0xF0:#x}], 0x1ff\n"


def handler(vector, eoi=f"mov dword ptr [{APIC + 0xB0:#x}], 0"):
    return f"vec_{vector:02x}: lock inc dword ptr [{COUNTS + 4 * vector:#x}]; {eoi}; iretd\n"


PIC_EOI = "push eax; mov al, 0x20; out 0xa0, al; out 0x20, al; pop eax"
X2APIC_EOI = "pushad; mov ecx, 0x80b; xor eax, eax; xor edx, edx; wrmsr; popad"


class IrqMachine(Machine):
    """``vcpus`` vCPUs; ``pit``: also a PIT; ``setup``: called instead of KVM_CREATE_IRQCHIP."""

    def __init__(self, name="amd", source=None, vcpus=1, pit=False, setup=None):
        self._setup, self._pit = setup, pit
        super().__init__(name)
        for i in range(1, vcpus):
            assert self.ioctl(VM_INODE, K.KVM_CREATE_VCPU, i) == (VCPU_INODE + i, b"")
        entries = [e for e in supported(name)]
        for i in range(vcpus):
            raw = b"".join(_with_deadline(e) for e in entries)
            self.host.memory.write(ARG, struct.pack("<II", len(entries), 0) + raw)
            assert self.vcpu_of(i, K.KVM_SET_CPUID2, ARG, struct.pack("<II", len(entries), 0)) == (0, b"")
        if source is not None:
            self.load(source)

    def prepare(self):
        if self._setup is not None:
            self._setup(self.vm)
        else:
            assert self.vm_ioctl(K.KVM_CREATE_IRQCHIP) == (0, b"")
        if self._pit:
            assert self.vm_ioctl(K.KVM_CREATE_PIT2, 1, bytes(64)) == (0, b"")

    def load(self, source):
        from tests.asm import assemble

        code, self.symbols = assemble(source, CODE, 32)
        assert len(code) < 0x7000
        self.write(CODE, code)
        self.write(GDT, FLAT)
        for name, address in self.symbols.items():
            if name.startswith("vec_"):
                gate = address & 0xFFFF | 8 << 16 | 0x8E00 << 32 | (address >> 16) << 48
                self.write(IDT + 8 * int(name[4:], 16), struct.pack("<Q", gate))
        sregs = self.sregs()
        for segment, selector, kind in ((sregs.cs, 8, 11), *((getattr(sregs, s), 16, 3) for s in ("ds", "es", "ss", "fs", "gs"))):
            segment.base, segment.limit, segment.selector, segment.type = 0, 0xFFFFFFFF, selector, kind
            segment.present = segment.s = segment.db = segment.g = 1
            segment.dpl = segment.l = 0
        sregs.gdt.base, sregs.gdt.limit = GDT, len(FLAT) - 1
        sregs.idt.base, sregs.idt.limit = IDT, 0x7FF
        sregs.cr0 |= 1
        assert self.set_sregs(sregs) == 0
        self.set_regs(rip=CODE, rsp=0x7000)

    def vm_ioctl(self, cmd, arg=0, data=b""):
        return self.ioctl(VM_INODE, cmd, arg, data)

    def vcpu_of(self, index, cmd, arg=0, data=b""):
        return self.ioctl(VCPU_INODE + index, cmd, arg, data)

    def count(self, vector):
        return struct.unpack("<I", self.read(COUNTS + 4 * vector, 4))[0]

    def irq_line(self, gsi, level):
        """KVM_IRQ_LINE_STATUS: what became of it."""
        result, data = self.vm_ioctl(K.KVM_IRQ_LINE_STATUS, 1, struct.pack("<II", gsi, level))
        assert result == 0
        return struct.unpack("<iI", data)[0]

    def msi(self, vector, dest=0, data=0, low=0):
        message = struct.pack("<IIIII12x", 0xFEE00000 | dest << 12 | low, 0, vector | data, 0, 0)
        return self.vm_ioctl(K.KVM_SIGNAL_MSI, 1, message)[0]

    def halted(self, index=0):
        return self.vm.vcpus[index].arch.mp_state == 3

    def start(self, index=0):
        return Running(self, index)

    def run_within(self, seconds=10, index=0):
        """KVM_RUN that has to come back by itself."""
        running = self.start(index)
        try:
            return running.wait(seconds)
        finally:
            running.stop()

    @contextlib.contextmanager
    def others(self, count):
        """vCPUs from 1 on run meanwhile."""
        running = [Running(self, i, again=True) for i in range(1, count)]
        try:
            yield
        finally:
            for r in running:
                r.stop()


class Running:
    """KVM_RUN of one vCPU in a thread of its own; ``again``: after every -EAGAIN, too."""

    def __init__(self, machine, index, again=False):
        self.machine, self.result, self._stopped = machine, None, False
        self.req = Req(VCPU_INODE + index, K.KVM_RUN, tid=index + 1)
        self._vcpu, self._again = machine.vm.vcpus[index], again
        self.thread = threading.Thread(target=self._run, daemon=True)
        self.thread.start()

    def _run(self):
        while True:
            try:
                self.result = self.machine.dispatch.ioctl(self.req)
            except OSError as e:
                self.result = -e.errno
            if not self._again or self.result != -11 or self._stopped:
                return

    def wait(self, seconds=10):
        self.thread.join(seconds)
        assert not self.thread.is_alive(), "KVM_RUN does not come back"
        return self.result

    @property
    def waits(self):
        return self.thread.is_alive()

    def stop(self):
        """As a signal does."""
        self._stopped = self.req.interrupted = True
        self._vcpu.kick()
        return self.wait(10)


def _with_deadline(entry):
    raw = bytearray(entry.pack())
    if entry.function == 1:
        raw[20:24] = struct.pack("<I", entry.ecx | TSC_DEADLINE)
    return bytes(raw)


def eventually(condition, seconds=10):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it does not happen"
        time.sleep(0.002)


DONE = "mov al, 1; out 0xf4, al\n"
