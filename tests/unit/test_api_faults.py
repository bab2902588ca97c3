# SPDX-License-Identifier: GPL-2.0-or-later
"""Fault rules: what they may say, and which calls they hit."""

import errno
import struct
from types import SimpleNamespace

import pytest

from kvmfs.abi.caps import CAPS
from kvmfs.abi.ioctls import BY_NAME, Level
from kvmfs.api.faults import Faults, RuleError, parse
from kvmfs.errors import KvmError

DONE = 7
BAD = {
    "KVM_NOTHING:ENOMEM": "no ioctl",
    "KVM_GET_REGS": "what shall happen",
    "KVM_GET_REGS:EWRONG": "neither an errno nor an exit",
    "KVM_GET_REGS:ENOMEM:EIO": "two actions",
    "KVM_GET_REGS:SHUTDOWN": "only KVM_RUN has exits",
    "KVM_GET_REGS:short=1": "is for KVM_GET_MSRS",
    "KVM_GET_REGS:ENOMEM:after=-1": "out of range",
    "KVM_GET_REGS:ENOMEM:at=x": "out of range",
    "KVM_GET_REGS:ENOMEM:probability=2": "out of range",
    "KVM_GET_REGS:delay=86400": "out of range",
    "KVM_GET_REGS:ENOMEM:sometimes=1": "there is no sometimes=",
    "KVM_CAP_NOTHING:absent": "no capability",
    "KVM_CAP_IRQCHIP:ENOMEM": "can only be absent",
}


@pytest.mark.parametrize(("rule", "why"), BAD.items())
def test_a_bad_rule_is_explained(rule, why):
    with pytest.raises(RuleError, match=why) as caught:
        parse(rule)
    assert str(caught.value).startswith(rule)


def calls(rule, count, *, vm=0, vcpu=0):
    """Which of ``count`` calls of KVM_GET_REGS on a vCPU fail, from 1."""
    faults, failed = Faults([rule], vm), []
    for number in range(1, count + 1):
        req = SimpleNamespace(cmd=BY_NAME["KVM_GET_REGS"].number, arg=0, context=None)
        try:
            assert faults(Level.VCPU, lambda *_: DONE, SimpleNamespace(vcpu_id=vcpu), req) == DONE
            assert req.context is None
        except KvmError as error:
            assert error.errno == errno.ENOMEM and req.context == rule
            failed.append(number)
    return failed


@pytest.mark.parametrize(("keys", "expected"), [
    ("", [1, 2, 3, 4, 5, 6]), (":at=3", [3]), (":after=2", [3, 4, 5, 6]), (":after=2:times=2", [3, 4]), (":every=3", [1, 4]),
    (":after=1:every=2", [2, 4, 6]), (":vcpu=0:vm=0", [1, 2, 3, 4, 5, 6]), (":vcpu=1", []), (":vm=1", []), (":probability=0", [])])
def test_which_calls(keys, expected):
    assert calls("KVM_GET_REGS:ENOMEM" + keys, 6) == expected


def test_chance_is_the_same_each_time():
    rule = "KVM_GET_REGS:ENOMEM:probability=0.5"
    first = calls(rule, 100)
    assert 20 < len(first) < 80
    assert calls(rule, 100) == first
    assert calls(rule, 100, vm=1) != first != calls(rule + ":seed=1", 100)


def request(name, arg=0, data=b""):
    return SimpleNamespace(cmd=BY_NAME[name].number, arg=arg, data=memoryview(bytearray(data)), context=None)


def test_an_absent_capability():
    number = CAPS["KVM_CAP_IRQCHIP"]
    faults = Faults(["KVM_CAP_IRQCHIP:absent"])
    assert faults(Level.VM, lambda *_: DONE, None, request("KVM_CHECK_EXTENSION", number)) == 0
    assert faults(Level.VM, lambda *_: DONE, None, request("KVM_CHECK_EXTENSION", number + 1)) == DONE
    with pytest.raises(KvmError) as caught:
        faults(Level.VM, lambda *_: DONE, None, request("KVM_ENABLE_CAP", data=struct.pack("<I100x", number)))
    assert caught.value.errno == errno.EINVAL


def test_a_short_count():
    req = request("KVM_SET_MSRS", data=struct.pack("<II", 5, 0))
    assert Faults(["KVM_SET_MSRS:short=2"])(Level.VCPU, lambda _, r: int.from_bytes(r.data[:4], "little"),
                                           SimpleNamespace(vcpu_id=0), req) == 2
