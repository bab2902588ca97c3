# SPDX-License-Identifier: GPL-2.0-or-later
"""Measures: the subjects take turns within each repetition, so that what disturbs the machine disturbs all of them."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from kvmfs_bench.model import AbsentError, Bench, MeasureError, Row, Subject

if TYPE_CHECKING:
    from kvmfs_bench.lab import Lab

IDLE = 0.1              # so many CPUs used by others, and less, is an idle machine


@dataclass(frozen=True)
class Load:
    """How busy the machine is: CPUs in use during a second, and the load average of the last minute."""

    cpus_used: float
    average: float

    @property
    def idle(self) -> bool:
        return self.cpus_used <= IDLE

    def text(self) -> str:
        if self.idle:
            return f"the machine is idle (load {self.average:.1f})"
        return f"the machine is NOT idle: others use {self.cpus_used:.1f} CPUs, load {self.average:.1f}"


def _ticks() -> int:
    """Clock ticks that all CPUs were not idle, nor waiting for a disk (proc(5), /proc/stat)."""
    fields = [int(word) for word in Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:9]]
    return sum(fields) - fields[3] - fields[4]


def load(seconds: float = 1) -> Load:
    begin = _ticks()
    time.sleep(seconds)
    return Load((_ticks() - begin) / os.sysconf("SC_CLK_TCK") / seconds, os.getloadavg()[0])


def plan(suite: Sequence[Bench], patterns: Sequence[str], *, quick: bool) -> list[Bench]:
    """What is to be done."""
    return [bench for bench in suite if bench.chosen(patterns) and not (quick and bench.heavy)]


def steps(benches: Sequence[Bench], *, quick: bool) -> int:
    """How many calls of measure() run() makes."""
    return sum(len(bench.subjects) * len(bench.pins) * _repetitions(bench, quick) for bench in benches)


def _repetitions(bench: Bench, quick: bool) -> int:
    return 1 if quick else bench.repetitions


def run(lab: Lab, benches: Sequence[Bench], patterns: Sequence[str], *, quick: bool,
        progress: Callable[[str], None]) -> Iterator[list[Row]]:
    """The rows of each bench, as soon as they are there; ``progress`` is called after each step."""
    for bench in benches:
        for pinned in bench.pins:
            rows = [Row(spec, pinned, bench.rival) for spec in bench.chosen(patterns)]
            _measure(lab, bench, rows, quick, progress)
            yield rows


def _measure(lab: Lab, bench: Bench, rows: Sequence[Row], quick: bool, progress: Callable[[str], None]) -> None:
    gone: set[Subject] = set()
    for repetition in range(_repetitions(bench, quick)):
        # Whoever comes second finds warmer caches: take turns in that, too.
        order = bench.subjects if repetition % 2 == 0 else bench.subjects[::-1]
        for subject in order:
            if subject not in gone:
                try:
                    found = bench.measure(lab, subject, rows[0].pinned)
                    for row in rows:
                        samples = row.ours_samples if subject is Subject.OURS else row.rival_samples
                        samples.append(found[row.spec.key])
                except (AbsentError, MeasureError, OSError, KeyError) as error:
                    gone.add(subject)
                    _note(rows, subject, error)
            progress(rows[0].name)


def _note(rows: Sequence[Row], subject: Subject, error: Exception) -> None:
    text = f"no {error.args[0]}" if isinstance(error, KeyError) else str(error)
    how = "absent" if isinstance(error, AbsentError) else "not measured"
    for row in rows:
        row.note = f"{row.note}; " * bool(row.note) + f"{subject.value} {how}: {text}"
        row.failed |= subject is Subject.OURS and not isinstance(error, AbsentError)
