# SPDX-License-Identifier: GPL-2.0-or-later
"""``kvmfs doctor``: what it says, and its exit status."""

import json

import pytest

from kvmfs_cli import checks
from kvmfs_cli.checks import Status, degraded, missing, ok
from kvmfs_cli.doctor import EXIT_STATUS, doctor
from tests.daemon import kvmfs


def test_this_host(nothing_left):
    """Each check is a line of its own, and the last one ran a guest."""
    result = kvmfs("doctor")
    assert result.returncode in (0, 1), result.stdout + result.stderr
    lines = {line.split("  ")[0].strip(): line for line in result.stdout.splitlines()}
    assert set(lines) >= {name for name, _ in checks.CHECKS}
    assert "a guest ran and halted" in lines["guest"]


def test_json():
    result = kvmfs("doctor", "--json")
    found = json.loads(result.stdout)
    assert [check["name"] for check in found["checks"]] == [name for name, _ in checks.CHECKS]
    assert found["worst"] == max((check["status"] for check in found["checks"]), key=["ok", "degraded", "missing"].index)


def test_without_dev_fuse():
    """The text says what to do, and nothing works."""
    result = kvmfs("doctor", "--json", wrapper=["unshare", "-m", "sh", "-c", 'mount --bind /dev/null /dev/fuse; exec "$@"', "sh"])
    found = {check["name"]: check for check in json.loads(result.stdout)["checks"]}
    assert result.returncode == EXIT_STATUS[Status.MISSING]
    assert found["mounting"]["status"] == found["guest"]["status"] == "missing"


@pytest.mark.parametrize(("results", "status"), [
    ([ok("fine"), ok("fine")], 0), ([ok("fine"), degraded("slow", "buy")], 1), ([missing("gone"), degraded("slow")], 3)])
def test_the_worst_decides(monkeypatch, capsys, results, status):
    monkeypatch.setattr("kvmfs_cli.doctor.CHECKS", [(f"check {n}", lambda r=r: r) for n, r in enumerate(results)])
    assert doctor(as_json=False) == status
    text = capsys.readouterr().out
    assert all(result.detail in text and result.advice in text for result in results)


def test_an_error_in_a_check_is_no_traceback():
    result = checks.run(lambda: 1 // 0)
    assert result.status is Status.MISSING and "ZeroDivisionError" in result.detail
