# SPDX-License-Identifier: GPL-2.0-or-later
"""Guest memory of a client that somebody else traces.

Such a client cannot be made to map anything, so its private memory cannot be shared with it.  It is mirrored
instead: a copy that the guest runs on, brought up to date before each KVM_RUN and written back after it.  What
the client writes while a vCPU runs is seen by the guest at its next entry.  That costs a comparison of the whole
range each time; it is meant for a look through strace or a debugger, where each system call costs more.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import threading
from collections.abc import Iterator
from typing import Final

from kvmfs.client.memory import ClientMemory

PAGE: Final = 4096
CHUNK: Final = 1 << 16


class Mirror:
    """The client's [hva, hva + size) and its copy, the memfd ``fd``; both multiples of 4096 bytes.

    Where the client has mapped nothing the copy has zeroes, and what the guest writes there is lost.
    """

    def __init__(self, memory: ClientMemory, hva: int, size: int) -> None:
        self.hva, self.size = hva, size
        self._memory = memory
        self.fd = os.memfd_create("kvmfs-mirror", os.MFD_CLOEXEC)
        os.ftruncate(self.fd, size)
        self._copy = mmap.mmap(self.fd, size)
        self._last = bytearray(size)            # what both sides had when they last agreed
        self._lock = threading.Lock()
        self.copy_in()

    def close(self) -> None:
        """Give the memory back."""
        self._copy.close()
        os.close(self.fd)

    def copy_in(self) -> list[tuple[int, int]]:
        """Take over what the client has changed; the changed ranges as (hva, size)."""
        changed = []
        with self._lock:
            for at in range(0, self.size, CHUNK):
                size = min(CHUNK, self.size - at)
                for offset, page in self._client_changes(at, size):
                    self._copy[offset:offset + len(page)] = page
                    self._last[offset:offset + len(page)] = page
                    changed.append((self.hva + offset, len(page)))
        return changed

    def _client_changes(self, at: int, size: int) -> Iterator[tuple[int, bytes]]:
        with contextlib.suppress(OSError):
            data = self._memory.read(self.hva + at, size)
            if data != self._last[at:at + size]:
                yield from _different(data, self._last, at)
            return
        if size > PAGE:                         # a part of it is not mapped
            for page in range(at, at + size, PAGE):
                yield from self._client_changes(page, PAGE)

    def copy_out(self) -> None:
        """Write back what the guest has changed."""
        with self._lock:
            for at in range(0, self.size, CHUNK):
                data = self._copy[at:at + CHUNK]
                if data == self._last[at:at + CHUNK]:
                    continue
                for offset, page in list(_different(data, self._last, at)):
                    self._last[offset:offset + len(page)] = page
                    with contextlib.suppress(OSError):
                        self._memory.write(self.hva + offset, page)


def _different(data: bytes, last: bytearray, at: int) -> Iterator[tuple[int, bytes]]:
    """The pages of ``data``, which belongs at ``at``, that are not as in ``last``: (offset, bytes)."""
    for page in range(0, len(data), PAGE):
        new = data[page:page + PAGE]
        if new != last[at + page:at + page + PAGE]:
            yield at + page, new
