# SPDX-License-Identifier: GPL-2.0-or-later
"""Guest memory that is resolved or taken over."""

import contextlib
import errno
import mmap
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from kvmfs.client import stop, takeover
from kvmfs.client.memory import ClientMemory, open_memory
from kvmfs.client.process import Process
from kvmfs.client.stop import StoppedProcess
from kvmfs.client.takeover import Segment, close_segments, populated, resolve, take_over
from kvmfs.client.tracer import ClientGoneError, Thread, TracedError
from tests.unit import client_rig
from tests.unit.client_rig import CREATE_VCPU, KVM_RUN, SET_MEMORY, Call, Rig, start

needs_rig = pytest.mark.skipif(not client_rig.usable(), reason="needs root and /dev/fuse")


def region(call: Call) -> tuple[int, int]:
    """(hva, size) of the struct that came with KVM_SET_USER_MEMORY_REGION."""
    return int.from_bytes(call.data[24:32], "little"), int.from_bytes(call.data[16:24], "little")


def take(rig: Rig, call: Call | None = None) -> tuple[list[Segment], bool]:
    """Answer one KVM_SET_USER_MEMORY_REGION as the daemon does; the segments, and whether they were taken over."""
    call = call or rig.call(SET_MEMORY)
    hva, size = region(call)
    with contextlib.closing(Process.from_tid(call.tid)) as process:
        segments = resolve(process, hva, size)
        if segments is not None:
            rig.answer(call, 0)
            return segments, False
        thread = Thread.seize(call.tid, timeout=10)
        rig.answer(call, 0)
        thread.arrive()
        try:
            segments = take_over(process, thread, hva, size)
        except OSError as e:
            thread.finish(-(e.errno or errno.EIO))
            raise
        try:
            thread.finish(0)
        except ClientGoneError:
            close_segments(segments)
            raise
        return segments, True


def report(client: "subprocess.Popen[str]") -> Callable[[], str]:
    assert client.stdout is not None
    return client.stdout.readline


@needs_rig
@pytest.mark.parametrize(
    ("kind", "taken"),
    [
        ("anon", True),
        ("bss", True),
        ("file-private", True),
        ("file-shared", False),
        ("anon-shared", False),
        ("memfd", False),
        ("memfd-closed", False),
    ],
)
def test_kinds_of_memory(rig: Rig, program: Path, tmp_path: Path, kind: str, taken: bool) -> None:
    data = os.urandom(16 * 4096 - (100 if kind == "file-private" else 0))
    (tmp_path / "file").write_bytes(data)
    client = start(program, rig.fd, "memory", kind, tmp_path / "file")
    call = rig.call(SET_MEMORY)
    hva, size = region(call)
    memory = ClientMemory(open_memory(call.tid))
    before = memory.read(hva, 15 * 4096 if size > 15 * 4096 else size)
    segments, was_taken = take(rig, call)
    assert was_taken == taken
    assert len(segments) == 1
    (segment,) = segments
    assert (segment.hva, segment.size, segment.writable, segment.hole) == (hva, size, True, False)
    assert not os.get_inheritable(segment.fd)
    window = mmap.mmap(segment.fd, size, offset=segment.offset)
    assert window[: len(before)] == before
    read = report(client)
    assert int(read(), 16) == hva
    assert read() == "0 1\n"
    call = rig.call(CREATE_VCPU)
    window[4096] = 99
    rig.answer(call, 0)
    assert read() == "99\n"
    client.communicate(timeout=5)
    memory.close()
    window.close()
    close_segments(segments)
    if kind in ("file-private", "file-shared"):
        stored = (tmp_path / "file").read_bytes()
        assert (stored == data) == (kind == "file-private")


@needs_rig
def test_mixed_range(rig: Rig, program: Path) -> None:
    client = start(program, rig.fd, "memory", "mixed")
    call = rig.call(SET_MEMORY)
    hva, _ = region(call)
    segments, taken = take(rig, call)
    assert taken
    out, _ = client.communicate(timeout=10)
    assert out.splitlines()[1] == "0 5 5 5"
    page = 4096
    assert [((s.hva - hva) // page, s.size // page, s.hole, s.writable) for s in segments] == [
        (0, 4, False, True),
        (4, 1, True, False),
        (5, 3, False, True),
        (8, 1, False, False),
        (9, 3, False, True),
        (12, 1, False, True),
        (13, 3, False, True),
    ]
    assert len({s.inode for s in segments if not s.hole}) == 2
    close_segments(segments)


@needs_rig
def test_nothing_is_lost_under_writers(rig: Rig, program: Path) -> None:
    client = start(program, rig.fd, "writers", 2048, 8)
    kept = []
    for _ in range(8):
        segments, taken = take(rig)
        assert taken
        kept += segments
    read = report(client)
    assert read() == "result=0 lost=0\n"
    call = rig.call(CREATE_VCPU)
    window = mmap.mmap(kept[0].fd, kept[0].size, offset=kept[0].offset)
    assert window[4096:4104] == (0x1122334455667788).to_bytes(8, "little")
    window[8192:8200] = (0xFEEDFACE).to_bytes(8, "little")
    rig.answer(call, 0)
    assert read() == "1 feedface\n"
    client.communicate(timeout=5)
    close_segments(kept)


@needs_rig
def test_blocked_threads_do_not_notice(rig: Rig, program: Path) -> None:
    client = start(program, rig.fd, "blocked")
    run = rig.call(KVM_RUN)
    segments, taken = take(rig)
    assert taken
    read = report(client)
    assert read() == "set 0\n"
    again = rig.call(KVM_RUN)
    assert again.tid == run.tid and again.unique != run.unique
    rig.answer(again, 77)
    assert read() == "run 77 0\n"
    assert read() == "epoll 0 0\n"
    client.communicate(timeout=5)
    close_segments(segments)


@needs_rig
def test_signalled_thread_gets_its_eintr(rig: Rig, program: Path) -> None:
    """With a signal pending the EINTR of KVM_RUN is not only ours."""
    client = start(program, rig.fd, "blocked", "signal")
    run = rig.call(KVM_RUN)
    call = rig.call(SET_MEMORY)
    with contextlib.closing(Process.from_tid(call.tid)) as process:
        with StoppedProcess(process, call.tid):
            signal_thread(process.tgid, run.tid, signal.SIGUSR1)
        read = report(client)
        assert read() == "run -1 4\n"
    rig.answer(call, 0)
    client.communicate(timeout=5)


def signal_thread(tgid: int, tid: int, number: int) -> None:
    import ctypes

    assert ctypes.CDLL(None).syscall(234, tgid, tid, number) == 0


@needs_rig
def test_thread_whose_ioctl_waits_for_us(rig: Rig, program: Path) -> None:
    client = start(program, rig.fd, "blocked", "create")
    run = rig.call(KVM_RUN)
    create = rig.call(CREATE_VCPU)
    segments, taken = take(rig)  # although the other thread's answer is still to come
    assert taken
    read = report(client)
    assert read() == "set 0\n"
    again = rig.call(KVM_RUN)
    assert again.tid == run.tid
    memfd = os.memfd_create("late")
    thread = Thread.seize(create.tid)
    rig.answer(create, 0)
    thread.arrive()
    thread.finish(thread.graft(memfd))
    assert read() == "create 1\n"
    rig.answer(again, 0)
    client.communicate(timeout=5)
    os.close(memfd)
    close_segments(segments)


@needs_rig
def test_thread_that_cannot_be_stopped(rig: Rig, program: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stop, "_in_held_ioctl", lambda tid: False)
    client = start(program, rig.fd, "blocked", "create")
    rig.call(KVM_RUN)
    create = rig.call(CREATE_VCPU)
    call = rig.call(SET_MEMORY)
    hva, size = region(call)
    process = Process.from_tid(call.tid)
    thread = Thread.seize(call.tid, timeout=0.3)
    rig.answer(call, 0)
    thread.arrive()
    with pytest.raises(TimeoutError, match=r"could not be stopped within 0\.3 s: state D.*system call 16 0x3"):
        take_over(process, thread, hva, size)
    thread.finish(-errno.EBUSY)
    read = report(client)
    assert read() == "set -1\n"
    assert process.vmas(hva, hva + size)[0].perms == "rw-p"
    rig.answer(create, 0)
    rig.answer(rig.call(KVM_RUN), 0)
    client.communicate(timeout=5)
    process.close()


@needs_rig
@pytest.mark.parametrize("failing", [0, 1, 2])
def test_failure_leaves_the_client_as_it_was(rig: Rig, program: Path, monkeypatch: pytest.MonkeyPatch, failing: int) -> None:
    client = start(program, rig.fd, "memory", "mixed")
    call = rig.call(SET_MEMORY)
    hva, size = region(call)
    process = Process.from_tid(call.tid)
    descriptors = sorted(os.listdir(f"/proc/{call.tid}/fd"))
    mappings = process.vmas(hva, hva + size)
    thread = Thread.seize(call.tid)
    rig.answer(call, 0)
    thread.arrive()
    real = Thread.mmap
    calls = iter(range(100))

    def refuse(self: Thread, *args: int) -> int:
        if args[3] == takeover.MAP_SHARED_FIXED and next(calls) == failing:
            raise OSError(errno.ENOMEM, "refused")
        return real(self, *args)

    monkeypatch.setattr(Thread, "mmap", refuse)
    with pytest.raises(OSError, match="refused"):
        take_over(process, thread, hva, size)
    after = process.vmas(hva, hva + size)
    assert [(v.start, v.end, v.perms, v.path) for v in after] == [(v.start, v.end, v.perms, v.path) for v in mappings]
    assert sorted(os.listdir(f"/proc/{call.tid}/fd")) == descriptors
    thread.finish(-errno.ENOMEM)
    out, _ = client.communicate(timeout=10)
    assert out.splitlines()[1] == "-1 5 5 5"
    process.close()


@needs_rig
def test_without_map_files(rig: Rig, program: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a user namespace: our own memfd, and a file that the client still has open, are found otherwise."""
    real = os.open

    def refuse(path: str, *args: int, **more: int) -> int:
        if "map_files" in str(path):
            raise PermissionError(errno.EPERM, "refused")
        return real(path, *args, **more)

    monkeypatch.setattr(os, "open", refuse)
    for kind, taken in (("anon", True), ("memfd", False), ("anon-shared", True), ("memfd-closed", True)):
        client = start(program, rig.fd, "memory", kind)
        segments, was_taken = take(rig)
        assert was_taken == taken, kind
        call = rig.call(CREATE_VCPU)
        process = Process.from_tid(call.tid)
        again = resolve(process, segments[0].hva, segments[0].size)
        assert again is not None and again[0].inode == segments[0].inode
        assert os.fstat(again[0].fd).st_ino == os.fstat(segments[0].fd).st_ino
        takeover.forget(process.tgid)
        rig.answer(call, 0)
        out, _ = client.communicate(timeout=5)
        assert out.splitlines()[1] == "0 1"
        close_segments(segments + again)
        process.close()
    assert not takeover._remembered


@needs_rig
def test_other_thread_is_traced(rig: Rig, program: Path) -> None:
    client = start(program, rig.fd, "blocked")
    run = rig.call(KVM_RUN)
    call = rig.call(SET_MEMORY)
    trace = f"import ctypes,sys; ctypes.CDLL(None).ptrace(0x4206, {run.tid}, None, None); print(1, flush=True); input()"
    tracer = subprocess.Popen([sys.executable, "-c", trace], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert tracer.stdout is not None and tracer.stdout.readline() == "1\n"
    process = Process.from_tid(call.tid)
    with pytest.raises(TracedError, match="kvmfs run"), StoppedProcess(process, call.tid):
        pass
    tracer.communicate("\n")
    rig.answer(call, 0)
    rig.answer(run, 0)
    client.communicate(timeout=5)
    process.close()


@needs_rig
@pytest.mark.parametrize("delay", [0.0, 0.001, 0.002, 0.004, 0.008, 0.016, 0.03])
def test_killed_while_taken_over(rig: Rig, program: Path, delay: float) -> None:
    client = start(program, rig.fd, "writers", 4096, 4)
    call = rig.call(SET_MEMORY)
    killer = threading.Timer(delay, os.kill, (call.tid, signal.SIGKILL))
    killer.start()
    with contextlib.suppress(ClientGoneError, ProcessLookupError, OSError):
        for _ in range(4):
            try:
                segments, _ = take(rig, call)
            finally:
                rig.answer(call, -errno.EIO)  # a killed client still waits for the answer to its ioctl
            close_segments(segments)
            call = rig.call(SET_MEMORY, timeout=0.3)
    killer.join()
    assert client.wait(timeout=5) == 128 + signal.SIGKILL
    assert not os.path.exists(f"/proc/{call.tid}")
    client.communicate()


def test_populated() -> None:
    import ctypes

    area = mmap.mmap(-1, 64 * 4096, flags=mmap.MAP_PRIVATE)
    addr = ctypes.addressof(ctypes.c_char.from_buffer(area))
    ctypes.CDLL(None).madvise(ctypes.c_void_p(addr), 64 * 4096, 15)  # MADV_NOHUGEPAGE
    for page in (0, 5, 6, 63):
        area[page * 4096] = 1
    assert area[20 * 4096] == 0  # the zero page holds nothing
    want = [(0, 1), (5, 7), (63, 64)]
    found = populated(os.getpid(), addr, addr + 64 * 4096)
    assert [((a - addr) // 4096, (b - addr) // 4096) for a, b in found] == want
    with open("/proc/self/pagemap", "rb") as f:
        walked = takeover._walk_pagemap(f.fileno(), addr, addr + 64 * 4096)
        assert [((a - addr) // 4096, (b - addr) // 4096) for a, b in walked] in (want, [(0, 1), (5, 7), (20, 21), (63, 64)])


@needs_rig
def test_without_privilege(rig: Rig, program: Path) -> None:
    """The daemon of an ordinary user: no CAP_SYS_ADMIN, so neither SUSPEND_SECCOMP nor map_files."""
    reader, writer = os.pipe()
    client = start(program, rig.fd, "blocked", "create", user=65534, group=65534, extra_groups=[])
    child = os.fork()
    if child == 0:
        try:
            os.setgroups([])
            os.setgid(65534)
            os.setuid(65534)
            create = rig.call(CREATE_VCPU)
            segments, taken = take(rig)
            assert taken and len(segments) == 1
            with contextlib.closing(Process.from_tid(create.tid)) as process:
                again = resolve(process, segments[0].hva, segments[0].size)
                assert again is not None and again[0].inode == segments[0].inode
            thread = Thread.seize(create.tid)
            rig.answer(create, 0)
            thread.arrive()
            thread.finish(thread.graft(segments[0].fd))
            rig.call(KVM_RUN)  # the first, which was set back
            rig.answer(rig.call(KVM_RUN), 5)
            os.write(writer, b"well")
        except BaseException:
            import traceback

            os.write(writer, traceback.format_exc().encode())
        finally:
            os._exit(0)
    os.close(writer)
    os.waitpid(child, 0)
    assert os.read(reader, 65536) == b"well"
    os.close(reader)
    out, _ = client.communicate(timeout=10)
    assert sorted(out.splitlines()) == ["create 1", "epoll 0 0", "run 5 0", "set 0"]


@needs_rig
def test_no_right_to_trace(rig: Rig, program: Path) -> None:
    client = start(program, rig.fd, "grafts")
    call = rig.call(CREATE_VCPU)
    child = os.fork()
    if child == 0:
        os.setuid(65534)
        try:
            Thread.seize(call.tid)
        except TracedError:
            os._exit(1)
        except PermissionError as e:
            os._exit(0 if "CAP_SYS_PTRACE" in str(e) else 2)
        os._exit(3)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    rig.answer(call, 0)
    client.communicate(timeout=5)


def test_descriptor_without_pidfd_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    """Before 6.9 there is no pidfd of a thread; the group's leader has the same descriptors."""
    from kvmfs.client import process as module

    real = module.pidfd_open

    def old_kernel(pid: int, flags: int = 0) -> int:
        if flags:
            raise OSError(errno.EINVAL, "refused")
        return real(pid)

    monkeypatch.setattr(module, "pidfd_open", old_kernel)
    go = threading.Event()
    thread = threading.Thread(target=go.wait)
    thread.start()
    assert thread.native_id is not None
    fd = module.take_descriptor(thread.native_id, os.getpid(), 1)
    assert os.fstat(fd).st_ino == os.fstat(1).st_ino
    os.close(fd)
    go.set()
    thread.join()


@needs_rig
def test_stopped_again_and_again(rig: Rig, program: Path) -> None:
    """KVM_RUN starts again after each stop, and the client sees one call."""
    client = start(program, rig.fd, "blocked", "signal")
    run = rig.call(KVM_RUN)
    call = rig.call(SET_MEMORY)
    with contextlib.closing(Process.from_tid(call.tid)) as process:
        for _ in range(20):
            with StoppedProcess(process, call.tid) as stopped:
                assert run.tid in stopped.stopped
            run = rig.call(KVM_RUN)
    rig.answer(run, 3)
    read = report(client)
    assert read() == "run 3 0\n"
    rig.answer(call, 0)
    client.communicate(timeout=5)
