# SPDX-License-Identifier: GPL-2.0-or-later
"""Writes docs/supported.md from the tables that the program itself uses: ``.venv/bin/python tools/reference.py``."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType

from kvmfs.abi.caps import CAPS
from kvmfs.abi.ioctls import TABLE, Level, Payload
from kvmfs.api import device, system, vcpu, vm
from kvmfs.kvm import caps

PATH = Path(__file__).resolve().parents[1] / "docs" / "supported.md"
MODULES: dict[Level, ModuleType] = {Level.SYSTEM: system, Level.VM: vm, Level.VCPU: vcpu, Level.DEVICE: device}
# KVM_RUN and KVM_CREATE_VM are served by the dispatchers themselves.
ELSEWHERE = {"KVM_RUN": Level.VCPU, "KVM_CREATE_VM": Level.SYSTEM}
_TRAVELS = {Payload.NONE: "—", Payload.VALUE: "a number", Payload.FIXED: "", Payload.FLEX: ", with an array behind it",
            Payload.POINTER: ", by pointer"}
_HEAD = """# Supported ioctls and capabilities

Written by `tools/reference.py` from the tables in `kvmfs/abi/ioctls.py` and `kvmfs/kvm/caps.py`; a test fails when it is stale.
An ioctl that is *absent* answers as in a kernel that was built without it, and its capability is 0.
"""


def ioctls() -> str:
    """The table of all ioctls."""
    lines = ["| ioctl | number | on | argument | |", "| --- | --- | --- | --- | --- |"]
    for entry in TABLE:
        levels = [level for level in MODULES if level in entry.levels]
        there = [level for level in levels if hasattr(MODULES[level], entry.handler) or ELSEWHERE.get(entry.name) is level]
        name = getattr(entry.struct, "__name__", "") if entry.payload not in (Payload.NONE, Payload.VALUE) else ""
        on = ", ".join((level.name or "").lower() for level in levels)
        state = "yes" if there == levels else "absent"
        if there and there != levels:
            state = "on " + ", ".join((level.name or "").lower() for level in there)
        argument = (f"`{name}`" if name else "") + _TRAVELS[entry.payload]
        lines.append(f"| `{entry.name}` | {entry.number:#010x} | {on} | {argument} | {state} |")
    return "\n".join(lines)


def capabilities() -> str:
    """What is there with its value, and what is absent with the reason."""
    names = {number: name for name, number in CAPS.items()}
    lines = ["| capability | number | value |", "| --- | --- | --- |"]
    for number, value in sorted(caps.SUPPORTED.items()):
        lines.append(f"| `{names.get(number, number)}` | {number} | {'depends on the host' if callable(value) else value} |")
    lines += ["", "Absent:", "", "| capability | number | why |", "| --- | --- | --- |"]
    for number, why in sorted(caps.ABSENT.items()):
        lines.append(f"| `{names.get(number, number)}` | {number} | {why} |")
    return "\n".join(lines)


def document() -> str:
    """The whole file."""
    return f"{_HEAD}\n## Ioctls\n\n{ioctls()}\n\n## Capabilities\n\n{capabilities()}\n"


if __name__ == "__main__":
    PATH.write_text(document(), "utf-8")
