# SPDX-License-Identifier: GPL-2.0-or-later
"""`make bench`: statistics, targets, taking turns, the table and its JSON.  Nothing here looks at a clock."""

from __future__ import annotations

import io
import json

import pytest
from click.testing import CliRunner
from rich.console import Console

from kvmfs_bench import report, runner
from kvmfs_bench.__main__ import main
from kvmfs_bench.lab import figures
from kvmfs_bench.memory import pss_beside_guest_ram
from kvmfs_bench.model import AbsentError, Bench, MeasureError, Row, RowSpec, Subject, Target, matches, spread
from kvmfs_bench.suite import SUITE, guest_times

IDLE, BUSY = runner.Load(0.02, 0.1), runner.Load(1.4, 3.2)


def fake(name="x", *, measure=lambda lab, subject, pinned: {"x": 1.0}, **rest):
    return Bench((RowSpec(name, "x", "µs", rest.pop("target", None)),), measure, **{"rival": Subject.REAL, **rest})


def measured(bench, *, quick=False, patterns=()):
    ticks = []
    rows = [row for part in runner.run(None, [bench], patterns, quick=quick, progress=ticks.append) for row in part]
    return rows, ticks


# ---- figures ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("samples", "wanted"), [
    ([], None), ([3.0], None), ([1.0, 2.0, 3.0], 1.0), ([0.0, 0.0], None),
    ([1.0, 2.0, 3.0, 4.0, 5.0], 2 / 3),     # quartiles 2 and 4 around 3
    ([2.0, 2.0, 2.0, 2.0, 100.0], 0.0),     # one disturbed repetition is not the spread
])
def test_spread(samples, wanted):
    assert spread(samples) == (pytest.approx(wanted) if wanted is not None else None)


def test_row_is_medians_and_their_ratio():
    row = Row(RowSpec("a", "x", "µs", Target(1.5)), True, Subject.SERVER, [4.0, 90.0, 5.0], [4.0, 3.0, 5.0])
    assert (row.ours, row.theirs, row.ratio, row.met, row.name) == (5.0, 4.0, 1.25, True, "a/pinned")


@pytest.mark.parametrize(("target", "ours", "theirs", "met"), [
    (Target(2), [4.0], [2.0], True), (Target(2), [4.1], [2.0], False), (Target(2), [4.0], [], None),
    (Target(5, relative=False), [5.0], [], True), (Target(5, relative=False), [5.1], [99.0], False),
    (Target(5, relative=False), [], [1.0], None), (None, [1.0], [1.0], None),
])
def test_target(target, ours, theirs, met):
    assert Row(RowSpec("a", "x", "ms", target), False, Subject.REAL, ours, theirs).met is met


def test_target_says_what_it_is_relative_to():
    assert Target(2.3).text("ns") == "≤ 2.3 ×"
    assert Target(40, relative=False).text("MB") == "≤ 40 MB"


def test_figures_of_the_client():
    assert figures("get_regs 4.5\nget_sregs 5\n") == {"get_regs": 4.5, "get_sregs": 5.0}
    with pytest.raises(MeasureError, match="exit 17"):
        figures("exit 17 instead of 2\n")


def test_guest_times_are_between_begin_and_end():
    lines = [(0.1, "SeaBIOS"), (1.0, "begin load"), (1.5, "end load 1000"), (1.5, "begin call"), (1.75, "end call 10"), (2, "")]
    assert guest_times(lines) == pytest.approx({"load": 500_000, "call": 25_000_000})


def test_guest_ram_is_not_a_vms_own_memory():
    smaps = """7f00-7f10 rw-s 0 00:01 5 /memfd:kvmfs-guest (deleted)
Pss:                4096 kB
7f20-7f30 rw-p 0 00:00 0
Pss:                  10 kB
Pss_Dirty:            10 kB
7f40-7f50 r-xp 0 08:01 7 /usr/lib/libc.so.6
Pss:                   5 kB
VmFlags: rd ex
""".splitlines(keepends=True)
    assert pss_beside_guest_ram(smaps) == 15


# ---- taking turns -------------------------------------------------------------------------------------------


def test_subjects_take_turns_and_each_begins_as_often():
    order = []

    def measure(lab, subject, pinned):
        order.append((subject, pinned))
        return {"x": 2.0 if subject is Subject.OURS else 1.0}

    bench = fake(measure=measure, pins=(False, True), repetitions=2)
    rows, ticks = measured(bench)
    once = [Subject.OURS, Subject.REAL, Subject.REAL, Subject.OURS]
    assert order == [(subject, False) for subject in once] + [(subject, True) for subject in once]
    assert [(row.name, row.ours_samples, row.ratio) for row in rows] == [("x", [2.0, 2.0], 2.0), ("x/pinned", [2.0, 2.0], 2.0)]
    assert len(ticks) == runner.steps([bench], quick=False) == 8


def test_quick_is_once_without_what_is_heavy():
    light, heavy = fake(), fake("y", heavy=True)
    assert runner.plan([light, heavy], (), quick=True) == [light]
    assert runner.plan([light, heavy], (), quick=False) == [light, heavy]
    assert len(measured(light, quick=True)[0][0].ours_samples) == 1


def test_a_rival_that_is_absent_is_said_and_is_no_failure():
    calls = []

    def measure(lab, subject, pinned):
        calls.append(subject)
        if subject is Subject.REAL:
            raise AbsentError("no /dev/kvm here")
        return {"x": 1.0}

    rows, ticks = measured(fake(measure=measure, repetitions=3))
    assert (rows[0].note, rows[0].failed, rows[0].ours, rows[0].theirs) == (
        "the machine's /dev/kvm absent: no /dev/kvm here", False, 1.0, None)
    assert calls.count(Subject.REAL) == 1 and len(ticks) == 6       # not asked again, and the progress still ends at its end


@pytest.mark.parametrize("error", [MeasureError("exit 17"), OSError(2, "No such file"), KeyError("x")])
def test_ours_that_cannot_be_measured_is_a_failure(error):
    def measure(lab, subject, pinned):
        if subject is Subject.OURS:
            raise error
        return {"x": 1.0}

    row = measured(fake(measure=measure))[0][0]
    assert row.failed and row.note.startswith("kvmfs not measured: ") and row.met is None


def test_only_the_rows_asked_for():
    bench = Bench((RowSpec("guest_load", "x", "ns"), RowSpec("guest_store", "x", "ns")), lambda *_: {"x": 1.0})
    assert [row.name for row in measured(bench, patterns=("store",))[0]] == ["guest_store"]
    assert matches("guest_load", "guest_*") and matches("guest_load", "load") and not matches("guest_load", "l*")


# ---- the suite and the reports ------------------------------------------------------------------------------


def test_names_are_unique_and_every_row_of_the_issue_is_there():
    names = [row.name for bench in SUITE for row in bench.rows]
    assert len(names) == len(set(names))
    for part in ("api_version", "check_extension", "get_regs", "get_sregs", "set_msrs", "pio", "mmio", "hlt", "4_vms", "ioeventfd",
                 "irqfd", "create", "memory_128", "memory_2048", "integer", "load", "store", "call", "double", "syscall",
                 "page_fault", "switch", "boot_1", "boot_2", "idle_1", "idle_50", "busy_1_", "busy_2_", "busy_4_", "busy_16_"):
        assert any(part in name for name in names), part


def rows():
    met = Row(RowSpec("a", "x", "µs", Target(1.5)), False, Subject.SERVER, [4.0, 5.0, 6.0], [4.0, 4.0, 4.0])
    missed = Row(RowSpec("b", "x", "ms", Target(15, relative=False)), True, Subject.REAL, [20.0], [], "it is absent")
    return [met, missed]


def test_json(tmp_path):
    path = tmp_path / "sub" / "bench.json"
    report.write_json(path, rows(), IDLE, BUSY, quick=True)
    found = json.loads(path.read_text("utf-8"))
    assert found["rows"][0] == {"name": "a", "ours": 5.0, "rival": 4.0, "rival_name": "libfuse server in C", "ratio": 1.25,
                                "unit": "µs", "spread": 0.4, "rival_spread": 0.0, "target": "≤ 1.5 ×", "met": True,
                                "pinned": False, "repetitions": 3, "note": None}
    assert (found["rows"][1]["rival"], found["rows"][1]["met"], found["rows"][1]["note"]) == (None, False, "it is absent")
    assert found["machine"]["before"]["idle"] and not found["machine"]["after"]["idle"] and found["quick"]


def test_table_says_targets_notes_and_a_busy_machine():
    console = Console(file=io.StringIO(), width=160)
    report.show(console, rows(), IDLE, BUSY, 3)
    text = console.file.getvalue()
    assert "1.25 ×" in text and "b/pinned: it is absent" in text and "1 of 2 targets met" in text
    assert "the machine is idle" in text and "NOT idle: others use 1.4 CPUs" in text


@pytest.mark.parametrize(("value", "text"), [(None, "–"), (1.234, "1.23"), (12.34, "12.3"), (1234.5, "1234"), (0.0, "0.00")])
def test_three_digits(value, text):
    assert report.figure(value) == text


def test_command_line_lists_rows_and_refuses_a_pattern_of_none():
    listed = CliRunner().invoke(main, ["--list", "--only", "guest_l*"])
    assert (listed.exit_code, listed.output) == (0, "guest_load\n")
    assert CliRunner().invoke(main, ["--only", "nothing-like-it"]).exit_code == 2
