# SPDX-License-Identifier: GPL-2.0-or-later
"""PDPTRs that come with KVM_SET_SREGS2: Intel's guests use them until they load others, AMD's CPUs walk memory."""

import struct

import pytest

from kvmfs.abi import ioctls as K
from kvmfs.abi.structs import KvmSregs2
from tests.unit.irq_machine import IrqMachine

PDPT, PD, DATA, GIB = 0x20000, 0x21000, 0x4000, 1 << 30
SOURCE = f"""
    mov esi, offset 1f; xor eax, eax
    mov eax, [{GIB + DATA}]
 1: out 0xf4, al
    mov esi, offset 2f; xor ecx, ecx
    mov ecx, [{2 * GIB}]
 2: mov ebx, cr3
    mov dword ptr [{GIB + DATA + 8}], 5
    mov cr3, ebx
    mov esi, offset 3f; xor eax, eax
    mov eax, [{GIB + DATA}]
 3: out 0xf4, al
    hlt
vec_0e: mov edx, cr2; add esp, 4; mov [esp], esi; iretd
"""


def sregs2(m):
    return KvmSregs2.from_buffer_copy(m.vcpu_ioctl(K.KVM_GET_SREGS2)[1])


def translate(m, linear):
    address, _, valid = struct.unpack_from("<QQB", m.vcpu_ioctl(K.KVM_TRANSLATE, 1, struct.pack("<Q16x", linear))[1])
    assert address == linear
    return valid


@pytest.fixture(params=["amd", "intel"])
def machine(request):
    m = IrqMachine(request.param, SOURCE)
    m.intel = request.param == "intel"
    yield m
    m.close()


@pytest.mark.parametrize("logged", [False, True])
def test_used_until_cr3_is_loaded(machine, logged):
    m = machine
    m.write(PDPT, struct.pack("<4Q", PD | 1, 0, 0, 0))
    m.write(PD, struct.pack("<512Q", *(i << 21 | 0x87 for i in range(512))))
    m.write(PD + 0x1000, struct.pack("<Q", 0x87))
    m.write(DATA, b"here")
    if logged:
        assert m.region(0, 1, 0, 1 << 20, 0) == 0
    sregs = sregs2(m)
    sregs.cr0, sregs.cr3, sregs.cr4, sregs.flags = sregs.cr0 | 1 << 31, PDPT, sregs.cr4 | 0x20, 1
    sregs.pdptrs[:] = PD | 1, PD + 0x1001, 0, 0
    assert m.vcpu_ioctl(K.KVM_SET_SREGS2, 1, bytes(sregs))[0] == 0
    m.set_regs(rdx=0)
    assert translate(m, GIB + DATA) == 1
    if not m.intel:
        m.write(PDPT + 8, struct.pack("<Q", 0))
        assert m.run_within() == 0
        assert (m.regs()["rax"], m.regs()["rdx"]) == (0, GIB + DATA)
        return
    assert m.run_within() == 0
    assert (m.regs()["rax"], m.regs()["rdx"]) == (int.from_bytes(b"here", "little"), 0)
    assert list(sregs2(m).pdptrs) == [PD | 1, PD + 0x1001, 0, 0]
    assert m.run_within() == 0
    regs = m.regs()
    assert (regs["rax"], regs["rbx"], regs["rcx"], regs["rdx"]) == (0, PDPT, 0, GIB + DATA)
    assert m.read(DATA + 8, 4) == b"\5\0\0\0"
    assert (list(sregs2(m).pdptrs), sregs2(m).cr3) == ([PD | 1, 0, 0, 0], PDPT)
    assert translate(m, GIB + DATA) == 0
