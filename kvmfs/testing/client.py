# SPDX-License-Identifier: GPL-2.0-or-later
"""A KVM client in Python: one class for each kind of descriptor (Linux: Documentation/virt/kvm/api.rst).

What has no method here is one call away: ``vm.ioctl("KVM_GET_CLOCK", clock := KvmClockData())``, with the structs of
:mod:`kvmfs.abi.structs`.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import mmap
import os
import weakref
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Final, Self, TypeVar

from kvmfs.abi import caps, exits, structs
from kvmfs.abi.ioctls import BY_NAME

PAGE: Final = mmap.PAGESIZE
EXIT_NAMES: Final[dict[int, str]] = {
    value: name.removeprefix("KVM_EXIT_") for name, value in vars(exits).items()
    if name.startswith("KVM_EXIT_") and not name.startswith(("KVM_EXIT_IO_", "KVM_EXIT_HYPERV_", "KVM_EXIT_XEN_"))}
_REASONS: Final = {name: value for value, name in EXIT_NAMES.items()}

# Intel needs three pages for real mode where no slot is.  fcntl.ioctl takes no number from 2 GiB up.
TSS_ADDRESS: Final = 0x7FFBD000
_MAX_CPUID: Final = 256
_CR0_PE, _CR0_LONG, _CR4_LONG, _EFER_LONG = 0x1, 0x80010031, 0x220, 0x500      # PG WP NE ET PE; OSFXSR PAE; LMA LME
_CODE_32: Final = {"limit": 0xFFFFFFFF, "selector": 0x8, "type": 11, "present": 1, "s": 1, "db": 1, "g": 1}
_DATA: Final = {"limit": 0xFFFFFFFF, "selector": 0x10, "type": 3, "present": 1, "s": 1, "db": 1, "g": 1}
_DATA_SEGMENTS: Final = ("ds", "es", "fs", "gs", "ss")
_PRESENT_WRITABLE, _LARGE = 3, 0x80

S = TypeVar("S", bound=ctypes.Structure)
Argument = int | ctypes.Structure | bytearray


class KvmCallError(OSError):
    """An ioctl failed: ``errno`` says how, ``call`` which one."""

    def __init__(self, code: int, call: str) -> None:
        super().__init__(code, f"{call}: {os.strerror(code)}")
        self.call = call


class Descriptor:
    """A descriptor that answers ioctls; closed by ``close()``, at the end of a ``with`` block, or with the object."""

    def __init__(self, fd: int) -> None:
        self.fd = fd
        self._closer = weakref.finalize(self, os.close, fd)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """Close the descriptor; twice does no harm."""
        self._closer()

    def ioctl(self, call: str | int, argument: Argument = 0) -> int:
        """Issue an ioctl, by its name or number, with a number or a struct that it reads or fills; returns its result.

        Raises KvmCallError.
        """
        number = BY_NAME[call].number if isinstance(call, str) else call
        try:
            return fcntl.ioctl(self.fd, number, argument)
        except OSError as error:
            raise KvmCallError(error.errno or errno.EIO, call if isinstance(call, str) else f"{call:#x}") from None

    def check_extension(self, capability: str | int) -> int:
        """0: no such capability; else 1, or what its documentation says.  ``"KVM_CAP_IRQCHIP"`` or its number."""
        return self.ioctl("KVM_CHECK_EXTENSION", caps.CAPS[capability] if isinstance(capability, str) else capability)

    def enable_cap(self, capability: str | int, *args: int, flags: int = 0) -> int:
        """KVM_ENABLE_CAP with up to four arguments."""
        number = caps.CAPS[capability] if isinstance(capability, str) else capability
        return self.ioctl("KVM_ENABLE_CAP", structs.KvmEnableCap(cap=number, flags=flags, args=args))


class Kvm(Descriptor):
    """The node: what KVM can do, and new VMs.

    Raises OSError when it cannot be opened, RuntimeError when it is no KVM of version 12.
    """

    def __init__(self, node: str | os.PathLike[str] = "/dev/kvm") -> None:
        super().__init__(os.open(node, os.O_RDWR | os.O_CLOEXEC))
        self.node = os.fspath(node)
        try:
            version = self.ioctl("KVM_GET_API_VERSION")
        except KvmCallError as error:
            self.close()
            raise RuntimeError(f"{node} is no KVM: {error}") from error
        if version != exits.KVM_API_VERSION:
            self.close()
            raise RuntimeError(f"{node}: KVM's API version is {version}, not {exits.KVM_API_VERSION}")

    def supported_cpuid(self) -> list[structs.KvmCpuidEntry2]:
        """All that guests may be shown."""
        return _counted(self, "KVM_GET_SUPPORTED_CPUID", structs.KvmCpuid2, "nent", structs.KvmCpuidEntry2, _MAX_CPUID)

    def create_vm(self, kind: int = 0) -> Vm:
        """A new VM, without memory and vCPUs."""
        vm = Vm(self, self.ioctl("KVM_CREATE_VM", kind))
        vm.ioctl("KVM_SET_TSS_ADDR", TSS_ADDRESS)
        return vm


@dataclass(slots=True)
class _Slot:
    gpa: int
    memory: mmap.mmap


class Vm(Descriptor):
    """A VM: its memory, interrupt controllers and vCPUs."""

    def __init__(self, kvm: Kvm, fd: int) -> None:
        super().__init__(fd)
        self.kvm = kvm
        self.vcpus: list[Vcpu] = []
        self._slots: dict[int, _Slot] = {}

    def close(self) -> None:
        """Close the vCPUs too."""
        for vcpu in self.vcpus:
            vcpu.close()
        super().close()

    # ---- memory -------------------------------------------------------------------------------------

    def add_memory(self, gpa: int, size: int, *, slot: int | None = None, flags: int = 0) -> mmap.mmap:
        """Give the guest ``size`` bytes of memory at ``gpa`` (both multiples of 4,096); returns that memory."""
        number = slot if slot is not None else next(n for n in range(len(self._slots) + 1) if n not in self._slots)
        memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
        self.ioctl("KVM_SET_USER_MEMORY_REGION", structs.KvmUserspaceMemoryRegion(
            slot=number, flags=flags, guest_phys_addr=gpa, memory_size=size, userspace_addr=address))
        self._slots[number] = _Slot(gpa, memory)
        return memory

    def remove_memory(self, slot: int) -> None:
        """Take a slot away: accesses to it become exits."""
        self.ioctl("KVM_SET_USER_MEMORY_REGION", structs.KvmUserspaceMemoryRegion(
            slot=slot, guest_phys_addr=self._slots[slot].gpa))
        del self._slots[slot]

    def read(self, gpa: int, size: int) -> bytes:
        """Guest memory; IndexError where there is none."""
        memory, at = self._find(gpa, size)
        return memory[at:at + size]

    def write(self, gpa: int, data: bytes) -> None:
        """Change guest memory; IndexError where there is none."""
        memory, at = self._find(gpa, len(data))
        memory[at:at + len(data)] = data

    def _find(self, gpa: int, size: int) -> tuple[mmap.mmap, int]:
        for slot in self._slots.values():
            if slot.gpa <= gpa and gpa + size <= slot.gpa + len(slot.memory):
                return slot.memory, gpa - slot.gpa
        raise IndexError(f"no slot holds {size} bytes at {gpa:#x}")

    # ---- vCPUs and interrupts -----------------------------------------------------------------------

    def create_vcpu(self, index: int | None = None, *, cpuid: Iterable[structs.KvmCpuidEntry2] | None = None) -> Vcpu:
        """A vCPU in the state after reset, which is shown ``cpuid`` (None: all that is supported)."""
        number = len(self.vcpus) if index is None else index
        vcpu = Vcpu(self, self.ioctl("KVM_CREATE_VCPU", number), number)
        vcpu.set_cpuid(self.kvm.supported_cpuid() if cpuid is None else cpuid)
        self.vcpus.append(vcpu)
        return vcpu

    def create_irqchip(self) -> None:
        """PICs, I/O APIC and local APICs in the kernel; before the first vCPU."""
        self.ioctl("KVM_CREATE_IRQCHIP")

    def irq_line(self, gsi: int, level: int) -> None:
        """Set the level of an interrupt line."""
        self.ioctl("KVM_IRQ_LINE", structs.KvmIrqLevel(irq=gsi, level=level))


@dataclass(frozen=True, slots=True)
class Exit:
    """One return of KVM_RUN: what of kvm_run matters, copied.

    ``data`` is what the guest wrote; for a read (IO in, MMIO read) ``size`` says how many bytes it wants.
    ``address`` is the port or the guest physical address.
    """

    reason: int
    address: int = 0
    size: int = 0
    write: bool = False
    data: bytes = b""

    @property
    def name(self) -> str:
        """The reason's name without KVM_EXIT_."""
        return EXIT_NAMES.get(self.reason, str(self.reason))

    def __str__(self) -> str:
        if self.reason in (exits.KVM_EXIT_IO, exits.KVM_EXIT_MMIO):
            what = f"write {self.data.hex(' ')}" if self.write else f"read {self.size}"
            return f"{self.name} {self.address:#x} {what}"
        return self.name


class Exits(list[Exit]):
    """The exits of a run, in order."""

    def written(self, address: int) -> bytes:
        """All that the guest wrote to this port or address."""
        return b"".join(one.data for one in self if one.write and one.address == address)


class Vcpu(Descriptor):
    """A vCPU: registers, and the guest's execution.  ``state`` is kvm_run, shared with KVM."""

    def __init__(self, vm: Vm, fd: int, index: int) -> None:
        super().__init__(fd)
        self.vm, self.index = vm, index
        self._map = mmap.mmap(fd, vm.kvm.ioctl("KVM_GET_VCPU_MMAP_SIZE"))
        self.state = structs.KvmRun.from_buffer(self._map)

    def close(self) -> None:
        """Unmap kvm_run too."""
        self.state = structs.KvmRun()
        try:
            self._map.close()
        except BufferError:         # somebody still holds a part of it; the mapping ends with that
            pass
        super().close()

    # ---- state --------------------------------------------------------------------------------------

    @property
    def regs(self) -> structs.KvmRegs:
        """The general registers, as they are now: change them and assign them back."""
        return self._get("KVM_GET_REGS", structs.KvmRegs())

    @regs.setter
    def regs(self, regs: structs.KvmRegs) -> None:
        self.ioctl("KVM_SET_REGS", regs)

    @property
    def sregs(self) -> structs.KvmSregs:
        """Segments, control registers, EFER: change them and assign them back."""
        return self._get("KVM_GET_SREGS", structs.KvmSregs())

    @sregs.setter
    def sregs(self, sregs: structs.KvmSregs) -> None:
        self.ioctl("KVM_SET_SREGS", sregs)

    @property
    def events(self) -> structs.KvmVcpuEvents:
        """Pending and injected exceptions, interrupts and NMIs."""
        return self._get("KVM_GET_VCPU_EVENTS", structs.KvmVcpuEvents())

    @events.setter
    def events(self, events: structs.KvmVcpuEvents) -> None:
        self.ioctl("KVM_SET_VCPU_EVENTS", events)

    def _get(self, call: str, struct: S) -> S:
        self.ioctl(call, struct)
        return struct

    def set_cpuid(self, entries: Iterable[structs.KvmCpuidEntry2]) -> None:
        """What CPUID shows the guest."""
        self.ioctl("KVM_SET_CPUID2", _with_array(structs.KvmCpuid2, "nent", structs.KvmCpuidEntry2, list(entries)))

    def get_msr(self, index: int) -> int:
        """An MSR's value.  KvmCallError with ENOENT when there is no such MSR."""
        buffer = _with_array(structs.KvmMsrs, "nmsrs", structs.KvmMsrEntry, [structs.KvmMsrEntry(index=index)])
        if self.ioctl("KVM_GET_MSRS", buffer) != 1:
            raise KvmCallError(errno.ENOENT, f"KVM_GET_MSRS {index:#x}")
        return structs.KvmMsrEntry.from_buffer(buffer, ctypes.sizeof(structs.KvmMsrs)).data

    def set_msr(self, index: int, value: int) -> None:
        """Set an MSR.  KvmCallError with ENOENT when there is none, or it does not take the value."""
        buffer = _with_array(structs.KvmMsrs, "nmsrs", structs.KvmMsrEntry, [structs.KvmMsrEntry(index=index, data=value)])
        if self.ioctl("KVM_SET_MSRS", buffer) != 1:
            raise KvmCallError(errno.ENOENT, f"KVM_SET_MSRS {index:#x}")

    def set_real_mode(self, *, start: int, stack: int = 0x1000) -> None:
        """16 bits, all segment bases 0."""
        sregs = self.sregs
        sregs.cs.selector = sregs.cs.base = 0
        self.sregs = sregs
        self.regs = structs.KvmRegs(rip=start, rsp=stack, rflags=2)

    def set_protected_mode(self, *, start: int, stack: int = 0x1000) -> None:
        """32 bits, flat segments, no paging."""
        sregs = self.sregs
        sregs.cs = structs.KvmSegment(**_CODE_32)
        for name in _DATA_SEGMENTS:
            setattr(sregs, name, structs.KvmSegment(**_DATA))
        sregs.cr0 |= _CR0_PE
        self.sregs = sregs
        self.regs = structs.KvmRegs(rip=start, rsp=stack, rflags=2)

    def set_long_mode(self, *, start: int, stack: int = 0x1000, tables: int) -> None:
        """64 bits; three pages of guest memory at ``tables`` map the first GiB one to one in pages of 2 MiB."""
        for level, entry in enumerate((tables + PAGE, tables + 2 * PAGE)):
            self.vm.write(tables + level * PAGE, (entry | _PRESENT_WRITABLE).to_bytes(8, "little"))
        large = b"".join((page << 21 | _LARGE | _PRESENT_WRITABLE).to_bytes(8, "little") for page in range(512))
        self.vm.write(tables + 2 * PAGE, large)
        sregs = self.sregs
        sregs.cs = structs.KvmSegment(**{**_CODE_32, "db": 0, "l": 1})
        for name in _DATA_SEGMENTS:
            setattr(sregs, name, structs.KvmSegment(**_DATA))
        sregs.cr0, sregs.cr3, sregs.cr4, sregs.efer = _CR0_LONG, tables, _CR4_LONG, _EFER_LONG
        self.sregs = sregs
        self.regs = structs.KvmRegs(rip=start, rsp=stack, rflags=2)

    # ---- running ------------------------------------------------------------------------------------

    def interrupt(self, vector: int) -> None:
        """Inject an interrupt (without interrupt controllers in the kernel), when ``ready_for_interrupt_injection``."""
        self.ioctl("KVM_INTERRUPT", structs.KvmInterrupt(irq=vector))

    def nmi(self) -> None:
        """Inject an NMI."""
        self.ioctl("KVM_NMI")

    def run(self) -> Exit:
        """KVM_RUN once.  KvmCallError: EINTR after a signal; what api.rst says."""
        self.ioctl("KVM_RUN")
        state = self.state
        if state.exit_reason == exits.KVM_EXIT_IO:
            io = state.io
            write = io.direction == exits.KVM_EXIT_IO_OUT
            return Exit(exits.KVM_EXIT_IO, io.port, io.size * io.count, write, bytes(self.io_data) if write else b"")
        if state.exit_reason == exits.KVM_EXIT_MMIO:
            mmio = state.mmio
            data = bytes(mmio.data[:mmio.len]) if mmio.is_write else b""
            return Exit(exits.KVM_EXIT_MMIO, mmio.phys_addr, mmio.len, bool(mmio.is_write), data)
        return Exit(state.exit_reason)

    @property
    def io_data(self) -> memoryview:
        """At an exit IO: the bytes of all elements, from the guest (out) or for it (in)."""
        io = self.state.io
        return memoryview(self._map)[io.data_offset:io.data_offset + io.size * io.count]

    def answer(self, one: Exit, data: bytes) -> None:
        """Give the guest what the read ``one``, the last exit, returns; missing bytes are 0."""
        padded = data[:one.size].ljust(one.size, b"\0")
        if one.reason == exits.KVM_EXIT_IO:
            self.io_data[:] = padded
        else:
            self.state.mmio.data[:one.size] = list(padded)

    def run_to(self, *reasons: str, device: Callable[[Exit], bytes | None] | None = None, limit: int = 100_000) -> Exits:
        """KVM_RUN until one of ``reasons`` ("HLT", "SHUTDOWN", …); returns all exits, that one last.

        Accesses to ports and addresses on the way go to ``device``, which returns what a read gives (None, or no device: zeros).
        Raises AssertionError for another reason on the way, or after ``limit`` exits.
        """
        ends = {_REASONS[reason] for reason in reasons}
        seen = Exits()
        for _ in range(limit):
            one = self.run()
            seen.append(one)
            if one.reason in ends:
                return seen
            if one.reason not in (exits.KVM_EXIT_IO, exits.KVM_EXIT_MMIO):
                raise AssertionError(f"the guest ended with {one} at rip {self.regs.rip:#x}, not with {' or '.join(reasons)}")
            data = device(one) if device else None
            if not one.write:
                self.answer(one, data or b"")
        raise AssertionError(f"{limit} exits and no {' or '.join(reasons)}; the last was {seen[-1]}")


# ---- headers with arrays behind them ------------------------------------------------------------------------


def _with_array(header: type[ctypes.Structure], count: str, kind: type[ctypes.Structure], items: list[Any]) -> bytearray:
    head = header()
    setattr(head, count, len(items))
    return bytearray(head) + b"".join(bytes(item) for item in items)


def _counted(descriptor: Descriptor, call: str, header: type[ctypes.Structure], count: str, kind: type[S],
             room: int) -> list[S]:
    head = header()
    setattr(head, count, room)
    size = ctypes.sizeof(head)
    buffer = bytearray(head) + bytearray(room * ctypes.sizeof(kind))
    descriptor.ioctl(call, buffer)
    found: int = getattr(header.from_buffer(buffer), count)
    return [kind.from_buffer_copy(buffer, size + index * ctypes.sizeof(kind)) for index in range(found)]
