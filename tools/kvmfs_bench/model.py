# SPDX-License-Identifier: GPL-2.0-or-later
"""What a row of the table is."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

Measure = Callable[[], float]


class NotMeasuredError(Exception):
    """A figure could not be had; the text says why."""


@dataclass(slots=True)
class Series:
    """What one contestant's repetitions gave, in the row's unit."""

    values: list[float] = field(default_factory=list)
    why_not: str = ""

    @property
    def median(self) -> float | None:
        """The middle one; None: there is none."""
        return statistics.median(self.values) if self.values else None

    @property
    def spread(self) -> float | None:
        """From the lowest to the highest, as a part of the median."""
        middle = self.median
        return (max(self.values) - min(self.values)) / middle if middle else None


@dataclass(frozen=True, slots=True)
class Plan:
    """A row to be measured: each repetition takes ours, then the rival's."""

    name: str
    unit: str
    ours: Measure
    rival_name: str = "—"
    rival: Measure | None = None
    most: float | None = None           # target: ours at most so much
    most_ratio: float | None = None     # target: at most so many times the rival
    least_ratio: float | None = None    # target, where more is better: at least that part of the rival
    repetitions: int = 5


@dataclass(frozen=True, slots=True)
class Row:
    """A row that was measured."""

    name: str
    unit: str
    ours: float | None
    rival: float | None
    rival_name: str
    ratio: float | None
    spread: float | None
    target: str
    met: bool | None
    remark: str

    def as_json(self) -> dict[str, Any]:
        """For build/bench.json."""
        return asdict(self)


def _take(measure: Measure, series: Series) -> None:
    if series.why_not:
        return
    try:
        series.values.append(measure())
    except NotMeasuredError as error:
        series.why_not = str(error)


def measure(plan: Plan, step: Callable[[], None] = lambda: None) -> Row:
    """Take the repetitions, ours and the rival's in turn."""
    ours, rival = Series(), Series()
    for _ in range(plan.repetitions):
        _take(plan.ours, ours)
        if plan.rival is not None:
            _take(plan.rival, rival)
        step()
    return judge(plan, ours, rival)


def judge(plan: Plan, ours: Series, rival: Series) -> Row:
    """The row of these series."""
    mine, theirs = ours.median, rival.median
    ratio = mine / theirs if mine is not None and theirs else None
    target, met = "", None
    if plan.most is not None:
        target, met = f"≤ {plan.most:g} {plan.unit}", None if mine is None else mine <= plan.most
    elif plan.most_ratio is not None:
        target, met = f"≤ {plan.most_ratio:g} ×", None if ratio is None else ratio <= plan.most_ratio
    elif plan.least_ratio is not None:
        target, met = f"≥ {plan.least_ratio:g} ×", None if ratio is None else ratio >= plan.least_ratio
    remark = "; ".join(part for part in (ours.why_not, f"{plan.rival_name}: {rival.why_not}" if rival.why_not else "") if part)
    return Row(plan.name, plan.unit, mine, theirs, plan.rival_name, ratio, ours.spread, target, met, remark)


def select(plans: Sequence[Plan], patterns: Sequence[str]) -> list[Plan]:
    """Those whose name contains one of ``patterns``; all without a pattern."""
    return [plan for plan in plans if not patterns or any(pattern in plan.name for pattern in patterns)]
