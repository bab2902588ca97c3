# SPDX-License-Identifier: GPL-2.0-or-later
"""Ioctls as text: names, fields, flags and errnos by the table of kvmfs.abi."""

from __future__ import annotations

import ctypes
import errno
import os
from collections.abc import Callable
from typing import Any, Final

from kvmfs.abi import caps, flags, ioctls, structs
from kvmfs.abi import exits as kx
from kvmfs.abi.ioctls import BY_NUMBER, Ioctl
from kvmfs.testing.client import EXIT_NAMES

_CAP_NAMES: Final = {number: name for name, number in caps.CAPS.items()}
_ELEMENTS: Final[dict[type, tuple[str, type]]] = {
    structs.KvmMsrs: ("nmsrs", structs.KvmMsrEntry), structs.KvmMsrList: ("nmsrs", ctypes.c_uint32),
    structs.KvmCpuid2: ("nent", structs.KvmCpuidEntry2), structs.KvmIrqRouting: ("nr", structs.KvmIrqRoutingEntry)}
ELEMENTS_SHOWN: Final = 4
_BYTES_SHOWN: Final = 16
_MAKE_DESCRIPTORS: Final = (ioctls.KVM_CREATE_VM, ioctls.KVM_CREATE_VCPU, ioctls.KVM_GET_STATS_FD)
_PAGE: Final = 4096


def _bits(prefix: str) -> dict[int, str]:
    return {value: name for module in (flags, kx) for name, value in vars(module).items() if name.startswith(prefix)}


_FLAGS: Final[dict[type, dict[int, str]]] = {
    structs.KvmUserspaceMemoryRegion: _bits("KVM_MEM_"), structs.KvmUserspaceMemoryRegion2: _bits("KVM_MEM_"),
    structs.KvmIrqfd: _bits("KVM_IRQFD_FLAG_"), structs.KvmIoeventfd: _bits("KVM_IOEVENTFD_FLAG_")}


def number(value: int) -> str:
    """Small numbers as people say them, others in hexadecimal."""
    return str(value) if value < 10 else f"{value:#x}"


def flag_names(value: int, names: dict[int, str]) -> str:
    """``A|B``; what has no name stays a number."""
    found = [name for bit, name in names.items() if bit and value & bit == bit]
    rest = value & ~sum({bit for bit in names if bit and value & bit == bit})
    return "|".join([*found, *([f"{rest:#x}"] if rest or not found else [])])


def fields(value: Any) -> str:
    """A struct's fields; reserved ones and those that are 0 are left out of long structs."""
    kind = type(value)
    parts = []
    names = [entry[0] for entry in kind._fields_]
    for name in names:
        if name.startswith(("pad", "reserved")):
            continue
        item = getattr(value, name)
        if len(names) > 8 and not isinstance(item, ctypes.Structure | ctypes.Union | ctypes.Array) and not item:
            continue
        if name == "flags" and kind in _FLAGS:
            parts.append(f"flags={flag_names(item, _FLAGS[kind])}")
        elif name == "cap" and kind is structs.KvmEnableCap:
            parts.append(f"cap={_CAP_NAMES.get(item, item)}")
        else:
            parts.append(f"{name}={text(item)}")
    return "{" + ", ".join(parts) + "}"


def text(item: Any) -> str:
    """A value of any ctypes kind."""
    if isinstance(item, int):
        return number(item)
    if isinstance(item, bytes):
        return item.hex()
    if isinstance(item, ctypes.Structure):
        return fields(item)
    if isinstance(item, ctypes.Union):
        return bytes(item)[:_BYTES_SHOWN].hex() + "…"
    if isinstance(item, ctypes.Array):
        if not any(bytes(item)):
            return "0"
        if item._type_ is ctypes.c_uint8:
            return bytes(item)[:_BYTES_SHOWN].hex() + ("…" if len(item) > _BYTES_SHOWN else "")
        return "[" + ", ".join(text(one) for one in item[:ELEMENTS_SHOWN]) + (", …]" if len(item) > ELEMENTS_SHOWN else "]")
    return str(getattr(item, "value", item))


def _struct(entry: Ioctl, data: bytes, array: bytes) -> str:
    """The struct of ``entry`` in ``data``, and what ``array`` holds behind it."""
    kind = entry.struct
    assert kind is not None
    size = ctypes.sizeof(kind)
    value: Any = kind.from_buffer_copy(data.ljust(size, b"\0")[:size])
    if not isinstance(value, ctypes.Structure):
        return text(value.value)
    if kind not in _ELEMENTS:
        return fields(value)
    name, element = _ELEMENTS[kind]
    count, width = getattr(value, name), ctypes.sizeof(element)
    shown = min(count, ELEMENTS_SHOWN, len(array) // width)
    items = ", ".join(text(element.from_buffer_copy(array, index * width)) if issubclass(element, ctypes.Structure)
                      else number(int.from_bytes(array[index * width:(index + 1) * width], "little")) for index in range(shown))
    return f"{{{name}={count}, [{items}{', …' if count > shown else ''}]}}"


def argument(entry: Ioctl | None, record: dict[str, Any]) -> str:
    """The argument of an ioctl, as it was given and as it came back."""
    arg = record["arg"]
    if entry is None:
        return f"{arg:#x}"
    if entry.number == ioctls.KVM_CHECK_EXTENSION:
        return _CAP_NAMES.get(arg, str(arg))
    before, after, array = (bytes.fromhex(record.get(name, "")) for name in ("in", "out", "array"))
    if entry.struct is None or not (before or after):
        return number(arg) if arg else ""
    shown = [_struct(entry, data, array) for data in (before, after) if data]
    return shown[0] if len(shown) == 1 or shown[0] == shown[1] else " → ".join(shown)


def _io(run: structs.KvmRun, page: bytes) -> str:
    io = run.io
    size = io.size * io.count
    if io.direction == kx.KVM_EXIT_IO_OUT:
        data = f" data {page[:min(size, len(page))].hex()}" if io.data_offset == _PAGE else ""
        return f"out port {io.port:#x} size {io.size} count {io.count}{data}"
    return f"in port {io.port:#x} size {io.size} count {io.count}"


def _mmio(run: structs.KvmRun, _: bytes) -> str:
    mmio = run.mmio
    length = min(mmio.len, 8)
    return (f"write {mmio.phys_addr:#x} data {bytes(mmio.data[:length]).hex()}" if mmio.is_write
            else f"read {mmio.phys_addr:#x} len {length}")


_DETAILS: Final[dict[int, Callable[[structs.KvmRun, bytes], str]]] = {
    kx.KVM_EXIT_IO: _io, kx.KVM_EXIT_MMIO: _mmio,
    kx.KVM_EXIT_HYPERCALL: lambda run, _: fields(run.hypercall),
    kx.KVM_EXIT_DEBUG: lambda run, _: fields(run.debug.arch),
    kx.KVM_EXIT_FAIL_ENTRY: lambda run, _: fields(run.fail_entry),
    kx.KVM_EXIT_INTERNAL_ERROR: lambda run, _: f"suberror {run.internal.suberror} ndata {run.internal.ndata}",
    kx.KVM_EXIT_SYSTEM_EVENT: lambda run, _: f"type {run.system_event.type}",
    kx.KVM_EXIT_X86_RDMSR: lambda run, _: f"index {run.msr.index:#x}",
    kx.KVM_EXIT_X86_WRMSR: lambda run, _: f"index {run.msr.index:#x} data {run.msr.data:#x}",
    kx.KVM_EXIT_IOAPIC_EOI: lambda run, _: f"vector {run.eoi.vector}",
}


def exit_text(record: dict[str, Any]) -> str:
    """What KVM_RUN came back with."""
    data = bytes.fromhex(record.get("run", ""))
    run = structs.KvmRun.from_buffer_copy(data.ljust(ctypes.sizeof(structs.KvmRun), b"\0"))
    name = f"KVM_EXIT_{EXIT_NAMES.get(run.exit_reason, run.exit_reason)}"
    detail = _DETAILS.get(run.exit_reason)
    return f"{name} {{{detail(run, bytes.fromhex(record.get('io', ''))).strip('{}')}}}" if detail else name


def outcome(record: dict[str, Any]) -> str:
    """``= 0``, or the errno."""
    result = record["result"]
    if result == 0 and record["cmd"] in _MAKE_DESCRIPTORS:
        return "= (a descriptor)"
    if result >= 0:
        return f"= {result}"
    return f"= -1 {errno.errorcode.get(-result, -result)} ({os.strerror(-result)})"


def ioctl(record: dict[str, Any]) -> str:
    """One line for a record "ioctl" of kvmfs.api.trace.  Raises KeyError, TypeError, ValueError for what is none."""
    entry = BY_NUMBER.get(record["cmd"])
    name = entry.name if entry else f"ioctl {record['cmd']:#x}"
    where = record["fd"] if record["fd"] == "system" else f"vm {record['vm']}" + (
        "" if record["fd"] == "vm" else f" {record['fd'].replace(':', ' ')}")
    said = argument(entry, record)
    if record["cmd"] == ioctls.KVM_RUN and record["result"] >= 0:
        said = exit_text(record)
    fault = f"  [fault {record['fault']}]" if "fault" in record else ""
    return f"{where}: {name}{' ' + said if said else ''} {outcome(record)} <{record['took'] / 1000:.0f} µs>{fault}"
