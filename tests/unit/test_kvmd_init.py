# SPDX-License-Identifier: GPL-2.0-or-later
"""The order of start-up, and that a step that fails undoes those before it."""

from __future__ import annotations

import contextlib
import os
import threading

import pytest

from kvmd import hotplug, init, power
from kvmd.options import Options


def steps(log, failing=None):
    def make(name):
        @contextlib.contextmanager
        def step(m):
            if name == failing:
                raise OSError(28, "no room for it")
            log.append(f"+{name}")
            yield
            log.append(f"-{name}")

        step.__name__ = name
        return step

    return tuple(make(name) for name in "abc")


def test_steps_are_undone_in_reverse():
    log = []
    module = init.Module(Options("/nowhere"), None)
    stack = init.kvm_init(module, steps(log))
    assert log == ["+a", "+b", "+c"]
    stack.close()
    assert log == ["+a", "+b", "+c", "-c", "-b", "-a"]
    assert module.facts["steps"] == ["a", "b", "c"]


def test_a_failing_step_is_named_with_its_reason():
    log = []
    with pytest.raises(init.InitError, match=r"c failed: no room for it \(undone: b, a\)"):
        init.kvm_init(init.Module(Options("/nowhere"), None), steps(log, "c"))
    assert log == ["+a", "+b", "-b", "-a"]


def test_the_order_is_linux_own():
    assert [step.__name__ for step in init.STEPS] == [
        "kvm_arch_init", "kvm_irqfd_init", "kvm_arch_hardware_setup", "kvm_arch_check_processor_compat", "cpuhp_setup_state",
        "register_reboot_notifier", "misc_register", "register_syscore_ops", "preempt_notifier_init"]


def test_every_cpu_is_looked_at_and_the_affinity_stays():
    before = os.sched_getaffinity(0)
    assert hotplug.check_all() == sorted(before)
    assert os.sched_getaffinity(0) == before


def test_the_cpu_that_differs_is_named():
    first = {"vendor_id": "X", "flags": "cmov avx2"}
    with pytest.raises(OSError, match="CPU 3 differs: CPU 0 has avx2, CPU 3 has not"):
        hotplug.check_one(3, {"vendor_id": "X", "flags": "cmov"}, first, 0)
    with pytest.raises(OSError, match="CPU 3 is a Y"):
        hotplug.check_one(3, {"vendor_id": "Y", "flags": "cmov avx2"}, first, 0)


def test_a_jump_between_the_clocks_is_a_suspend(monkeypatch):
    slept = threading.Event()
    nanoseconds = []

    def resumed(ns):
        nanoseconds.append(ns)
        slept.set()

    now = [0]
    monkeypatch.setattr(power, "asleep", lambda: now[0])
    watch = power.SuspendWatch(resumed)
    try:
        now[0] = 3 * 10**9
        # The kernel would cancel the timer; an expired one makes the watcher look in the same way.
        power._libc.timerfd_settime(watch._timer, 0, bytes(24) + (1).to_bytes(8, "little"), None)
        assert slept.wait(5)
        assert nanoseconds == [3 * 10**9]
    finally:
        watch.close()
