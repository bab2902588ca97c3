# SPDX-License-Identifier: GPL-2.0-or-later
"""The link between the daemon and what it does not trust."""

from __future__ import annotations

import os
import socket

import pytest

from kvmd.link import MAX_MESSAGE, Link, LinkError, Message


@pytest.fixture
def raw():
    """A link and the plain socket at its other end."""
    one, other = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    yield Link(one), other
    one.close()
    other.close()


def test_message_and_descriptors_travel():
    one, other = Link.pair()
    reader, writer = os.pipe()
    one.send("graft", [writer], tid=7, name="kvm-vm")
    os.close(writer)
    with other.receive(1) as message:
        assert (message.op, message.integer("tid"), message.text("name", "kvm-[a-z]+")) == ("graft", 7, "kvm-vm")
        assert not os.get_inheritable(message.fds[0])
        os.write(message.fds[0], b"x")
    assert os.read(reader, 10) == b"x"
    assert os.read(reader, 10) == b""       # leaving the block closed the descriptor that nobody took
    os.close(reader)


def test_end_and_timeout():
    one, other = Link.pair()
    with pytest.raises(TimeoutError):
        one.receive(0.01)
    other.close()
    assert one.receive() is None
    with pytest.raises(BrokenPipeError):
        one.send("ping")


@pytest.mark.parametrize("data", [
    b"{", b"[]", b"7", b"{}", b'{"op":7}', b'{"op":["x"]}', b"\xff\xfe", b"[" * 60000, b'{"op":"x"} {"op":"y"}',
    b'{"op":"' + b"x" * (MAX_MESSAGE + 10),
])
def test_broken_messages_are_refused_and_leak_nothing(raw, data):
    link, other = raw
    reader, writer = os.pipe()
    socket.send_fds(other, [data], [writer])
    os.close(writer)
    with pytest.raises(LinkError):
        link.receive(1)
    assert os.read(reader, 1) == b""
    os.close(reader)


@pytest.mark.parametrize("value", [None, -1, 1 << 70, 1.0, True, "7", [7], {"a": 7}])
def test_integers_are_checked(value):
    with pytest.raises(LinkError):
        Message({"op": "x", "tid": value}, []).integer("tid", 0, (1 << 31) - 1)


@pytest.mark.parametrize("value", [None, 7, "", "kvm-vm/..", "kvm-vm\n", "kvm-\u0663", "../x", "x" * 1000])
def test_text_is_checked(value):
    with pytest.raises(LinkError):
        Message({"op": "x", "name": value}, []).text("name", r"kvm-[a-z]{1,16}(:\d{1,10})?")


def test_lists_are_limited():
    message = Message({"op": "x", "many": [{"a": 1}] * 3, "odd": [1]}, [])
    assert [item.integer("a") for item in message.items("many", 3)] == [1, 1, 1]
    for name, limit in (("many", 2), ("odd", 2), ("none", 2)):
        with pytest.raises(LinkError):
            message.items(name, limit)
