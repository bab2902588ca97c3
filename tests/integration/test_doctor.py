# SPDX-License-Identifier: GPL-2.0-or-later
"""``kvmfs doctor``: what it says, and its exit status."""

import errno
import json
import os
import subprocess
import sys

import pytest

from kvmfs.fuse import mount
from kvmfs_cli import checks
from kvmfs_cli.checks import Status, degraded, missing, ok
from kvmfs_cli.doctor import EXIT_STATUS, doctor
from tests.daemon import ENVIRONMENT, kvmfs, ordinary_user


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


ONE = "import sys; from kvmfs_cli import checks; r = getattr(checks, sys.argv[1])(); print(r.status.name, r.detail, '->', r.advice)"
WITHOUT_PTRACE = ("setpriv", "--bounding-set=-sys_ptrace", "--inh-caps=-sys_ptrace")


@pytest.mark.parametrize(("wrapper", "check", "found"), [
    (WITHOUT_PTRACE, "check_capabilities", "DEGRADED no CAP_SYS_PTRACE: programs of other users cannot be served -> "
                                           "in Docker: --cap-add SYS_PTRACE"),
    (ordinary_user(), "check_capabilities", "DEGRADED no CAP_SYS_ADMIN and CAP_SYS_PTRACE: 'kvmfs run' works within a user "),
    (ordinary_user(), "check_namespaces", "OK mount namespaces within user namespaces"),
    (ordinary_user(), "check_fuse", "OK /dev/fuse can be opened"),
    (ordinary_user(), "check_mounting", "OK fsopen, fsmount"),
    (ordinary_user(), "check_passthrough", "DEGRADED kvm_run is copied at each KVM_RUN"),
    (ordinary_user(), "check_memory_of_clients", "DEGRADED guest memory must not be a shared mapping without a descriptor"),
    ((), "check_memory_of_clients", "OK PAGEMAP_SCAN, PROCMAP_QUERY, map_files"),
])
def test_one_check(wrapper, check, found):
    result = subprocess.run([*wrapper, sys.executable, "-c", ONE, check], env=ENVIRONMENT, capture_output=True, text=True,
                            timeout=60, check=False)
    assert result.stdout.startswith(found), result.stdout + result.stderr


@pytest.mark.parametrize(("number", "text"), [
    (errno.ENOENT, "CONFIG_FUSE_FS"), (errno.ENODEV, "modprobe fuse"), (errno.EPERM, "--device /dev/fuse"),
    (errno.EACCES, "chmod")])
def test_what_keeps_dev_fuse_from_being_opened(monkeypatch, number, text):
    def refuse(*_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(mount.os, "open", refuse)
    result = checks.check_fuse()
    assert result.status is Status.MISSING and os.strerror(number) in result.detail and text in result.advice


def test_yama_forbids_tracing(monkeypatch):
    """kernel.yama.ptrace_scope 3, and a container's profile."""
    def refuse(_):
        raise PermissionError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(checks.Thread, "seize", refuse)
    result = checks.check_ptrace()
    assert result.status is Status.MISSING and "yama.ptrace_scope" in result.advice and "SYS_PTRACE" in result.advice


def test_an_older_kernel(monkeypatch):
    monkeypatch.setattr(checks.platform, "release", lambda: "5.4.0-42-generic")
    assert checks.check_kernel().status is Status.MISSING
    monkeypatch.setattr(checks, "_knows", lambda path, request: False)
    result = checks.check_memory_of_clients()
    assert result.status is Status.DEGRADED and "Linux 6.7" in result.advice and "Linux 6.11" in result.advice


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
