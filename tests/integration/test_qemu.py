# SPDX-License-Identifier: GPL-2.0-or-later
"""Unmodified QEMU boots Debian's kernel on the fake node; `make boot-matrix` has the other machines, devices and loaders."""

from __future__ import annotations

from pathlib import Path

import pytest

from qemu_boot import cases, images


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


@pytest.mark.timeout(400)
def test_linux_on_a_virtio_disk(vendor: str, tmp_path: Path) -> None:
    """Two vCPUs, root file system on the disk, network, entropy, kvm-clock, power-off; the disk has what was written."""
    cases.devices(vendor, tmp_path)
