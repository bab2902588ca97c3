# SPDX-License-Identifier: GPL-2.0-or-later
"""``kvmfs conformance`` on our node is green, and differs from real kernels only where the list has a reason."""

from __future__ import annotations

import json
import os
import stat
import subprocess
from xml.etree import ElementTree

import pytest

from kvmfs_conformance import compare, differences, facts
from tests.daemon import ENVIRONMENT, KVMFS

REAL = "/dev/kvm"


def conformance(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*KVMFS, "conformance", *arguments], env=ENVIRONMENT, timeout=110, capture_output=True, text=True,
                          check=False, stdin=subprocess.DEVNULL)


def is_real(path: str) -> bool:
    """A character device that can be opened: a kernel's own node, and not one that is mounted over it."""
    return os.access(path, os.R_OK | os.W_OK) and stat.S_ISCHR(os.stat(path).st_mode)


def test_green_and_known_differences(node, tmp_path):
    """One run does both: everything required passes, and recorded kernels differ only as listed."""
    run = conformance("--device", node, "--compare", facts.recorded()[0], "--json", str(tmp_path / "json"),
                      "--junit", str(tmp_path / "junit"))
    assert run.returncode == 0, run.stdout + run.stderr
    found = facts.load(str(tmp_path / "json"))
    assert found.kind == "kvmfs" or is_real(node)
    assert not [case for case, result in found.cases.items() if result["status"] == "fail"]
    known = differences.load()
    seen = found.failures() + [line.subject for line in compare.compare(found, facts.load(facts.recorded()[0]), known)]
    assert found.kind != "kvmfs" or not known.stale("kvmfs", seen)
    assert sum(result["status"] == "pass" for result in found.cases.values()) > 150
    suites = ElementTree.parse(tmp_path / "junit").getroot()
    assert [suite.get("name") for suite in suites] == ["system", "vm", "vcpu", "device"]
    assert {suite.get("failures") for suite in suites} == {"0"}
    assert sum(int(suite.get("tests", 0)) for suite in suites) == len(found.cases)


@pytest.mark.skipif(not is_real(REAL), reason="the machine has no node of its own")
def test_real_node(node, tmp_path):
    """The machine's own kernel passes too, and side by side with ours no difference is without a reason."""
    run = conformance("--device", node, "--compare", REAL, "--guest", "no")
    assert run.returncode == 0, run.stdout + run.stderr


@pytest.mark.skipif(not is_real(REAL), reason="the machine has no node of its own")
def test_suite_passes_on_a_real_kernel(tmp_path):
    run = conformance("--device", REAL, "--json", str(tmp_path / "json"))
    assert run.returncode == 0, run.stdout + run.stderr
    assert json.loads((tmp_path / "json").read_text())["node"]["kind"].startswith("kvm")


def test_levels_and_patterns(node):
    run = conformance("--device", node, "--level", "system", "api_version")
    assert run.returncode == 0, run.stdout + run.stderr
    assert "KVM_GET_API_VERSION" in run.stdout
    assert "KVM_CREATE_VM" not in run.stdout


def test_unusable(tmp_path):
    run = conformance("--device", str(tmp_path / "none"))
    assert (run.returncode, run.stdout) == (2, "")
    assert "No such file" in run.stderr
    (tmp_path / "facts").write_text("{}")
    run = conformance("--device", REAL, "--compare", str(tmp_path / "facts"))
    assert run.returncode == 2
    assert "not the facts of a node" in run.stderr
    assert conformance("no such case").returncode == 2
