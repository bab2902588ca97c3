# SPDX-License-Identifier: GPL-2.0-or-later
"""Memory slots that come, go and move while a vCPU runs: as soon as the ioctl is over the guest has the new ones."""

import struct
import threading
import time
from functools import partial
from types import SimpleNamespace

import pytest

from kvmfs.abi.exits import KVM_EXIT_HLT, KVM_EXIT_MMIO
from tests.unit.machine import Machine

READONLY = 2
HIGH, OTHER = 0x100000, 0x300000       # ffff:0010, which real mode reaches; elsewhere
BOX, STOP, GATE = 0x3000, 0x3010, 0x3020
SHOWN = {0x1111: 0x20000, 0x2222: 0x30000}      # what is found in the memory at these offsets
NOTHING = 0xEEEE                        # what a read gets where no memory is
VENDORS = pytest.mark.parametrize("vendor", ["amd", "intel"])


class Running:
    """The guest stores what it finds at HIGH into BOX, over and over; a thread is its client."""

    def __init__(self, vendor, look):
        self.m = Machine(vendor, f"1: {look}; mov [{BOX}], ax; cmp byte ptr [{STOP}], 0; je 1b; hlt")
        sregs = self.m.sregs()
        sregs.es.base, sregs.es.selector = 0xFFFF0, 0xFFFF
        assert self.m.set_sregs(sregs) == 0
        for value, at in SHOWN.items():
            self.m.write(at, struct.pack("<H", value))
        if ".byte" in look:
            for value, at in SHOWN.items():
                self.m.write(at, b"\xb8" + struct.pack("<H", value) + b"\xcb")     # mov ax, value; retf
            assert self.m.region(1, 0, HIGH, 0x1000, SHOWN[0x1111]) == 0
        self.failure = None
        self.thread = threading.Thread(target=self._client)

    def _client(self):
        m = self.m
        try:
            while True:
                result = m.run()
                assert result == 0, result
                if m.reason == KVM_EXIT_MMIO:
                    gpa, _, is_write = m.mmio()
                    assert (gpa, is_write) == (HIGH, 0)
                    struct.pack_into("<H", m.run_page, 40, NOTHING)
                elif m.reason == KVM_EXIT_HLT:
                    return
                else:
                    raise AssertionError(m.reason)
        except BaseException as error:
            self.failure = error
            raise

    def expect(self, value):
        """The guest finds it from now on."""
        deadline = time.monotonic() + 10
        self.m.write(BOX, b"\0\0")
        found = []
        while time.monotonic() < deadline and self.failure is None:
            got, = struct.unpack("<H", self.m.read(BOX, 2))
            if got and (not found or found[-1] != got):
                found.append(got)
            if got == value:
                break
            time.sleep(0.0002)
        assert found[-1:] == [value], (found, self.failure)
        # At most one look was under way when the ioctl returned.
        assert len(found) <= 2, found

    def __enter__(self):
        self.thread.start()
        return self

    def __exit__(self, *_):
        self.m.write(STOP, b"\x01")
        self.thread.join(20)
        assert not self.thread.is_alive()
        self.m.close()


@VENDORS
def test_data(vendor):
    """A BAR that is moved about, an option ROM that is switched on and off, memory in the place of other memory."""
    with Running(vendor, "mov ax, es:[0x10]") as guest:
        m = guest.m
        guest.expect(NOTHING)
        for _ in range(15):
            assert m.region(1, 0, HIGH, 0x1000, 0x20000) == 0
            guest.expect(0x1111)
            assert m.region(1, 0, OTHER, 0x1000, 0x20000) == 0
            guest.expect(NOTHING)
            assert m.region(2, READONLY, HIGH, 0x1000, 0x30000) == 0
            guest.expect(0x2222)
            assert m.region(2, 0, 0, 0, 0) == 0
            assert m.region(1, 0, HIGH, 0x1000, 0x20000) == 0
            guest.expect(0x1111)
            assert m.region(1, 0, 0, 0, 0) == 0
            guest.expect(NOTHING)


@VENDORS
def test_code(vendor):
    """What was translated from a slot is not executed from another one in its place."""
    gate = f"2: mov al, [{GATE}]; mov [{GATE + 1}], al; test al, al; jne 2b; "
    with Running(vendor, gate + ".byte 0x9a, 0x10, 0, 0xff, 0xff") as guest:        # call ffff:0010
        m = guest.m

        def show(value):
            m.write(GATE, b"\x01")              # nobody is in the slot while it is not there
            deadline = time.monotonic() + 10
            while m.read(GATE + 1, 1) != b"\x01" and time.monotonic() < deadline:
                time.sleep(0.0002)
            assert m.region(1, 0, 0, 0, 0) == 0
            assert m.region(1, READONLY if value == 0x2222 else 0, HIGH, 0x1000, SHOWN[value]) == 0
            m.write(GATE, b"\0")
            guest.expect(value)

        for _ in range(15):
            show(0x1111)
            show(0x2222)
        show(0x1111)


@pytest.mark.parametrize("size", [0, 0x1000], ids=["goes", "moves"])
@pytest.mark.parametrize("write", [False, True])
def test_memory_stays_while_the_machine_uses_it(monkeypatch, size, write):
    """A device, or a store of the guest that met no memory at that moment: what it found is there until it is done."""
    m = Machine("amd")
    assert m.region(1, 0, OTHER, 0x1000, 0x20000) == 0
    order, inside = [], threading.Event()

    def slow(*_):
        inside.set()
        time.sleep(0.05)
        order.append("used")
        return b""

    memory = SimpleNamespace(memmove=slow, string_at=slow)
    monkeypatch.setattr("kvmfs.kvm.memslots.ctypes", memory)
    use = partial(m.vm.memslots.write, OTHER, b"x") if write else partial(m.vm.memslots.read, OTHER, 1)
    thread = threading.Thread(target=use)
    thread.start()
    assert inside.wait(10)
    monkeypatch.undo()
    assert m.region(1, 0, OTHER + 0x10000, size, 0x20000) == 0
    order.append("changed")
    thread.join(10)
    m.close()
    assert order == ["used", "changed"]
