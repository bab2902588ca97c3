# SPDX-License-Identifier: GPL-2.0-or-later
"""The table of ``make bench``: medians, ratios, targets, and what is said of a figure that could not be had."""

import json
import subprocess
import sys

import pytest
from rich.console import Console

from kvmfs_bench.main import _figure, _result, table
from kvmfs_bench.model import NotMeasuredError, Plan, Series, judge, measure, select
from tests.daemon import ENVIRONMENT, ROOT


def figures(*values):
    remaining = list(values)

    def take():
        value = remaining.pop(0)
        if isinstance(value, str):
            raise NotMeasuredError(value)
        return value
    return take


def test_a_row_is_the_medians():
    row = measure(Plan("x", "µs", figures(5.0, 1.0, 3.0), "rival", figures(2.0, 2.0, 1.0), most_ratio=1.5, repetitions=3))
    assert (row.ours, row.rival, row.ratio, row.spread) == (3.0, 2.0, 1.5, 4 / 3)
    assert (row.target, row.met) == ("≤ 1.5 ×", True)


def test_the_two_take_turns():
    order = []
    measure(Plan("x", "µs", lambda: order.append("ours") or 1.0, "rival", lambda: order.append("rival") or 1.0, repetitions=2))
    assert order == ["ours", "rival"] * 2


@pytest.mark.parametrize(("target", "met"), [
    ({"most": 15}, True), ({"most": 9}, False), ({"most_ratio": 2}, True), ({"most_ratio": 1}, False), ({"least_ratio": 2}, True),
    ({"least_ratio": 2.1}, False), ({}, None)])
def test_targets(target, met):
    assert judge(Plan("x", "ms", figures(), "rival", figures(), **target), Series([10.0]), Series([5.0])).met is met


def test_what_could_not_be_measured_is_said():
    row = measure(Plan("x", "µs", figures(1.0), "real node", figures("no such device"), most_ratio=1, repetitions=1))
    assert (row.ours, row.rival, row.ratio, row.met) == (1.0, None, None, None)
    assert row.remark == "real node: no such device"
    failed = measure(Plan("x", "µs", figures("it died"), most=3, repetitions=3))
    assert (failed.ours, failed.met, failed.remark) == (None, None, "it died")


def test_selection():
    plans = [Plan(name, "µs", figures()) for name in ("pio, free", "pio, pinned", "mmio")]
    assert [plan.name for plan in select(plans, ["pio,"])] == ["pio, free", "pio, pinned"]
    assert select(plans, []) == plans


def test_the_table_and_the_file():
    row = judge(Plan("KVM_RUN pio", "µs", figures(), "real node", figures(), most_ratio=1.0), Series([12.6]), Series([6.97]))
    console = Console(width=140)
    with console.capture() as captured:
        console.print(table([row]))
    text = captured.get()
    assert "KVM_RUN pio" in text and "12.6" in text and "1.81" in text and "missed" in text
    stored = json.loads(json.dumps(_result([row], 0.1)))["rows"][0]
    assert {"name", "ours", "rival", "rival_name", "ratio", "unit", "spread"} <= stored.keys()
    assert _figure(None) == "—" and _figure(12345.6) == "12,346"


def test_a_short_run(tmp_path):
    """It measures our node, and says so as JSON."""
    made = subprocess.run(["make", "-C", str(ROOT / "tools/bench")], capture_output=True, text=True, check=False)
    assert made.returncode == 0, made.stderr
    out = tmp_path / "bench.json"
    run = subprocess.run([sys.executable, "-m", "kvmfs_bench", "--quick", "--no-guests", "--only", "get_regs",
                          "--only", "pio, free", "--json", str(out)],
                         env=ENVIRONMENT, capture_output=True, text=True, check=False, timeout=100, cwd=ROOT)
    assert run.returncode == 0, run.stdout + run.stderr
    rows = json.loads(out.read_text())["rows"]
    assert [row["name"] for row in rows] == ["get_regs, pinned", "get_regs, free", "KVM_RUN pio, free"]
    assert all(row["ours"] > 0 and (row["rival"] or 1) > 0 for row in rows)
