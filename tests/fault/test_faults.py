# SPDX-License-Identifier: GPL-2.0-or-later
"""Clients and workers killed in each phase: the others go on, and nothing is left behind."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

VICTIM = [sys.executable, str(Path(__file__).with_name("victim.py"))]
PHASES = ["open", "vm", "memory", "vcpu", "io", "mmio", "run", "three", "creating"]
IN_A_ROW = int(os.environ.get("KVMFS_TEST_VMS", "200"))     # 1000 for the whole test
KILLS = 10
RESENDS = tuple(map(int, os.uname().release.split(".")[:2])) >= (6, 9)
AFTER_DEATH = {errno.EIO} if RESENDS else {errno.ENOTCONN, errno.ECONNABORTED}
GROWTH = 8 << 20                                             # bytes that a daemon may grow by: allocator noise


PTRACE_CONT, PTRACE_SEIZE, PTRACE_INTERRUPT, WALL = 7, 0x4206, 0x4207, 0x40000000


def ptrace(request: int, tid: int) -> int:
    return int(ctypes.CDLL(None).ptrace(ctypes.c_long(request), ctypes.c_long(tid), None, None))


@contextlib.contextmanager
def victim(node: str, phase: str) -> Iterator[subprocess.Popen[str]]:
    """A client in that phase; killed at the end if it still lives."""
    process = subprocess.Popen([*VICTIM, node, phase], stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None and process.stdout.readline() == "ready\n"
        yield process
    finally:
        process.kill()
        process.communicate()


def family(pid: int) -> list[int]:
    """A process and all its descendants."""
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return [pid, *(member for child in children for member in family(int(child)))]


def what_there_is(kvmd) -> dict[int, int]:
    """The daemon's processes and how many descriptors (memfds among them) each has; start_kvmd counts the rest."""
    return {pid: len(os.listdir(f"/proc/{pid}/fd")) for pid in family(kvmd.process.pid)}


def more_than(before: dict[int, int], kvmd) -> dict[int, int]:
    return {pid: count for pid, count in what_there_is(kvmd).items() if count > before.get(pid, 0)}


def assert_back(kvmd, before: dict[int, int], seconds: float = 5) -> None:
    """Nothing is left that was not there before (when something of a VM before that may not have been gone yet)."""
    deadline = time.monotonic() + seconds
    kvmd.wait_for_vms(0, seconds)
    while (more := more_than(before, kvmd)) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not more, (before, kvmd.log)


def resident(pid: int) -> int:
    """Bytes of a process's own memory."""
    fields = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    return sum(int(line.split()[1]) for line in fields if line.startswith("Private_")) * 1024


def some_exits(process: subprocess.Popen[str]) -> int:
    """The next count that a counting client prints."""
    assert process.stdout is not None
    return int(process.stdout.readline())


@pytest.fixture
def warm(kvmd):
    """A daemon that has had a VM, so that what it keeps for later is there."""
    daemon_and_zygote = family(kvmd.process.pid)
    with victim(kvmd.node, "io"):
        pass
    kvmd.wait_for_vms(0)
    deadline = time.monotonic() + 5
    while family(kvmd.process.pid) != daemon_and_zygote and time.monotonic() < deadline:
        time.sleep(0.02)            # the VM is forgotten a moment before its worker has ended
    return kvmd


@pytest.mark.parametrize("phase", PHASES)
def test_a_client_is_killed(warm, phase):
    before = what_there_is(warm)
    with victim(warm.node, phase) as process:
        if phase == "creating":
            time.sleep(1)
        process.kill()
        process.wait()
    assert_back(warm, before)
    with victim(warm.node, "io"):
        pass
    assert_back(warm, before)


def test_clients_are_killed_while_another_runs(warm):
    before = what_there_is(warm)
    with victim(warm.node, "count") as other:
        last = some_exits(other)
        for phase in PHASES:
            with victim(warm.node, phase):
                pass
            now = some_exits(other)
            assert now > last
            last = now
    assert_back(warm, before)


def test_clients_are_killed_at_any_moment_of_creation(warm):
    chance = random.Random(4)
    before = what_there_is(warm)
    for _ in range(KILLS):
        with victim(warm.node, "creating") as process:
            time.sleep(chance.uniform(0, 0.2))
            process.kill()
    assert_back(warm, before, 10)


def test_a_worker_is_killed(warm):
    before = what_there_is(warm)
    with victim(warm.node, "count") as first:
        some_exits(first)
        worker, = warm.workers()
        with victim(warm.node, "count") as second:
            last = some_exits(second)
            os.kill(worker, signal.SIGKILL)
            output, _ = first.communicate(timeout=10)
            assert output.splitlines()[-1] in {f"errno {number} from KVM_RUN" for number in AFTER_DEATH}
            assert first.returncode == 0
            assert some_exits(second) > last
            with victim(warm.node, "io"):       # and new VMs can be made
                pass
    assert_back(warm, before)


def test_a_dead_vm_answers_as_linux_does(warm):
    """EIO from every call, in flight or not; what needs no KVM goes on, and close is no error."""
    before = what_there_is(warm)
    with victim(warm.node, "dead") as process:
        worker, = warm.workers()
        os.kill(worker, signal.SIGKILL)
        output, _ = process.communicate(timeout=20)
    answers = dict(line.split() for line in output.splitlines())
    assert answers.pop("close") == "0" and len(answers) > 6
    assert set(map(int, answers.values())) <= AFTER_DEATH, answers
    assert "ended of signal 9" in warm.log
    assert_back(warm, before)


@pytest.mark.parametrize("phase", ["vm", "run", "count", "three"])
def test_a_client_of_a_hung_worker_can_be_killed(warm, phase):
    before = what_there_is(warm)
    with victim(warm.node, "count") as other:
        last = some_exits(other)
        others = set(warm.workers())
        with victim(warm.node, phase) as process:
            if phase == "count":
                some_exits(process)
            stopped = set(warm.workers()) - others
            assert stopped
            for worker in stopped:
                os.kill(worker, signal.SIGSTOP)
            time.sleep(0.2)
            process.kill()
            process.wait(15)
            warm.wait_for_vms(1, 15)
            assert some_exits(other) > last
    assert_back(warm, before)
    if phase in ("run", "count"):
        assert "does not answer" in warm.log


def test_a_client_of_a_hung_handler_can_be_killed(warm):
    """The worker still answers pings, but not its client."""
    before = what_there_is(warm)
    with victim(warm.node, "run") as process:
        worker, = warm.workers()
        # All threads are held but the main one and the one of the control link, which are the first two.
        held = sorted(map(int, os.listdir(f"/proc/{worker}/task")))[2:]
        for tid in held:
            assert ptrace(PTRACE_SEIZE, tid) == ptrace(PTRACE_INTERRUPT, tid) == 0
            os.waitpid(tid, WALL)
        try:
            process.kill()
            process.wait(20)
        finally:
            for tid in held:
                ptrace(PTRACE_CONT, tid)
                with contextlib.suppress(ChildProcessError):
                    os.waitpid(tid, WALL)
    assert_back(warm, before, 10)
    assert "cannot die" in warm.log


def test_a_worker_that_was_stopped_for_a_while_goes_on(warm):
    with victim(warm.node, "count") as process:
        some_exits(process)
        worker, = warm.workers()
        os.kill(worker, signal.SIGSTOP)
        time.sleep(5)
        os.kill(worker, signal.SIGCONT)
        last = some_exits(process)
        for _ in range(100):
            some_exits(process)
        assert some_exits(process) > last


def test_all_workers_are_killed(warm):
    before = what_there_is(warm)
    with victim(warm.node, "three") as process:
        warm.wait_for_vms(3)
        for worker in warm.workers():
            os.kill(worker, signal.SIGKILL)
        warm.wait_for_vms(0)
        assert process.poll() is None
    assert_back(warm, before)


@pytest.mark.timeout(900)
def test_many_vms_in_a_row(warm):
    def in_a_row(count: int) -> None:
        done = subprocess.run([*VICTIM, warm.node, "many", str(count)], capture_output=True, text=True, check=False,
                              timeout=850)
        assert done.stdout == "ready\n", done.stderr + warm.log

    in_a_row(20)
    warm.wait_for_vms(0)
    before, memory = what_there_is(warm), resident(warm.process.pid)
    in_a_row(IN_A_ROW)
    assert_back(warm, before)
    assert resident(warm.process.pid) < memory + GROWTH
