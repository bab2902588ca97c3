# SPDX-License-Identifier: GPL-2.0-or-later
"""A small FUSE server in a process of its own, whose ioctls the test answers, and clients in C that call them.

KVM_GET_API_VERSION is answered at once; KVM_RUN waits until it is interrupted (EINTR) or answered; every other ioctl waits for
the test's answer.
"""

import contextlib
import ctypes
import json
import os
import select
import socket
import struct
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

GET_API_VERSION = 0xAE00
KVM_RUN = 0xAE80
CREATE_VCPU = 0xAE41
SET_MEMORY = 0x4020AE46

_HEADER = struct.Struct("<IIQQIIIHH")


def usable() -> bool:
    """Whether FUSE can be mounted here."""
    return os.access("/dev/fuse", os.R_OK | os.W_OK) and os.geteuid() == 0


def _call(number: int, *args: object) -> int:
    libc = ctypes.CDLL(None, use_errno=True)
    result: int = libc.syscall(number, *args)
    if result < 0:
        raise OSError(ctypes.get_errno(), f"system call {number}: {os.strerror(ctypes.get_errno())}")
    return result


def detached_mount() -> tuple[int, int]:
    """A FUSE mount without a path: (the server's descriptor, the mount's)."""
    fuse = os.open("/dev/fuse", os.O_RDWR | os.O_CLOEXEC)
    fs = _call(430, b"fuse", 1)
    for key, value in (("source", "rig"), ("fd", str(fuse)), ("rootmode", "40000"), ("user_id", "0"), ("group_id", "0")):
        _call(431, fs, 1, key.encode(), value.encode(), 0)
    _call(431, fs, 0, b"allow_other", None, 0)
    _call(431, fs, 6, None, None, 0)
    mount = _call(432, fs, 1, 0)
    os.close(fs)
    return fuse, mount


@dataclass
class Call:
    """An ioctl that waits for its answer."""

    unique: int
    tid: int
    cmd: int
    arg: int
    data: bytes


class Rig:
    """The test's end: `fd` is an open file whose ioctls come out of `call`."""

    def __init__(self) -> None:
        fuse, mount = detached_mount()
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._server = subprocess.Popen(
            [sys.executable, __file__, str(fuse), str(theirs.fileno())], pass_fds=(fuse, theirs.fileno())
        )
        theirs.close()
        os.close(fuse)
        self._control = ours
        ours.settimeout(20)
        self.fd = os.open("kvm", os.O_RDWR | os.O_CLOEXEC, dir_fd=mount)
        os.close(mount)
        self._runs: list[Call] = []

    def call(self, cmd: int | None = None, timeout: float = 20) -> Call:
        """The next ioctl (of number `cmd`) that waits."""
        deadline = time.monotonic() + timeout
        while True:
            for seen in self._runs:
                if cmd in (None, seen.cmd):
                    self._runs.remove(seen)
                    return seen
            self._control.settimeout(max(deadline - time.monotonic(), 0.01))
            message = json.loads(self._control.recv(65536))
            message["data"] = bytes.fromhex(message["data"])
            self._runs.append(Call(**message))

    def answer(self, call: Call, result: int) -> None:
        """Let it return `result`."""
        self._control.send(json.dumps({"unique": call.unique, "result": result}).encode())

    def close(self) -> None:
        """End the server; whoever still waits gets an error."""
        os.close(self.fd)
        self._control.close()
        try:
            self._server.wait(5)
        except subprocess.TimeoutExpired:
            self._server.kill()
            self._server.wait()


def start(program: Path, fd: int, *args: object, **options: object) -> "subprocess.Popen[str]":
    """Start a client, which moves `fd` to descriptor 3.

    A shell is its parent: that of a child of ours, a tracer's waitpid would take the exit status away from Popen.
    """
    return subprocess.Popen(
        ["/bin/sh", "-c", '"$0" "$@"; exit $?', str(program), *map(str, args)],
        pass_fds=(fd,),
        stdout=subprocess.PIPE,
        stdin=subprocess.PIPE,
        text=True,
        env={**os.environ, "RIG_FD": str(fd)},
        **options,
    )


def compile_client(directory: Path, *, static: bool = False) -> Path:
    """Build client.c beside this file."""
    program = directory / ("client-static" if static else "client")
    source = Path(__file__).with_name("client.c")
    command = ["cc", "-O1", "-Wall", "-Werror", "-pthread", "-o", str(program), str(source)]
    subprocess.run([*command, *(["-static"] if static else [])], check=True)
    return program


def _serve(fuse: int, control: socket.socket) -> None:
    buffer = bytearray(1 << 20)
    running: set[int] = set()
    early: set[int] = set()

    def reply(unique: int, data: bytes = b"", error: int = 0) -> None:
        with contextlib.suppress(FileNotFoundError):
            os.write(fuse, struct.pack("<IiQ", 16 + len(data), -error, unique) + data)

    def attributes(mode: int, node: int) -> bytes:
        return struct.pack("<QQQQQQIIIIIIIIII", node, 0, 0, 0, 0, 0, 0, 0, 0, mode, 1, 0, 0, 0, 4096, 0)

    poll = select.poll()
    poll.register(fuse, select.POLLIN)
    poll.register(control, select.POLLIN)
    while True:
        ready = dict(poll.poll())
        if control.fileno() in ready:
            try:
                message = control.recv(65536)
            except ConnectionResetError:
                return
            if not message:
                return
            answer = json.loads(message)
            running.discard(answer["unique"])
            if answer["result"] < 0:
                reply(answer["unique"], error=-answer["result"])
            else:
                reply(answer["unique"], struct.pack("<iIII", answer["result"], 0, 0, 0))
        if fuse not in ready:
            continue
        try:
            os.readv(fuse, [buffer])
        except OSError as e:
            if e.errno == 19:
                return
            continue
        length, op, unique, node, _uid, _gid, tid, _, _ = _HEADER.unpack_from(buffer)
        if op == 26:
            version = (7, 31, 65536, 0, 16, 12, 65536, 1, 16, 0, 0, 0, 0, 0)
            reply(unique, struct.pack("<IIIIHHIIHHIIHH", *version) + bytes(20))
        elif op == 1:
            reply(unique, struct.pack("<QQQQII", 2, 0, 1, 1, 0, 0) + attributes(0o100666, 2))
        elif op == 3:
            reply(unique, struct.pack("<QII", 1, 0, 0) + attributes(0o40755 if node == 1 else 0o100666, node))
        elif op == 14:
            reply(unique, struct.pack("<QIi", 1, 1, 0))
        elif op == 39:
            _fh, _flags, cmd, arg, _in, _out = struct.unpack_from("<QIIQII", buffer, 40)
            if cmd == GET_API_VERSION:
                reply(unique, struct.pack("<iIII", 12, 0, 0, 0))
                continue
            if cmd == KVM_RUN:
                if unique in early:
                    reply(unique, error=4)
                    continue
                running.add(unique)
            call = {"unique": unique, "tid": tid, "cmd": cmd, "arg": arg, "data": bytes(buffer[72:length]).hex()}
            control.send(json.dumps(call).encode())
        elif op == 36:
            (target,) = struct.unpack_from("<Q", buffer, 40)
            if target in running:
                running.discard(target)
                reply(target, error=4)
            else:
                early.add(target)
        elif op not in (2, 42):
            reply(unique, error=0 if op in (18, 25) else 38)


if __name__ == "__main__":
    _serve(int(sys.argv[1]), socket.socket(fileno=int(sys.argv[2])))
