# SPDX-License-Identifier: GPL-2.0-or-later
"""One Unicorn engine: a VM's guest memory and the machine that its vCPUs take turns on.

Two engines over one memory would lose ``lock``-prefixed updates and miss each other's code changes, so a VM has one, and
its vCPUs are time-sliced on it natively: a vCPU that waits gets it after about a millisecond, whoever changes memory at once.
"""

from __future__ import annotations

import ctypes
from types import TracebackType
from typing import Any

from unicorn import UC_ARCH_X86, UC_MODE_64
from unicorn.unicorn_py3 import unicorn
from unicorn.x86_const import UC_CPU_X86_EPYC, UC_X86_INS_IN, UC_X86_INS_OUT, UC_X86_INS_SYSCALL, UC_X86_INS_SYSENTER

from kvmfs.cpu.cpu import Cpu
from kvmfs.cpu.layout import UNICORN_VERSION, LayoutError, Translation, load

_PAGE = 4096
_Uc: Any = unicorn.Uc  # its methods have no types
_LIBRARY: str = unicorn.uclib._name


class EngineLock:
    """Holds the engine: no vCPU of it runs meanwhile (the one that runs is stopped and goes on afterwards).

    Not reentrant, and not for a thread that is inside one of the engine's calls.
    """

    def __init__(self, lib: ctypes.CDLL, engine: ctypes.c_void_p) -> None:
        self._lib = lib
        self._engine = engine

    def __enter__(self) -> None:
        self._lib.nv_lock(self._engine)

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self._lib.nv_unlock(self._engine)


class Engine:
    """One per VM. Guest physical addresses have 40 bits (the engine's page walk knows no more)."""

    def __init__(self) -> None:
        """Raises LayoutError when Unicorn is not the build that this package knows, MemoryError."""
        self._lib = load()
        if self._lib.nv_prepare(_LIBRARY.encode()):
            raise LayoutError(f"{_LIBRARY} is not of the unicorn {UNICORN_VERSION} wheel: it lacks functions that kvmfs needs")
        self._uc = _Uc(UC_ARCH_X86, UC_MODE_64)
        self._uc.ctl_set_cpu_model(UC_CPU_X86_EPYC)
        # An empty exit set: else the end of emu_start walks the guest's page tables and overwrites CR2.
        self._uc.ctl_exits_enabled(True)
        self._uc.reg_read(1)  # makes Unicorn build its CPU
        handle = self._uc._uch.value
        insns = (ctypes.c_int * 4)(UC_X86_INS_SYSCALL, UC_X86_INS_SYSENTER, UC_X86_INS_IN, UC_X86_INS_OUT)
        out = ctypes.c_void_p()
        error = self._lib.nv_engine_new(_LIBRARY.encode(), handle, insns, ctypes.byref(out))
        if error == 1:
            raise LayoutError(f"{_LIBRARY} does not have the layout of the unicorn {UNICORN_VERSION} wheel")
        if error:
            raise MemoryError(f"engine: {error}")
        self._engine = out
        self.lock = EngineLock(self._lib, out)
        self.window: int = self._lib.nv_window(out)     # guest physical memory is mapped here, at window + gpa
        self.cpus: list[Cpu] = []
        self._first: Cpu | None = None
        self._regions: dict[int, tuple[int, int]] = {}

    def map(self, gpa: int, size: int, host_addr: int, *, readonly: bool = False, file: int = 0, offset: int = 0) -> None:
        """Make host memory guest memory; gpa, size and host_addr are multiples of 4096.

        It is either mapped at :attr:`window` + gpa already and stays there, or elsewhere as a shared mapping.
        A write to a readonly region is an MMIO write. Regions with overlapping ranges, from offset on, of one file (any number but
        0) are the same memory. ValueError: misaligned, overlapping, or beyond 40 bits.
        """
        if (gpa | size | host_addr) % _PAGE or not size or gpa + size > 1 << 40:
            raise ValueError(f"guest memory {gpa:#x}+{size:#x} at {host_addr:#x}")
        error = self._lib.nv_map(self._engine, gpa, size, host_addr, readonly, file, offset)
        if error:
            raise ValueError(f"guest memory {gpa:#x}+{size:#x}: refused ({error})")
        self._regions[gpa] = (size, host_addr)

    def unmap(self, gpa: int, size: int) -> None:
        """Take a region away, exactly as it was mapped. ValueError: there is none."""
        if self._regions.get(gpa, (0, 0))[0] != size:
            raise ValueError(f"no region {gpa:#x}+{size:#x}")
        error = self._lib.nv_unmap(self._engine, gpa)
        if error:
            raise ValueError(f"guest memory {gpa:#x}+{size:#x}: refused ({error})")
        del self._regions[gpa]

    def invalidate(self, gpa: int, size: int) -> None:
        """Guest memory was changed from outside the guest: translations of that range are dropped. Cheap for data pages."""
        self._lib.nv_invalidate(self._engine, gpa, size)

    def log(self, gpa: int, bitmap: int, touched: int, page: int, slot: int) -> None:
        """Every page of the region at gpa that the guest or its page walk writes sets a bit in the bitmap at that address.

        page: the bit of the region's first page; slot: what rings are told. bitmap 0: no more. touched: the address of a bitmap
        like it of the pages that the guest has come to; its first access to one that is not there sets both bits. 0: it has
        come to all of them. ValueError: there is no region.
        """
        if self._lib.nv_log(self._engine, gpa, bitmap, touched, page, slot):
            raise ValueError(f"no region at {gpa:#x}")

    def log_set(self, bitmap: int, page: int, count: int) -> None:
        """Set bits in a log's bitmap, while a guest may do so."""
        self._lib.nv_log_set(bitmap, page, count)

    def log_sync(self) -> None:
        """Bring all bitmaps up to date with what the guest did until now."""
        self._lib.nv_log_sync(self._engine)

    def log_take(self, bitmap: int, out: int, words: int, *, mask: bool) -> bool:
        """Move bits from a bitmap to the one at out, both of 64-bit words: all, or with mask those that are set there.

        The next store to their pages is logged again. True when there were any.
        """
        return bool(self._lib.nv_log_take(self._engine, bitmap, out, words, mask))

    def is_code_page(self, gpa: int) -> bool:
        """Whether the page was ever executed (only such pages matter to :meth:`invalidate`)."""
        page = gpa >> 12
        byte: int = ctypes.c_uint8.from_address(self._lib.nv_code_pages(self._engine) + (page >> 3)).value
        return bool(byte >> (page & 7) & 1)

    def long_mode_sysenter(self) -> None:
        """SYSENTER and SYSEXIT are known in long mode, too (SDM; on AMD's CPUs they are not). Before the first vCPU runs."""
        self._lib.nv_long_mode_sysenter(self._engine)

    def translation(self) -> Translation:
        """What the translator has done so far.  Any thread may ask, while a guest runs."""
        found = Translation()
        self._lib.nv_translation(self._engine, ctypes.byref(found))
        return found

    def make_ahead(self) -> None:
        """Make the first vCPU before somebody asks for it."""
        self._first = self._new_cpu(0)

    def create_cpu(self, index: int) -> Cpu:
        """A vCPU in reset state. The second one of an engine moves all state out of Unicorn while no vCPU runs."""
        cpu, self._first = self._first, None
        if cpu is None or cpu.index != index:
            cpu = self._new_cpu(index)
        for other in self.cpus:
            other.rebind()
        self.cpus.append(cpu)
        return cpu

    def _new_cpu(self, index: int) -> Cpu:
        pointer = self._lib.nv_cpu_new(self._engine)
        if not pointer:
            raise MemoryError("vCPU")
        return Cpu(self._lib, pointer, index, self)

    def close(self) -> None:
        """Free the engine; no vCPU may run or be used afterwards."""
        if self._engine:
            self._lib.nv_engine_close(self._engine)
            self._engine = ctypes.c_void_p()
            self._uc = None

    def __del__(self) -> None:
        if getattr(self, "_engine", None):
            self.close()
