# SPDX-License-Identifier: GPL-2.0-or-later
"""The daemons of the integration tests, for tests that break things."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.integration.conftest import kvmd, nothing_left, start_kvmd, vendor  # noqa: F401


def pytest_collection_modifyitems(items):
    if os.geteuid() != 0 or not os.access("/dev/fuse", os.R_OK | os.W_OK):
        for item in items:
            if Path(__file__).parent in item.path.parents:
                item.add_marker(pytest.mark.skip(reason="needs root and /dev/fuse"))
