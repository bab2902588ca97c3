# SPDX-License-Identifier: GPL-2.0-or-later
"""Fixtures that several files share."""

import pytest

from tests.unit.irq_machine import IrqMachine
from tests.unit.machine import machines


@pytest.fixture
def machine(request):
    """Makes IrqMachines, or what the module says (MACHINE), which are closed after the test."""
    with machines(getattr(request.module, "MACHINE", IrqMachine)) as make:
        yield make
