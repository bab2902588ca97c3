# SPDX-License-Identifier: GPL-2.0-or-later
"""``kvmd``: the daemon."""

from __future__ import annotations

import contextlib
import logging
import os
import sys
import threading
from functools import partial

import click

from kvmd import warmup, worker
from kvmd.control import ControlServer
from kvmd.init import InitError, Module, kvm_init, shutdown
from kvmd.link import Link, LinkError
from kvmd.notified import NotifyServer
from kvmd.options import Options
from kvmd.zygote import Zygote
from kvmfs.api.faults import Faults, RuleError
from kvmfs.fuse import mount
from kvmfs.kvm import profile as profiles

log = logging.getLogger("kvmd")

LEVELS = ["debug", "info", "warning", "error"]


def check_faults(_context: click.Context, _parameter: click.Parameter, rules: tuple[str, ...]) -> tuple[str, ...]:
    """An option's callback: every rule is one."""
    try:
        Faults(rules)
    except RuleError as error:
        raise click.BadParameter(str(error)) from None
    return rules


def set_up_log(level: str) -> None:
    """Log to stderr."""
    logging.basicConfig(level=level.upper(), stream=sys.stderr,
                        format="%(asctime)s %(name)s[%(process)d] %(levelname)s: %(message)s")


def serve(options: Options) -> int:
    """The daemon's life; returns its exit status.  The process must have one thread and no other use for it."""
    zygote = Zygote.start(worker.main, partial(warmup.preload, options.vendor, options.profile))
    try:
        module = Module(options, zygote)
        try:
            stack = kvm_init(module)
        except InitError as error:
            log.error("%s", error)
            return 1
        try:
            node = module.node
            assert node is not None
            node.publish(module.facts)
            threading.Thread(target=_watch_zygote, args=(module,), name="zygote-watch", daemon=True).start()
            stack.enter_context(contextlib.closing(_control(module)))
            log.info("%s is ready: %s, %s", node.path, module.facts["vendor"],
                     "passthrough" if module.facts["passthrough"] else "kvm_run is copied")
            if options.listeners_fd is not None and module.vms is not None:
                NotifyServer(Link.from_fd(options.listeners_fd), node, module.vms)
            _tell_ready(options)
            node.serve()
        finally:
            stack.close()
        log.info("ended")
        return 0
    finally:
        zygote.stop()
        if options.pid_file:
            try:
                os.unlink(options.pid_file)
            except FileNotFoundError:
                pass


def _control(module: Module) -> ControlServer:
    assert module.node is not None and module.vms is not None
    return ControlServer(module.node, module.vms, lambda: module.facts)


def _tell_ready(options: Options) -> None:
    if options.pid_file:
        with open(options.pid_file, "w", encoding="ascii") as file:
            file.write(f"{os.getpid()}\n")
    if options.ready_fd is not None:
        os.write(options.ready_fd, b"ready\n")
        os.close(options.ready_fd)


def _watch_zygote(module: Module) -> None:
    """Say how workers ended; without the zygote there are no workers, so the daemon ends too."""
    try:
        while (message := module.zygote.reports.receive()) is not None:
            with message:
                status = message.integer("status", -128, 255)
                if status:
                    how = f"of signal {-status}" if status < 0 else f"with status {status}"
                    log.warning("worker %d ended %s", message.integer("pid"), how)
    except (OSError, LinkError, ValueError):
        pass
    if not (module.vms is None or module.vms.closing):
        log.critical("the zygote is gone: no VM can be made any more, the daemon ends")
        shutdown(module)


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("mountpoint", type=click.Path(file_okay=False))
@click.option("--vendor", type=click.Choice(["auto", "intel", "amd"]), default="auto", show_default=True,
              help="Which CPU the guests see; auto: the host's vendor.")
@click.option("--profile", type=click.Choice(profiles.names()), default=profiles.DEFAULT, show_default=True,
              help="Which kernel's KVM this presents: an older one has fewer ioctls, capabilities and flags.")
@click.option("--mode", default="660", show_default=True, metavar="OCTAL", help="Permissions of the node.")
@click.option("--owner", metavar="USER", help="Owner of the node (default: who runs the daemon).")
@click.option("--group", metavar="GROUP", help="Group of the node (default: kvm, else 0).")
@click.option("--passthrough", type=click.Choice(["auto", "on", "off"]), default="auto", show_default=True,
              help="Share kvm_run by FUSE passthrough, or copy it.")
@click.option("--fault", "faults", multiple=True, metavar="RULE", callback=check_faults,
              help="Inject a fault, KVM_CREATE_VCPU:ENOMEM:after=2 for example; may be given more than once (see below).")
@click.option("--log-level", type=click.Choice(LEVELS), default="info", show_default=True,
              help="What is said on stderr; info: each step of the start, and VMs that come and go.")
@click.option("--pid-file", type=click.Path(dir_okay=False), help="Write the process id there when ready.")
@click.option("--ready-fd", type=int, metavar="FD", help='Write "ready" there when the node can be opened.')
def main(mountpoint: str, vendor: str, profile: str, mode: str, owner: str | None, group: str | None, passthrough: str,
         faults: tuple[str, ...], log_level: str, pid_file: str | None, ready_fd: int | None) -> None:
    """Serve a fake /dev/kvm as MOUNTPOINT/kvm, in the foreground, until SIGTERM or SIGINT.

    MOUNTPOINT is a directory; it is made when it does not exist.  A dead mount that a killed daemon left there is
    removed first.  Needs root, or CAP_SYS_ADMIN and CAP_SYS_PTRACE.  At the end the node goes, then every VM is stopped, then
    the daemon; SIGTSTP and SIGCONT make all guests pause and go on, as for a suspended host.

    MOUNTPOINT/state says as JSON what runs; 'kvmfs version' shows it.  The exit status is 0 after a signal, 1 when the
    start failed (the log says in which step and why), 2 when the command line is wrong.

    \b
    Rules of --fault:
      KVM_CREATE_VCPU:ENOMEM:after=2  an errno, from a VM's third call on
      KVM_RUN:INTERNAL_ERROR:at=100   an exit; also FAIL_ENTRY, SHUTDOWN, INTR
      KVM_SET_MSRS:short=1            only so many MSRs; also KVM_GET_MSRS
      KVM_GET_REGS:delay=0.5          seconds, alone or with one of the above
      KVM_CAP_IRQFD:absent            CHECK_EXTENSION 0, ENABLE_CAP EINVAL
      which calls: at=N after=N times=N every=N probability=P seed=N
                   vm=N vcpu=N

    \b
    Examples:
      kvmfs mount /run/kvmfs --group kvm --mode 660
      kvmfs run --node /run/kvmfs/kvm -- PROGRAM
    """
    set_up_log(log_level)
    try:
        bits = int(mode, 8)
        if bits & ~0o777:
            raise ValueError
    except ValueError:
        raise click.BadParameter(f"{mode!r} is not an octal mode", param_hint="--mode") from None
    mount.clear_stale(mountpoint)       # before anything looks at the path
    try:
        status = serve(Options(mountpoint, vendor, bits, owner, group, passthrough, pid_file, ready_fd, faults,
                               profile))
    except (OSError, ValueError) as error:
        log.error("%s", error)
        status = 1
    # Reader threads may still be in the kernel with requests of clients that hold the node.
    logging.shutdown()
    sys.stdout.flush()
    os._exit(status)
