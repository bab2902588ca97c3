# SPDX-License-Identifier: GPL-2.0-or-later
"""Records docs/commands.md anew: runs each "$ command" of it, in order, and puts what it printed below.

As root, in a network namespace of its own (``unshare -n .venv/bin/python tools/record.py``), so that other daemons of the
machine do not appear.  Between the headings "vms" and "conformance" a guest that counts runs meanwhile.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PATH = ROOT / "docs" / "commands.md"
PROMPT = "    $ "
SECONDS = 300
# mov rax, 0x1234; again: inc rax; jmp again
GUEST = """
from kvmfs.testing import Kvm
with Kvm("/dev/kvm") as kvm, kvm.create_vm() as vm:
    vm.add_memory(0, 0x100000)
    vm.write(0x1000, bytes.fromhex("48c7c034120000 48ffc0 ebfb"))
    vcpu = vm.create_vcpu()
    vcpu.set_long_mode(start=0x1000, tables=0x10000)
    vcpu.run()
"""
ENVIRONMENT = {**os.environ, "PATH": f"{ROOT / '.venv/bin'}:{os.environ['PATH']}"}


def output(command: str) -> list[str]:
    """What it prints, as lines of a code block."""
    text = subprocess.run(["bash", "-c", command], stdout=subprocess.PIPE, text=True, check=False, timeout=SECONDS, cwd=ROOT,
                          env=ENVIRONMENT).stdout
    return [f"    {line}".rstrip() or "    " for line in text.splitlines()]


def record(text: str) -> str:
    """The document with new outputs."""
    lines, guest, skipping = [], None, False
    for line in text.splitlines():
        if line.startswith("## vms"):
            guest = subprocess.Popen(["kvmfs", "run", "--", "python", "-c", GUEST], cwd=ROOT, env=ENVIRONMENT)
            time.sleep(5)
        elif line.startswith("## ") and not re.match("## (vms|stat|fault)", line) and guest is not None:
            guest.terminate()
            guest.wait(20)
            guest = None
        if line.startswith(PROMPT):
            lines += [line, *output(line.removeprefix(PROMPT))]
            skipping = True
        elif not skipping or not line.startswith("    "):
            skipping = False
            lines.append(line)
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    PATH.write_text(record(PATH.read_text("utf-8")), "utf-8")
    sys.exit(0)
