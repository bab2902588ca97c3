# SPDX-License-Identifier: GPL-2.0-or-later
"""A guest that runs and never exits executes what its client, or another process, writes over its code."""

from __future__ import annotations

import subprocess
import sys

import pytest

from tests.daemon import ENVIRONMENT, ROOT

CLIENT = '''
import ctypes, mmap, os, sys, threading, time
from tests.integration.client import RUN, Guest, fcntl

# 0: jmp 0x20 / 0x20: call 0x1000; mov [0x3000], ax; jmp 0x20 / 0x1000: mov ax, 0; ret
LOOP = bytes([0xE8, 0xDD, 0x0F, 0xA3, 0x00, 0x30, 0xEB, 0xF8])
node = os.open(sys.argv[1], os.O_RDWR | os.O_CLOEXEC)
guest = Guest(node, bytes([0xEB, 0x1E]).ljust(0x20, b"\\x90") + LOOP,
              mmap.MAP_SHARED if sys.argv[2] == "shared" else mmap.MAP_PRIVATE)
memory, address = guest.memory, ctypes.addressof(ctypes.c_char.from_buffer(guest.memory))
memory[0x1000:0x1004] = b"\\xb8\\0\\0\\xc3"

def store(at, data):
    memory[at:at + len(data)] = data

def read_call(at, data):
    reader, writer = os.pipe()
    os.write(writer, data)
    with memoryview(memory) as view, view[at:at + len(data)] as part:
        assert os.readv(reader, [part]) == len(data)
    os.close(reader)
    os.close(writer)

def in_a_child(at, data, how):
    parent, pid = os.getpid(), os.fork()
    if pid == 0:
        try:
            how(parent, at, data)
        except BaseException as error:
            print(error)
            os._exit(1)
        os._exit(0)
    assert os.waitpid(pid, 0)[1] == 0

def process_vm_writev(pid, at, data):
    libc = ctypes.CDLL(None, use_errno=True)
    class Iovec(ctypes.Structure):
        _fields_ = (("base", ctypes.c_void_p), ("len", ctypes.c_size_t))
    buffer = ctypes.create_string_buffer(data, len(data))
    here, there = Iovec(ctypes.addressof(buffer), len(data)), Iovec(address + at, len(data))
    assert libc.process_vm_writev(pid, ctypes.byref(here), 1, ctypes.byref(there), 1, 0) == len(data), ctypes.get_errno()

def proc_mem(pid, at, data):
    with open(f"/proc/{pid}/mem", "r+b", buffering=0) as file:
        file.seek(address + at)
        assert file.write(data) == len(data)

def child_process_vm_writev(at, data):
    in_a_child(at, data, process_vm_writev)

def child_proc_mem(at, data):
    in_a_child(at, data, proc_mem)

runner = threading.Thread(target=lambda: fcntl.ioctl(guest.vcpu, RUN, 0), daemon=True)
runner.start()
value, slowest = 0, 0.0
for write in (store, read_call, child_process_vm_writev, child_proc_mem) * 3:
    value += 1
    write(0x1001, bytes([value]))
    started = time.monotonic()
    while memory[0x3000] != value:
        assert time.monotonic() - started < 10, (write.__name__, memory[0x3000], value)
        time.sleep(0.0002)
    slowest = max(slowest, time.monotonic() - started)
store(0x1000, b"\\xf4")
runner.join(10)
assert not runner.is_alive()
print("ok", round(slowest * 1000, 1))
'''


@pytest.mark.parametrize("sharing", ["private", "shared"])
def test_running_code_is_rewritten(node: str, sharing: str) -> None:
    done = subprocess.run([sys.executable, "-c", CLIENT, node, sharing], capture_output=True, text=True, timeout=60,
                          env=ENVIRONMENT, cwd=ROOT, check=False)
    assert done.stdout.startswith("ok "), done.stdout + done.stderr
