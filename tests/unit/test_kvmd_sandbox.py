# SPDX-License-Identifier: GPL-2.0-or-later
"""A worker can do nothing to others: tried in a child that enters the sandbox."""

from __future__ import annotations

import os
import socket
import threading
import traceback

import pytest

from kvmd import sandbox

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="needs root")


def in_sandbox(body) -> str:
    """Run ``body`` in a sandboxed child; returns its text, or a traceback."""
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            sandbox.enter(sandbox.worker_uid(7), [writer])
            text = str(body())
        except BaseException:
            text = traceback.format_exc()
        os.write(writer, text.encode())
        os._exit(0)
    os.close(writer)
    with os.fdopen(reader) as file:
        text = file.read()
    os.waitpid(pid, 0)
    return text


def test_identity_and_capabilities():
    uid = sandbox.worker_uid(7)

    def body():
        with open("/proc/self/status") as file:
            fields = dict(line.split(":", 1) for line in file)
        return [os.getresuid() == (uid, uid, uid), os.getgroups(),
                *[int(fields[name], 16) for name in ("CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb")],
                int(fields["NoNewPrivs"]), int(fields["Seccomp"]), len(os.listdir("/proc/self/fd"))]

    # Descriptors: 0, 1, 2, the pipe, and the one of the listing.
    assert in_sandbox(body) == str([True, [], 0, 0, 0, 0, 0, 1, 2, 5])


def test_what_a_worker_needs_works():
    def body():
        done = []
        thread = threading.Thread(target=done.append, args=(1,))
        thread.start()
        thread.join()
        with open("/proc/self/stat") as file:
            file.read()
        a, b = socket.socketpair()
        a.send(b"x")
        fd = os.memfd_create("x")
        os.ftruncate(fd, 4096)
        return [done, b.recv(1), os.sched_getaffinity(0) != set()]

    assert in_sandbox(body) == str([[1], b"x", True])


@pytest.mark.parametrize("attempt", [
    lambda: os.open("/tmp/kvmfs-escape", os.O_WRONLY | os.O_CREAT),
    lambda: os.open("/dev/null", os.O_RDWR),
    lambda: socket.socket(socket.AF_INET, socket.SOCK_STREAM),
    lambda: socket.socket(socket.AF_UNIX, socket.SOCK_STREAM),
    lambda: os.fork(),
    lambda: os.execv("/bin/true", ["true"]),
    lambda: os.kill(os.getppid(), 0),
    lambda: os.setuid(0),
    lambda: os.unlink("/tmp/nothing"),
    lambda: os.mkdir("/tmp/kvmfs-escape"),
    lambda: os.chroot("/"),
    lambda: os.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(1)),
], ids=["create", "write", "inet", "unix", "fork", "exec", "kill", "setuid", "unlink", "mkdir", "chroot", "realtime"])
def test_what_reaches_others_is_refused(attempt):
    def body():
        try:
            attempt()
        except PermissionError:
            return "refused"
        return "done"

    assert in_sandbox(body) == "refused"
