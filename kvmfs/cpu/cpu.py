# SPDX-License-Identifier: GPL-2.0-or-later
"""One vCPU: its state, its events, and running it until something needs the machine.

Numbers follow AMD's APM volume 2 (SVM): exit codes, segment attributes, intercepts. After an exit the guest's state is simply
there; nothing has to be copied. How each exit leaves the registers is written at :class:`Cpu.run`.

EFER is not passed through (as the SYSCALL MSRs are): its SVME bit must stay set in the engine and must not be seen by the
guest, so RDMSR and WRMSR of it exit and :attr:`Cpu.efer` hides the bit. The debug registers are state only; which breakpoints
are in force is said with :meth:`Cpu.set_breakpoints`, therefore MOV to DR7 exits (0x37).
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterable, Sequence
from struct import Struct
from typing import Final, NamedTuple

from kvmfs.cpu.fields import StateFields
from kvmfs.cpu.layout import CpuState, ExitInfo, VcpuInfo

EXIT_NONE: Final = 0
EXIT_SVM: Final = 1
EXIT_IO_IN: Final = 2
EXIT_IO_OUT: Final = 3
EXIT_MMIO_READ: Final = 4
EXIT_MMIO_WRITE: Final = 5
EXIT_FETCH: Final = 6
EXIT_UNKNOWN: Final = 7

_GPRS: Final = Struct("<16Q")
_RESET_INTERCEPTS: Final = (
    15,  # RDPMC
    18,  # CPUID
    19,  # RSM
    24,  # HLT
    26,  # INVLPGA
    28,  # MSR
    31,  # SHUTDOWN
    *range(32, 39),  # VMRUN VMMCALL VMLOAD VMSAVE STGI CLGI SKINIT
    42,  # MONITOR
    43,  # MWAIT
)
# Numbers of 32 bits with, each, two bits in the permission map; APM 15.11
_MSR_RANGES: Final = ((0, 0x2000, 0), (0xC0000000, 0xC0002000, 0x2000), (0xC0010000, 0xC0012000, 0x4000))
_PASSED_MSRS: Final = (
    0x174, 0x175, 0x176,  # SYSENTER_CS _ESP _EIP
    0x277,  # PAT
    0xC0000081, 0xC0000082, 0xC0000083, 0xC0000084,  # STAR LSTAR CSTAR FMASK
    0xC0000100, 0xC0000101, 0xC0000102, 0xC0000103,  # FS_BASE GS_BASE KERNEL_GS_BASE TSC_AUX
)  # fmt: skip
_CS, _LDTR, _TR = 1, 6, 7
# ctypes takes 60 ns and more for a field, struct 100 for several: where the fields are that each exit reads.
def _offset(struct: type[ctypes.Structure], field: str) -> int:
    at: int = getattr(struct, field).offset
    return at


_PORT_AT: Final = _offset(ExitInfo, "port")
_RFLAGS_AT: Final = _offset(CpuState, "rflags")
_TPR_AT: Final = _offset(CpuState, "v_tpr")
_INTR_AT: Final = _offset(VcpuInfo, "intr_vector") // 4
_EXC_AT: Final = _offset(VcpuInfo, "exc_vector") // 4
_SUSPECT_AT: Final = _offset(VcpuInfo, "suspect") // 4
_IO_EXIT: Final = Struct("<4I").unpack_from
_FLAGS: Final = Struct(f"<Q{_offset(CpuState, 'hflags') - _RFLAGS_AT - 8}xI").unpack_from
_SEGMENT: Final = Struct("<I4xQII").iter_unpack  # SegmentState
_SEGMENTS_AT: Final = _offset(CpuState, "segs")
_TABLES_AT: Final = _offset(CpuState, "gdt")  # the IDT and the control registers follow
_TABLES: Final = Struct("<8xQI4x8xQI4x5Q").unpack_from
_MASK64: Final = (1 << 64) - 1
_HF2_GIF, _HF2_NMI, _HF2_VINTR_MASKING = 1, 4, 8


_PDPTRS = 0x3000            # behind the VMCB: native.h


class Injection(NamedTuple):
    """An event that was given and is not delivered yet. kind: "interrupt", "nmi", "exception" or "soft"."""

    kind: str
    vector: int
    error_code: int | None


class Cpu(StateFields):
    """One vCPU. Everything but :meth:`kick` is for one thread at a time, while the vCPU does not run."""

    def __init__(self, lib: ctypes.CDLL, pointer: int, index: int, engine: object) -> None:
        """For :meth:`Engine.create_cpu` only."""
        self._engine = engine  # owns the memory at pointer
        self.index = index
        self._lib = lib
        self._ptr = ctypes.c_void_p(pointer)
        self._info = VcpuInfo.from_address(pointer)
        self._has_error_code = False
        self._tsc_ratio, self._tsc_frac_bits = 1, 0
        self.exit = self._info.exit
        self.data = memoryview(self.exit.data).cast("B")
        self._io_view = memoryview(self.exit).cast("B")
        self._ints = memoryview(self._info).cast("B").cast("i")
        self._nv_run: Callable[[ctypes.c_void_p], int] = lib.nv_run
        self._nv_complete: Callable[[ctypes.c_void_p], int] = lib.nv_complete
        self.rebind()
        self.reset()

    def rebind(self) -> None:
        """Look where the state lives now (it moves once, when the engine gets its second vCPU)."""
        self._s = CpuState.from_address(self._info.home)
        self._state = memoryview(self._s).cast("B")

    def reset(self) -> None:
        """The state after RESET (SDM volume 3, table 11-1) with the default intercepts. No event is pending."""
        s = self._s
        ctypes.memset(ctypes.addressof(s), 0, ctypes.sizeof(s))
        for i in range(8):
            self.set_segment(i, 0, 0, 0xFFFF, {_LDTR: 0x082, _TR: 0x08B}.get(i, 0x093))
        self.set_segment(_CS, 0xF000, 0xFFFF0000, 0xFFFF, 0x09B)
        s.gdt.limit = s.idt.limit = 0xFFFF
        s.rip = 0xFFF0
        s.rflags = 2
        s.cr[0] = 0x60000010
        s.dr[6] = 0xFFFF0FF0
        s.dr[7] = 0x400
        s.a20_mask = -1
        s.efer = 1 << 12
        s.pat = 0x0007040600070406
        s.xcr0 = 1
        s.hflags2 = _HF2_GIF | _HF2_VINTR_MASKING
        s.old_exception = -1
        s.vm_vmcb = self._info.vmcb_gpa
        fx = bytearray(512)
        fx[0:2] = (0x37F).to_bytes(2, "little")
        fx[24:28] = (0x1F80).to_bytes(4, "little")
        self.fxrstor(bytes(fx))
        self.cancel_injection()
        self.set_intercept(*_RESET_INTERCEPTS)
        self.set_exception_intercepts(0)
        s.intercept_dr_write = 0x80
        for msr in _PASSED_MSRS:
            self.msr_passthrough(msr, True, True)
        self.commit_state()

    # --- running ---

    def run(self) -> int:
        """Enter the guest (after completing what the last exit left open) until something happens; the kind of exit.

        - EXIT_NONE: kicked. The guest may have run.
        - EXIT_SVM: ``exit.code``, ``info1``, ``info2``; rip is at the instruction (traps: after it). VMCALL is 0x81 with
          info1 = 1. A page fault that is intercepted has its address in info2 and leaves CR2.
        - EXIT_IO_IN, EXIT_IO_OUT: ``exit.port``, ``size`` (1, 2, 4), ``count``, ``string``; :attr:`data` holds what OUT writes,
          and takes count * size bytes before IN is completed. rip is at the instruction, except that OUTS is done, one element
          an exit.
        - EXIT_MMIO_READ: ``exit.gpa``, ``size`` (at most 8, within a page); put the bytes into :attr:`data`. Nothing changed yet.
        - EXIT_MMIO_WRITE: the same with what was written; the instruction is completed. More may come before the guest runs.
        - EXIT_FETCH: ``exit.gpa`` is executed and is no memory.
        - EXIT_UNKNOWN: an instruction that Linux's emulator does not know accesses MMIO at ``exit.gpa``; info1: it writes.
        """
        return self._nv_run(self._ptr)

    @property
    def address(self) -> int:
        """Of the native struct Vcpu."""
        return self._ptr.value or 0

    @property
    def entry_points(self) -> tuple[ctypes.c_void_p, ...]:
        """The native functions behind run, complete, kick and skip_instruction, for other native code."""
        lib = self._lib
        return tuple(ctypes.cast(f, ctypes.c_void_p) for f in (lib.nv_run, lib.nv_complete, lib.nv_kick, lib.nv_skip))

    def io_exit(self) -> tuple[int, int, int, int]:
        """(port, size, count, string) of EXIT_IO_IN and EXIT_IO_OUT at once."""
        return _IO_EXIT(self._io_view, _PORT_AT)

    def run_state(self) -> tuple[bool, int, int]:
        """(:attr:`interrupt_allowed`, IF, :attr:`cr8`) at once: every return to the client shows them."""
        state = self._state
        rflags, hflags = _FLAGS(state, _RFLAGS_AT)
        if not rflags & 0x200:
            return False, 0, state[_TPR_AT] & 15
        ints = self._ints
        return not hflags & 8 and ints[_INTR_AT] < 0 and ints[_EXC_AT] < 0, 1, state[_TPR_AT] & 15

    def segments(self) -> list[tuple[int, int, int, int]]:
        """:meth:`segment` of all eight at once."""
        found = [
            (selector, base, limit, flags >> 8 & 0xFF | flags >> 12 & 0xF00)
            for selector, base, limit, flags in _SEGMENT(self._state[_SEGMENTS_AT:_TABLES_AT])
        ]
        found[_TR] = self.segment(_TR)
        return found

    def tables_and_crs(self) -> tuple[int, ...]:
        """Base and limit of the GDT, the same of the IDT, CR0 to CR4 (CR1 is 0), at once."""
        return _TABLES(self._state, _TABLES_AT)

    def complete_io_in(self, data: bytes | bytearray | memoryview) -> int:
        """IN or INS gets its data (count * size bytes). 0, or the kind of a further exit (INS into MMIO)."""
        self.data[: len(data)] = data
        return self._nv_complete(self._ptr)

    def complete_io_out(self) -> int:
        """OUT is over. 0, or EXIT_SVM when a single-step trap is intercepted."""
        return self._nv_complete(self._ptr)

    def complete_mmio_read(self, data: bytes | bytearray | memoryview) -> int:
        """The read gets its bytes. 0 when the instruction is completed, or the kind of its next exit."""
        self.data[: len(data)] = data
        return self._nv_complete(self._ptr)

    def complete(self) -> int:
        """Complete what is open with what :attr:`data` holds, without entering the guest. 0, or a further exit."""
        return self._nv_complete(self._ptr)

    def open_ring(self, address: int, entries: int, soft_limit: int) -> ctypes.Array[ctypes.c_uint32]:
        """From now on a page of a logged slot that becomes dirty is told in the ring (struct kvm_dirty_gfn) at that address, too.

        Left with EXIT_NONE at soft_limit entries. Returns two counters, live: entries written; entries reset, which
        the caller counts.
        """
        return (ctypes.c_uint32 * 2).from_address(self._lib.nv_ring_open(self._ptr, address, entries, soft_limit))

    def ring_push(self, bitmap: int, slot: int, page: int, count: int) -> None:
        """The machine has written pages on behalf of this vCPU, which is not in its guest."""
        self._lib.nv_ring_push(self._ptr, bitmap, slot, page, count)

    def forget_io(self) -> None:
        """Drop what the last I/O exit left open: the guest will be elsewhere."""
        self._info.pend = 0

    def host_tsc(self) -> int:
        """The host's time stamp counter now."""
        value: int = self._lib.nv_host_tsc()
        return value

    def guest_tsc(self, host_tsc: int | None = None) -> int:
        """The guest's time stamp counter when the host's is ``host_tsc``, or now."""
        return self.scale_tsc(self.host_tsc() if host_tsc is None else host_tsc) + self._s.tsc_offset & _MASK64

    def scale_tsc(self, cycles: int) -> int:
        """How far the guest's TSC comes in that many cycles of the host's (``kvm_scale_tsc``)."""
        return cycles * self._tsc_ratio >> self._tsc_frac_bits & _MASK64

    def unscale_tsc(self, cycles: int) -> int:
        """How many cycles of the host's TSC that many of the guest's take."""
        return (cycles << self._tsc_frac_bits) // self._tsc_ratio

    def set_tsc_ratio(self, ratio: int, frac_bits: int) -> None:
        """TSC scaling: the guest's TSC counts ``ratio`` / 2**``frac_bits`` times as fast as the host's; ``ratio`` is u64, not 0."""
        self._lib.nv_scale_tsc(self._ptr, ratio, frac_bits)
        self._tsc_ratio, self._tsc_frac_bits = ratio, frac_bits

    @property
    def completion_pending(self) -> bool:
        """Whether the last I/O exit is still to be completed."""
        return self._info.pend != 0

    def skip_instruction(self, length: int) -> None:
        """Step over the instruction at rip: interrupt shadow and RF end. A single-step trap is the caller's."""
        self._lib.nv_skip(self._ptr, length)

    def insn_bytes(self, count: int = 15) -> bytes:
        """Up to count bytes at cs:rip; fewer where memory ends."""
        buffer = ctypes.create_string_buffer(count)
        got: int = self._lib.nv_insn_bytes(self._ptr, buffer, count)
        return buffer.raw[:got]

    def translate(self, address: int) -> int | None:
        """The guest physical address of a linear one by the guest's page tables, None when it is not present."""
        gpa: int = self._lib.nv_translate(self._ptr, address)
        return None if gpa == (1 << 64) - 1 else gpa

    def kick(self) -> None:
        """From any thread: the run that is going on, or the next one, returns EXIT_NONE soon. Never lost."""
        self._lib.nv_kick(self._ptr)

    def flush_tlb(self) -> None:
        """From any thread: the next entry starts with an empty TLB."""
        self._info.flush = 1

    def suspect_code(self) -> None:
        """Others may have written guest memory since this vCPU ran: code is compared before it is executed again.

        Interrupts and NMIs imply it. Not needed for what :meth:`Engine.invalidate` was told.
        """
        self._ints[_SUSPECT_AT] = 1

    @property
    def waited(self) -> int:
        """Nanoseconds that it was ready to run while other vCPUs had the engine."""
        return self._info.waited

    @property
    def guest_cycles(self) -> int:
        """Cycles of the host's TSC that it has been in its guest, until now.  Any thread may ask."""
        info = self._info
        while True:
            before, since = info.guest_cycles, info.guest_since
            now = self.host_tsc()
            if info.guest_cycles == before:
                return before + max(now - since, 0) if since else before

    def tell_preemption(self, gpa: int) -> None:
        """While others have the engine the byte at gpa is 1 (KVM_VCPU_PREEMPTED); the guest may add 2: flush the TLB then.

        gpa: guest memory that can be written, 0: nowhere. It is forgotten when that memory goes."""
        self._info.preempted_gpa = gpa

    def clear_kick(self) -> None:
        """Forget a kick that has not ended a run yet."""
        self._info.kick = 0

    # --- events ---

    def inject_interrupt(self, vector: int) -> None:
        """Deliver an external interrupt at the next entry (or, when it is not allowed yet, as soon as it is)."""
        self._info.intr_vector = vector
        self._info.suspect = 1      # whoever caused it may have written memory before

    @property
    def interrupt_allowed(self) -> bool:
        """IF is set, no shadow, and no other event has to go first."""
        info, s = self._info, self._s
        return bool(s.rflags & 0x200) and not s.hflags & 8 and info.intr_vector < 0 and info.exc_vector < 0

    def set_interrupt_window(self, on: bool) -> None:
        """Exit with 0x64 as soon as an interrupt could be delivered, after one that is being injected. One exit each."""
        self._info.window = on

    def inject_nmi(self) -> None:
        """Deliver an NMI at the next entry, or when the guest's IRET ends NMI blocking."""
        self._info.nmi = 1
        self._info.suspect = 1

    def inject_exception(self, vector: int, error_code: int | None = None, *, soft: bool = False, length: int = 0) -> None:
        """Deliver an exception before the next instruction, with double-fault rules; CR2 is the caller's.

        error_code matters for the vectors that push one. soft: an INT n, INT3 or INTO, whose rip is already after it,
        or has yet to go ``length`` bytes further for the frame.
        """
        info = self._info
        info.exc_vector = vector
        info.exc_error = error_code or 0
        info.exc_soft = 1 + length if soft else 0
        self._has_error_code = error_code is not None

    def pending_injection(self) -> list[Injection]:
        """What was given and not delivered, in the order in which it would be."""
        info = self._info
        found = []
        if info.exc_vector >= 0:
            code = info.exc_error if self._has_error_code else None
            found.append(Injection("soft" if info.exc_soft else "exception", info.exc_vector, code))
        if info.nmi:
            found.append(Injection("nmi", 2, None))
        if info.intr_vector >= 0:
            found.append(Injection("interrupt", info.intr_vector, None))
        return found

    def cancel_injection(self) -> None:
        """Take back everything that is not delivered, the interrupt window too."""
        info = self._info
        info.exc_vector = info.intr_vector = -1
        info.nmi = info.window = 0

    # --- intercepts ---

    def set_intercept(self, *bits: int) -> None:
        """Intercept exactly these; bit n is exit code 0x60 + n. HLT and SHUTDOWN stay.

        INVD and WBINVD both have bit 41 (exit 0x89)."""
        mask = 1 << 24 | 1 << 31
        for bit in bits:
            mask |= 1 << bit
        self._s.intercept = mask & ~(1 << 4)

    def set_exception_intercepts(self, mask: int) -> None:
        """Bit n: exception n exits with 0x40 + n before it is delivered (info1: its error code)."""
        self._info.ud_exits = mask >> 6 & 1
        self._s.intercept_exceptions = mask | 1 << 6

    def set_register_intercepts(self, *, cr_read: int = 0, cr_write: int = 0, dr_read: int = 0, dr_write: int = 0x80) -> None:
        """Bit n: MOV from or to CRn (exit codes 0x00, 0x10 + n), DRn (0x20, 0x30 + n). DR7 writes must exit."""
        s = self._s
        s.intercept_cr_read, s.intercept_cr_write = cr_read, cr_write
        s.intercept_dr_read, s.intercept_dr_write = dr_read, dr_write | 0x80

    def set_pdptrs(self, pdptrs: tuple[int, ...] | None) -> None:
        """PAE paging uses these four instead of those in memory until CR3 is another or this is called with None.

        MOV to CR3 exits meanwhile (exit code 0x13): whoever handles it loads them from memory.
        """
        s, info = self._s, self._info
        info.own_pdptrs = pdptrs is not None
        if pdptrs is None:
            s.intercept_cr_write &= ~(1 << 3)
        else:
            (ctypes.c_uint64 * 4).from_address(info.vmcb + _PDPTRS)[:] = list(pdptrs)
            info.pdptrs_cr3 = s.cr[3]
            s.intercept_cr_write |= 1 << 3
        info.flush = 1

    def set_dr_intercepts(self, read: int, write: int) -> None:
        """Bit n: MOV from or to DRn exits (0x20, 0x30 + n). DR7 writes do always."""
        self._s.intercept_dr_read, self._s.intercept_dr_write = read, write | 0x80

    def set_breakpoints(self, dr7: int, addresses: Sequence[int]) -> None:
        """The breakpoints in force: four linear addresses, and what they are for as in DR7 (I/O breakpoints never hit).

        A hit leaves with exit.code 0x41 whatever is intercepted, and info2 is its cause as bits of DR6. An execution
        breakpoint stops at its instruction and sets RF, with which the next run goes on; a data breakpoint stops after.
        With #DB intercepted (set_exception_intercepts) DR6 reads as 0xffff0ff0 in the guest, and no #DB changes :meth:`dr`.
        """
        info = self._info
        dr7 &= 0xFFFFFFFF
        if info.bp_dr7 == dr7 and info.bp[:] == list(addresses):
            return
        info.bp_dr7 = dr7
        for i, address in enumerate(addresses):
            info.bp[i] = address
        info.flush = 1  # pages with data breakpoints have TLB entries of their own

    def msr_passthrough(self, msr: int, read: bool, write: bool) -> None:
        """Whether RDMSR / WRMSR of an MSR that the engine has go without exit. ValueError: outside the map's ranges."""
        for low, high, at in _MSR_RANGES:
            if low <= msr < high:
                bit = 2 * (msr - low + at)
                byte = ctypes.c_uint8.from_address(self._info.vmcb + 0x1000 + bit // 8)
                byte.value = byte.value & ~(3 << bit % 8) | ((not read) | (not write) << 1) << bit % 8
                return
        raise ValueError(f"MSR {msr:#x}")

    # --- registers ---

    def get_gprs(self) -> tuple[int, ...]:
        """rax rcx rdx rbx rsp rbp rsi rdi r8 … r15."""
        return _GPRS.unpack_from(self._s)

    def set_gprs(self, values: Sequence[int] | Iterable[int]) -> None:
        """All 16, in the order of :meth:`get_gprs`."""
        _GPRS.pack_into(self._s, 0, *values)

    def fxsave(self) -> bytes:
        """x87 and SSE state as FXSAVE64 writes it (512 bytes)."""
        buffer = ctypes.create_string_buffer(512)
        self._lib.nv_fxsave(self._ptr, buffer)
        return buffer.raw

    def fxrstor(self, image: bytes) -> None:
        """The reverse of :meth:`fxsave`. ValueError: not 512 bytes."""
        if len(image) != 512:
            raise ValueError("an FXSAVE image has 512 bytes")
        self._lib.nv_fxrstor(self._ptr, image)

    def commit_state(self) -> None:
        """After CRn, EFER or segments were set: make the engine's derived state fit and drop the TLB at the next entry."""
        self._lib.nv_commit(self._ptr)

    @property
    def nmi_masked(self) -> bool:
        """NMIs are blocked until IRET."""
        return bool(self._s.hflags2 & _HF2_NMI)

    @nmi_masked.setter
    def nmi_masked(self, masked: bool) -> None:
        self._s.hflags2 = self._s.hflags2 & ~_HF2_NMI | (_HF2_NMI if masked else 0)
