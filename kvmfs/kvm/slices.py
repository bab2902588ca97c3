# SPDX-License-Identifier: GPL-2.0-or-later
"""Who may use a VM's engine: the vCPUs by turns, and whoever changes what they run on.

All vCPUs of a VM share one engine (two engines side by side would lose each other's locked updates), so this
is the VM's scheduler.  Turns are strictly first come, first served: a plain lock would let the vCPU that has
just been kicked out take the engine again.
"""

from __future__ import annotations

import threading
from collections import deque
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from kvmfs.kvm.kvm_main import Vcpu

SLICE = 0.005       # seconds that a vCPU may keep the engine while another one waits


class EngineShare:
    """A fair lock whose waiters kick the vCPU that holds it once its slice is over."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._queue: deque[tuple[Vcpu | None, threading.Lock]] = deque()
        self._owner: Vcpu | None = None
        self._taken = False

    def acquire(self, vcpu: Vcpu | None, *, urgent: bool = False) -> None:
        """Wait for a turn.  ``urgent``: do not let the present holder finish its slice."""
        with self._lock:
            if not self._taken:
                self._taken, self._owner = True, vcpu
                return
            turn = threading.Lock()
            turn.acquire()
            self._queue.append((vcpu, turn))
            owner = self._owner
        if urgent and owner is not None:
            owner.kick()
        while not turn.acquire(timeout=SLICE):
            owner = self._owner
            if owner is not None:
                owner.kick()

    def release(self) -> None:
        """End the turn; the first in the queue is next."""
        with self._lock:
            if self._queue:
                self._owner, turn = self._queue.popleft()
                turn.release()
            else:
                self._taken, self._owner = False, None

    @property
    def contended(self) -> bool:
        """Does anybody wait?"""
        return bool(self._queue)

    def give_way(self, vcpu: Vcpu) -> None:
        """Let the others have their turn, then go on."""
        self.release()
        self.acquire(vcpu)
