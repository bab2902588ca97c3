# SPDX-License-Identifier: GPL-2.0-or-later
"""Descriptors by seccomp user notification, also for a client under a tracer."""

import ctypes
import errno
import os
import select
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable

import pytest

from kvmfs.client.notify import Notification, Notifier, install_filter
from kvmfs.client.syscalls import SYS_MMAP

CREATE_VM = 0xAE01
CLIENT = """
import fcntl, os, sys
f = os.open("/dev/null", os.O_RDWR)
for cmd, arg in ((0xAE01, 5), (0xAE41, 6), (0xC00CAEE0, 0), (0xAE03, 0), (0x5413, 0)):
    try:
        n = fcntl.ioctl(f, cmd, arg)
        print(n, os.readlink(f"/proc/self/fd/{n}"), fcntl.fcntl(n, fcntl.F_GETFD))
    except OSError as e:
        print("errno", e.errno)
    sys.stdout.flush()
"""


def start(*command: str) -> "tuple[subprocess.Popen[str], Notifier]":
    """Start a program under the filter, as `kvmfs run` does; its listener comes through a socket."""
    ours, theirs = socket.socketpair()

    def prepare() -> None:
        listener = install_filter()
        assert not os.get_inheritable(listener)
        socket.send_fds(theirs, [b"x"], [listener])

    client = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, preexec_fn=prepare)
    theirs.close()
    _, fds, _, _ = socket.recv_fds(ours, 1, 1)
    ours.close()
    return client, Notifier(fds[0])


def serve(notifier: Notifier, handle: Callable[[Notification], None]) -> threading.Thread:
    def loop() -> None:
        poll = select.poll()
        poll.register(notifier, select.POLLIN)
        while True:
            ((_, event),) = poll.poll()
            if event & select.POLLHUP:
                return
            try:
                handle(notifier.recv())
            except OSError as e:
                if e.errno != errno.ENOENT:
                    raise

    thread = threading.Thread(target=loop)
    thread.start()
    return thread


@pytest.mark.parametrize("traced", [False, True])
def test_descriptors(traced: bool) -> None:
    memfd = os.memfd_create("given")
    seen: list[Notification] = []
    client: subprocess.Popen[str]

    def handle(held: Notification) -> None:
        seen.append(held)
        assert notifier.valid(held.id)
        if held.cmd == CREATE_VM:
            notifier.add_fd_and_return(held.id, memfd)
        elif held.cmd == 0xAE41:
            notifier.respond(held.id, -1, errno.EEXIST)
        else:
            notifier.cont(held.id)
        assert not notifier.valid(held.id)

    trace = [sys.executable, "-c", TRACE] if traced else []
    client, notifier = start(*trace, sys.executable, "-c", CLIENT)
    server = serve(notifier, handle)
    out, _ = client.communicate(timeout=20)
    server.join(5)
    notifier.close()
    assert out.splitlines() == [
        "4 /memfd:given (deleted) 1",
        f"errno {errno.EEXIST}",
        f"errno {errno.ENOTTY}",  # went on to /dev/null
        f"errno {errno.ENOTTY}",  # these two were never notified
        f"errno {errno.ENOTTY}",
    ]
    assert [(held.cmd, held.arg, held.fd) for held in seen[:2]] == [(CREATE_VM, 5, 3), (0xAE41, 6, 3)]
    assert len(seen) == 3 and all(held.tid == seen[0].tid for held in seen)
    os.close(memfd)


MAPPINGS = """
import os, sys, tempfile
from mmap import ALLOCATIONGRANULARITY, MAP_DENYWRITE, MAP_PRIVATE, MAP_SHARED, PROT_EXEC, PROT_READ, PROT_WRITE, mmap
file = tempfile.TemporaryFile()
file.truncate(3 << 20)
PAGE, RING, END = ALLOCATIONGRANULARITY, 64 * 4096, (64 + 256) * 4096
print(file.fileno())
for flags, protection, offset in (
        (MAP_PRIVATE, PROT_READ, RING), (MAP_PRIVATE, PROT_READ | PROT_WRITE, END - PAGE),
        (MAP_SHARED, PROT_READ | PROT_EXEC, RING), (MAP_PRIVATE, PROT_READ, RING - PAGE), (MAP_PRIVATE, PROT_READ, END),
        (MAP_SHARED, PROT_READ | PROT_WRITE, RING), (MAP_PRIVATE | MAP_DENYWRITE, PROT_READ | PROT_EXEC, RING)):
    try:
        mmap(file.fileno(), PAGE, flags, protection, offset=offset)
        print("mapped")
    except OSError as e:
        print("errno", e.errno)
"""


def test_mappings_of_a_dirty_ring() -> None:
    """Held: private or executable ones where a ring may be, but not those of a dynamic linker."""
    seen: list[Notification] = []

    def handle(held: Notification) -> None:
        seen.append(held)
        if len(seen) == 1:
            notifier.respond(held.id, 0, errno.EINVAL)
        else:
            notifier.cont(held.id)

    client, notifier = start(sys.executable, "-c", MAPPINGS)
    server = serve(notifier, handle)
    out, _ = client.communicate(timeout=20)
    server.join(5)
    notifier.close()
    number, *results = out.splitlines()
    assert results == [f"errno {errno.EINVAL}", *["mapped"] * 6]
    assert [(held.nr, held.fd, held.offset) for held in seen] == [
        (SYS_MMAP, int(number), offset) for offset in (64 * 4096, 319 * 4096, 64 * 4096)]


# Runs a program under ptrace, letting every stop go on.
TRACE = """
import ctypes, os, signal, sys
ptrace = ctypes.CDLL(None).ptrace
child = os.fork()
if child == 0:
    ptrace(0, 0, None, None)
    os.execv(sys.argv[1], sys.argv[1:])
while True:
    _, status = os.waitpid(child, 0)
    if not os.WIFSTOPPED(status):
        break
    number = os.WSTOPSIG(status)
    ptrace(7, child, None, ctypes.c_void_p(0 if number == signal.SIGTRAP else number))
"""


def test_full_table_and_death() -> None:
    code = "import fcntl, os, resource\nf = os.open('/dev/null', 2)\nresource.setrlimit(resource.RLIMIT_NOFILE, (4, 4))\n"
    code += "try: fcntl.ioctl(f, 0xAE01, 0)\nexcept OSError as e: print(e.errno, flush=True)\nfcntl.ioctl(f, 0xAE01, 0)"
    client, notifier = start(sys.executable, "-c", code)
    held = notifier.recv()
    with pytest.raises(OSError) as caught:
        notifier.add_fd_and_return(held.id, 0)
    assert caught.value.errno == errno.EMFILE
    notifier.respond(held.id, 0, errno.EMFILE)
    assert client.stdout is not None and client.stdout.readline() == f"{errno.EMFILE}\n"
    held = notifier.recv()
    client.kill()
    client.wait(5)
    assert not notifier.valid(held.id)
    for answer in (lambda: notifier.respond(held.id, 0), lambda: notifier.cont(held.id)):
        with pytest.raises(OSError) as caught:
            answer()
        assert caught.value.errno == errno.ENOENT
    client.stdout.close()
    notifier.close()


def test_signals_do_not_interrupt() -> None:
    code = "import fcntl, os, signal\nsignal.signal(signal.SIGALRM, lambda *a: None)\nf = os.open('/dev/null', 2)\n"
    code += "signal.setitimer(signal.ITIMER_REAL, 0.01, 0.01)\nprint(fcntl.ioctl(f, 0xAE01, 0))"
    client, notifier = start(sys.executable, "-c", code)
    held = notifier.recv()
    time.sleep(0.1)
    number = notifier.add_fd_and_return(held.id, 0)
    out, _ = client.communicate(timeout=5)
    assert out == f"{number}\n"
    notifier.close()


def test_unprivileged() -> None:
    """Without CAP_SYS_ADMIN no_new_privs is needed, and set."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            if os.getuid() == 0:
                os.setgroups([])
                os.setuid(65534)
            listener = install_filter()
            nnp = ctypes.CDLL(None).prctl(39, 0, 0, 0, 0)
            os.write(writer, f"{listener > 2} {nnp}".encode())
        finally:
            os.kill(os.getpid(), signal.SIGKILL)
    os.waitpid(child, 0)
    assert os.read(reader, 100) == b"True 1"
    os.close(reader)
    os.close(writer)


def test_listener_closed() -> None:
    code = "import fcntl, os\nf = os.open('/dev/null', 2)\ntry: fcntl.ioctl(f, 0xAE01, 0)\nexcept OSError as e: print(e.errno)"
    client, notifier = start(sys.executable, "-c", code)
    notifier.close()
    notifier.close()
    out, _ = client.communicate(timeout=5)
    assert out == f"{errno.ENOSYS}\n"
