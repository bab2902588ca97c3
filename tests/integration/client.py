# SPDX-License-Identifier: GPL-2.0-or-later
"""A client in one file, run as a process of its own: ``client.py NODE WHAT [ARG]``.

It knows the ABI only from linux/kvm.h and prints what it sees, so that the tests can compare.
"""

from __future__ import annotations

import ctypes
import fcntl
import mmap
import os
import signal
import struct
import sys
import threading
import time

CREATE_VM, CREATE_VCPU, RUN, SET_MEMORY = 0xAE01, 0xAE41, 0xAE80, 0x4020AE46
GET_SREGS, SET_SREGS, SET_REGS, API_VERSION, MMAP_SIZE = 0x8138AE83, 0x4138AE84, 0x4090AE82, 0xAE00, 0xAE04
EXIT_IO, EXIT_HLT = 2, 5
# mov dx, 0x3f8; mov al, 'H'; out dx, al; mov al, 'i'; out dx, al; hlt
HELLO = bytes([0xBA, 0xF8, 0x03, 0xB0, ord("H"), 0xEE, 0xB0, ord("i"), 0xEE, 0xF4])
LOOP = bytes([0xEB, 0xFE])
MEMORY = 1 << 20


class Guest:
    """One VM with one vCPU in real mode at address 0."""

    def __init__(self, node: int, code: bytes, sharing: int = mmap.MAP_PRIVATE) -> None:
        self.vm = fcntl.ioctl(node, CREATE_VM, 0)
        self.memory = mmap.mmap(-1, MEMORY, flags=sharing | mmap.MAP_ANONYMOUS)
        self.memory[:len(code)] = code
        at = ctypes.addressof(ctypes.c_char.from_buffer(self.memory))
        fcntl.ioctl(self.vm, SET_MEMORY, struct.pack("<IIQQQ", 0, 0, 0, MEMORY, at))
        self.vcpu = fcntl.ioctl(self.vm, CREATE_VCPU, 0)
        self.run = mmap.mmap(self.vcpu, fcntl.ioctl(node, MMAP_SIZE, 0))
        sregs = bytearray(312)
        fcntl.ioctl(self.vcpu, GET_SREGS, sregs)
        sregs[0:8] = bytes(8)                   # cs.base
        sregs[12:14] = bytes(2)                 # cs.selector
        fcntl.ioctl(self.vcpu, SET_SREGS, bytes(sregs))
        fcntl.ioctl(self.vcpu, SET_REGS, struct.pack("<18Q", *[0] * 17, 2))

    def play(self) -> str:
        """Run to HLT; returns what was written to port 0x3f8."""
        text = ""
        while True:
            fcntl.ioctl(self.vcpu, RUN, 0)
            reason, = struct.unpack_from("<I", self.run, 8)
            if reason == EXIT_HLT:
                return text
            assert reason == EXIT_IO, reason
            _, _, port, count, offset = struct.unpack_from("<BBHIQ", self.run, 32)
            assert (port, count) == (0x3F8, 1)
            text += chr(self.run[offset])

    def close(self) -> None:
        self.run.close()
        os.close(self.vcpu)
        os.close(self.vm)


def main() -> None:
    path, what, *arguments = sys.argv[1:]
    node = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    assert fcntl.ioctl(node, API_VERSION, 0) == 12
    if what in ("hello", "shared"):
        guest = Guest(node, HELLO, mmap.MAP_SHARED if what == "shared" else mmap.MAP_PRIVATE)
        print(guest.play(), os.readlink(f"/proc/self/fd/{guest.vm}"), os.readlink(f"/proc/self/fd/{guest.vcpu}"))
    elif what == "many":                        # one after the other
        for _ in range(int(arguments[0])):
            guest = Guest(node, HELLO)
            assert guest.play() == "Hi"
            guest.close()
        print(len(os.listdir("/proc/self/fd")))
    elif what == "together":                    # in threads of this process
        results: list[str] = []
        threads = [threading.Thread(target=lambda: results.append(Guest(node, HELLO).play()))
                   for _ in range(int(arguments[0]))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        print(*results)
    elif what == "hold":                        # up to a phase, then wait to be killed
        if arguments[0] in ("vm", "vcpu", "running"):
            guest = Guest(node, LOOP)
            if arguments[0] == "running":
                threading.Thread(target=fcntl.ioctl, args=(guest.vcpu, RUN, 0), daemon=True).start()
        print("ready", flush=True)
        time.sleep(60)
    elif what == "outlive":                     # the worker is killed meanwhile
        guest = Guest(node, LOOP)
        print("ready", flush=True)
        try:
            fcntl.ioctl(guest.vcpu, RUN, 0)
            print("returned")
        except OSError as error:
            print(error.errno)
    elif what == "fork":
        guest = Guest(node, HELLO)
        if os.fork() == 0:
            try:
                fcntl.ioctl(guest.vcpu, RUN, 0)
            except OSError as error:
                print(error.errno, flush=True)
            os._exit(0)
        os.wait()
        print(guest.play())
    elif what == "alarm":                       # a signal ends KVM_RUN
        guest = Guest(node, LOOP)
        signal.signal(signal.SIGALRM, lambda *_: None)
        signal.setitimer(signal.ITIMER_REAL, 0.2)
        libc = ctypes.CDLL(None, use_errno=True)    # fcntl.ioctl would call again after EINTR
        print(libc.ioctl(guest.vcpu, ctypes.c_ulong(RUN), 0), ctypes.get_errno())



if __name__ == "__main__":
    main()
