# SPDX-License-Identifier: GPL-2.0-or-later
"""Conformance tests run against any node: the one named in KVMFS_TEST_NODE, or a private daemon of each vendor."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.daemon import Kvmd

GIVEN = os.environ.get("KVMFS_TEST_NODE")


def pytest_collection_modifyitems(items):
    if not GIVEN and (os.geteuid() != 0 or not os.access("/dev/fuse", os.R_OK | os.W_OK)):
        for item in items:
            if Path(__file__).parent in item.path.parents:
                item.add_marker(pytest.mark.skip(reason="needs root and /dev/fuse, or KVMFS_TEST_NODE"))


@pytest.fixture(scope="module", params=["given"] if GIVEN else ["amd", "intel"])
def node(request, tmp_path_factory):
    """The path of the node under test; one daemon for all tests of a module."""
    if GIVEN:
        yield GIVEN
        return
    directory = tmp_path_factory.mktemp("node") / "dev"
    directory.mkdir()
    kvmd = Kvmd(directory, "--vendor", request.param)
    try:
        assert kvmd.ready, kvmd.log
        kvmd.prove()
        yield kvmd.node
        kvmd.wait_for_vms(0)
    finally:
        kvmd.stop()
    assert "Traceback" not in kvmd.log, kvmd.log
