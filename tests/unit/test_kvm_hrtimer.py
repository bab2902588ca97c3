# SPDX-License-Identifier: GPL-2.0-or-later
"""Timers of devices: who fires them, and when."""

import threading
import time

import pytest

from kvmfs.kvm import hrtimer
from kvmfs.kvm.hrtimer import HrTimer, HrTimers, now_ns
from tests.unit.irq_machine import eventually


@pytest.fixture
def timers():
    made = HrTimers(threading.RLock())
    yield made
    made.close()


def in_thread(function, *args):
    thread = threading.Thread(target=function, args=args, daemon=True)
    thread.start()
    return thread


def test_order_cancel_and_again(timers):
    fired, now = [], now_ns()
    late, early = HrTimer(timers, lambda: fired.append("late")), HrTimer(timers, lambda: fired.append("early"))
    gone = HrTimer(timers, lambda: fired.append("gone"))
    often = HrTimer(timers, lambda: fired.append("often") or (often.expires + 1_000_000 if fired.count("often") < 3 else None))
    with timers._lock:
        late.start(now + 30_000_000)
        early.start(now + 5_000_000)
        gone.start(now + 5_000_000)
        gone.cancel()
        often.start(now + 10_000_000)
    eventually(lambda: "late" in fired)
    assert fired == ["early", "often", "often", "often", "late"]


def test_a_sleeper_fires_for_itself_and_for_others(timers, monkeypatch):
    """The halted vCPU's thread does it, while the timers' own waits a little longer."""
    monkeypatch.setattr(hrtimer, "SLACK", 5_000_000_000)
    wake, threads = threading.Event(), []
    first = HrTimer(timers, lambda: threads.append(threading.current_thread()))
    mine = HrTimer(timers, lambda: threads.append(threading.current_thread()) or wake.set())

    def halted():
        while not wake.is_set():
            timers.sleep(wake)

    with timers._lock:
        first.start(now_ns() + 200_000_000)
        mine.start(now_ns() + 220_000_000)
    sleeper = in_thread(halted)
    eventually(lambda: timers._sleeper)
    sleeper.join(10)
    assert threads == [sleeper, sleeper]


def test_a_second_sleeper_and_one_without_timers_wait_for_their_events(timers):
    wakes = [threading.Event() for _ in range(3)]
    with timers._lock:
        HrTimer(timers, lambda: None).start(now_ns() + 10_000_000_000)
    sleepers = [in_thread(timers.sleep, wake) for wake in wakes]
    eventually(lambda: timers._sleeper)
    assert all(s.is_alive() for s in sleepers)
    for wake, sleeper in zip(wakes, sleepers, strict=True):
        wake.set()
        sleeper.join(10)
        assert not sleeper.is_alive()
    assert not timers._sleeper


def test_an_earlier_timer_comes_in_time_while_a_vcpu_sleeps(timers):
    wake, fired = threading.Event(), threading.Event()
    with timers._lock:
        HrTimer(timers, lambda: None).start(now_ns() + 10_000_000_000)
    sleeper = in_thread(timers.sleep, wake)
    eventually(lambda: timers._sleeper)
    with timers._lock:
        HrTimer(timers, lambda: fired.set()).start(now_ns() + 1_000_000)
    assert fired.wait(5)
    wake.set()
    sleeper.join(10)


def test_setting_a_timer_does_not_wake_the_thread(timers, monkeypatch):
    """It looks again when the first one is due, also when that was put off or came to be an earlier one."""
    looks, fired = [], threading.Event()
    timer = HrTimer(timers, fired.set)
    fire = timers._fire
    monkeypatch.setattr(timers, "_fire", lambda: looks.append(1) or fire())
    for seconds in (30, 20, 40):
        with timers._lock:
            timer.cancel()
            timer.start(now_ns() + seconds * 1_000_000_000)
    time.sleep(0.05)
    assert looks == []
    due = now_ns() + 1_000_000
    for _ in range(2):                  # the second time it is past
        with timers._lock:
            timer.start(due)
        assert fired.wait(5)
        fired.clear()


def test_closed_timers_do_not_fire(timers):
    fired = []
    timer = HrTimer(timers, lambda: fired.append(1))
    with timers._lock:
        timer.start(now_ns() + 20_000_000)
    timers.close()
    assert not timers._thread.is_alive()
    with timers._lock:
        timer.start(now_ns())
    time.sleep(0.05)
    assert fired == []
    timers.close()
