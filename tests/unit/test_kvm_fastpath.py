# SPDX-License-Identifier: GPL-2.0-or-later
"""KVM_RUN without Python: what the client sees is the same, and everything that is not plain comes back to Python."""

from __future__ import annotations

import errno
import os
import struct
import threading
import time

import pytest

from kvmfs.abi import exits as kx
from kvmfs.abi import ioctls as K
from kvmfs.kvm import debugfs, stats
from kvmfs.kvm.kvm_main import VCPU_INODE, VM_INODE
from kvmfs.kvm.x86_exits import tap_exits
from tests.unit.machine import ANSWERED, BEGUN, NOT_MINE, RAM, Machine, Req, ask_shortcut

GUEST = f"""
l:  mov al, 0x5a
    out 0x10, al
    mov dx, 0x3f8
    in ax, dx
    out dx, eax
    mov ebx, {RAM + 0x40:#x}
    addr32 mov [ebx], ax
    addr32 mov ecx, [ebx + 8]
    addr32 add dword ptr [ebx + 12], 3
    sti
    nop
    hlt
    cli
    mov si, 0x1000
    outsb
    jmp l
"""
LOOP = "l: out 0x10, al\n jmp l"


@pytest.fixture(params=("amd", "intel"))
def vendor(request):
    return request.param


@pytest.fixture
def machine(vendor):
    m = Machine(vendor, LOOP)
    yield m
    m.close()


def seen(m):
    """Everything that a KVM_RUN leaves to be seen by the client."""
    return m.run(), bytes(m.run_page[:304]), bytes(m.run_page[4096:4104])


def test_the_client_sees_the_same(vendor):
    plain, quick = Machine(vendor, GUEST), Machine(vendor, GUEST)
    try:
        plain.with_shortcut = False
        for turn in range(150):
            assert seen(plain) == seen(quick), turn
            if plain.reason in (kx.KVM_EXIT_IO, kx.KVM_EXIT_MMIO):
                for m in (plain, quick):
                    at = 4096 if m.reason == kx.KVM_EXIT_IO else 40
                    m.run_page[at:at + 2] = struct.pack("<H", 0x1234 + turn)
            if turn % 7 == 0:
                assert plain.regs() == quick.regs()
        assert plain.answered == 0
        assert quick.answered > 60
        assert stats.values(plain.vcpu) == stats.values(quick.vcpu)
        assert stats.exit_reasons(plain.vcpu) == stats.exit_reasons(quick.vcpu)
        counts = quick.dispatch.counts()
        assert counts[K.KVM_RUN] == plain.dispatch.counts()[K.KVM_RUN] == 150
    finally:
        plain.close()
        quick.close()


def ready(m):
    """Armed: the next KVM_RUN is the shortcut's."""
    for _ in range(3):
        assert m.run() == 0
    before = m.answered
    assert m.run() == 0
    assert m.answered == before + 1


def ask(m, cmd=K.KVM_RUN, arg=0, tid=1, inode=VCPU_INODE):
    return ask_shortcut(m.vm, Req(inode, cmd, arg, tid=tid))[0]


def test_what_is_not_its_business(machine):
    ready(machine)
    assert ask(machine, arg=1) == ask(machine, cmd=K.KVM_GET_API_VERSION) == ask(machine, inode=VM_INODE) == NOT_MINE
    assert ask(machine, inode=VCPU_INODE + 1) == ask(machine, inode=VCPU_INODE - 1) == ask(machine, inode=1 << 40) == NOT_MINE
    assert ask(machine, tid=2) == NOT_MINE
    page = machine.run_page
    for at, value in ((0, 1), (1, 1), (16, 3), (288, 1), (296, 1)):
        page[at] = value
        assert ask(machine) == NOT_MINE, at
        page[at] = 0
    assert ask(machine) == ANSWERED


@pytest.mark.parametrize("change", [
    lambda m: m.vcpu.request_work(lambda vcpu: None), lambda m: m.vm.suspend(), lambda m: m.vm.kick_all(),
    lambda m: m.dispatch.tap([lambda level, handler, subject, req: handler(subject, req)]), lambda m: m.regs(),
    lambda m: m.ioctl(VM_INODE, K.KVM_CHECK_EXTENSION, 7), lambda m: m.vcpu_ioctl(K.KVM_NMI)])
def test_who_changes_something_takes_the_vcpu_back(machine, change):
    ready(machine)
    change(machine)
    assert ask(machine) == NOT_MINE


def test_an_exit_that_python_answers(machine):
    ready(machine)
    event = os.eventfd(0, os.EFD_NONBLOCK)
    try:
        data = struct.pack("<QQIiI36x", 0, 0x10, 1, event, 2)      # no datamatch, port 0x10
        assert machine.ioctl(VM_INODE, K.KVM_IOEVENTFD, 1, data)[0] == 0
        threading.Timer(0.2, machine.vm.kick_all).start()
        interrupted = Req(VCPU_INODE, K.KVM_RUN)
        threading.Timer(0.3, lambda: (setattr(interrupted, "interrupted", True), machine.dispatch.interrupt(interrupted))).start()
        assert machine.dispatch.ioctl(interrupted) == -errno.EINTR
        assert os.eventfd_read(event) > 0
    finally:
        os.close(event)


def test_others_wait_while_the_guest_runs(vendor):
    m = Machine(vendor, "l: out 0x10, al\n cmp byte ptr [0x6000], 0\n je l\nk: jmp k")
    try:
        ready(m)
        m.write(0x6000, b"\1")
        request, verdicts, results = Req(VCPU_INODE, K.KVM_RUN), [], []
        runner = threading.Thread(target=lambda: verdicts.append(ask_shortcut(m.vm, request)[0]))
        runner.start()
        deadline = time.monotonic() + 10
        while not m.vcpu.mutex.running() and time.monotonic() < deadline:
            time.sleep(0.001)
        assert debugfs.vcpu_state(m.vcpu) == "guest"
        assert not m.vcpu.mutex.acquire(False)
        other = threading.Thread(target=lambda: results.append(m.regs()["rip"]))
        other.start()
        other.join(0.1)
        assert other.is_alive()
        request.interrupted = True
        m.dispatch.interrupt(request)
        runner.join(10)
        assert verdicts == [BEGUN]
        other.join(0.1)
        assert other.is_alive()                 # it is begun, not over
        assert m.dispatch.go_on(request) == -errno.EINTR
        other.join(10)
        assert len(results) == 1
        assert m.reason == kx.KVM_EXIT_INTR
    finally:
        m.close()


def test_exits_are_told_of(machine):
    ready(machine)
    told = []
    tap_exits(lambda vcpu, kind: told.append(kind))
    try:
        machine.vm.stop_lanes()
        before = machine.answered
        for _ in range(3):
            assert machine.run() == 0
        assert machine.answered == before
        assert len(told) == 3
    finally:
        tap_exits(None)
