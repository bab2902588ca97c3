# SPDX-License-Identifier: GPL-2.0-or-later
"""``kvmfs trace``: like strace, for a KVM node."""

from __future__ import annotations

import fnmatch
import json
import os
import signal
import socket
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TextIO

from kvmd.link import Link, LinkError
from kvmfs.abi.ioctls import BY_NUMBER
from kvmfs_cli import daemons, decode, exits

_RECORDS = 4 << 20          # bytes of records that may wait for the printer


@dataclass(frozen=True, slots=True)
class Filter:
    """Which records are shown."""

    vm: int | None = None
    vcpu: int | None = None
    level: str | None = None
    ioctls: tuple[str, ...] = ()
    exits: bool = False         # the guests' exits instead of ioctls

    def wants(self, record: dict[str, Any]) -> bool:
        """Is this record to be shown?"""
        if self.vm is not None and record["vm"] != self.vm:
            return False
        if record["op"] == "exit":
            return self.vcpu in (None, record["vcpu"])
        kind, _, number = record["fd"].partition(":")
        if (self.level is not None and kind != self.level) or (self.vcpu is not None and number != str(self.vcpu)):
            return False
        entry = BY_NUMBER.get(record["cmd"])
        name = entry.name if entry else f"{record['cmd']:#x}"
        return not self.ioctls or any(matches(name, pattern) for pattern in self.ioctls)


def matches(name: str, pattern: str) -> bool:
    """KVM_GET_REGS by 'KVM_GET_REGS', 'GET_REGS', '*REGS', …"""
    return any(fnmatch.fnmatchcase(name, prefix + pattern) for prefix in ("", "KVM_"))


class Stream:
    """The two ends between workers, which write, and the printer."""

    def __init__(self) -> None:
        self._ours, self._theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._theirs.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _RECORDS)
        self._daemon: daemons.Daemon | None = None

    def attach(self, pid: int, shown: Filter, only: int | None = None) -> None:
        """Have that daemon and its VMs, those to come too, write here; or only one VM that runs.  Raises DaemonError."""
        self._daemon = daemons.Daemon(pid)
        one = {} if only is None else {"vm": only}
        self._daemon.ask("trace", [self._theirs.fileno()], exits=int(shown.exits), **one)

    def only_read(self) -> None:
        """From now on the end is seen when the writers are gone."""
        self._theirs.close()

    def only_write(self) -> None:
        """Another process reads."""
        self._ours.close()

    def show(self, shown: Filter, out: TextIO, *, as_json: bool, times: bool) -> None:
        """Print until all writers are gone."""
        link = Link(self._ours)
        while True:
            try:
                message = link.receive()
            except (LinkError, OSError):
                continue                    # a worker is not trusted to write sense
            if message is None:
                return
            message.close()
            line = _line(message.body, shown, as_json=as_json, times=times)
            if line:
                print(line, file=out, flush=True)


def _line(record: dict[str, Any], shown: Filter, *, as_json: bool, times: bool) -> str:
    try:
        if not shown.wants(record):
            return ""
        if as_json:
            return json.dumps(record)
        text = exits.kvm_exit(record) if record["op"] == "exit" else decode.ioctl(record)
        lost = f"({record['lost']} records lost)\n" if "lost" in record else ""
        clock = time.strftime("%H:%M:%S", time.localtime(record["time"] // 10**9)) + f".{record['time'] // 1000 % 10**6:06} "
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
        return f"(a record that makes no sense: {error})"
    return f"{lost}{clock if times else ''}{text}"


def _opened(path: str | None) -> TextIO | None:
    try:
        return open(path, "w", encoding="utf-8") if path else None
    except OSError as error:
        raise OSError(error.errno, f"cannot write {path}: {error.strerror}") from None


def trace_command(command: Sequence[str], shown: Filter, output: str | None, *, as_json: bool, times: bool, **options: Any) -> int:
    """``kvmfs run`` with a printer beside it; returns the command's exit status.  Raises RunError, OSError."""
    from kvmfs_cli import run

    out = _opened(output) or sys.stderr
    stream, printer = Stream(), 0

    def prepare(pid: int) -> None:
        nonlocal printer
        printer = os.fork()
        if printer == 0:
            try:
                for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
                    signal.signal(number, signal.SIG_IGN)   # what was traced so far is shown; the end comes with the writers'
                stream.only_read()
                stream.show(shown, out, as_json=as_json, times=times)
            finally:
                out.flush()
                os._exit(0)
        stream.only_write()
        try:
            stream.attach(pid, shown)
        finally:
            stream.only_read()      # otherwise the printer would wait for us

    try:
        return run.run(command, prepare=prepare, **options)
    finally:
        if printer:
            os.waitpid(printer, 0)


def trace_running(pid: int | None, shown: Filter, output: str | None, *, as_json: bool, times: bool) -> None:
    """Show what a daemon's VMs do until ^C or the daemon's end.  Raises DaemonError, OSError."""
    if shown.vm is not None:
        pid, _ = daemons.find_vm(shown.vm, pid)
    with daemons.one(pid) as daemon:
        chosen = daemon.pid
    stream = Stream()
    stream.attach(chosen, shown, shown.vm)
    stream.only_read()
    out = _opened(output) or sys.stdout
    try:
        stream.show(shown, out, as_json=as_json, times=times)
    except KeyboardInterrupt:
        pass
