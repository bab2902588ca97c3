# SPDX-License-Identifier: GPL-2.0-or-later
"""What programs look at before they open the node, in a private mount namespace: /proc/cpuinfo and /sys/module."""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Iterator, Mapping

from kvmfs.kvm.module_params import module_parameters
from kvmfs_cli.namespace import MS_BIND, MS_MOVE, MS_NOEXEC, MS_NOSUID, MS_RDONLY, MS_REC, MS_REMOUNT, detach, mount

CPUINFO = "/proc/cpuinfo"
MODULES = "/sys/module"
VIRTUALIZATION_FLAGS = {"intel": "vmx", "amd": "svm"}


def pretend_virtualization(vendor: str) -> None:
    """Show a machine on which ``vendor``'s KVM is loaded: the CPU's flag, the modules and their parameters.  OSError."""
    with open(CPUINFO, encoding="utf-8", errors="replace") as file:
        text = with_virtualization(file.read(), vendor)
    with _temporary("kvmfs-cpuinfo") as directory:
        copy = os.path.join(directory, "cpuinfo")
        _write(copy, text)
        mount(copy, CPUINFO, None, MS_BIND)
        detach(directory)               # the file's own mount keeps it
    if os.path.isdir(MODULES):
        with _temporary("kvmfs-module") as directory:
            _other_modules(directory)
            _modules(directory, module_parameters(vendor))
            mount(directory, MODULES, None, MS_MOVE)
            mount("none", MODULES, None, MS_REMOUNT | MS_BIND | MS_RDONLY | MS_NOSUID | MS_NOEXEC)


def with_virtualization(cpuinfo: str, vendor: str) -> str:
    """The text of /proc/cpuinfo with the flag of that vendor's virtualization at each CPU, and not the other vendor's."""
    wanted = VIRTUALIZATION_FLAGS[vendor]
    others = set(VIRTUALIZATION_FLAGS.values())

    def flags(line: str) -> str:
        name, colon, value = line.partition(":")
        if name.strip() != "flags":
            return line
        return f"{name}{colon} {' '.join([flag for flag in value.split() if flag not in others] + [wanted])}"

    return "".join(flags(line) + "\n" for line in cpuinfo.splitlines())


def _other_modules(directory: str) -> None:
    """All of /sys/module but what belongs to the kernel's own KVM, which these programs do not use."""
    for entry in os.scandir(MODULES):
        if entry.name != "kvm" and not entry.name.startswith("kvm_"):
            target = os.path.join(directory, entry.name)
            os.mkdir(target)
            mount(entry.path, target, None, MS_BIND | MS_REC)


def _modules(directory: str, modules: Mapping[str, Mapping[str, str]]) -> None:
    for module, parameters in modules.items():
        path = directory
        for part in (module, "parameters"):
            path = os.path.join(path, part)
            os.mkdir(path)
            os.chmod(path, 0o755)
        for name, value in parameters.items():
            _write(os.path.join(path, name), f"{value}\n")


def _write(path: str, text: str) -> None:
    with open(path, "w", encoding="utf-8") as file:
        file.write(text)
    os.chmod(path, 0o444)


@contextlib.contextmanager
def _temporary(name: str) -> Iterator[str]:
    """A new tmpfs on a directory that is gone afterwards; the tmpfs must have moved or been detached by then."""
    directory = tempfile.mkdtemp(prefix=f"{name}-")
    try:
        mount(name, directory, "tmpfs", MS_NOSUID | MS_NOEXEC, "mode=755")
        yield directory
    finally:
        with contextlib.suppress(OSError):
            os.rmdir(directory)
