# SPDX-License-Identifier: GPL-2.0-or-later
"""KVM_GET_STATS_FD: the layout, and what is counted."""

import struct
import threading
import time

import pytest

from kvmfs.abi import ioctls as K
from kvmfs.abi import svm
from kvmfs.kvm import debugfs
from kvmfs.kvm.kvm_main import DEVICE_INODE, VCPU_INODE, VCPU_STATS_INODE, VM_INODE, VM_STATS_INODE
from kvmfs_cli.exits import by_reason
from tests.unit.machine import CODE, Machine, error


@pytest.fixture(params=["amd", "intel"])
def vendor(request):
    return request.param


def parse(content):
    """The id, and values by name; a histogram is a list."""
    flags, name_size, count, id_offset, desc_offset, data_offset = struct.unpack_from("<6I", content)
    assert (flags, name_size, id_offset, desc_offset, data_offset) == (0, 48, 24, 72, 72 + 64 * count)
    values = {}
    for i in range(count):
        at = desc_offset + 64 * i
        _, _, size, offset, _, name = struct.unpack_from("<IhHII48s", content, at)
        numbers = list(struct.unpack_from(f"<{size}Q", content, data_offset + offset))
        values[name.rstrip(b"\0").decode()] = numbers[0] if size == 1 else numbers
    return content[24:72].rstrip(b"\0").decode(), values


def stats(machine, inode=VCPU_INODE):
    result, _ = machine.ioctl(inode, K.KVM_GET_STATS_FD)
    assert result == (VM_STATS_INODE if inode == VM_INODE else VCPU_STATS_INODE)
    return parse(machine.host.content())


def test_vm(vendor):
    machine = Machine(vendor)
    identity, values = stats(machine, VM_INODE)
    assert identity == "kvm-1" and len(values) == 15 and not any(values.values())
    machine.host.content().index(b"max_mmu_rmap_size")
    machine.close()


def test_descriptors(vendor):
    machine = Machine(vendor)
    identity, values = stats(machine)
    assert identity == "kvm-1/vcpu-0"
    assert list(values)[:4] == ["halt_successful_poll", "halt_attempted_poll", "halt_poll_invalid", "halt_wakeup"]
    assert len(values["halt_wait_hist"]) == 32 and len(values) == 45
    content = machine.host.content()
    assert len(content) == 72 + 64 * 45 + 8 * (42 + 3 * 32)
    flags, exponent = struct.unpack_from("<Ih", content, 72 + 64 * 4)      # halt_poll_success_ns: seconds
    assert (flags, exponent) == (0x20, -9)
    flags, = struct.unpack_from("<I", content, 72 + 64 * 10)               # blocking: instant, boolean
    assert flags == 0x41
    machine.close()


def test_exits_are_counted(vendor):
    machine = Machine(vendor, "out 0x10, al; in al, 0x11; hlt; cpuid; hlt")
    while machine.run() == 0 and machine.reason != 5:
        pass
    values = stats(machine)[1]
    content = machine.host.content
    assert values["io_exits"] == 2 and values["halt_exits"] == 1 and values["exits"] - values["irq_exits"] == 3
    assert values["req_event"] > 0 and values["pf_taken"] == values["guest_mode"] == values["insn_emulation"] == 0
    assert machine.run() == 0
    later = parse(content())[1]             # the same descriptor shows what is true now
    assert later["halt_exits"] == 2 and later["exits"] - later["irq_exits"] == 5
    machine.close()


def test_mmio(vendor):
    """Linux emulates each access, a read-modify-write twice; a page-crossing access is one exit."""
    machine = Machine(vendor, """
        mov ax, 0xffff
        mov ds, ax
        mov al, [0x10]
        inc byte ptr [0x10]
        mov word ptr [0x1ff0 - 1], ax
        hlt
    """)
    reasons = []
    machine.region(0, 0, 0, 0, 0)
    machine.region(0, 0, 0, 0x10000, 0)
    while machine.run() == 0 and machine.reason != 5:
        reasons.append(machine.reason)
    values = stats(machine)[1]
    assert reasons and set(reasons) == {6}
    assert values["mmio_exits"] == values["insn_emulation"] == 4 <= len(reasons)
    machine.close()


def test_interrupts(vendor):
    machine = Machine(vendor, "sti; nop; hlt; hlt")
    machine.run_page[0] = 1                                 # request_interrupt_window
    assert machine.run() == 0 and machine.reason == 7
    machine.run_page[0] = 0
    assert machine.vcpu_ioctl(K.KVM_INTERRUPT, 1, struct.pack("<I", 0x20)) == (0, b"")
    machine.write(4 * 0x20, struct.pack("<HH", machine.symbols.get("end", 0x8003), 0))
    assert machine.run() == 0
    assert machine.vcpu_ioctl(K.KVM_NMI) == (0, b"")
    machine.run()
    values = stats(machine)[1]
    assert values["request_irq_exits"] == 1 and values["irq_injections"] == 1 and values["nmi_injections"] == 1
    assert values["irq_window_exits"] == 1
    machine.close()


def test_failed_emulation_and_hypercalls(vendor):
    machine = Machine(vendor, ("vmmcall" if vendor == "amd" else "vmcall") + "; jmp 0xffff:0xfff0")
    machine.run()
    values = stats(machine)[1]
    assert values["hypercalls"] == 1 and values["insn_emulation_fail"] == values["insn_emulation"]
    machine.close()


def test_exits_by_reason(vendor):
    """SVM's codes, as the engine leaves the guest; those that a tracepoint would count."""
    machine = Machine(vendor, "mov ecx, 0x10; rdmsr; wrmsr; cpuid; out 0x10, al; hlt")
    while machine.run() == 0 and machine.reason != 5:
        pass
    numbers = debugfs.statistics(machine.vm)
    vcpu, = numbers["vcpus"]
    reasons = {int(code): count for code, count in vcpu["reasons"].items() if int(code) != svm.SVM_EXIT_INTR}
    assert reasons == {svm.SVM_EXIT_MSR: 2, svm.SVM_EXIT_CPUID: 1, svm.SVM_EXIT_IOIO: 1, svm.SVM_EXIT_HLT: 1}
    assert vcpu["wrmsr_exits"] == 1 and numbers["vendor"] == vendor and sum(vcpu["reasons"].values()) == vcpu["exits"]
    names = by_reason(vcpu, vendor)
    names.pop("interrupt" if vendor == "amd" else "EXTERNAL_INTERRUPT", None)
    assert names == ({"msr": 2, "cpuid": 1, "io": 1, "hlt": 1} if vendor == "amd" else
                     {"MSR_READ": 1, "MSR_WRITE": 1, "CPUID": 1, "IO_INSTRUCTION": 1, "HLT": 1})
    machine.close()


def test_time_and_translation(vendor):
    machine = Machine(vendor, "mov ecx, 300000; again: dec ecx; jnz again; hlt")
    before = debugfs.statistics(machine.vm)
    assert before["vcpus"][0]["guest_time_ns"] == before["translation"]["tb_translated"] == 0 and before["memory"] == 1 << 20
    began = time.monotonic_ns()
    while machine.run() == 0 and machine.reason != 5:
        pass
    took = time.monotonic_ns() - began
    after = debugfs.statistics(machine.vm)
    assert 100_000 < after["vcpus"][0]["guest_time_ns"] <= took * 1.02
    done = after["translation"]
    assert 1 <= done["tb_translated"] < 50 and 0 < done["code_buffer_bytes"] < done["code_buffer_size"]
    assert done["tb_guest_bytes"] >= 5 and done["tb_flushed"] == 0
    machine.vm.engine.invalidate(CODE, 16)
    assert debugfs.statistics(machine.vm)["translation"]["tb_invalidated"] > done["tb_invalidated"]
    machine.close()


def test_guest_time_grows_while_the_guest_runs(vendor):
    machine = Machine(vendor, "again: jmp again")
    thread = threading.Thread(target=machine.run)
    thread.start()
    try:
        deadline = time.monotonic() + 20
        while debugfs.statistics(machine.vm)["vcpus"][0]["guest_time_ns"] < 20_000_000:
            assert time.monotonic() < deadline
            time.sleep(0.005)
        assert machine.vcpu.request is not None     # it is in there yet
    finally:
        machine.vm.dead = True
        machine.vcpu.kick()
        thread.join(20)
    machine.close()


def test_statistics_have_no_ioctl(vendor):
    machine = Machine(vendor)
    for inode in (VM_STATS_INODE, VCPU_STATS_INODE):
        for cmd in (K.KVM_RUN, K.KVM_GET_REGS, K.KVM_CREATE_VCPU, 0xAE55):
            assert machine.ioctl(inode, cmd)[0] == error("ENOTTY")
            assert machine.ioctl(inode, cmd, tid=1000)[0] == error("ENOTTY")
    assert machine.ioctl(VM_INODE, K.KVM_GET_STATS_FD, tid=1000)[0] == error("EIO")
    assert DEVICE_INODE < VCPU_INODE
    machine.close()
