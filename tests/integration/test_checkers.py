# SPDX-License-Identifier: GPL-2.0-or-later
"""Debian's programs that say whether a machine can do KVM; `make libvirt` runs a domain, too."""

from __future__ import annotations

import shutil

import pytest

from tests.daemon import kvmfs_run


def test_kvm_ok(vendor, nothing_left):
    program = shutil.which("kvm-ok", path="/usr/sbin:/usr/bin")
    if program is None:
        pytest.skip("kvm-ok: Debian's package cpu-checker")
    result = kvmfs_run(program, options=["--vendor", vendor, "--pretend-cpu"])
    assert (result.returncode, result.stdout.splitlines()) == (
        0, ["INFO: /dev/kvm exists", "KVM acceleration can be used"]), result.stderr


def test_virt_host_validate(vendor, nothing_left):
    """What it says about KVM; the rest (IOMMU, cgroups) is the host's."""
    program = shutil.which("virt-host-validate")
    if program is None:
        pytest.skip("virt-host-validate: Debian's package libvirt-clients")
    result = kvmfs_run(program, "qemu", options=["--vendor", vendor, "--pretend-cpu"])
    verdicts = {check.strip(): verdict.split()[0] for check, verdict in (
        line.removeprefix("  QEMU: ").split(":", 1) for line in result.stdout.splitlines())}
    assert {verdicts[f"Checking {what}"] for what in (
        "for hardware virtualization", "if device /dev/kvm exists", "if device /dev/kvm is accessible")} == {"PASS"}, result.stdout
