# SPDX-License-Identifier: GPL-2.0-or-later
"""Host CPUs: what each of them can do, and the news of one that goes offline."""

from __future__ import annotations

import logging
import os
import select
import socket
import threading
from collections.abc import Callable

log = logging.getLogger("kvmd.hotplug")

NETLINK_KOBJECT_UEVENT = 15
KERNEL_GROUP = 1
# What the translator looks for once, on the CPU that it happens to start on, and then uses on all.
TRANSLATOR_FEATURES = ("cx8", "cmov", "sse2", "cx16", "popcnt", "movbe", "abm", "bmi1", "bmi2", "avx", "avx2")


def cpu_facts() -> dict[int, dict[str, str]]:
    """The lines of /proc/cpuinfo by CPU number."""
    facts: dict[int, dict[str, str]] = {}
    current: dict[str, str] = {}
    with open("/proc/cpuinfo", encoding="ascii", errors="replace") as file:
        for line in file:
            name, _, value = line.partition(":")
            if name.strip() == "processor":
                current = facts.setdefault(int(value), {})
            current[name.strip()] = value.strip()
    return facts


def check_one(cpu: int, mine: dict[str, str], first: dict[str, str], first_cpu: int) -> None:
    """Raises OSError naming what ``cpu`` has not got or has other than the first CPU."""
    if mine.get("vendor_id") != first.get("vendor_id"):
        raise OSError(5, f"CPU {cpu} is a {mine.get('vendor_id')}, CPU {first_cpu} a {first.get('vendor_id')}")
    flags, wanted = set(mine.get("flags", "").split()), set(first.get("flags", "").split())
    for feature in TRANSLATOR_FEATURES:
        if (feature in flags) != (feature in wanted):
            has, lacks = (cpu, first_cpu) if feature in flags else (first_cpu, cpu)
            raise OSError(5, f"CPU {cpu} differs: CPU {has} has {feature}, CPU {lacks} has not")


def check_all() -> list[int]:
    """Look at every CPU that this process may use, from that CPU; returns their numbers.

    Raises OSError naming the CPU that differs.
    """
    allowed = os.sched_getaffinity(0)
    facts = cpu_facts()
    first_cpu = min(allowed)
    first = facts.get(first_cpu, {})
    try:
        for cpu in sorted(allowed):
            try:
                os.sched_setaffinity(0, {cpu})
            except OSError as error:
                raise OSError(error.errno, f"CPU {cpu} cannot be used: {error.strerror}") from error
            check_one(cpu, facts.get(cpu, first), first, first_cpu)
    finally:
        os.sched_setaffinity(0, allowed)
    return sorted(allowed)


class HotplugWatch:
    """Calls ``offline(cpu)`` in its own thread when the kernel tells that a CPU went offline."""

    def __init__(self, offline: Callable[[int], None]) -> None:
        self._offline = offline
        self._socket = socket.socket(socket.AF_NETLINK, socket.SOCK_DGRAM, NETLINK_KOBJECT_UEVENT)
        try:
            self._socket.bind((0, KERNEL_GROUP))
        except OSError:
            self._socket.close()
            raise
        self._stop, self._wake = os.pipe2(os.O_CLOEXEC)
        self._thread = threading.Thread(target=self._run, name="hotplug", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        poll = select.poll()
        poll.register(self._socket, select.POLLIN)
        poll.register(self._stop, select.POLLIN)
        while True:
            if any(fd == self._stop for fd, _ in poll.poll()):
                return
            try:
                message, (sender, _) = self._socket.recvfrom(8192)
            except OSError:
                continue                            # too many events at once: the queue was cut
            # Only the kernel may say so: its messages come from port 0.
            if sender == 0 and message.startswith(b"offline@/devices/system/cpu/cpu"):
                number = message.split(b"\0")[0].rpartition(b"/cpu")[2]
                if number.isdigit():
                    log.info("host CPU %d goes offline", int(number))
                    self._offline(int(number))

    def close(self) -> None:
        """Stop watching."""
        os.write(self._wake, b"x")
        self._thread.join()
        self._socket.close()
        os.close(self._stop)
        os.close(self._wake)
