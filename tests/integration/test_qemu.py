# SPDX-License-Identifier: GPL-2.0-or-later
"""Unmodified QEMU boots Debian's kernel on the fake node; `make boot-matrix` has the other machines, devices and loaders."""

from __future__ import annotations

from pathlib import Path

import pytest

from qemu_boot import cases, images, matrix


@pytest.fixture(autouse=True)
def _installed(nothing_left: None) -> None:
    try:
        images.kernel()
    except images.Missing as missing:
        pytest.skip(f"not installed: {missing}")


def test_names() -> None:
    """Each case of the matrix can be chosen by its name."""
    assert len(cases.names(["devices/pc"])) == 2
    assert cases.names(["devices/q35/irqchip-split"]) == ["devices/q35/irqchip-split"]


def test_every_combination() -> None:
    """Machine types, interrupt controllers and numbers of vCPUs are all there; QEMU's own APIC with one vCPU only."""
    names = set(cases.names([]))
    for machine in ("pc", "q35", "microvm"):
        assert {f"boot/{machine}/irqchip-{chip}/{cpus}-cpus" for chip in ("on", "split") for cpus in (1, 2, 4)} < names
        assert f"boot/{machine}/irqchip-off/1-cpu" in names


def test_table() -> None:
    """The last table counts what passed, by machine and vendor, and has the mean of the ratios."""
    outcomes = {"boot/pc/a": {"amd": matrix.Outcome("pass", 1, ""), "intel": matrix.Outcome("fail", 1, "")},
                "boot/pc/b": {"amd": matrix.Outcome("pass", 1, "", 2)}}
    lines = matrix.table(outcomes, {("boot/pc", "amd"): [1, 4]})
    assert [line.split() for line in lines] == [["amd", "x", "tcg", "intel", "x", "tcg"], ["boot/pc", "2/2", "2.00", "0/1"]]


@pytest.mark.timeout(400)
def test_linux_on_a_virtio_disk(vendor: str, tmp_path: Path) -> None:
    """Two vCPUs, root file system on the disk, network, entropy, kvm-clock, power-off; the disk has what was written."""
    cases.devices(vendor, tmp_path)


@pytest.mark.timeout(200)
def test_ends(vendor: str, tmp_path: Path) -> None:
    """A QEMU that quits and one that is killed leave nothing in a daemon that goes on: no VM, worker, memfd, descriptor."""
    cases.ends(vendor, tmp_path, ways=("quit", "SIGKILL"))
