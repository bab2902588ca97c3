# SPDX-License-Identifier: GPL-2.0-or-later
"""``stats/`` in the public mount: what Linux shows below /sys/kernel/debug/kvm (Linux: kvm_main.c, kvm_create_vm_debugfs).

``stats/NAME`` is the sum of a statistic over all VMs, ``stats/PID-N/NAME`` that of VM N of process PID, over its vCPUs, and
``stats/PID-N/vcpuM/NAME`` that of one vCPU.  Beside Linux's names there are a vCPU's times and what the VM's translator did.
A file is read from the worker when it is opened.
"""

from __future__ import annotations

import errno
import stat
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Final

from kvmd.control import ask
from kvmfs.kvm.stats import TRANSLATION, VCPU_STATS, VCPU_TIMES, VM_STATS

if TYPE_CHECKING:
    from kvmd.broker import Broker

VCPU_NAMES: Final = (*(one.name for one in VCPU_STATS if one.size == 1), *VCPU_TIMES)
VM_NAMES: Final = (*(one.name for one in VM_STATS), *TRANSLATION, *VCPU_NAMES)
FIRST_INODE: Final = 0x1000
Path = tuple[str, ...]


class StatsTree:
    """The directory's content; paths are relative to it, and each path that was asked for has an inode number of its own."""

    def __init__(self, brokers: Callable[[], list[Broker]]) -> None:
        self._brokers = brokers
        self._inodes: dict[Path, int] = {}
        self._paths: dict[int, Path] = {}
        self._lookups: dict[int, int] = {}
        self._next = FIRST_INODE

    def inode(self, path: Path) -> int:
        """The inode number of a path."""
        number = self._inodes.get(path)
        if number is None:
            number = self._inodes[path] = self._next
            self._paths[number] = path
            self._next += 1
        return number

    def looked_up(self, inode: int) -> None:
        """The kernel knows this inode once more."""
        self._lookups[inode] = self._lookups.get(inode, 0) + 1

    def forget(self, inode: int, count: int) -> None:
        """The kernel has forgotten it so many times; who has no more numbers to it is dropped."""
        left = self._lookups.pop(inode, 0) - count
        if left > 0:
            self._lookups[inode] = left
        elif inode in self._paths:
            del self._inodes[self._paths.pop(inode)]

    def path(self, inode: int) -> Path | None:
        """The path of an inode number; None: it has none."""
        return self._paths.get(inode)

    def _vm(self, name: str) -> Broker:
        for broker in self._brokers():
            if name == _directory(broker):
                return broker
        raise OSError(errno.ENOENT, "no such VM", name)

    def children(self, path: Path) -> list[str]:
        """The names in a directory.  Raises OSError(ENOENT)."""
        if not path:
            return [*(_directory(broker) for broker in self._brokers()), *VM_NAMES]
        if len(path) == 1:
            return [*(f"vcpu{vcpu['id']}" for vcpu in _vcpus(self._vm(path[0]))), *VM_NAMES]
        return list(VCPU_NAMES)

    def mode(self, path: Path) -> int:
        """A path's kind and permission bits.  Raises OSError(ENOENT)."""
        if path and len(path) <= 3 and path[-1] in (VCPU_NAMES if len(path) == 3 else VM_NAMES):
            return stat.S_IFREG | 0o444
        if len(path) > 2:
            raise OSError(errno.ENOENT, "no such statistic", path[-1])
        if path:
            broker = self._vm(path[0])
            if len(path) == 2 and path[1] not in (f"vcpu{vcpu['id']}" for vcpu in _vcpus(broker)):
                raise OSError(errno.ENOENT, "no such vCPU", path[1])
        return stat.S_IFDIR | 0o555

    def content(self, path: Path) -> bytes:
        """A file's text: a number and a newline.  Asks the workers.  Raises OSError(ENOENT)."""
        name = path[-1]
        brokers = self._brokers() if len(path) == 1 else [self._vm(path[0])]
        if name not in VCPU_NAMES:
            return b"%d\n" % sum(_number(_statistics(broker).get("translation"), name) for broker in brokers)
        vcpus = [vcpu for broker in brokers for vcpu in _vcpus(broker) if len(path) < 3 or path[1] == f"vcpu{vcpu['id']}"]
        return b"%d\n" % sum(_number(vcpu, name) for vcpu in vcpus)


def _directory(broker: Broker) -> str:
    return f"{broker.process.tgid}-{broker.number}"


# What a worker says is not trusted.
def _statistics(broker: Broker) -> dict[str, Any]:
    try:
        return ask(broker, "statistics")
    except OSError:
        return {}                       # it has just ended


def _vcpus(broker: Broker) -> list[dict[str, Any]]:
    vcpus = _statistics(broker).get("vcpus")
    return [vcpu for vcpu in vcpus if isinstance(vcpu, dict) and isinstance(vcpu.get("id"), int)] if isinstance(vcpus, list) else []


def _number(numbers: Any, name: str) -> int:
    value = numbers.get(name) if isinstance(numbers, dict) else None
    return value if isinstance(value, int) else 0
