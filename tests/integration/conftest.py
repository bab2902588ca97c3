# SPDX-License-Identifier: GPL-2.0-or-later
"""A private daemon for each test that asks for one."""

from __future__ import annotations

from pathlib import Path

from tests.daemon import kvmd, node, nothing_left, passthrough, skip_without_fuse, start_kvmd, vendor  # noqa: F401


def pytest_collection_modifyitems(items):
    skip_without_fuse(items, Path(__file__).parent)
