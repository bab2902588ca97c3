#!/usr/bin/env python3
# SPDX-License-Identifier: GPL-2.0-or-later
"""A KVM client in Python: a guest in long mode prints, reads a port, and uses a device of ours.  ``kvm.py [NODE]``.

The client library is :mod:`kvmfs.testing`, which works on any node.
"""

from __future__ import annotations

import sys

from kvmfs.testing import Exit, Kvm

SERIAL, KEYBOARD, DEVICE, HALTED_WITH = 0x3F8, 0x60, 0xA0000, 0x2A

GUEST = bytes.fromhex(
    "48 8d 35 1c 00 00 00"      # 00 lea rsi, [rip + text]
    "b9 1a 00 00 00"            # 07 mov ecx, length
    "66 ba f8 03"               # 0c mov dx, SERIAL
    "f3 6e"                     # 10 rep outsb
    "e4 60"                     # 12 in al, KEYBOARD
    "88 04 25 00 00 0a 00"      # 14 mov [DEVICE], al
    "8b 1c 25 04 00 0a 00"      # 1b mov ebx, [DEVICE + 4]
    "f4"                        # 22 hlt
) + b"Hello from Python's guest\n"


def demonstrate(node: str) -> int:
    """Run GUEST; returns 0 if it did what it should."""
    def device(access: Exit) -> bytes | None:
        if access.write:
            return None
        return b"k" if access.address == KEYBOARD else HALTED_WITH.to_bytes(4, "little")

    with Kvm(node) as kvm, kvm.create_vm() as vm:
        vm.add_memory(0, 0x90000)
        vm.write(0x8000, GUEST)
        vcpu = vm.create_vcpu()
        vcpu.set_long_mode(start=0x8000, stack=0x8000, tables=0x10000)
        exits = vcpu.run_to("HLT", device=device)
        regs = vcpu.regs
    written, stored = exits.written(SERIAL), exits.written(DEVICE)
    print(f"{node}: the guest wrote {written.decode()!r}, stored {stored!r}, and halted; rbx is {regs.rbx:#x}, rip {regs.rip:#x}")
    good = written == GUEST[0x23:] and stored == b"k" and (regs.rbx, regs.rcx) == (HALTED_WITH, 0)
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(demonstrate(*sys.argv[1:2] or ["/dev/kvm"]))
