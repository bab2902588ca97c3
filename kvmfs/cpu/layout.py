# SPDX-License-Identifier: GPL-2.0-or-later
"""The private layout of the pinned Unicorn build, as Python sees it, and the native module.

The offsets are those of the x86-64 Linux wheel of unicorn 2.1.4; ``native.h`` has the same. Nothing outside ``kvmfs.cpu``
may know them. :func:`load` refuses any other build by its version; ``nv_engine_new`` checks, for each engine, that the pointers
which sit at known places in this build are there.
"""

from __future__ import annotations

import ctypes
import functools
import importlib.metadata
import importlib.util
import platform
from typing import Final

UNICORN_VERSION: Final = "2.1.4"
STATE_SIZE: Final = 5568
IO_DATA_SIZE: Final = 1024


class LayoutError(RuntimeError):
    """The running Unicorn is not the build whose layout this package knows."""


class SegmentState(ctypes.Structure):
    """SegmentCache: flags are the second descriptor word."""

    _fields_ = (
        ("selector", ctypes.c_uint32),
        ("base", ctypes.c_uint64),
        ("limit", ctypes.c_uint32),
        ("flags", ctypes.c_uint32),
    )
    selector: int
    base: int
    limit: int
    flags: int


_FIELDS: Final[tuple[tuple[int, str, type], ...]] = (
    (0, "regs", ctypes.c_uint64 * 16),
    (128, "rip", ctypes.c_uint64),
    (136, "rflags", ctypes.c_uint64),
    (176, "hflags", ctypes.c_uint32),
    (180, "hflags2", ctypes.c_uint32),
    (184, "segs", SegmentState * 8),  # ES CS SS DS FS GS LDTR TR
    (376, "gdt", SegmentState),
    (400, "idt", SegmentState),
    (424, "cr", ctypes.c_uint64 * 9),
    (496, "a20_mask", ctypes.c_int32),
    (592, "efer", ctypes.c_uint64),
    (4800, "sysenter_cs", ctypes.c_uint32),
    (4808, "sysenter_esp", ctypes.c_uint64),
    (4816, "sysenter_eip", ctypes.c_uint64),
    (4824, "star", ctypes.c_uint64),
    (4840, "lstar", ctypes.c_uint64),
    (4848, "cstar", ctypes.c_uint64),
    (4856, "fmask", ctypes.c_uint64),
    (4864, "kernel_gs_base", ctypes.c_uint64),
    (4896, "tsc_aux", ctypes.c_uint64),
    (4904, "xcr0", ctypes.c_uint64),
    (5280, "pat", ctypes.c_uint64),
    (5400, "dr", ctypes.c_uint64 * 8),
    (5496, "old_exception", ctypes.c_int32),
    (5504, "vm_vmcb", ctypes.c_uint64),
    (5512, "tsc_offset", ctypes.c_uint64),
    (5520, "intercept", ctypes.c_uint64),
    (5528, "intercept_cr_read", ctypes.c_uint16),
    (5530, "intercept_cr_write", ctypes.c_uint16),
    (5532, "intercept_dr_read", ctypes.c_uint16),
    (5534, "intercept_dr_write", ctypes.c_uint16),
    (5536, "intercept_exceptions", ctypes.c_uint32),
    (5556, "v_tpr", ctypes.c_uint8),
)


def _with_padding() -> list[tuple[str, type]]:
    fields: list[tuple[str, type]] = []
    at = 0
    for offset, name, kind in _FIELDS:
        if offset > at:
            fields.append((f"_pad{at}", ctypes.c_uint8 * (offset - at)))
        fields.append((name, kind))
        at = offset + ctypes.sizeof(kind)
    fields.append((f"_pad{at}", ctypes.c_uint8 * (STATE_SIZE - at)))
    return fields


class CpuState(ctypes.Structure):
    """The part of CPUX86State that makes a vCPU (its first 5,568 bytes)."""

    _fields_ = _with_padding()
    regs: ctypes.Array[ctypes.c_uint64]
    segs: ctypes.Array[SegmentState]
    gdt: SegmentState
    idt: SegmentState
    cr: ctypes.Array[ctypes.c_uint64]
    dr: ctypes.Array[ctypes.c_uint64]
    rip: int
    rflags: int
    hflags: int
    hflags2: int
    a20_mask: int
    efer: int
    sysenter_cs: int
    sysenter_esp: int
    sysenter_eip: int
    star: int
    lstar: int
    cstar: int
    fmask: int
    kernel_gs_base: int
    tsc_aux: int
    xcr0: int
    pat: int
    old_exception: int
    vm_vmcb: int
    tsc_offset: int
    intercept: int
    intercept_cr_read: int
    intercept_cr_write: int
    intercept_dr_read: int
    intercept_dr_write: int
    intercept_exceptions: int
    v_tpr: int


for _offset, _name, _kind in _FIELDS:
    assert getattr(CpuState, _name).offset == _offset, _name


class ExitInfo(ctypes.Structure):
    """Why the guest stopped; which fields hold something depends on ``kind`` (see :mod:`kvmfs.cpu.cpu`)."""

    _fields_ = (
        ("kind", ctypes.c_int32),
        ("insn_len", ctypes.c_uint32),
        ("code", ctypes.c_uint64),
        ("info1", ctypes.c_uint64),
        ("info2", ctypes.c_uint64),
        ("gpa", ctypes.c_uint64),
        ("port", ctypes.c_uint32),
        ("size", ctypes.c_uint32),
        ("count", ctypes.c_uint32),
        ("string", ctypes.c_uint32),
        ("data", ctypes.c_uint8 * IO_DATA_SIZE),
    )
    kind: int
    insn_len: int
    code: int
    info1: int
    info2: int
    gpa: int
    port: int
    size: int
    count: int
    string: int
    data: ctypes.Array[ctypes.c_uint8]


class VcpuInfo(ctypes.Structure):
    """The head of the native struct Vcpu."""

    _fields_ = (
        ("exit", ExitInfo),
        ("state", ctypes.c_uint64),
        ("vmcb_gpa", ctypes.c_uint64),
        ("vmcb", ctypes.c_uint64),
        ("home", ctypes.c_uint64),
        ("bp", ctypes.c_uint64 * 4),
        ("bp_dr7", ctypes.c_uint32),
        ("flush", ctypes.c_int32),
        ("intr_vector", ctypes.c_int32),
        ("window", ctypes.c_int32),
        ("nmi", ctypes.c_int32),
        ("exc_vector", ctypes.c_int32),
        ("exc_error", ctypes.c_int32),
        ("exc_soft", ctypes.c_int32),
        ("pend", ctypes.c_int32),
        ("ud_exits", ctypes.c_int32),
        ("kick", ctypes.c_int32),
        ("yield_", ctypes.c_int32),
        ("waited", ctypes.c_uint64),
        ("preempted_gpa", ctypes.c_uint64),
        ("suspect", ctypes.c_int32),
        ("own_pdptrs", ctypes.c_int32),
        ("pdptrs_cr3", ctypes.c_uint64),
        ("guest_cycles", ctypes.c_uint64),
        ("guest_since", ctypes.c_uint64),
    )
    exit: ExitInfo
    state: int
    vmcb_gpa: int
    vmcb: int
    home: int
    bp: ctypes.Array[ctypes.c_uint64]
    bp_dr7: int
    flush: int
    intr_vector: int
    window: int
    nmi: int
    exc_vector: int
    exc_error: int
    exc_soft: int
    pend: int
    ud_exits: int
    kick: int
    yield_: int
    waited: int
    preempted_gpa: int
    suspect: int
    own_pdptrs: int
    pdptrs_cr3: int
    guest_cycles: int
    guest_since: int


class Translation(ctypes.Structure):
    """What an engine's translator has done, and what its buffer of code holds (bytes)."""

    _fields_ = (
        ("blocks", ctypes.c_uint64),
        ("guest_bytes", ctypes.c_uint64),
        ("flushes", ctypes.c_uint64),
        ("invalidated", ctypes.c_uint64),
        ("code_bytes", ctypes.c_uint64),
        ("code_capacity", ctypes.c_uint64),
    )
    blocks: int
    guest_bytes: int
    flushes: int
    invalidated: int
    code_bytes: int
    code_capacity: int


@functools.cache
def load() -> ctypes.CDLL:
    """The native module, its functions typed. ctypes releases the GIL while one runs.
    Once loaded it needs no more files, so that a worker without rights can have it from its parent.

    Raises LayoutError, naming both versions, when the installed Unicorn or the machine is another.
    """
    found = importlib.metadata.version("unicorn")
    if found != UNICORN_VERSION or platform.machine() != "x86_64":
        raise LayoutError(
            f"kvmfs drives the private state of unicorn {UNICORN_VERSION} on x86_64; this is unicorn {found} on "
            f"{platform.machine()}. Install unicorn=={UNICORN_VERSION}."
        )
    spec = importlib.util.find_spec("kvmfs.cpu._native")
    if spec is None or spec.origin is None:
        raise LayoutError("kvmfs.cpu._native is not built; install kvmfs with pip, or build it in place")
    lib = ctypes.CDLL(spec.origin)
    ptr, u64, i32 = ctypes.c_void_p, ctypes.c_uint64, ctypes.c_int
    prototypes: dict[str, tuple[type | None, tuple[type, ...]]] = {
        "nv_engine_new": (i32, (ctypes.c_char_p, ptr, ptr, ptr)),
        "nv_prepare": (i32, (ctypes.c_char_p,)),
        "nv_engine_close": (None, (ptr,)),
        "nv_long_mode_sysenter": (None, (ptr,)),
        "nv_cpu_new": (ptr, (ptr,)),
        "nv_map": (i32, (ptr, u64, u64, ptr, i32, u64, u64)),
        "nv_unmap": (i32, (ptr, u64)),
        "nv_window": (ptr, (ptr,)),
        "nv_invalidate": (None, (ptr, u64, u64)),
        "nv_log": (i32, (ptr, u64, ptr, ptr, u64, u64)),
        "nv_ring_open": (ptr, (ptr, ptr, ctypes.c_uint32, ctypes.c_uint32)),
        "nv_ring_push": (None, (ptr, ptr, u64, u64, u64)),
        "nv_log_set": (None, (ptr, u64, u64)),
        "nv_log_sync": (None, (ptr,)),
        "nv_log_take": (i32, (ptr, ptr, ptr, u64, i32)),
        "nv_code_pages": (ptr, (ptr,)),
        "nv_lock": (None, (ptr,)),
        "nv_unlock": (None, (ptr,)),
        "nv_kick": (None, (ptr,)),
        "nv_run": (i32, (ptr,)),
        "nv_complete": (i32, (ptr,)),
        "nv_commit": (None, (ptr,)),
        "nv_skip": (None, (ptr, i32)),
        "nv_insn_bytes": (i32, (ptr, ptr, i32)),
        "nv_translate": (u64, (ptr, u64)),
        "nv_fxsave": (None, (ptr, ptr)),
        "nv_fxrstor": (None, (ptr, ptr)),
        "nv_translation": (None, (ptr, ctypes.POINTER(Translation))),
        "nv_host_tsc": (u64, ()),
        "nv_scale_tsc": (None, (ptr, u64, ctypes.c_uint32)),
        "nv_clock_and_tsc": (u64, (i32, ptr)),
    }
    for name, (result, arguments) in prototypes.items():
        function = getattr(lib, name)
        function.restype = result
        function.argtypes = arguments
    return lib
