# SPDX-License-Identifier: GPL-2.0-or-later
"""``--profile``: an older kernel's KVM, and what programs and the conformance suite see of it."""

from __future__ import annotations

import errno
import json
import subprocess
import sys

import pytest

from tests.clients import program
from tests.daemon import ENVIRONMENT, KVMFS, kvmfs_run

CLIENT = """
import errno, fcntl, json, os, sys
kvm = os.open(sys.argv[1], os.O_RDWR)
vm = fcntl.ioctl(kvm, 0xAE01, 0)
def tried(fd, number, arg=0):
    try:
        return fcntl.ioctl(fd, number, arg)
    except OSError as error:
        return -error.errno
print(json.dumps([tried(fd, 0xAE03, 208) for fd in (kvm, vm)] + [tried(vm, 0xAEA3) > 0 or tried(vm, 0xAEA3)]))
"""


def seen(*options):
    result = kvmfs_run(sys.executable, "-c", CLIENT, "/dev/kvm", options=options)
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout)


def test_a_client_sees_it():
    assert seen("--profile", "linux-5.15") == [0, 0, -errno.ENOTTY]
    assert seen("--profile", "linux-6.1") == [4096, 4096, True]
    assert seen() == [4096, 4096, True]


def test_version_shows_it(start_kvmd, vendor):
    start_kvmd("--vendor", vendor, "--profile", "linux-6.1")
    run = subprocess.run([*KVMFS, "version", "--json"], env=ENVIRONMENT, capture_output=True, text=True, timeout=30, check=True)
    facts = json.loads(run.stdout)
    assert facts["profiles"][-1] == "linux-6.12"
    assert "linux-6.1" in [node.get("profile") for node in facts["nodes"]]


@pytest.mark.parametrize("profile", ["linux-5.15", "linux-6.1"])
def test_guests_and_the_suite(start_kvmd, vendor, profile):
    kvmd = start_kvmd("--vendor", vendor, "--profile", profile)
    run = subprocess.run([program("hello"), kvmd.node], capture_output=True, text=True, timeout=30, check=False)
    assert run.returncode == 0, run.stderr
    suite = subprocess.run([*KVMFS, "conformance", "--device", kvmd.node], env=ENVIRONMENT, capture_output=True, text=True,
                           timeout=100, check=False)
    assert suite.returncode == 0, suite.stdout
