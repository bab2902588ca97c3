# SPDX-License-Identifier: GPL-2.0-or-later
"""The vendor modules, and which one serves: as Linux loads kvm-intel or kvm-amd by the host's CPU."""

from __future__ import annotations

from kvmfs.vendor.ops import KvmX86Ops


def host_vendor() -> str:
    """"intel" or "amd" by the host CPU's vendor string; anything else runs as AMD, which the engine is."""
    with open("/proc/cpuinfo", encoding="ascii", errors="replace") as f:
        for line in f:
            if line.startswith("vendor_id"):
                return "intel" if "GenuineIntel" in line else "amd"
    return "amd"


def load(name: str) -> KvmX86Ops:
    """The vendor module for ``auto``, ``intel`` or ``amd``.  ValueError for another name."""
    from kvmfs.vendor.svm import Svm
    from kvmfs.vendor.vmx import Vmx

    if name == "auto":
        name = host_vendor()
    for module in (Svm, Vmx):
        if module.name == name:
            return module()
    raise ValueError(f"unknown vendor {name!r}: use auto, intel or amd")
