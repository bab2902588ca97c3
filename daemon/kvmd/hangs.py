# SPDX-License-Identifier: GPL-2.0-or-later
"""Workers that hang, seen from their clients.

A thread that was killed while it waits for a worker's answer cannot die before it has that answer, or before the
connection ends.  So a client that is to die and does not, or is dead while its VM lives on, puts its worker under
suspicion: such a worker must answer a ping, and must let its client die, or it is killed, which frees the client.
"""

from __future__ import annotations

import logging
import select
import signal
import threading
import time
from typing import TYPE_CHECKING

from kvmfs.client.process import status_field

if TYPE_CHECKING:
    from collections.abc import Callable

    from kvmd.broker import Broker
    from kvmfs.client.process import Process

log = logging.getLogger("kvmd.hangs")

LOOK = 1.0              # seconds between looks
SUSPECT = 2.0           # seconds that a client may take to die, and its VM to follow it
ANSWER = 3.0            # seconds for the ping
LIMIT = 10.0            # seconds after which a client that cannot die frees itself from a worker that only answers
_KILLED = 1 << signal.SIGKILL - 1

LIVES, DYING, GONE = range(3)


def state_of(process: Process) -> int:
    """LIVES; DYING: killed, and a thread of it waits for something that a kill does not end; GONE."""
    pidfd = process.pidfd
    if pidfd < 0:
        return GONE                     # its broker has just closed it
    poll = select.poll()
    poll.register(pidfd, select.POLLIN)
    if poll.poll(0):
        return GONE
    # In a process that is being killed the leader is either such a thread, or a zombie.
    if _is_killed(process.tgid):
        return DYING
    if (status_field(process.tgid, "State") or "Z")[0] == "Z" and any(map(_is_killed, process.threads())):
        return DYING
    return LIVES


def _is_killed(tid: int) -> bool:
    return bool(int(status_field(tid, "SigPnd") or "0", 16) & _KILLED)


class HangWatch:
    """One thread, which sleeps while there are no VMs."""

    def __init__(self, brokers: Callable[[], list[Broker]]) -> None:
        self._brokers = brokers
        self._wake = threading.Event()
        self._thread: threading.Thread | None = None
        self._since: dict[Broker, float] = {}
        self._asked: set[Broker] = set()

    def wake(self) -> None:
        """There is a VM."""
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="hangs", daemon=True)
            self._thread.start()
        self._wake.set()

    def _run(self) -> None:
        while True:
            self._wake.wait()
            self._wake.clear()
            while brokers := self._brokers():
                try:
                    self._look(brokers)
                except Exception:
                    log.exception("looking for workers that hang")
                time.sleep(LOOK)
            self._since.clear()
            self._asked.clear()

    def _look(self, brokers: list[Broker]) -> None:
        now = time.monotonic()
        states = {broker: state_of(broker.process) for broker in brokers}
        self._since = {broker: self._since.get(broker, now) for broker, state in states.items() if state != LIVES}
        self._asked &= set(self._since)
        for broker, since in self._since.items():
            if now - since >= SUSPECT and broker not in self._asked:
                self._asked.add(broker)
                # One hung worker shall not keep the others waiting.
                threading.Thread(target=broker.ping, args=[ANSWER], name="ping", daemon=True).start()
            if now - since >= LIMIT and states[broker] == DYING:
                log.error("VM %d: process %d cannot die because of worker %d; that is killed", broker.number,
                          broker.process.tgid, broker.pid)
                broker.kill()
