# SPDX-License-Identifier: GPL-2.0-or-later
"""How the struct classes behave; that they are what the C headers say is test_abi_header's subject."""

from ctypes import Array as CArray
from ctypes import c_uint16, sizeof
from typing import Annotated

import pytest

from kvmfs.abi import exits, structs, x86
from kvmfs.abi.cstruct import S32, U8, U32, U64, Structure, Union, layout, offset_of


@layout
class Sample(Structure):
    """C would put three bytes between the first two fields."""

    a: U8
    b: U32
    c: Annotated[CArray[c_uint16], c_uint16 * 3]
    d: U64


@layout
class Either(Union):
    number: U64
    signed: S32


@layout
class Outer(Structure):
    head: U32
    inner: Sample
    either: Either


def test_layout_aligns_like_c() -> None:
    assert [offset_of(Sample, name) for name in "abcd"] == [0, 4, 8, 16]
    assert sizeof(Sample) == 24


def test_layout_embeds() -> None:
    assert offset_of(Outer, "inner.d") == 8 + 16
    outer = Outer()
    outer.either.number = 0xFFFFFFFF
    assert outer.either.signed == -1
    outer.inner.c[2] = 7
    assert bytes(outer)[offset_of(Outer, "inner.c") + 4] == 7


def test_layout_keywords_and_wire_format() -> None:
    assert bytes(structs.KvmMsrEntry(index=0x10, data=0x1122334455667788)) == bytes.fromhex(
        "10000000 00000000 8877665544332211"
    )


def test_offset_of_unknown_field() -> None:
    with pytest.raises(AttributeError):
        offset_of(Sample, "e")
    with pytest.raises(AttributeError):
        offset_of(Outer, "inner.e")


def test_flexible_structs_are_their_header() -> None:
    assert sizeof(structs.KvmCpuid2) == 8
    assert sizeof(structs.KvmMsrs) == 8
    assert sizeof(structs.KvmMsrList) == 4
    assert sizeof(structs.KvmSignalMask) == 4
    assert sizeof(structs.KvmNestedState) == 128


def test_kvm_run_layout() -> None:
    assert structs.RUN_REQUEST_INTERRUPT_WINDOW == 0
    assert structs.RUN_IMMEDIATE_EXIT == 1
    assert structs.RUN_EXIT_REASON == 8
    assert structs.RUN_READY_FOR_INTERRUPT_INJECTION == 12
    assert structs.RUN_IF_FLAG == 13
    assert structs.RUN_FLAGS == 14
    assert structs.RUN_CR8 == 16
    assert structs.RUN_APIC_BASE == 24
    assert structs.RUN_EXIT == 32
    assert structs.RUN_KVM_VALID_REGS == 288
    assert structs.RUN_KVM_DIRTY_REGS == 296
    assert structs.RUN_S == 304
    assert sizeof(structs.KvmRun) == 304 + 2048
    assert sizeof(structs.KvmRun) < x86.PAGE_SIZE
    assert exits.KVM_VCPU_MMAP_SIZE == 12288


def test_kvm_run_view() -> None:
    page = bytearray(exits.KVM_VCPU_MMAP_SIZE)
    run = structs.KvmRun.from_buffer(page)
    run.exit_reason = exits.KVM_EXIT_IO
    run.io.direction = exits.KVM_EXIT_IO_OUT
    run.io.size, run.io.port, run.io.count, run.io.data_offset = 1, 0x3F8, 1, 4096
    assert page[32:48] == bytes.fromhex("0101f803 01000000 0010000000000000")
    run.hypercall.longmode = 1
    assert run.hypercall.flags == 1
    run.s.regs.sregs.cr0 = x86.CR0_RESET
    assert offset_of(structs.KvmRun, "s.regs.sregs.cr0") == 304 + 144 + offset_of(structs.KvmSregs, "cr0")


def test_irq_level_union() -> None:
    level = structs.KvmIrqLevel(irq=5, level=1)
    level.status = -1
    assert level.irq == 0xFFFFFFFF
    assert level.level == 1


def test_coalesced_ring_size() -> None:
    entry = sizeof(structs.KvmCoalescedMmio)
    assert (x86.PAGE_SIZE - sizeof(structs.KvmCoalescedMmioRing)) // entry == x86.KVM_COALESCED_MMIO_MAX
