# SPDX-License-Identifier: GPL-2.0-or-later
"""A vCPU's state beyond the basic registers: SREGS2, debug registers, XCRs, XSAVE, TRANSLATE, sync regs."""

import errno
import struct

import pytest

from kvmfs import vendor as vendors
from kvmfs.abi import exits as kx
from kvmfs.abi import ioctls as K
from kvmfs.abi.structs import KvmDebugregs, KvmSregs2, KvmVcpuEvents, KvmXcrs
from kvmfs.api import system
from kvmfs.errors import KvmError
from kvmfs.kvm import caps
from kvmfs.kvm.kvm_main import Kvm
from tests.unit.fake_client import FakeMemory
from tests.unit.machine import CODE, Machine, Req

MACHINE = Machine           # that the fixture makes
BOTH = pytest.mark.parametrize("vendor", ["amd", "intel"])
CR0_PG, CR4_PAE, EFER_LM = 0x80000011, 0x20, 0x500
M64 = (1 << 64) - 1


def cpuid(m, *entries):
    """KVM_SET_CPUID2 with (function, index, eax, ebx, ecx, edx)."""
    data = b"".join(struct.pack("<7I12x", f, i, int(f in (7, 0xD)), *regs) for f, i, *regs in entries)
    m.host.memory.write(0x1008, data)
    assert m.vcpu_ioctl(K.KVM_SET_CPUID2, 0x1000, struct.pack("<II", len(entries), 0))[0] == 0


LONG_MODE = (0x80000001, 0, 0, 0, 0, 1 << 29 | 1 << 20 | 1 << 26)
WIDTH = (0x80000008, 0, 0x3028, 0, 0, 0)
XSAVE = ((1, 0, 0, 0, 1 << 26, 0), (0xD, 0, 3, 576, 576, 0))


def pack(m, address, *entries, size=8):
    m.write(address, b"".join(e.to_bytes(size, "little") for e in entries))


# ---- SREGS2 ----------------------------------------------------------------------------------------------

def sregs2(m):
    result, data = m.vcpu_ioctl(K.KVM_GET_SREGS2)
    assert result == 0
    return KvmSregs2.from_buffer_copy(data)


@BOTH
def test_sregs2_round_trip(machine, vendor):
    m = machine(vendor, "hlt")
    sregs = sregs2(m)
    assert bytes(sregs)[:280] == bytes(m.sregs())[:280]
    assert (sregs.flags, list(sregs.pdptrs)) == (0, [0] * 4)
    sregs.cr2 = 0x1234
    assert m.vcpu_ioctl(K.KVM_SET_SREGS2, 1, bytes(sregs))[0] == 0
    assert bytes(sregs2(m)) == bytes(sregs)
    assert m.sregs().cr2 == 0x1234


@BOTH
def test_sregs2_errors(machine, vendor):
    m = machine(vendor, "hlt")
    sregs = sregs2(m)
    sregs.flags = 2
    assert m.vcpu_ioctl(K.KVM_SET_SREGS2, 1, bytes(sregs))[0] == -errno.EINVAL
    sregs.flags = 1                                  # PDPTRs, and no PAE paging
    assert m.vcpu_ioctl(K.KVM_SET_SREGS2, 1, bytes(sregs))[0] == -errno.EINVAL
    sregs.flags, sregs.cr4 = 0, 1 << 30
    assert m.vcpu_ioctl(K.KVM_SET_SREGS2, 1, bytes(sregs))[0] == -errno.EINVAL


@BOTH
def test_sregs2_pdptrs(machine, vendor):
    m = machine(vendor, "hlt")
    pack(m, 0x3020, 0x4001, 0x5001, 0, 0x6001)
    sregs = sregs2(m)
    sregs.cr0, sregs.cr4, sregs.cr3 = CR0_PG, CR4_PAE, 0x3020
    assert m.vcpu_ioctl(K.KVM_SET_SREGS2, 1, bytes(sregs))[0] == 0
    sregs = sregs2(m)
    assert (sregs.flags, list(sregs.pdptrs)) == (1, [0x4001, 0x5001, 0, 0x6001])
    sregs.pdptrs[2] = 0x7001
    assert m.vcpu_ioctl(K.KVM_SET_SREGS2, 1, bytes(sregs))[0] == 0
    assert list(sregs2(m).pdptrs) == [0x4001, 0x5001, 0x7001, 0x6001]
    assert m.set_sregs(m.sregs()) == 0               # loads them from memory
    assert list(sregs2(m).pdptrs) == [0x4001, 0x5001, 0, 0x6001]


# ---- debug registers -------------------------------------------------------------------------------------

@BOTH
def test_debugregs(machine, vendor):
    m = machine(vendor, "mov eax, dr0; mov ebx, dr7; hlt")
    regs = KvmDebugregs.from_buffer_copy(m.vcpu_ioctl(K.KVM_GET_DEBUGREGS)[1])
    assert (list(regs.db), regs.dr6, regs.dr7, regs.flags) == ([0] * 4, 0xFFFF0FF0, 0x400, 0)
    regs.db[0], regs.db[3], regs.dr6, regs.dr7 = 0x1234, M64, 0x1, 0x500
    assert m.vcpu_ioctl(K.KVM_SET_DEBUGREGS, 1, bytes(regs))[0] == 0
    assert m.vcpu_ioctl(K.KVM_GET_DEBUGREGS)[1] == bytes(regs)
    assert m.run() == 0
    assert (m.regs()["rax"], m.regs()["rbx"]) == (0x1234, 0x500)
    for field, value in (("flags", 1), ("dr6", 1 << 32), ("dr7", 1 << 63)):
        bad = KvmDebugregs.from_buffer_copy(regs)
        setattr(bad, field, value)
        assert m.vcpu_ioctl(K.KVM_SET_DEBUGREGS, 1, bytes(bad))[0] == -errno.EINVAL
    assert m.vcpu_ioctl(K.KVM_GET_DEBUGREGS)[1] == bytes(regs)


# ---- XCRs and XSAVE --------------------------------------------------------------------------------------

@BOTH
def test_xcrs(machine, vendor):
    m = machine(vendor)
    xcrs = KvmXcrs.from_buffer_copy(m.vcpu_ioctl(K.KVM_GET_XCRS)[1])
    assert (xcrs.nr_xcrs, xcrs.flags, xcrs.xcrs[0].xcr, xcrs.xcrs[0].value) == (1, 0, 0, 1)

    def put(value=1, number=1, index=0, flags=0):
        xcrs.nr_xcrs, xcrs.flags, xcrs.xcrs[0].xcr, xcrs.xcrs[0].value = number, flags, index, value
        return m.vcpu_ioctl(K.KVM_SET_XCRS, 1, bytes(xcrs))[0]

    assert put(3) == -errno.EINVAL                   # not in this vCPU's CPUID
    cpuid(m, *XSAVE)
    assert put(3) == 0
    for bad in ({"value": 0}, {"value": 2}, {"value": 7}, {"flags": 1}, {"number": 17}):
        assert put(**bad) == -errno.EINVAL
    assert put(7, index=1) == 0                      # others are passed over
    assert put(7, number=0) == 0
    assert KvmXcrs.from_buffer_copy(m.vcpu_ioctl(K.KVM_GET_XCRS)[1]).xcrs[0].value == 3


@BOTH
def test_xsave_of_a_fresh_vcpu(machine, vendor):
    m = machine(vendor)
    result, image = m.vcpu_ioctl(K.KVM_GET_XSAVE)
    assert (result, len(image)) == (0, 4096)
    assert m.vcpu_ioctl(K.KVM_GET_XSAVE2) == (0, image)
    assert struct.unpack_from("<H", image, 0) == (0x37F,)
    assert struct.unpack_from("<II", image, 24) == (0x1F80, 0xFFFF)
    assert struct.unpack_from("<QQ", image, 512) == (0, 0)
    assert m.vcpu_ioctl(K.KVM_SET_XSAVE, 1, image)[0] == 0


@BOTH
def test_xsave_round_trip(machine, vendor):
    m = machine(vendor)
    image = bytearray(m.vcpu_ioctl(K.KVM_GET_XSAVE)[1])
    struct.pack_into("<HHBBHQQ", image, 0, 0x27F, 0x3800, 0x80, 0, 0x7FF, 0x1234, 0x5678)
    struct.pack_into("<I", image, 24, 0x1FA0)
    image[32:42] = bytes(range(1, 11))
    image[160:416] = bytes(i & 0xFF for i in range(256))
    struct.pack_into("<Q", image, 512, 3)
    assert m.vcpu_ioctl(K.KVM_SET_XSAVE, 1, image)[0] == 0
    assert m.vcpu_ioctl(K.KVM_GET_XSAVE)[1] == image
    struct.pack_into("<Q", image, 512, 2)            # x87 goes to its initial state
    assert m.vcpu_ioctl(K.KVM_SET_XSAVE, 1, image)[0] == 0
    got = m.vcpu_ioctl(K.KVM_GET_XSAVE)[1]
    assert struct.unpack_from("<HHB", got, 0) == (0x37F, 0, 0)
    assert got[32:160] == bytes(128)
    assert got[160:416] == image[160:416]
    assert struct.unpack_from("<Q", got, 512) == (2,)
    struct.pack_into("<Q", image, 512, 0)
    assert m.vcpu_ioctl(K.KVM_SET_XSAVE, 1, image)[0] == 0
    assert struct.unpack_from("<Q", m.vcpu_ioctl(K.KVM_GET_XSAVE)[1], 512) == (0,)


@BOTH
@pytest.mark.parametrize("features,change", [
    (4, None), (1 << 63, None), (3, (520, "<Q", 1 << 63)), (3, (528, "<Q", 1)), (0, (568, "<Q", 1)), (1, (24, "<I", 1 << 16)),
    (2, (24, "<I", 1 << 31)),
])
def test_xsave_errors(machine, vendor, features, change):
    m = machine(vendor)
    before = m.vcpu_ioctl(K.KVM_GET_XSAVE)[1]
    image = bytearray(before)
    image[160] = 1
    struct.pack_into("<Q", image, 512, features)
    if change:
        struct.pack_into(change[1], image, change[0], change[2])
    assert m.vcpu_ioctl(K.KVM_SET_XSAVE, 1, image)[0] == -errno.EINVAL
    assert m.vcpu_ioctl(K.KVM_GET_XSAVE)[1] == before


def test_mxcsr_does_not_matter_without_its_components(machine):
    m = machine("amd")
    image = bytearray(4096)
    struct.pack_into("<I", image, 24, M64 & 0xFFFFFFFF)
    assert m.vcpu_ioctl(K.KVM_SET_XSAVE, 1, image)[0] == 0


# ---- the node's attributes -------------------------------------------------------------------------------

def test_device_attributes_of_the_node():
    memory = FakeMemory()
    kvm = Kvm(vendors.load("amd"), lambda req: memory)

    def call(handler, group, attr, address=0x1000):
        return handler(kvm, Req(1, 0, 0, struct.pack("<IIQQ", 0, group, attr, address)))

    assert call(system.has_device_attr, 0, 0) == 0
    assert call(system.get_device_attr, 0, 0) == 0
    assert memory.read(0x1000, 8) == struct.pack("<Q", 3)
    for handler in (system.has_device_attr, system.get_device_attr):
        for group, attr in ((1, 0), (0, 1)):
            with pytest.raises(KvmError) as e:
                call(handler, group, attr)
            assert e.value.errno == errno.ENXIO
    ask = lambda name: caps.check_extension(kvm.profile, getattr(caps.K, f"KVM_CAP_{name}"))  # noqa: E731
    assert (ask("XSAVE2"), ask("SYNC_REGS"), ask("SET_GUEST_DEBUG2")) == (4096, 7, 0x1F0003)


# ---- TRANSLATE -------------------------------------------------------------------------------------------

def translate(m, address):
    result, data = m.vcpu_ioctl(K.KVM_TRANSLATE, 1, struct.pack("<QQBBB5s", address, 7, 7, 7, 7, b"pad78"))
    assert result == 0
    linear, physical, valid, writeable, usermode, pad = struct.unpack("<QQBBB5s", data)
    assert (linear, writeable, usermode, pad) == (address, 1, 0, b"pad78")
    return physical if valid else (None if physical == M64 else "?")


@BOTH
def test_translate_without_paging(machine, vendor):
    m = machine(vendor)
    assert translate(m, 0xFFFF_1234_5678) == 0xFFFF_1234_5678


@BOTH
def test_translate_in_long_mode(machine, vendor):
    m = machine(vendor)
    cpuid(m, LONG_MODE, WIDTH)
    pack(m, 0x10000, 0x11007)
    pack(m, 0x10FF8, 0x11007)
    pack(m, 0x11000, 0x12007, 0x40000087, 1 << 45 | 7)
    pack(m, 0x12000, 0x13007, 0x600083, 0x602083)
    pack(m, 0x13000, 0x5007, 0, 1 << 63 | 0x6001)
    sregs = m.sregs()
    sregs.cr0, sregs.cr3, sregs.cr4, sregs.efer = CR0_PG, 0x10000, CR4_PAE, EFER_LM
    assert m.set_sregs(sregs) == 0
    assert translate(m, 0x123) == 0x5123
    assert translate(m, 0x1123) is None
    assert translate(m, 0x2123) is None              # NX is reserved
    assert translate(m, 0x212345) == 0x612345
    assert translate(m, 0x412345) is None            # a reserved bit of the large page
    assert translate(m, 0x40001234) == 0x40001234
    assert translate(m, 0x80001234) is None          # beyond the physical addresses
    assert translate(m, M64 - 0x7FFFFFFFFF + 0x123) == 0x5123
    assert translate(m, 0x1234_0000_0000_0123) == 0x5123
    sregs.efer |= 0x800
    assert m.set_sregs(sregs) == 0
    assert translate(m, 0x2123) == 0x6123


@BOTH
def test_translate_with_32_bit_paging(machine, vendor):
    m = machine(vendor)
    pack(m, 0x10000, 0x11007, 0x00802087, size=4)
    pack(m, 0x11000, 0x5001, 0, size=4)
    sregs = m.sregs()
    sregs.cr0, sregs.cr3, sregs.cr4 = CR0_PG, 0x10000, 0x10
    assert m.set_sregs(sregs) == 0
    assert translate(m, 0x123) == 0x5123
    assert translate(m, 0x1123) is None
    assert translate(m, 0x400123) == 0x01_00800123   # PSE-36
    assert translate(m, 0x1_0000_0123) == 0x5123


# ---- the APIC that is not in the kernel ------------------------------------------------------------------

@BOTH
def test_without_an_apic(machine, vendor):
    m = machine(vendor)
    assert m.vcpu_ioctl(K.KVM_GET_LAPIC)[0] == -errno.EINVAL
    assert m.vcpu_ioctl(K.KVM_SET_LAPIC, 1, bytes(1024))[0] == -errno.EINVAL
    assert m.vcpu_ioctl(K.KVM_SET_VAPIC_ADDR, 1, bytes(8))[0] == -errno.EINVAL
    control = struct.pack("<II32s", 1, 0, b"r" * 32)
    assert m.vcpu_ioctl(K.KVM_TPR_ACCESS_REPORTING, 1, control) == (0, control)
    assert m.vcpu_ioctl(K.KVM_TPR_ACCESS_REPORTING, 1, struct.pack("<II32x", 1, 1))[0] == -errno.EINVAL
    assert m.vcpu_ioctl(K.KVM_SMI)[0] == -errno.ENOTTY


# ---- sync regs -------------------------------------------------------------------------------------------

VALID, DIRTY, REGS, SREGS, EVENTS = 288, 296, 304, 448, 760


def sync(m, valid, dirty=0):
    struct.pack_into("<QQ", m.run_page, VALID, valid, dirty)


def dirty(m):
    return struct.unpack_from("<Q", m.run_page, DIRTY)[0]


@BOTH
def test_sync_regs_to_the_client(machine, vendor):
    m = machine(vendor, "mov al, 7; hlt")
    sync(m, 7)
    assert m.run() == 0
    assert m.run_page[REGS:SREGS] == m.vcpu_ioctl(K.KVM_GET_REGS)[1]
    assert m.run_page[SREGS:EVENTS] == m.vcpu_ioctl(K.KVM_GET_SREGS)[1]
    assert m.run_page[EVENTS:EVENTS + 64] == m.vcpu_ioctl(K.KVM_GET_VCPU_EVENTS)[1]
    assert struct.unpack_from("<Q", m.run_page, REGS)[0] == 7


@BOTH
def test_sync_regs_from_the_client(machine, vendor):
    m = machine(vendor, "mov dword ptr [24], offset h6; hlt; h6: mov cl, 6; hlt")
    m.run()
    values = [0] * 18
    values[1], values[16], values[17] = 5, CODE, 2
    struct.pack_into("<18Q", m.run_page, REGS, *values)
    sregs = m.sregs()
    sregs.cr2 = 0x77
    m.run_page[SREGS:EVENTS] = bytes(sregs)
    events = KvmVcpuEvents()
    events.exception.injected, events.exception.nr = 1, 6
    m.run_page[EVENTS:EVENTS + 64] = bytes(events)
    sync(m, 0, 7)
    assert m.run() == 0
    assert m.reason == kx.KVM_EXIT_HLT
    assert (m.regs()["rbx"], m.regs()["rcx"], m.sregs().cr2, dirty(m)) == (5, 6, 0x77, 0)


@BOTH
@pytest.mark.parametrize("fields", [(8, 0), (0, 8), (1 << 63, 0), (1, 1 << 32)])
def test_unknown_sync_regs(machine, vendor, fields):
    m = machine(vendor, "mov al, 7; hlt")
    sync(m, *fields)
    assert m.run() == -errno.EINVAL
    assert dirty(m) == fields[1]
    if fields[0] == 1:                               # what is valid is stored all the same
        assert m.run_page[REGS:SREGS] == m.vcpu_ioctl(K.KVM_GET_REGS)[1]
    sync(m, 0)
    assert m.run() == 0


@BOTH
def test_sync_regs_that_cannot_be(machine, vendor):
    m = machine(vendor, "hlt")
    m.run_page[REGS:SREGS] = m.vcpu_ioctl(K.KVM_GET_REGS)[1]
    sregs = m.sregs()
    sregs.cr4 = 1 << 30
    m.run_page[SREGS:EVENTS] = bytes(sregs)
    sync(m, 1, 7)
    assert m.run() == -errno.EINVAL
    assert dirty(m) == 6
    events = KvmVcpuEvents()
    events.flags = 1 << 20
    m.run_page[EVENTS:EVENTS + 64] = bytes(events)
    sync(m, 0, 4)
    assert m.run() == -errno.EINVAL
    assert dirty(m) == 4


@BOTH
def test_sync_regs_with_immediate_exit(machine, vendor):
    m = machine(vendor, "hlt")
    m.run_page[1] = 1
    sync(m, 1)
    assert m.run() == -errno.EINTR
    assert m.run_page[REGS:SREGS] == m.vcpu_ioctl(K.KVM_GET_REGS)[1]
