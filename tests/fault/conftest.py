# SPDX-License-Identifier: GPL-2.0-or-later
"""The daemons of the integration tests, for tests that break things."""

from __future__ import annotations

from pathlib import Path

from tests.daemon import kvmd, nothing_left, skip_without_fuse, start_kvmd, vendor  # noqa: F401


def pytest_collection_modifyitems(items):
    skip_without_fuse(items, Path(__file__).parent)
