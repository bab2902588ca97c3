#!/usr/bin/env python3
# SPDX-License-Identifier: GPL-2.0-or-later
"""An example for users: a small virtual machine monitor, the program that test_guest.py tests.  ``monitor.py [NODE]``."""

from __future__ import annotations

import sys

from kvmfs.testing import Kvm, KvmCallError

SERIAL = 0x3F8
GUEST = bytes.fromhex(
    "be 0e 10"      # 1000 mov si, text
    "ba f8 03"      # 1003 mov dx, SERIAL
    "b9 13 00"      # 1006 mov cx, its length
    "f3 6e"         # 1009 rep outsb
    "f4"            # 100b hlt
    "90 90"
) + b"Hello from a guest\n"


def main(node: str = "/dev/kvm") -> int:
    """Run GUEST, print what it writes to the serial port; returns the exit status."""
    try:
        with Kvm(node) as kvm, kvm.create_vm() as vm:
            vm.add_memory(0, 0x10000)
            vm.write(0x1000, GUEST)
            vcpu = vm.create_vcpu()
            vcpu.set_real_mode(start=0x1000)
            exits = vcpu.run_to("HLT")
    except KvmCallError as error:
        print(f"monitor: {error.strerror}", file=sys.stderr)
        return 1
    print(exits.written(SERIAL).decode(), end="")
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:2]))
