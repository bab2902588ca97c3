# SPDX-License-Identifier: GPL-2.0-or-later
"""Fixtures that several files share."""

import tempfile
from pathlib import Path

import pytest

from tests.unit import client_rig
from tests.unit.irq_machine import IrqMachine
from tests.unit.machine import machines


@pytest.fixture
def machine(request):
    """Makes IrqMachines, or what the module says (MACHINE), which are closed after the test."""
    with machines(getattr(request.module, "MACHINE", IrqMachine)) as make:
        yield make


@pytest.fixture(scope="module")
def program():
    """The path of the C client, which other users may run."""
    with tempfile.TemporaryDirectory() as directory:        # pytest's own are closed to them
        Path(directory).chmod(0o755)
        yield client_rig.compile_client(Path(directory))


@pytest.fixture
def rig():
    """Serves a file to clients, and lets the test answer their ioctls."""
    rig = client_rig.Rig()
    yield rig
    rig.close()
