# SPDX-License-Identifier: GPL-2.0-or-later
"""Messages between the daemon, its zygote and the workers: JSON objects and file descriptors over SOCK_SEQPACKET.

A worker runs guest code and counts as hostile, so whatever arrives is limited in size, must be one JSON object
with a text field ``op``, and every other field is fetched through an accessor that checks type and range.  A
message that breaks these rules raises :class:`LinkError`; the daemon ends the worker that sent it.
"""

from __future__ import annotations

import json
import os
import re
import select
import socket
import struct
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import Any

MAX_MESSAGE = 65536
MAX_FDS = 128
INT = struct.Struct("@i")
SEND_TIMEOUT = 5        # seconds that a peer may leave its queue full before it counts as hung


class LinkError(Exception):
    """The peer broke the protocol."""


class Message:
    """One received message.  Use it as a context manager: descriptors that nobody took are closed at the end."""

    def __init__(self, body: dict[str, Any], fds: list[int]) -> None:
        op = body.get("op")
        if not isinstance(op, str):
            raise LinkError("message without op")
        self.op: str = op
        self.body = body
        self.fds: list[int] = fds

    def integer(self, name: str, low: int = 0, high: int = (1 << 64) - 1) -> int:
        """The field as an integer in ``low..high``."""
        value = self.body.get(name)
        if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
            raise LinkError(f"{self.op}: field {name} is {value!r:.40}, not an integer in {low}..{high}")
        return value

    def text(self, name: str, pattern: str) -> str:
        """The field as text that matches ``pattern`` as a whole."""
        value = self.body.get(name)
        if not isinstance(value, str) or not re.fullmatch(pattern, value, re.ASCII):
            raise LinkError(f"{self.op}: field {name} is {value!r:.40}")
        return value

    def data(self, name: str, limit: int) -> bytes:
        """The field as bytes; they travel as hexadecimal digits."""
        value = self.body.get(name)
        try:
            if isinstance(value, str) and len(value) <= 2 * limit:
                return bytes.fromhex(value)
        except ValueError:
            pass
        raise LinkError(f"{self.op}: field {name} is not at most {limit} bytes in hexadecimal")

    def texts(self, name: str, limit: int = 100) -> list[str]:
        """The field as a list of at most ``limit`` texts; an absent one is empty."""
        value = self.body.get(name, [])
        if not isinstance(value, list) or len(value) > limit or not all(isinstance(item, str) for item in value):
            raise LinkError(f"{self.op}: field {name} is not a list of at most {limit} texts")
        return value

    def items(self, name: str, limit: int) -> list[Message]:
        """The field as a list of at most ``limit`` objects, with the same accessors."""
        value = self.body.get(name)
        if not isinstance(value, list) or len(value) > limit or not all(isinstance(i, dict) for i in value):
            raise LinkError(f"{self.op}: field {name} is not a list of at most {limit} objects")
        return [Message({**item, "op": f"{self.op}.{name}"}, []) for item in value]

    def expect(self, *ops: str) -> Message:
        """This message, when its op is one of ``ops``."""
        if self.op not in ops:
            raise LinkError(f"got {self.op!r:.40} where {' or '.join(ops)} was due")
        return self

    def take_fds(self) -> list[int]:
        """The descriptors; from now on the caller closes them."""
        fds, self.fds = self.fds, []
        return fds

    def close(self) -> None:
        for fd in self.take_fds():
            os.close(fd)

    def __enter__(self) -> Message:
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None,
                 traceback: TracebackType | None) -> None:
        self.close()


class Link:
    """One end of a link.  Not locked: each end has one user at a time, or its user locks."""

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, struct.pack("@ll", SEND_TIMEOUT, 0))

    @classmethod
    def pair(cls) -> tuple[Link, Link]:
        one, other = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        return cls(one), cls(other)

    @classmethod
    def from_fd(cls, fd: int) -> Link:
        return cls(socket.socket(fileno=fd))

    def fileno(self) -> int:
        return self._sock.fileno()

    def send(self, op: str, fds: Sequence[int] = (), **fields: Any) -> None:
        """Send one message.

        Raises BrokenPipeError or ConnectionResetError when the peer is gone, BlockingIOError when it did not
        read for SEND_TIMEOUT seconds, OSError(EMSGSIZE) for a message over MAX_MESSAGE.
        """
        data = json.dumps({"op": op, **fields}, separators=(",", ":")).encode()
        if len(data) > MAX_MESSAGE or len(fds) > MAX_FDS:
            raise OSError(90, f"message {op} of {len(data)} bytes with {len(fds)} descriptors is too long")
        socket.send_fds(self._sock, [data], list(fds), socket.MSG_NOSIGNAL)

    def receive(self, timeout: float | None = None) -> Message | None:
        """The next message, or None when the peer is gone.

        Raises TimeoutError after ``timeout`` seconds, LinkError for what is no proper message.
        """
        if timeout is not None:
            poll = select.poll()
            poll.register(self._sock, select.POLLIN)
            if not poll.poll(timeout * 1000):
                raise TimeoutError(f"no message within {timeout:g} s")
        try:
            # Not socket.recv_fds: it drops its flags argument (CPython 3.11).
            data, control, flags, _ = self._sock.recvmsg(MAX_MESSAGE, socket.CMSG_SPACE(MAX_FDS * INT.size),
                                                         socket.MSG_CMSG_CLOEXEC)
        except ConnectionResetError:
            return None
        fds = [fd for level, kind, payload in control if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS)
               for fd, in INT.iter_unpack(payload[:len(payload) // INT.size * INT.size])]
        try:
            if not data:
                if fds:
                    raise LinkError("descriptors without a message")
                return None
            if flags & (socket.MSG_TRUNC | socket.MSG_CTRUNC):
                raise LinkError("message too long")
            return Message(self._parse(data), fds)
        except LinkError:
            for fd in fds:
                os.close(fd)
            raise

    @staticmethod
    def _parse(data: bytes) -> dict[str, Any]:
        try:
            body = json.loads(data)
        except (ValueError, RecursionError) as error:
            raise LinkError(f"not JSON: {error}") from None
        if not isinstance(body, dict):
            raise LinkError("not a JSON object")
        return body

    def call(self, op: str, fds: Sequence[int] = (), *, timeout: float | None = None,
             **fields: Any) -> Message:
        """Send and wait for the one answer.  Raises what :meth:`send` and :meth:`receive` raise."""
        self.send(op, fds, **fields)
        answer = self.receive(timeout)
        if answer is None:
            raise BrokenPipeError(32, f"the peer ended before it answered {op}")
        return answer

    def shutdown(self) -> None:
        """Let both sides read the end of the link; the descriptor stays for a thread that is still in it."""
        try:
            self._sock.shutdown(socket.SHUT_RDWR)
        except OSError:
            pass

    def close(self) -> None:
        self._sock.close()


def failure(error: BaseException) -> Mapping[str, Any]:
    """The fields of an answer that reports ``error``."""
    number = error.errno if isinstance(error, OSError) and error.errno else 5
    text = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    return {"errno": number, "text": text[:500]}
