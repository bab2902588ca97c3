# SPDX-License-Identifier: GPL-2.0-or-later
"""``kvmfs run``: a command in whose world /dev/kvm is the fake node."""

from __future__ import annotations

import ctypes
import errno
import os
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Sequence

from kvmfs.fuse.mount import open_dev_fuse
from kvmfs.vendor import host_vendor
from kvmfs_cli import namespace
from kvmfs_cli.nodes import NodeError, check_node

PR_SET_PDEATHSIG = 1
STOP_PATIENCE = 15          # seconds for the daemon to end its VMs
SI_USER, SI_TKILL, SI_QUEUE = 0, -6, -1
FORWARDED = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT, signal.SIGUSR1, signal.SIGUSR2,
             signal.SIGALRM)
EXIT_NOT_FOUND, EXIT_NOT_EXECUTABLE, EXIT_OURS = 127, 126, 125


class RunError(Exception):
    """The command was not started; the text says why."""


class PrivateDaemon:
    """A kvmd of this run's own, on a temporary directory of this namespace."""

    def __init__(self, *, vendor: str, profile: str, passthrough: str, faults: tuple[str, ...], log_level: str) -> None:
        from kvmd.link import Link
        from kvmd.main import serve, set_up_log
        from kvmd.options import Options

        self._directory = tempfile.mkdtemp(prefix="kvmfs-")
        theirs, self.listeners = Link.pair()
        reader, writer = os.pipe2(os.O_CLOEXEC)
        parent = os.getpid()
        sys.stdout.flush()
        self.pid = os.fork()
        if self.pid == 0:
            status = 1
            try:
                os.close(reader)
                # A ^C is the command's; the daemon ends when the command has ended.  It may log to a terminal that would
                # stop it for that.  Why this is no session of its own: zygote.py.
                os.setpgid(0, 0)
                signal.signal(signal.SIGTTOU, signal.SIG_IGN)
                ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
                if os.getppid() != parent:
                    os._exit(1)
                set_up_log(log_level)
                # Only this namespace sees the node, so its mode may be open: the command may change its user.
                status = serve(Options(self._directory, vendor=vendor, profile=profile, mode=0o666,
                                       passthrough=passthrough, faults=faults,
                                       ready_fd=writer, listeners_fd=theirs.fileno()))
            except BaseException as error:
                print(f"kvmfs run: the daemon failed: {error}", file=sys.stderr)
            finally:
                sys.stderr.flush()
                os._exit(status)
        os.close(writer)
        theirs.close()
        with os.fdopen(reader, "rb") as file:
            ready = file.read() == b"ready\n"
        self.node = os.path.join(self._directory, "kvm")
        if not ready:
            self.stop()
            raise RunError("the daemon did not start (its message is above)")

    def stop(self) -> None:
        """End it in order, and leave nothing."""
        try:
            os.kill(self.pid, signal.SIGTERM)
        except ProcessLookupError:
            pass
        deadline = time.monotonic() + STOP_PATIENCE
        while os.waitpid(self.pid, os.WNOHANG)[0] == 0:
            if time.monotonic() > deadline:
                os.kill(self.pid, signal.SIGKILL)
                os.waitpid(self.pid, 0)
                break
            time.sleep(0.005)
        try:
            os.rmdir(self._directory)
        except OSError:
            pass


def run(command: Sequence[str], *, node: str | None, vendor: str, profile: str, passthrough: str,
        faults: tuple[str, ...], log_level: str, pretend_cpu: bool = False,
        prepare: Callable[[int], None] | None = None) -> int:
    """Run ``command``; returns its exit status, 128 + n when signal n ended it.  Raises RunError.

    ``pretend_cpu``: its /proc/cpuinfo has the flag of the vendor's virtualization, its /sys/module the vendor's KVM.
    ``prepare`` is called with the private daemon's pid before the command starts; it may fork.
    """
    if node is not None:
        try:
            check_node(node)
        except NodeError as error:
            raise RunError(str(error)) from None
    try:
        namespace.enter()
    except (namespace.NamespaceError, OSError) as error:
        raise RunError(str(error)) from error
    daemon = None
    if node is None:
        try:
            os.close(open_dev_fuse())
        except OSError as error:
            raise RunError(error.strerror or str(error)) from error
        daemon = PrivateDaemon(vendor=vendor, profile=profile, passthrough=passthrough, faults=faults, log_level=log_level)
        node = daemon.node
    try:
        try:
            namespace.place_node(node)
            if pretend_cpu:
                from kvmfs_cli.pretend import pretend_virtualization

                pretend_virtualization(host_vendor() if vendor == "auto" else vendor)
        except OSError as error:
            raise RunError(error.strerror or str(error)) from error
        if prepare is not None and daemon is not None:
            prepare(daemon.pid)
        return _run_command(command, daemon)
    finally:
        if daemon is not None:
            daemon.stop()


def _run_command(command: Sequence[str], daemon: PrivateDaemon | None) -> int:
    waited = {*FORWARDED, signal.SIGCHLD}
    signal.signal(signal.SIGCHLD, lambda *_: None)          # an ignored one would never be pending
    old = signal.pthread_sigmask(signal.SIG_BLOCK, waited)
    pid = os.fork()
    if pid == 0:
        _become(command, old, daemon)
    while True:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            code = os.waitstatus_to_exitcode(status)
            return 128 - code if code < 0 else code
        info = signal.sigwaitinfo(waited)
        # What the terminal sends goes to the whole process group, so the command has it already.
        if info.si_signo != signal.SIGCHLD and info.si_code in (SI_USER, SI_TKILL, SI_QUEUE):
            try:
                os.kill(pid, info.si_signo)
            except ProcessLookupError:
                pass


def _send_listener(daemon: PrivateDaemon) -> None:
    """Descriptor-making ioctls of the command go to the daemon first, so that it can serve a traced program too."""
    from kvmfs.client.notify import install_filter

    try:
        listener = install_filter()
    except OSError:
        return          # an outer `kvmfs run` has one already, or the kernel is too old: the daemon stops the client instead
    daemon.listeners.send("listener", [listener])


def _why(program: str, number: int | None) -> str:
    if os.path.isdir(program):
        return " (it is a directory)"
    return {errno.EACCES: " (is it a program, and executable? chmod +x)",
            errno.ENOEXEC: " (a script needs '#!INTERPRETER' in its first line)"}.get(number or 0, "")


def _become(command: Sequence[str], mask: set[int], daemon: PrivateDaemon | None) -> None:
    status = EXIT_OURS
    try:
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        for number in (signal.SIGPIPE, signal.SIGINT, signal.SIGXFSZ):
            signal.signal(number, signal.SIG_DFL)           # Python's own settings are not the command's
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        if daemon is not None:
            _send_listener(daemon)
        os.execvp(command[0], list(command))
    except FileNotFoundError:
        print(f"kvmfs run: {command[0]}: there is no such program", file=sys.stderr)
        status = EXIT_NOT_FOUND
    except OSError as error:
        print(f"kvmfs run: {command[0]} cannot be executed: {error.strerror}{_why(command[0], error.errno)}", file=sys.stderr)
        status = EXIT_NOT_EXECUTABLE
    finally:
        sys.stderr.flush()
        os._exit(status)
