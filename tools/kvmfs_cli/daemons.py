# SPDX-License-Identifier: GPL-2.0-or-later
"""Finding the daemons of this machine, and talking to one over its control socket."""

from __future__ import annotations

import contextlib
import os
import socket
from collections.abc import Iterator, Sequence
from typing import Any

from kvmd.control import NAME, address, peer_of
from kvmd.link import Link, LinkError

_PREFIX = "@" + NAME.format("")
PATIENCE = 15           # seconds for an answer


class DaemonError(Exception):
    """There is no such daemon or VM, or it refused; the text says what to do."""


class Daemon:
    """A connection to the daemon with that pid.  Raises DaemonError."""

    def __init__(self, pid: int) -> None:
        self.pid = pid
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        try:
            sock.connect(address(pid))
            peer, uid = peer_of(sock)
        except OSError as error:
            sock.close()
            raise DaemonError(f"daemon {pid}: {error.strerror}") from error
        # Anybody may bind an abstract address: believe only root, and one's own processes.  The pid may have no number here.
        if uid not in (0, os.geteuid()) or peer not in (pid, 0):
            sock.close()
            raise DaemonError(f"what answers as daemon {pid} is process {peer} of user {uid}")
        self._link = Link(sock)

    def __enter__(self) -> Daemon:
        return self

    def __exit__(self, *_: object) -> None:
        self._link.close()

    def ask(self, op: str, fds: Sequence[int] = (), **fields: Any) -> dict[str, Any]:
        """The answer's fields.  Raises DaemonError."""
        try:
            with self._link.call(op, fds, timeout=PATIENCE, **fields) as answer:
                if answer.op == "failed":
                    raise DaemonError(str(answer.body.get("text")) or os.strerror(answer.integer("errno")))
                return answer.body
        except (OSError, LinkError) as error:
            raise DaemonError(f"daemon {self.pid}: {error}") from error


def pids() -> list[int]:
    """The daemons whose sockets are in this network namespace, by pid."""
    found = set()
    with open("/proc/net/unix", encoding="utf-8", errors="replace") as file:
        for line in file:
            path = line.split()[-1]
            if path.startswith(_PREFIX) and path[len(_PREFIX):].isdecimal():
                found.add(int(path[len(_PREFIX):]))
    return sorted(found)


@contextlib.contextmanager
def every() -> Iterator[list[Daemon]]:
    """Connections to all daemons that answer."""
    with contextlib.ExitStack() as stack:
        daemons = []
        for pid in pids():
            with contextlib.suppress(DaemonError):
                daemons.append(stack.enter_context(Daemon(pid)))
        yield daemons


@contextlib.contextmanager
def chosen(pid: int | None) -> Iterator[list[Daemon]]:
    """A connection to that daemon, or to all.  Raises DaemonError when that one is not there."""
    if pid is None:
        with every() as daemons:
            yield daemons
    else:
        with Daemon(pid) as daemon:
            yield [daemon]


@contextlib.contextmanager
def one(pid: int | None) -> Iterator[Daemon]:
    """A connection to that daemon, or to the only one.  Raises DaemonError."""
    if pid is None:
        known = pids()
        if not known:
            raise DaemonError("no daemon runs: 'kvmfs run -- PROGRAM' or 'kvmfs mount DIRECTORY' starts one")
        if len(known) > 1:
            raise DaemonError(f"several daemons run: choose one with --daemon ({', '.join(map(str, known))})")
        pid = known[0]
    with Daemon(pid) as daemon:
        yield daemon


def find_vm(number: int | None, pid: int | None) -> tuple[int, int]:
    """(daemon's pid, VM's number) of the VM that is meant: by number, or the only one.  Raises DaemonError."""
    with chosen(pid) as daemons:
        found = [(daemon.pid, int(vm["vm"])) for daemon in daemons for vm in daemon.ask("state")["vms"]
                 if number in (None, vm["vm"])]
    if not found:
        raise DaemonError("no VM runs" if number is None else f"there is no VM {number} ('kvmfs vms' lists them)")
    if len(found) > 1:
        raise DaemonError("several VMs are meant: " + ", ".join(f"--daemon {p} {n}" for p, n in found))
    return found[0]
