# SPDX-License-Identifier: GPL-2.0-or-later
"""Faults on demand: what hardware never gives a program whose error paths are to be tested.

A rule is text, ``WHAT:ACTION[:KEY=VALUE]...``::

    KVM_CREATE_VCPU:ENOMEM:after=2      the third and later ones fail
    KVM_RUN:INTERNAL_ERROR:at=100       the hundredth KVM_RUN of a VM ends so
    KVM_SET_MSRS:short=1                only the first MSR is set
    KVM_GET_REGS:delay=0.5              it takes half a second longer
    KVM_CAP_IRQFD:absent                a kernel without that capability

WHAT is an ioctl or, with the action ``absent``, a capability.  Actions: an errno; ``short=N`` (KVM_GET_MSRS, KVM_SET_MSRS);
for KVM_RUN an exit, INTERNAL_ERROR, FAIL_ENTRY, SHUTDOWN or INTR; ``delay=SECONDS``, alone or with one of these.  Which calls:
``at=N`` or ``after=N``, ``times=N``, ``every=N``, ``probability=P`` (0 to 1, with ``seed=N``), ``vm=N``, ``vcpu=N``.  Calls are
counted from 1, for each VM, or, on the node itself, for the daemon; the same rule with the same calls always does the same.
"""

from __future__ import annotations

import errno
import random
import struct
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Final

from kvmfs.abi import exits as kx
from kvmfs.abi.caps import CAPS
from kvmfs.abi.ioctls import BY_NAME, KVM_CHECK_EXTENSION, KVM_ENABLE_CAP, KVM_GET_MSRS, KVM_RUN, KVM_SET_MSRS, Level
from kvmfs.api.taps import Handler, Result
from kvmfs.errors import KvmError

EXITS: Final = {"INTERNAL_ERROR": kx.KVM_EXIT_INTERNAL_ERROR, "FAIL_ENTRY": kx.KVM_EXIT_FAIL_ENTRY,
                "SHUTDOWN": kx.KVM_EXIT_SHUTDOWN, "INTR": kx.KVM_EXIT_INTR}
MAX_DELAY: Final = 3600.0
_INTEGERS: Final = ("at", "after", "times", "every", "short", "seed", "vm", "vcpu")
_REALS: Final = ("probability", "delay")
_EXIT_REASON, _UNION = 8, 32            # in struct kvm_run
_BAD_GUEST_STATE: Final = 0x80000021    # VMX: basic reason 33 with bit 31; what a FAIL_ENTRY mostly is


class RuleError(ValueError):
    """A rule that cannot be; the text says why."""


@dataclass(slots=True)
class Rule:
    """One parsed rule, with its count of calls."""

    text: str
    number: int                 # of the ioctl; of the capability, with ``absent``
    absent: bool = False
    error: int = 0
    exit: int = 0
    at: int = 0
    after: int = 0
    times: int = 0
    every: int = 1
    short: int = -1
    seed: int = 0
    vm: int = -1
    vcpu: int = -1
    probability: float = 1.0
    delay: float = 0.0
    calls: int = 0
    injected: int = 0
    _random: random.Random = field(default_factory=random.Random)

    def start(self, vm: int) -> None:
        """Begin to count, in VM ``vm`` (-1: on the node)."""
        self._random = random.Random(f"{self.seed} {self.text} {vm}")

    def applies(self, vm: int, vcpu: int) -> bool:
        """Count this call; is it one that fails?"""
        if self.vm not in (-1, vm) or self.vcpu not in (-1, vcpu):
            return False
        self.calls += 1
        due = self.calls == self.at if self.at else self.calls > self.after and (self.calls - self.after - 1) % self.every == 0
        if not due or (self.times and self.injected >= self.times):
            return False
        if self.probability < 1 and self._random.random() >= self.probability:
            return False
        self.injected += 1
        return True


def parse(text: str) -> Rule:
    """A rule from its text.  Raises RuleError."""
    what, *parts = text.split(":")
    actions = [part for part in parts if "=" not in part]
    if len(actions) > 1:
        raise RuleError(f"{text}: {actions[0]} and {actions[1]} are two actions; a rule has one")
    action = actions[0] if actions else ""
    rule = _capability_rule(text, what, action) if what.startswith("KVM_CAP_") else _ioctl_rule(text, what, action)
    for part in parts:
        if "=" in part:
            _set(rule, *part.split("=", 1))
    if not (action or rule.delay or rule.short >= 0):
        raise RuleError(f"{text}: what shall happen?  An errno (ENOMEM), delay=SECONDS, short=N, or an exit of KVM_RUN")
    if rule.short >= 0 and (rule.absent or rule.number not in (KVM_GET_MSRS, KVM_SET_MSRS)):
        raise RuleError(f"{text}: short= is for KVM_GET_MSRS and KVM_SET_MSRS")
    return rule


def _capability_rule(text: str, what: str, action: str) -> Rule:
    if what not in CAPS:
        raise RuleError(f"{text}: there is no capability {what}")
    if action != "absent":
        raise RuleError(f"{text}: a capability can only be absent ({what}:absent)")
    return Rule(text, CAPS[what], absent=True)


def _ioctl_rule(text: str, what: str, action: str) -> Rule:
    entry = BY_NAME.get(what)
    if entry is None:
        raise RuleError(f"{text}: there is no ioctl {what}")
    rule = Rule(text, entry.number)
    if action in EXITS:
        if entry.number != KVM_RUN:
            raise RuleError(f"{text}: {action} is an exit, and only KVM_RUN has exits")
        rule.exit = EXITS[action]
    elif action:
        code = getattr(errno, action, None)
        if not isinstance(code, int):
            raise RuleError(f"{text}: {action} is neither an errno nor an exit ({', '.join(EXITS)})")
        rule.error = code
    return rule


def _set(rule: Rule, key: str, value: str) -> None:
    try:
        if key in _INTEGERS:
            number = int(value, 0)
            if number < (1 if key in ("at", "every", "times") else 0):
                raise ValueError
            setattr(rule, key, number)
        elif key in _REALS:
            real = float(value)
            if not 0 <= real <= (1 if key == "probability" else MAX_DELAY):
                raise ValueError
            setattr(rule, key, real)
        else:
            raise RuleError(f"{rule.text}: there is no {key}=; known are {', '.join(f'{name}=' for name in (*_INTEGERS, *_REALS))}")
    except ValueError as error:
        if isinstance(error, RuleError):
            raise
        raise RuleError(f"{rule.text}: {key}={value} is out of range") from None


class Faults:
    """A tap that follows rules; ``vm`` is the VM's number, -1 for the node itself."""

    def __init__(self, rules: Sequence[str], vm: int = -1) -> None:
        self.rules = [parse(text) for text in rules]
        self._vm = vm
        self._by_number: dict[int, list[Rule]] = {}
        for rule in self.rules:
            rule.start(vm)
            numbers = (KVM_CHECK_EXTENSION, KVM_ENABLE_CAP) if rule.absent else (rule.number,)
            for number in numbers:
                self._by_number.setdefault(number, []).append(rule)

    def __call__(self, level: Level, handler: Handler, subject: Any, req: Any) -> Result:
        """The handler, or what a rule wants instead.  ``req.context`` then is the rule's text."""
        vcpu = subject.vcpu_id if level is Level.VCPU else -1
        for rule in self._by_number.get(req.cmd, ()):
            if rule.absent:
                if _names(rule, req) and rule.applies(self._vm, vcpu):
                    req.context = rule.text
                    if req.cmd == KVM_CHECK_EXTENSION:
                        return 0
                    raise KvmError(errno.EINVAL)
            elif rule.applies(self._vm, vcpu):
                return self._inject(rule, level, handler, subject, req)
        return handler(subject, req)

    @staticmethod
    def _inject(rule: Rule, level: Level, handler: Handler, subject: Any, req: Any) -> Result:
        req.context = rule.text
        if rule.delay:
            if level is not Level.SYSTEM:
                (subject.vm if level is Level.VCPU else subject).host.may_block()
            time.sleep(rule.delay)
        if rule.error:
            raise KvmError(rule.error)
        if rule.exit:
            return _exit(subject, rule.exit)
        if rule.short >= 0:
            count, = struct.unpack_from("<I", req.data)
            struct.pack_into("<I", req.data, 0, min(count, rule.short))
        outcome = handler(subject, req)
        if outcome is not None:         # otherwise the handler has noted what it answered
            req.context = rule.text
        return outcome


def _names(rule: Rule, req: Any) -> bool:
    asked = req.arg if req.cmd == KVM_CHECK_EXTENSION else struct.unpack_from("<I", req.data)[0]
    return bool(asked == rule.number)


def _exit(vcpu: Any, reason: int) -> int:
    """KVM_RUN ends with ``reason`` and has not entered the guest."""
    run, host = vcpu.run, vcpu.vm.host
    if vcpu.copy_run:
        host.kvm_run_copy_in(vcpu.inode, run)
    struct.pack_into("<I", run, _EXIT_REASON, reason)
    if reason == kx.KVM_EXIT_INTERNAL_ERROR:
        struct.pack_into("<II", run, _UNION, kx.KVM_INTERNAL_ERROR_EMULATION, 0)
    elif reason == kx.KVM_EXIT_FAIL_ENTRY:
        struct.pack_into("<QI", run, _UNION, _BAD_GUEST_STATE, 0)
    if vcpu.copy_run:
        host.kvm_run_copy_out(vcpu.inode, run)
    return -errno.EINTR if reason == kx.KVM_EXIT_INTR else 0
