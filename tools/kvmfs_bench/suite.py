# SPDX-License-Identifier: GPL-2.0-or-later
"""All that is measured: one line for each row."""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterable

from kvmfs_bench.lab import BUILD, Lab, linux_image
from kvmfs_bench.memory import idle_vms
from kvmfs_bench.model import Bench, Figures, Measure, MeasureError, RowSpec, Subject, Target

BOTH = (False, True)
NEEDED_FOR_2_GIB = 5 << 30      # the client's pages, their copy, and some air
DEBUG_EXIT = "isa-debug-exit,iobase=0xf4,iosize=4"


def _client(*job: str | int) -> Measure:
    """The client's job as it is; its second word is how often."""
    name, count, *rest = job
    return lambda lab, subject, pinned: lab.client(subject, pinned, name, lab.count(int(count)), *rest)


def _memory(mib: int, fill: str) -> Measure:
    def measure(lab: Lab, subject: Subject, pinned: bool) -> Figures:
        free = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_AVPHYS_PAGES")
        if fill == "full" and mib >= 2048 and free < NEEDED_FOR_2_GIB:
            raise MeasureError("not enough free memory")
        return lab.client(subject, pinned, "memory", mib, fill, 1 if fill == "full" or lab.quick else 5)
    return measure


def _idle(count: int) -> Measure:
    return lambda lab, subject, pinned: {"idle": idle_vms(lab, min(count, 5) if lab.quick else count)}


def _busy(vms: int) -> Measure:
    """Nanoseconds for a loop of all together; what one VM alone would give on as many CPUs is the rival."""
    def measure(lab: Lab, subject: Subject, pinned: bool) -> Figures:
        count, parts = (1, min(vms, lab.cpus)) if subject is Subject.ONE else (vms, 1)
        speed = lab.client(Subject.OURS, pinned, "busy", count, 0.2 if lab.quick else 2)["busy"]
        return {"busy": 1e3 / speed / parts}
    return measure


def guest_times(lines: Iterable[tuple[float, str]]) -> dict[str, float]:
    """Nanoseconds for each operation, of (seconds, line) of what bench-guest says."""
    found, begin = {}, 0.0
    for at, line in lines:
        match line.split():
            case ["begin", _]:
                begin = at
            case ["end", name, count]:
                found[name] = (at - begin) * 1e9 / int(count)
    return found


def _guest(lab: Lab, subject: Subject, pinned: bool) -> Figures:
    return guest_times(lab.qemu(subject, "-m", "1024", "-serial", "none", "-debugcon", "stdio", "-device", DEBUG_EXIT,
                                "-kernel", str(BUILD / "bench-guest")))


def _boot(cpus: int) -> Measure:
    def measure(lab: Lab, subject: Subject, pinned: bool) -> Figures:
        kernel, initrd = linux_image()
        lines = lab.qemu(subject, "-m", "256", "-smp", str(cpus), "-serial", "stdio", "-kernel", kernel, "-initrd", initrd,
                         "-append", "console=ttyS0 panic=-1 quiet")
        if not any("GUEST-UP" in line for _, line in lines):
            raise MeasureError(f"Linux did not come up: {' / '.join(line for _, line in lines[-4:])}")
        return {"boot": lines[-1][0]}
    return measure


def _calls(limit: float, *keys: str) -> tuple[RowSpec, ...]:
    return tuple(RowSpec(key, key, "µs", Target(limit)) for key in keys)


def _guest_rows() -> tuple[RowSpec, ...]:
    limits = {"integer": 1.1, "load": 1.3, "store": 1.3, "call": 1.3, "double": 2.3,
              "syscall": 1.3, "page_fault": 1.3, "switch": 1.3}
    return tuple(RowSpec(f"guest_{key}", key, "ns", Target(limit)) for key, limit in limits.items())


def _exit_benches() -> Iterable[Bench]:
    for vms, kind in itertools.product((1, 4), ("pio", "mmio", "hlt")):
        name = f"{kind}_exit" if vms == 1 else f"{kind}_exit_{vms}_vms"
        target = Target(1.0) if kind == "pio" and vms == 1 else None
        yield Bench((RowSpec(name, kind, "µs", target),), _client(kind, 20000 // vms, vms), Subject.REAL,
                    pins=BOTH if vms == 1 else (False,))


def _event_benches() -> Iterable[Bench]:
    for kind, name in (("wake", "irq_line_to_halted_guest"), ("irqfd", "irqfd_to_halted_guest"),
                       ("irqfd_running", "irqfd_to_running_guest"), ("ioeventfd", "ioeventfd_to_reader")):
        yield Bench((RowSpec(name, kind, "µs"),), _client(kind, 400), Subject.REAL,
                    pins=(False,) if kind == "irqfd_running" else BOTH, repetitions=5)


def _memory_benches() -> Iterable[Bench]:
    for mib, fill, limit in ((128, "untouched", 5), (2048, "untouched", 20), (128, "full", None), (2048, "full", None)):
        target = Target(limit, relative=False) if limit else None
        heavy = fill == "full" and mib > 128
        yield Bench((RowSpec(f"memory_{mib}_mib_{fill}", "memory", "ms", target),), _memory(mib, fill), Subject.REAL,
                    repetitions=3 if heavy else 5, heavy=heavy)


SUITE: tuple[Bench, ...] = (
    Bench(_calls(1.5, "api_version", "check_extension"), _client("system", 20000), Subject.SERVER, pins=BOTH),
    Bench(_calls(3, "get_regs", "get_sregs", "set_msrs"), _client("vcpu", 10000), Subject.SERVER, pins=BOTH),
    *_exit_benches(),
    *_event_benches(),
    Bench((RowSpec("create_vm_vcpu_close", "create", "ms", Target(15, relative=False)),), _client("create", 40), Subject.REAL,
          pins=BOTH),
    *_memory_benches(),
    Bench(_guest_rows(), _guest, Subject.TCG, repetitions=5),
    *(Bench((RowSpec(f"linux_boot_{cpus}_cpu", "boot", "s", Target(2)),), _boot(cpus), Subject.TCG, repetitions=3, heavy=True)
      for cpus in (1, 2)),
    *(Bench((RowSpec(f"idle_{count}_vm", "idle", "MB", Target(40, relative=False)),), _idle(count), repetitions=3, heavy=count > 1)
      for count in (1, 50)),
    Bench((RowSpec("busy_1_vm", "busy", "ns"),), _busy(1), repetitions=3),
    *(Bench((RowSpec(f"busy_{vms}_vm", "busy", "ns", Target(1.1)),), _busy(vms), Subject.ONE, repetitions=3, heavy=vms > 4)
      for vms in (2, 4, 16)),
)
