# SPDX-License-Identifier: GPL-2.0-or-later
"""Which kernel this KVM presents itself as: an older one has fewer ioctls, capabilities and flags.

What came when is data, profiles.toml.  A profile takes away what its kernel had not yet; nothing behaves in an older
way otherwise.
"""

from __future__ import annotations

import tomllib
from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import cache
from importlib.resources import files
from typing import TYPE_CHECKING, Any

from kvmfs.abi import msrs as _msrs
from kvmfs.abi.caps import CAPS
from kvmfs.abi.ioctls import BY_NAME, Level

if TYPE_CHECKING:
    from kvmfs.kvm.cpuid import CpuidEntry

Version = tuple[int, int]
CLOCK_FLAGS_SINCE: Version = (5, 16)    # KVM_CLOCK_REALTIME and HOST_TSC; before, KVM_SET_CLOCK took no flag at all


def _version(text: str) -> Version:
    major, minor = text.split(".")
    return int(major), int(minor)


@dataclass(frozen=True)
class Profile:
    """One kernel: ``without`` and the like name what it has not yet."""

    name: str
    version: Version
    without: frozenset[int]                         # capabilities
    cannot_enable: frozenset[int]
    values: dict[int, int]                          # capability → its value, where another one than today's
    no_ioctls: dict[Level, frozenset[int]]
    no_msrs: frozenset[int]
    no_hyperv: tuple[tuple[int, str, int], ...]     # leaf, register, bits

    def extension(self, cap: int, value: int) -> int:
        """KVM_CHECK_EXTENSION's answer where the newest kernel says ``value``."""
        if not value or cap in self.without:
            return 0
        return self.values.get(cap, value)

    def mask(self, cap: int, mask: int) -> int:
        """The flags that ``cap`` tells of, where the newest kernel has ``mask``."""
        return self.values.get(cap, mask)

    @property
    def clock_flags(self) -> bool:
        """Has KVM_GET_CLOCK the host's times, and takes KVM_SET_CLOCK what that gave?"""
        return self.version >= CLOCK_FLAGS_SINCE

    def msrs(self, indices: tuple[int, ...]) -> tuple[int, ...]:
        """A list of MSRs without those that are newer."""
        return tuple(index for index in indices if index not in self.no_msrs) if self.no_msrs else indices

    def hyperv_cpuid(self, entries: Iterable[CpuidEntry]) -> list[CpuidEntry]:
        """Hyper-V's leaves without bits that are newer."""
        result = list(entries)
        for leaf, register, bits in self.no_hyperv:
            result = [replace(entry, **{register: getattr(entry, register) & ~bits}) if entry.function == leaf else entry
                      for entry in result]
        return result


@cache
def _data() -> dict[str, Any]:
    return tomllib.loads(files(__package__).joinpath("profiles.toml").read_text("utf-8"))


def names() -> list[str]:
    """All profiles, the newest last."""
    return list(_data()["profiles"])


@cache
def load(name: str) -> Profile:
    """The profile of that name.  ValueError: there is none."""
    data = _data()
    if name not in data["profiles"]:
        raise ValueError(f"there is no profile {name!r}: use one of {', '.join(data['profiles'])}")
    version = _version(name.removeprefix("linux-"))

    def newer(table: dict[str, str]) -> list[str]:
        return [key for key, since in table.items() if _version(since) > version]

    values = {}
    for cap, history in data["values"].items():
        for before, value in reversed(history):
            if version < _version(before):
                values[CAPS[cap]] = value
    without = frozenset(CAPS[cap] for cap in newer(data["capabilities"]))
    return Profile(
        name, version, without, without | {CAPS[cap] for cap in newer(data["enable_cap"])}, values,
        {Level[level.upper()]: frozenset(BY_NAME[ioctl].number for ioctl in newer(table))
         for level, table in data["ioctls"].items()},
        frozenset(getattr(_msrs, msr) for msr in newer(data["msrs"])),
        tuple((entry["leaf"], entry["register"], entry["bits"]) for entry in data["hyperv_cpuid"]
              if _version(entry["since"]) > version))


DEFAULT = names()[-1]
