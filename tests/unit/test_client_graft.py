# SPDX-License-Identifier: GPL-2.0-or-later
"""Descriptors grafted into clients of all kinds."""

import contextlib
import errno
import fcntl
import os
import resource
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from kvmfs.client.tracer import ClientGoneError, Thread, TracedError, settle
from tests.unit import client_rig
from tests.unit.client_rig import CREATE_VCPU, Rig, start

pytestmark = pytest.mark.skipif(not client_rig.usable(), reason="needs root and /dev/fuse")


@pytest.fixture
def memfd() -> Iterator[int]:
    fd = os.memfd_create("grafted")
    yield fd
    os.close(fd)


KILLED = 128 + signal.SIGKILL


def graft(rig: Rig, fd: int, *, cloexec: bool = True) -> int:
    call = rig.call(CREATE_VCPU)
    thread = Thread.seize(call.tid)
    rig.answer(call, 0)
    thread.arrive()
    number = thread.graft(fd, cloexec=cloexec)
    thread.finish(number)
    return number


def lines(client: "subprocess.Popen[str]") -> list[list[int]]:
    out, _ = client.communicate(timeout=20)
    assert client.returncode == 0
    return [[int(word) for word in line.split()] for line in out.splitlines()]


def test_lowest_number_and_flags(rig: Rig, program: Path, memfd: int) -> None:
    client = start(program, rig.fd, "grafts", 4)
    assert [graft(rig, memfd, cloexec=i != 2) for i in range(4)] == [4, 5, 6, 7]
    inode = os.fstat(memfd).st_ino
    assert lines(client) == [[4, 0, inode, 1], [5, 0, inode, 1], [6, 0, inode, 0], [7, 0, inode, 1]]


@pytest.mark.parametrize("kind", ["thread", "uid", "namespaces", "leaderless"])
def test_kinds_of_client(rig: Rig, program: Path, memfd: int, kind: str) -> None:
    client = start(program, rig.fd, kind, 2)
    assert [graft(rig, memfd), graft(rig, memfd)] == [4, 5]
    inode = os.fstat(memfd).st_ino
    assert lines(client) == [[4, 0, inode, 1], [5, 0, inode, 1]]


def test_static_client(rig: Rig, tmp_path: Path, memfd: int) -> None:
    try:
        static = client_rig.compile_client(tmp_path, static=True)
    except subprocess.CalledProcessError:
        pytest.skip("no static C library")
    client = start(static, rig.fd, "grafts", 2)
    assert [graft(rig, memfd), graft(rig, memfd)] == [4, 5]
    assert len(lines(client)) == 2


def test_python_client(rig: Rig, memfd: int) -> None:
    code = f"import fcntl, os; n = fcntl.ioctl({rig.fd}, {CREATE_VCPU}, 0); print(n, os.fstat(n).st_ino)"
    client = start(Path(sys.executable), rig.fd, "-c", code)
    number = graft(rig, memfd)
    assert lines(client) == [[number, os.fstat(memfd).st_ino]]


def test_killing_seccomp_filter(rig: Rig, program: Path, memfd: int) -> None:
    client = start(program, rig.fd, "seccomp")
    assert graft(rig, memfd) == 4
    assert lines(client) == [[4]]


def test_error_return(rig: Rig, program: Path) -> None:
    client = start(program, rig.fd, "grafts", 1)
    call = rig.call()
    thread = Thread.seize(call.tid)
    rig.answer(call, 0)
    thread.arrive()
    thread.finish(-errno.EEXIST)
    assert lines(client) == [[-1, errno.EEXIST, 0, 0]]


def test_full_descriptor_table(rig: Rig, program: Path, memfd: int) -> None:
    client = start(program, rig.fd, "grafts", 2)
    call = rig.call(CREATE_VCPU)
    resource.prlimit(call.tid, resource.RLIMIT_NOFILE, (4, 100))
    thread = Thread.seize(call.tid)
    rig.answer(call, 0)
    thread.arrive()
    with pytest.raises(OSError) as caught:
        thread.graft(memfd)
    assert caught.value.errno == errno.EMFILE
    thread.finish(-errno.EMFILE)
    # Room for the socket only: nothing may be left behind.
    call = rig.call(CREATE_VCPU)
    resource.prlimit(call.tid, resource.RLIMIT_NOFILE, (5, 100))
    before = sorted(os.listdir(f"/proc/{call.tid}/fd"))
    thread = Thread.seize(call.tid)
    rig.answer(call, 0)
    thread.arrive()
    with contextlib.suppress(OSError):
        thread.graft(memfd)
        pytest.fail("there was no room")
    assert sorted(os.listdir(f"/proc/{call.tid}/fd")) == before
    thread.finish(-errno.EMFILE)
    assert lines(client) == [[-1, errno.EMFILE, 0, 0]] * 2


def test_signal_storm(rig: Rig, program: Path, memfd: int) -> None:
    client = start(program, rig.fd, "storm", 150)
    for _ in range(150):
        graft(rig, memfd)
    out, _ = client.communicate(timeout=20)
    assert out == "bad=0 eintr=0 alarms=1 blocked=0\n"


def test_queued_signal_keeps_its_value(rig: Rig, program: Path, memfd: int) -> None:
    client = start(program, rig.fd, "queued")
    call = rig.call(CREATE_VCPU)
    thread = Thread.seize(call.tid)
    subprocess.run(["python3", "-c", QUEUE, str(call.tid)], check=True)
    rig.answer(call, 0)
    thread.arrive()
    thread.finish(thread.graft(memfd))
    out, _ = client.communicate(timeout=20)
    assert out == "ready\n4 42\n"


QUEUE = """
import ctypes, sys, signal
ctypes.CDLL(None).sigqueue(int(sys.argv[1]), signal.SIGRTMIN, ctypes.c_void_p(42))
"""


def test_stop_signal_during_injection(rig: Rig, program: Path, memfd: int) -> None:
    client = start(program, rig.fd, "grafts", 1)
    call = rig.call(CREATE_VCPU)
    thread = Thread.seize(call.tid)
    rig.answer(call, 0)
    thread.arrive()
    os.kill(call.tid, signal.SIGSTOP)
    number = thread.graft(memfd)
    thread.finish(number)
    deadline = time.monotonic() + 5
    while Path(f"/proc/{call.tid}/stat").read_text().rpartition(")")[2].split()[0] != "T":
        assert time.monotonic() < deadline, "the stop was lost"
        time.sleep(0.01)
    os.kill(call.tid, signal.SIGCONT)
    assert lines(client)[0][0] == number == 4


def test_stopped_before(rig: Rig, program: Path, memfd: int) -> None:
    client = start(program, rig.fd, "grafts", 1)
    call = rig.call(CREATE_VCPU)
    os.kill(call.tid, signal.SIGSTOP)
    thread = Thread.seize(call.tid)
    rig.answer(call, 0)
    thread.arrive()
    number = thread.graft(memfd)
    thread.finish(number)
    time.sleep(0.05)
    assert client.poll() is None
    os.kill(call.tid, signal.SIGCONT)
    assert lines(client)[0][0] == 4


@pytest.mark.parametrize("moment", ["seized", "answered", "arrived", "injected", "threads"])
def test_killed_at_any_moment(rig: Rig, program: Path, memfd: int, moment: str) -> None:
    client = start(program, rig.fd, "thread" if moment == "threads" else "grafts", 1)
    call = rig.call(CREATE_VCPU)
    thread = Thread.seize(call.tid, timeout=2)

    def kill() -> None:
        os.kill(call.tid, signal.SIGKILL)
        time.sleep(0.02)

    with pytest.raises(ClientGoneError):
        if moment == "seized":
            kill()
        rig.answer(call, 0)
        if moment == "answered":
            kill()
        thread.arrive()
        if moment in ("arrived", "threads"):
            kill()
        number = thread.graft(memfd)
        kill()
        thread.finish(number)
    assert client.wait(timeout=5) == KILLED
    assert settle() == 0
    assert not os.path.exists(f"/proc/{call.tid}")
    client.communicate()


def test_killed_over_and_over(rig: Rig, program: Path, memfd: int) -> None:
    for i in range(25):
        client = start(program, rig.fd, "grafts", 100, "close")
        call = rig.call(CREATE_VCPU)
        killer = threading.Timer(0.003 * (i % 7), os.kill, (call.tid, signal.SIGKILL))
        killer.start()
        with contextlib.suppress(OSError):
            while client.poll() is None:
                thread = Thread.seize(call.tid, timeout=2)
                rig.answer(call, 0)
                thread.arrive()
                thread.finish(thread.graft(memfd))
                call = rig.call(CREATE_VCPU, timeout=0.2)
        killer.join()
        assert client.wait(timeout=5) == KILLED
        client.communicate()
    assert settle() == 0


def test_abandoned(rig: Rig, program: Path, memfd: int) -> None:
    client = start(program, rig.fd, "grafts", 2)
    call = rig.call(CREATE_VCPU)
    thread = Thread.seize(call.tid)
    thread.abandon()  # it still sits in the ioctl
    assert settle() == 1
    rig.answer(call, 33)
    call = rig.call(CREATE_VCPU) if settle_soon() else None
    assert call is not None
    thread = Thread.seize(call.tid)
    rig.answer(call, 34)
    thread.arrive()
    thread.close(thread.graft(memfd))
    thread.abandon()
    assert [line[0] for line in lines(client)] == [33, 34]


def settle_soon() -> bool:
    deadline = time.monotonic() + 5
    while settle():
        assert time.monotonic() < deadline
        time.sleep(0.001)
    return True


def test_never_answered(rig: Rig, program: Path) -> None:
    client = start(program, rig.fd, "grafts", 1)
    call = rig.call(CREATE_VCPU)
    thread = Thread.seize(call.tid, timeout=0.2)
    with pytest.raises(TimeoutError, match=r"did not stop within 0\.2 s"):
        thread.arrive()
    thread.abandon()
    rig.answer(call, 5)
    assert settle_soon()
    client.communicate(timeout=5)


def test_traced_client(rig: Rig, program: Path) -> None:
    client = start(program, rig.fd, "grafts", 1)
    call = rig.call(CREATE_VCPU)
    tracer = subprocess.Popen(
        [sys.executable, "-c", TRACE, str(call.tid)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert tracer.stdout is not None and tracer.stdout.readline() == "traced\n"
    with pytest.raises(TracedError, match=rf"traced by process {tracer.pid} \(python.*kvmfs run") as caught:
        Thread.seize(call.tid)
    assert caught.value.errno == errno.EPERM
    tracer.communicate("")
    rig.answer(call, 9)
    client.communicate(timeout=5)


TRACE = """
import ctypes, sys
assert ctypes.CDLL(None).ptrace(0x4206, int(sys.argv[1]), None, None) == 0
print("traced", flush=True)
sys.stdin.read()
"""


def test_two_threads_of_ours_take_turns(rig: Rig, program: Path, memfd: int) -> None:
    clients = [start(program, rig.fd, "grafts", 20) for _ in range(2)]
    lock = threading.Lock()
    failed: list[BaseException] = []

    def work() -> None:
        try:
            for _ in range(20):
                with lock:          # once: when one client is through, the other's call must not wait for who waits for it
                    call = rig.call(CREATE_VCPU)
                    thread = Thread.seize(call.tid)
                    rig.answer(call, 0)
                thread.arrive()
                thread.finish(thread.graft(memfd))
        except BaseException as e:
            failed.append(e)

    workers = [threading.Thread(target=work) for _ in clients]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert not failed
    for client in clients:
        assert [line[0] for line in lines(client)] == list(range(4, 24))


def test_gone_thread() -> None:
    client = subprocess.Popen(["true"])
    client.wait()
    with pytest.raises(ProcessLookupError):
        Thread.seize(client.pid)


def test_zombie() -> None:
    client = subprocess.Popen(["true"])
    os.waitid(os.P_PID, client.pid, os.WEXITED | os.WNOWAIT)
    with pytest.raises(ProcessLookupError):
        Thread.seize(client.pid)
    client.wait()


def test_flags_of_our_own_descriptors(memfd: int) -> None:
    assert fcntl.fcntl(memfd, fcntl.F_GETFD) & fcntl.FD_CLOEXEC
