# SPDX-License-Identifier: GPL-2.0-or-later
"""What a figure is: the row of a table, its rival, its target; medians and spreads.  Less is better in every row."""

from __future__ import annotations

import enum
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from kvmfs_bench.lab import Lab


class Subject(enum.Enum):
    """Who is measured."""

    OURS = "kvmfs"
    SERVER = "libfuse server in C"
    REAL = "the machine's /dev/kvm"
    TCG = "QEMU TCG"
    ONE = "one VM"


class AbsentError(Exception):
    """That subject does not have it, or is not there; the text says why."""


class MeasureError(Exception):
    """It could not be measured; the text says why."""


@dataclass(frozen=True)
class Target:
    """To be reached: at most ``limit``, of the rival's figure (``relative``) or in the row's unit."""

    limit: float
    relative: bool = True

    def text(self, unit: str) -> str:
        return f"≤ {self.limit:g} ×" if self.relative else f"≤ {self.limit:g} {unit}"

    def met(self, ours: float | None, ratio: float | None) -> bool | None:
        """None: cannot be told."""
        value = ratio if self.relative else ours
        return None if value is None else value <= self.limit


@dataclass(frozen=True)
class RowSpec:
    """One row: ``key`` is the figure's name in what :attr:`Bench.measure` returns."""

    name: str
    key: str
    unit: str
    target: Target | None = None


Figures = Mapping[str, float]
Measure = Callable[["Lab", Subject, bool], Figures]


@dataclass(frozen=True)
class Bench:
    """One job, measured for each subject in turn, again and again; it gives a figure for each of its rows.

    ``measure(lab, subject, pinned)`` raises AbsentError or MeasureError.
    """

    rows: tuple[RowSpec, ...]
    measure: Measure
    rival: Subject | None = None
    pins: tuple[bool, ...] = (False,)
    repetitions: int = 7
    heavy: bool = False         # not with --quick

    @property
    def subjects(self) -> tuple[Subject, ...]:
        return (Subject.OURS,) if self.rival is None else (Subject.OURS, self.rival)

    def chosen(self, patterns: Sequence[str]) -> list[RowSpec]:
        """The rows that were asked for; all when nothing was."""
        return [row for row in self.rows if not patterns or any(matches(row.name, pattern) for pattern in patterns)]


def matches(name: str, pattern: str) -> bool:
    """A part of the name, or a glob over all of it."""
    return pattern in name or fnmatchcase(name, pattern)


@dataclass
class Row:
    """The outcome of a row."""

    spec: RowSpec
    pinned: bool
    rival: Subject | None
    ours_samples: list[float] = field(default_factory=list)
    rival_samples: list[float] = field(default_factory=list)
    note: str = ""              # why something is missing
    failed: bool = False        # ours could not be measured

    @property
    def name(self) -> str:
        return f"{self.spec.name}/pinned" if self.pinned else self.spec.name

    @property
    def ours(self) -> float | None:
        return median(self.ours_samples)

    @property
    def theirs(self) -> float | None:
        return median(self.rival_samples)

    @property
    def ratio(self) -> float | None:
        ours, theirs = self.ours, self.theirs
        return ours / theirs if ours is not None and theirs else None

    @property
    def met(self) -> bool | None:
        return self.spec.target.met(self.ours, self.ratio) if self.spec.target else None

    def as_json(self) -> dict[str, Any]:
        target = self.spec.target
        return {
            "name": self.name, "ours": self.ours, "rival": self.theirs, "rival_name": self.rival.value if self.rival else None,
            "ratio": self.ratio, "unit": self.spec.unit, "spread": spread(self.ours_samples),
            "rival_spread": spread(self.rival_samples), "target": target.text(self.spec.unit) if target else None,
            "met": self.met, "pinned": self.pinned, "repetitions": len(self.ours_samples), "note": self.note or None,
        }


def median(samples: Sequence[float]) -> float | None:
    return statistics.median(samples) if samples else None


def spread(samples: Sequence[float]) -> float | None:
    """The distance between the quartiles as a part of the median; with fewer than four samples between the extremes."""
    middle = median(samples)
    if not middle or len(samples) < 2:
        return None
    if len(samples) < 4:
        return (max(samples) - min(samples)) / middle
    low, _, high = statistics.quantiles(samples, n=4, method="inclusive")
    return (high - low) / middle
