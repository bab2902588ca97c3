# SPDX-License-Identifier: GPL-2.0-or-later
"""Taps: functions around every handler of a dispatcher, for what looks at ioctls or changes their outcome.

A dispatcher without taps has its plain tables of handlers and pays nothing.
"""

from __future__ import annotations

import errno
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Final, Protocol

from kvmfs.abi.ioctls import Level
from kvmfs.errors import KvmError

Result = int | bytes | tuple[int, bytes] | None
Handler = Callable[[Any, Any], Result]

UNKNOWN: Final = {Level.SYSTEM: errno.EINVAL, Level.VM: errno.ENOTTY, Level.VCPU: errno.EINVAL, Level.DEVICE: errno.ENOTTY}


class Tap(Protocol):
    """Called instead of ``handler``, which it calls, or not, with ``subject`` (a Kvm, Vm or Vcpu) and the request."""

    def __call__(self, level: Level, handler: Handler, subject: Any, req: Any) -> Result: ...


class Handlers(Protocol):
    """What a dispatcher looks handlers up in."""

    def get(self, number: int, /) -> Handler | None: ...


class TappedHandlers:
    """The handlers of one level, each behind all taps, the last one outermost.  Unknown numbers have a handler too."""

    def __init__(self, level: Level, handlers: Handlers, taps: Sequence[Tap]) -> None:
        self._level, self._handlers, self._taps = level, handlers, taps

    def get(self, number: int, /) -> Handler:
        """The handler of ``number``."""
        return tapped(self._level, self._handlers.get(number) or self._unknown, self._taps)

    def _unknown(self, subject: Any, req: Any) -> Result:
        raise KvmError(UNKNOWN[self._level])


def tapped(level: Level, handler: Handler, taps: Sequence[Tap]) -> Handler:
    """``handler`` behind ``taps``."""
    for tap in taps:
        handler = partial(tap, level, handler)
    return handler
