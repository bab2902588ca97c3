# SPDX-License-Identifier: GPL-2.0-or-later
"""Client memory, as /proc/PID/mem and the list of mappings show it, and processes."""

import errno
import mmap
import os
import signal
import subprocess
import threading
import time
from pathlib import Path

import pytest

from kvmfs.client import maps
from kvmfs.client.memory import ClientMemory, open_memory
from kvmfs.client.process import Process

# -- plain memory --------------------------------------------------------------------------------


def test_memory_of_our_own() -> None:
    memory = ClientMemory(open_memory(os.getpid()))
    area = mmap.mmap(-1, 3 * 4096)
    addr = int.from_bytes(_address(area), "little")
    memory.write(addr, b"hello")
    assert area[:5] == b"hello" and memory.read(addr, 5) == b"hello"
    got = bytearray(3)
    memory.readinto(addr + 1, got)
    assert got == b"ell"
    memory.write(addr, memoryview(b"abc")[1:])
    assert area[:2] == b"bc"
    assert memory.read(addr, 0) == b""
    for bad in (0, 0x1000, 1 << 47, 1 << 63, (1 << 64) - 1, -1):
        for access in (lambda a: memory.read(a, 8), lambda a: memory.write(a, b"x")):
            with pytest.raises(OSError) as caught:
                access(bad)
            assert caught.value.errno == errno.EFAULT
    memory.close()
    memory.close()
    with pytest.raises(OSError):
        memory.read(addr, 1)


def _address(area: mmap.mmap) -> bytes:
    import ctypes

    holder = (ctypes.c_char * 1).from_buffer(area)
    return ctypes.addressof(holder).to_bytes(8, "little")


def test_half_of_a_range_is_a_fault() -> None:
    import ctypes

    libc = ctypes.CDLL(None)
    area = mmap.mmap(-1, 2 * 4096, flags=mmap.MAP_PRIVATE)
    addr = int.from_bytes(_address(area), "little")
    assert libc.mprotect(ctypes.c_void_p(addr + 4096), 4096, 0) == 0
    memory = ClientMemory(open_memory(os.getpid()))
    # mem is forced: it reads what has no protection bits at all, but not what is not mapped.
    memory.read(addr, 8192)
    libc.munmap(ctypes.c_void_p(addr + 4096), 4096)
    with pytest.raises(OSError) as caught:
        memory.read(addr, 8192)
    assert caught.value.errno == errno.EFAULT
    memory.close()


def test_memory_after_exec_is_a_fault() -> None:
    with subprocess.Popen(["sh", "-c", "read x; exec cat"], stdin=subprocess.PIPE, text=True) as client:
        process = Process.from_tid(client.pid)
        vma = process.vmas()[0]
        process.memory.read(vma.start, 4)
        assert client.stdin is not None
        client.stdin.write("x\n")
        client.stdin.flush()
        deadline = time.monotonic() + 5
        while Path(f"/proc/{client.pid}/comm").read_text() != "cat\n":
            assert time.monotonic() < deadline
        with pytest.raises(OSError) as caught:
            process.memory.read(vma.start, 4)
        assert caught.value.errno == errno.EFAULT
        client.stdin.close()
    process.close()


def test_mappings_by_query_are_those_of_the_text() -> None:
    """Where PROCMAP_QUERY (6.11) is unknown the text is read instead."""
    client = subprocess.Popen(["/bin/sh", "-c", "kill -STOP $$"])
    try:
        os.waitpid(client.pid, os.WUNTRACED)
        path = f"/proc/{client.pid}/maps"
        with open(path, "rb") as asked, open(path, "rb") as text:
            expected = list(maps._scan(text, 0, 1 << 47))
            assert expected and maps.read_vmas(asked, 0, 1 << 47) == expected
            middle = expected[2]
            assert maps.read_vmas(asked, middle.start + 1, middle.end - 1) in ([middle], [])  # []: read to its end already
    finally:
        client.kill()
        client.wait()
    with open("/dev/null", "rb") as no_query:  # ENOTTY
        assert maps.read_vmas(no_query, 0, 1 << 47) == []


# -- processes -----------------------------------------------------------------------------------


def test_process() -> None:
    client = subprocess.Popen(["sleep", "30"])
    process = Process.from_tid(client.pid)
    assert process.tgid == client.pid and process.alive()
    assert process.owns(client.pid) and not process.owns(os.getpid()) and not process.owns(0)
    assert process.tracer() == 0
    assert process.threads() == [client.pid]
    vmas = process.vmas()
    assert any(vma.path == "[stack]" and vma.perms == "rw-p" and not vma.shared for vma in vmas)
    middle = vmas[2]
    assert process.vmas(middle.start + 1, middle.end - 1) == [middle]
    fd = process.getfd(1)
    assert os.fstat(fd).st_ino == os.fstat(1).st_ino
    os.close(fd)
    with pytest.raises(OSError) as caught:
        process.getfd(999)
    assert caught.value.errno == errno.EBADF
    client.kill()
    client.wait()
    assert not process.alive()
    assert process.threads() == []
    with pytest.raises(ProcessLookupError):
        process.vmas()
    process.close()
    process.close()
    with pytest.raises(ProcessLookupError):
        Process.from_tid(client.pid)


def test_threads_and_children_are_told_apart() -> None:
    process = Process.from_tid(os.getpid())
    ids: list[int] = []
    go = threading.Event()
    thread = threading.Thread(target=lambda: (ids.append(threading.get_native_id()), go.wait()))
    thread.start()
    child = os.fork()
    if child == 0:
        time.sleep(30)
        os._exit(0)
    assert process.owns(ids[0])
    assert not process.owns(child)
    assert Process.from_tid(ids[0]).tgid == os.getpid()
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    go.set()
    thread.join()
    process.close()
