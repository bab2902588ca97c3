# SPDX-License-Identifier: GPL-2.0-or-later
"""``kvmfs vms``: what runs, and a look into one VM."""

from __future__ import annotations

import json
import pwd
import time
from dataclasses import dataclass
from typing import Any

import capstone
from rich.console import Console
from rich.table import Table

from kvmfs.abi.structs import KvmRegs, KvmSregs
from kvmfs.abi.x86 import CR0_PG, CR4_LA57, CR4_PAE, CR4_PSE, EFER_LMA
from kvmfs_cli import daemons
from kvmfs_cli.daemons import Daemon, DaemonError
from kvmfs_cli.memory import pss

_MODES = {16: capstone.CS_MODE_16, 32: capstone.CS_MODE_32, 64: capstone.CS_MODE_64}
_GENERAL = ("rax", "rbx", "rcx", "rdx", "rsi", "rdi", "rsp", "rbp", *(f"r{n}" for n in range(8, 16)))
_SEGMENTS = ("cs", "ss", "ds", "es", "fs", "gs", "tr", "ldt")
_FLAGS = ((0, "CF"), (2, "PF"), (4, "AF"), (6, "ZF"), (7, "SF"), (8, "TF"), (9, "IF"), (10, "DF"), (11, "OF"), (16, "RF"),
          (17, "VM"), (18, "AC"))
INSTRUCTIONS = 8
_PRESENT, _LARGE = 1, 1 << 7
_ADDRESS = ((1 << 52) - 1) & ~0xFFF


def _user(uid: int) -> str:
    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:
        return str(uid)


def collect(pid: int | None = None) -> list[dict[str, Any]]:
    """Every VM, or every one of a daemon, that this user may see, as JSON-able objects.  Raises DaemonError."""
    found = []
    with daemons.chosen(pid) as connected:
        for daemon in connected:
            for vm in daemon.ask("state")["vms"]:
                try:
                    found.append({"daemon": daemon.pid, **vm, **_details(daemon, vm)})
                except DaemonError:
                    continue            # it has just ended
    return found


def _details(daemon: Daemon, vm: dict[str, Any]) -> dict[str, Any]:
    shown = daemon.ask("describe", vm=vm["vm"])
    return {"vcpus": shown["vcpus"], "slots": shown["slots"], "memory": sum(slot["size"] for slot in shown["slots"]),
            "worker_pss": pss(vm["worker"])}


def show_all(pid: int | None = None, *, as_json: bool) -> None:
    """The table, or the list as JSON.  Raises DaemonError."""
    found = collect(pid)
    if as_json:
        print(json.dumps(found, indent=2))
        return
    console = Console(width=None if Console().is_terminal else 120)
    if not found:
        console.print("No VM runs.")
        return
    table = Table(box=None, pad_edge=False)
    for name, side in (("VM", "right"), ("daemon", "right"), ("process", "right"), ("command", "left"), ("user", "left"),
                       ("age", "right"), ("guest memory", "right"), ("worker", "right"), ("vCPUs", "left")):
        table.add_column(name, justify="right" if side == "right" else "left")
    for vm in found:
        own = f"{vm['worker_pss'] >> 20} MiB" if vm["worker_pss"] else "?"
        table.add_row(str(vm["vm"]), str(vm["daemon"]), str(vm["process"]), vm["command"], _user(vm["uid"]),
                      f"{time.time() - vm['since']:.0f} s", f"{vm['memory'] / (1 << 20):g} MiB", f"{vm['worker']} ({own})",
                      " ".join(f"{vcpu['id']}:{vcpu['state']}" for vcpu in vm["vcpus"]))
    console.print(table)


# ---- one VM -------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Registers:
    """A vCPU's registers as the worker tells them."""

    regs: KvmRegs
    sregs: KvmSregs
    bits: int
    linear_rip: int
    code: bytes

    @classmethod
    def of(cls, daemon: Daemon, vm: int, vcpu: int) -> Registers:
        """Ask for them.  Raises DaemonError."""
        answer = daemon.ask("registers", vm=vm, vcpu=vcpu)
        try:
            return cls(KvmRegs.from_buffer_copy(bytes.fromhex(answer["regs"])),
                       KvmSregs.from_buffer_copy(bytes.fromhex(answer["sregs"])), int(answer["bits"]), int(answer["linear_rip"]),
                       bytes.fromhex(answer["code"]))
        except (KeyError, TypeError, ValueError) as error:
            raise DaemonError(f"VM {vm} answers with nonsense: {error}") from error


def show_registers(r: Registers) -> None:
    """Registers, and what comes next."""
    regs, sregs = r.regs, r.sregs
    for at in range(0, len(_GENERAL), 4):
        print("  ".join(f"{name:>3} {getattr(regs, name):016x}" for name in _GENERAL[at:at + 4]))
    flags = " ".join(name for bit, name in _FLAGS if regs.rflags >> bit & 1)
    print(f"rip {regs.rip:016x}  rflags {regs.rflags:08x} [{flags}]  {r.bits}-bit code")
    for name in _SEGMENTS:
        segment = getattr(sregs, name)
        print(f"{name:>3} {segment.selector:04x}  base {segment.base:016x}  limit {segment.limit:08x}  type {segment.type:2}  "
              f"dpl {segment.dpl}" + ("" if segment.present and not segment.unusable else "  unusable"))
    print(f"cr0 {sregs.cr0:08x}  cr2 {sregs.cr2:016x}  cr3 {sregs.cr3:016x}  cr4 {sregs.cr4:08x}  cr8 {sregs.cr8:x}")
    print(f"gdt {sregs.gdt.base:016x} {sregs.gdt.limit:04x}  idt {sregs.idt.base:016x} {sregs.idt.limit:04x}  "
          f"efer {sregs.efer:x}  apic_base {sregs.apic_base:x}")
    print()
    show_code(r)


def show_code(r: Registers) -> None:
    """Disassembly from rip on."""
    if not r.code:
        print(f"   {r.linear_rip:016x}  no memory there")
        return
    engine = capstone.Cs(capstone.CS_ARCH_X86, _MODES[r.bits])
    for index, insn in enumerate(engine.disasm(r.code, r.linear_rip)):
        if index == INSTRUCTIONS:
            break
        mark = "  " if index else "=>"
        print(f"{mark} {insn.address:016x}  {insn.bytes.hex(' '):<32} {insn.mnemonic} {insn.op_str}".rstrip())


def show_memory(data: bytes, start: int) -> None:
    """A hex dump."""
    for at in range(0, len(data), 16):
        part = data[at:at + 16]
        text = "".join(chr(byte) if 32 <= byte < 127 else "." for byte in part)
        print(f"{start + at:016x}  {part.hex(' '):<47}  {text}")


@dataclass(frozen=True, slots=True)
class Step:
    """One level of a page-table walk: the entry's name, where it is, its value."""

    name: str
    at: int
    entry: int


def walk(daemon: Daemon, vm: int, r: Registers, va: int) -> tuple[list[Step], int | None]:
    """The entries that translate ``va``, and the physical address (None: not mapped)."""
    sregs = r.sregs
    if not sregs.cr0 & CR0_PG:
        return [], va
    shifts: tuple[int, ...] = (48, 39, 30, 21, 12)
    if not sregs.efer & EFER_LMA:
        shifts = shifts[2:] if sregs.cr4 & CR4_PAE else (22, 12)
    elif not sregs.cr4 & CR4_LA57:
        shifts = shifts[1:]
    size, bits = (4, 10) if shifts[0] == 22 else (8, 9)
    names = ("PML5E", "PML4E", "PDPTE", "PDE", "PTE")[-len(shifts):]
    table, steps = sregs.cr3 & (_ADDRESS if size == 8 else 0xFFFFF000), []
    if size == 8 and len(shifts) == 3:
        table = sregs.cr3 & 0xFFFFFFE0
    for name, shift in zip(names, shifts, strict=True):
        at = table + size * (va >> shift & (1 << bits) - 1)
        data = bytes.fromhex(daemon.ask("physical", vm=vm, address=at, size=size)["data"])
        entry = int.from_bytes(data, "little")
        steps.append(Step(name, at, entry))
        if not entry & _PRESENT:
            return steps, None
        large = entry & _LARGE and shift > 12 and name not in ("PML5E", "PML4E") and (size == 8 or sregs.cr4 & CR4_PSE)
        if large or shift == 12:
            mask = (1 << shift) - 1
            return steps, entry & _ADDRESS & ~mask | va & mask
        table = entry & _ADDRESS
    raise AssertionError("a walk ends at its last level")


def show_walk(steps: list[Step], pa: int | None, va: int) -> None:
    """The walk, a line a level."""
    for step in steps:
        e = step.entry
        bits = " ".join(name for bit, name in ((0, "P"), (1, "W"), (2, "U"), (3, "PWT"), (4, "PCD"), (5, "A"), (6, "D"), (7, "PS"),
                                               (8, "G"), (63, "NX")) if e >> bit & 1)
        print(f"{step.name:>5} at {step.at:012x}  {e:016x}  {bits}")
    print(f"{va:#x} is physical {pa:#x}" if pa is not None else f"{va:#x} is not mapped")
