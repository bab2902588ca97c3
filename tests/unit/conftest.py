# SPDX-License-Identifier: GPL-2.0-or-later
"""Fixtures that several files share."""

from tests.unit.irq_machine import machine  # noqa: F401
