# SPDX-License-Identifier: GPL-2.0-or-later
"""``--fault``: what an unmodified client sees of a rule."""

import pytest

from tests.clients import program
from tests.daemon import kvmfs_run


def hello(*rules, options=()):
    return kvmfs_run(program("hello"), options=[*options, *(part for rule in rules for part in ("--fault", rule))])


@pytest.mark.parametrize(("rule", "said"), [
    ("KVM_CREATE_VM:EMFILE", "KVM_CREATE_VM: Too many open files"),
    ("KVM_CREATE_VCPU:ENOMEM", "KVM_CREATE_VCPU: Cannot allocate memory"),
    ("KVM_SET_USER_MEMORY_REGION:EEXIST:at=1", "KVM_SET_USER_MEMORY_REGION: File exists"),
    ("KVM_RUN:EFAULT:after=3", "KVM_RUN: Bad address"),
])
def test_an_errno(rule, said, nothing_left):
    result = hello(rule)
    assert result.returncode == 1 and said in result.stdout + result.stderr, result.stderr


@pytest.mark.parametrize("passthrough", ["auto", "off"])
@pytest.mark.parametrize("reason", ["17 KVM_EXIT_INTERNAL_ERROR", "9 KVM_EXIT_FAIL_ENTRY", "8 KVM_EXIT_SHUTDOWN"])
def test_an_exit_at_the_third_run(reason, passthrough):
    result = hello(f"KVM_RUN:{reason.split('KVM_EXIT_')[1]}:at=3", options=["--passthrough", passthrough])
    assert f"it stopped with exit {reason}\n" in result.stdout
    assert "the guest wrote: He\n" in result.stdout


def test_a_rule_that_cannot_be():
    result = hello("KVM_RUN:EVIL")
    assert result.returncode == 2 and "EVIL is neither an errno nor an exit" in result.stderr
