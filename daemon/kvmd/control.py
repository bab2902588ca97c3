# SPDX-License-Identifier: GPL-2.0-or-later
"""The daemon's control socket: where ``kvmfs vms``, ``stat``, ``trace`` and ``fault`` come in.

An abstract Unix socket named after the daemon's pid, so that it can be found (/proc/net/unix) and reached also when the mount is
in another namespace.  The kernel says who calls: root and the daemon's own user may ask for everything; others for their own VMs,
and may change nothing.
"""

from __future__ import annotations

import errno
import itertools
import logging
import os
import socket
import stat
import struct
import threading
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from kvmd.link import Link, LinkError, Message, failure
from kvmfs.api.faults import Faults
from kvmfs.api.taps import Tap
from kvmfs.api.trace import Tracer
from kvmfs.kvm.debugfs import MAX_READ

if TYPE_CHECKING:
    from kvmd.broker import Broker
    from kvmd.node import Node
    from kvmd.vms import Vms

log = logging.getLogger("kvmd.control")

NAME = "kvmfs/{}"               # + the daemon's pid
MAX_CONNECTIONS = 64
MAX_ADDRESS = (1 << 64) - 1
_PEER = struct.Struct("@iII")   # struct ucred
_INQUIRIES = ("describe", "statistics", "registers", "physical", "virtual")


def address(pid: int) -> str:
    """The abstract address of the daemon with that pid."""
    return "\0" + NAME.format(pid)


def peer_of(sock: socket.socket) -> tuple[int, int]:
    """pid and uid of who is at the other end."""
    pid, uid, _ = _PEER.unpack(sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _PEER.size))
    return pid, uid


class ControlServer:
    """Serves until :meth:`close`; a thread for each connection."""

    def __init__(self, node: Node, vms: Vms, facts: Callable[[], dict[str, Any]]) -> None:
        self._node, self._vms, self._facts = node, vms, facts
        self._lock = threading.Lock()
        self._connections: set[Connection] = set()
        self._idents = itertools.count(1)
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._listener.bind(address(os.getpid()))
        self._listener.listen(8)
        vms.created_hooks.append(self._new_vm)
        threading.Thread(target=self._accept, name="control", daemon=True).start()

    def close(self) -> None:
        """No new connections."""
        try:
            self._listener.shutdown(socket.SHUT_RDWR)
        except OSError:
            pass
        self._listener.close()

    def _accept(self) -> None:
        while True:
            try:
                sock, _ = self._listener.accept()
            except OSError:
                return
            with self._lock:
                if len(self._connections) >= MAX_CONNECTIONS:
                    sock.close()
                    continue
                connection = Connection(self, sock, next(self._idents))
                self._connections.add(connection)
            threading.Thread(target=connection.serve, name="control-connection", daemon=True).start()

    def ended(self, connection: Connection) -> None:
        """That connection is no more."""
        with self._lock:
            self._connections.discard(connection)
        self.tap_system()

    # ---- what connections ask for -------------------------------------------------------------------

    def brokers(self, uid: int) -> list[Broker]:
        """The VMs that ``uid`` may see."""
        return [broker for broker in self._vms.brokers() if may_everything(uid) or broker.uid == uid]

    def state(self, uid: int) -> dict[str, Any]:
        """The daemon's facts, and the VMs."""
        return {**self._facts(), "pid": os.getpid(), "faults": self._vms.faults if may_everything(uid) else [], "vms": [
            {"vm": b.number, "process": b.process.tgid, "uid": b.uid, "command": b.command, "since": b.since, "worker": b.pid}
            for b in self.brokers(uid)]}

    def set_faults(self, rules: list[str]) -> None:
        """New rules for all VMs, those that run and those to come.  Raises RuleError."""
        Faults(rules)
        self._vms.faults = rules
        self.tap_system()
        self._vms.tell("fault", rules=rules)

    def tap_system(self) -> None:
        """The node's own ioctls go through the rules and to who traces."""
        taps: list[Tap] = [Faults(self._vms.faults)] if self._vms.faults else []
        with self._lock:
            taps += [connection.tracer for connection in self._connections if connection.tracer is not None]
        self._node.dispatcher.tap(taps)

    def _new_vm(self, broker: Broker) -> None:
        with self._lock:
            connections = list(self._connections)
        for connection in connections:
            connection.trace_vm(broker)


def may_everything(uid: int) -> bool:
    """Root, and who runs the daemon."""
    return uid in (0, os.geteuid())


class Connection:
    """One caller."""

    def __init__(self, server: ControlServer, sock: socket.socket, ident: int) -> None:
        self._server, self._link, self._ident = server, Link(sock), ident
        self._uid = peer_of(sock)[1]
        self.tracer: Tracer | None = None
        self._sink: socket.socket | None = None
        self._exits, self._only = 0, -1

    def serve(self) -> None:
        """Until the caller goes."""
        try:
            while (message := self._link.receive()) is not None:
                with message:
                    try:
                        answer = self._answer(message)
                    except (OSError, ValueError) as error:
                        self._link.send("failed", **failure(error))
                    else:
                        self._link.send("answer", **answer)
        except (LinkError, OSError) as error:
            log.debug("control connection: %s", error)
        finally:
            self._stop_trace()
            self._server.ended(self)
            self._link.close()

    def _answer(self, message: Message) -> dict[str, Any]:
        match message.op:
            case "state":
                return self._server.state(self._uid)
            case "trace":
                self._start_trace(message)
                return {}
            case "fault":
                if not may_everything(self._uid):
                    raise OSError(errno.EPERM, "only root and the daemon's own user may inject faults")
                self._server.set_faults(message.texts("rules"))
                return {}
            case op if op in _INQUIRIES:
                return self._inquire(message)
        raise LinkError(f"unknown request {message.op!r:.40}")

    def _broker(self, number: int) -> Broker:
        for broker in self._server.brokers(self._uid):
            if broker.number == number:
                return broker
        raise OSError(errno.ENOENT, f"there is no VM {number}")

    def _inquire(self, message: Message) -> dict[str, Any]:
        fields = {name: message.integer(name, 0, limit) for name, limit in (
            ("vcpu", 1 << 31), ("address", MAX_ADDRESS), ("size", MAX_READ)) if name in message.body}
        return ask(self._broker(message.integer("vm")), message.op, **fields)

    # ---- traces -------------------------------------------------------------------------------------

    def _start_trace(self, message: Message) -> None:
        if self._sink is not None:
            raise OSError(errno.EBUSY, "this connection traces already")
        fds = message.take_fds()
        try:
            if len(fds) != 1 or not stat.S_ISSOCK(os.fstat(fds[0]).st_mode):
                raise LinkError("trace: one socket is needed")
            self._sink = socket.socket(fileno=fds[0])
        except BaseException:
            for fd in fds:
                os.close(fd)
            raise
        self._exits = message.integer("exits", 0, 1)
        self._only = message.integer("vm") if "vm" in message.body else -1
        if self._only >= 0:
            self.trace_vm(self._broker(self._only))
            return
        if may_everything(self._uid) and not self._exits:
            self.tracer = Tracer(Link(self._sink).send, lambda: None)
            self._server.tap_system()
        for broker in self._server.brokers(self._uid):
            self.trace_vm(broker)

    def trace_vm(self, broker: Broker) -> None:
        """Have that VM tell of its ioctls, or exits, when that is wanted."""
        sink = self._sink
        if sink is None or self._only not in (-1, broker.number) or not (may_everything(self._uid) or broker.uid == self._uid):
            return
        answer = broker.control("trace", [sink.fileno()], id=self._ident, exits=self._exits)
        if answer is not None:
            answer.close()

    def _stop_trace(self) -> None:
        if self._sink is None:
            return
        self.tracer = None
        for broker in self._server.brokers(0):
            answer = broker.control("untrace", id=self._ident)
            if answer is not None:
                answer.close()
        self._sink.close()
        self._sink = None


def ask(broker: Broker, op: str, **fields: Any) -> dict[str, Any]:
    """A worker's answer to an inquiry, as it is: whoever reads it treats it as hostile.  Raises OSError."""
    answer = broker.control(op, **fields)
    if answer is None:
        raise OSError(errno.ESRCH, f"VM {broker.number} has ended")
    with answer:
        if answer.body.get("errno"):
            raise OSError(answer.integer("errno", 1, 4095), str(answer.body.get("text", ""))[:500])
        return {name: value for name, value in answer.body.items() if name != "op"}
