# SPDX-License-Identifier: GPL-2.0-or-later
"""The worker's part of a trace."""

import socket

import pytest

from kvmd.link import Link, Message
from kvmd.window import Window
from kvmfs.abi import ioctls as K
from kvmfs.kvm.kvm_main import VM_INODE
from tests.unit.machine import Machine


@pytest.fixture
def traced():
    m = Machine("amd", "out 0x10, al; out 0x10, al; out 0x10, al; hlt")
    window = Window(m.vm, m.dispatch, 3)

    def trace(ident, exits):
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        window.obey(Message({"op": "trace", "id": ident, "exits": exits}, [theirs.detach()]))
        return Link(ours)

    yield m, window, trace
    for ident in (1, 2):
        window.obey(Message({"op": "untrace", "id": ident}, []))
    m.close()


def records(link):
    found = []
    while True:
        try:
            message = link.receive(0.05)
        except TimeoutError:
            return found
        if message is None:
            return found
        found.append(message.op)


def test_two_traces_of_exits(traced):
    """One ends, the other goes on."""
    m, window, trace = traced
    first, second = trace(1, 1), trace(2, 1)
    m.run()
    seen = records(first)
    assert seen == records(second) and set(seen) == {"exit"}
    window.obey(Message({"op": "untrace", "id": 2}, []))
    m.run()
    assert set(records(first)) == {"exit"} and records(second) == []


def test_exits_and_ioctls(traced):
    m, _, trace = traced
    exits, ioctls = trace(1, 1), trace(2, 0)
    m.ioctl(VM_INODE, K.KVM_SET_TSS_ADDR, 0x1000)
    assert (records(exits), records(ioctls)) == ([], ["ioctl"])


def test_a_reader_that_is_gone_is_forgotten(traced):
    m, _, trace = traced
    trace(1, 1).close()
    m.run()
    m.run()
    assert records(trace(2, 1)) == []
