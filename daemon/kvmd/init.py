# SPDX-License-Identifier: GPL-2.0-or-later
"""Start-up, in the order and under the names of Linux's ``kvm_init``.

Each step is one context manager: what it does before its ``yield`` is undone by what stands after it, in
reverse order, when a later step fails or the daemon ends.
"""

from __future__ import annotations

import contextlib
import logging
import os
import select
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from kvmd import hotplug, power
from kvmd.node import Node
from kvmd.options import Options
from kvmd.vms import Vms
from kvmd.zygote import Zygote
from kvmfs import vendor as vendors
from kvmfs.cpu.engine import Engine
from kvmfs.fuse import mount
from kvmfs.vendor.ops import KvmX86Ops

log = logging.getLogger("kvmd.init")

SELF_TEST_TIMEOUT = 30      # seconds


class InitError(Exception):
    """A step failed; the text says which, and why."""


@dataclass
class Module:
    """What the loaded "kernel module" consists of; filled by the steps."""

    options: Options
    zygote: Zygote
    facts: dict[str, Any] = field(default_factory=dict)
    ops: KvmX86Ops | None = None
    vms: Vms | None = None
    node: Node | None = None

    def note(self, **facts: object) -> None:
        """Facts for the log and for ``kvmfs version``."""
        self.facts.update(facts)


Step = Callable[[Module], contextlib.AbstractContextManager[None]]


@contextlib.contextmanager
def kvm_arch_init(m: Module) -> Iterator[None]:
    """Choose the vendor module and register its operations."""
    m.ops = vendors.load(m.options.vendor)
    m.note(vendor=m.ops.name, module=m.ops.module, chosen=m.options.vendor)
    yield
    m.ops = None


@contextlib.contextmanager
def kvm_irqfd_init(m: Module) -> Iterator[None]:
    """What irqfds wait with: eventfds in an epoll set.  Each VM has its own; here it is shown that they can be made."""
    with select.epoll() as epoll:
        fd = os.eventfd(1, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        try:
            epoll.register(fd, select.EPOLLIN)
            if not epoll.poll(1):
                raise OSError(5, "an eventfd does not wake its waiter")
        finally:
            os.close(fd)
    yield


@contextlib.contextmanager
def kvm_arch_hardware_setup(m: Module) -> Iterator[None]:
    """The engine works and is the build that this KVM knows; the vendor finds what it can do with it."""
    assert m.ops is not None
    _self_test()
    m.ops.hardware_setup()
    m.note(engine="unicorn", profile=m.options.profile)
    yield


def _self_test() -> None:
    """Make an engine with a vCPU in a child: another build's layout could crash this process.  Raises OSError."""
    reader, writer = os.pipe2(os.O_CLOEXEC)
    sys.stderr.flush()
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            signal.alarm(SELF_TEST_TIMEOUT)
            engine = Engine()
            engine.create_cpu(0)
            engine.close()
            status = 0
        except BaseException as error:
            os.write(writer, str(error).encode()[:4096])
        finally:
            os._exit(status)
    os.close(writer)
    with os.fdopen(reader, "rb") as file:
        text = file.read().decode(errors="replace")
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    if code < 0:
        raise OSError(5, f"the engine's self-test died of {signal.Signals(-code).name}")
    if code:
        raise OSError(5, f"the engine's self-test failed: {text}")


@contextlib.contextmanager
def kvm_arch_check_processor_compat(m: Module) -> Iterator[None]:
    """Every host CPU can run what was translated on another one."""
    m.note(cpus=hotplug.check_all())
    yield


@contextlib.contextmanager
def cpuhp_setup_state(m: Module) -> Iterator[None]:
    """A host CPU that goes offline takes no vCPU thread with it."""
    vms = m.vms = Vms(m.zygote, m.ops.name if m.ops else "auto", _passthrough(m.options), m.options.faults,
                       m.options.profile)
    try:
        watch = hotplug.HotplugWatch(lambda cpu: vms.tell("cpu_offline", cpu=cpu))
    except OSError as error:
        # Not in a network namespace of a user namespace; the scheduler then moves the threads alone.
        log.info("no news of CPU hotplug: %s", error)
        yield
        return
    yield
    watch.close()


def _passthrough(options: Options) -> bool:
    if options.passthrough == "off":
        return False
    supported = mount.passthrough_supported()
    if options.passthrough == "on" and not supported:
        raise OSError(95, "--passthrough on: this kernel or these privileges have no FUSE passthrough "
                          "(Linux 6.9, CAP_SYS_ADMIN in the initial user namespace)")
    return supported


@contextlib.contextmanager
def register_reboot_notifier(m: Module) -> Iterator[None]:
    """SIGTERM (what init sends at shutdown) and SIGINT stop all VMs in order, then the daemon."""
    def stop(number: int, _: object) -> None:
        log.info("%s: stopping", signal.Signals(number).name)
        threading.Thread(target=shutdown, args=(m,), name="shutdown", daemon=True).start()

    old = {number: signal.signal(number, stop) for number in (signal.SIGTERM, signal.SIGINT)}
    yield
    for number, handler in old.items():
        signal.signal(number, handler)


def shutdown(m: Module) -> None:
    """The node goes, then the VMs, then the daemon's main loop ends.  Any thread but the main one."""
    if m.node is not None:
        m.node.unregister()
    if m.vms is not None:
        m.vms.stop()
    if m.node is not None:
        m.node.stop()


@contextlib.contextmanager
def misc_register(m: Module) -> Iterator[None]:
    """The node appears."""
    assert m.vms is not None and m.ops is not None
    node = m.node = Node(m.options, m.ops, m.vms)
    m.note(node=node.path, passthrough=node.vms_passthrough)
    try:
        yield
    finally:
        node.unregister()
        m.vms.stop()


@contextlib.contextmanager
def register_syscore_ops(m: Module) -> Iterator[None]:
    """Suspend: vCPUs leave their guests and wait; resume: clocks go on and guests are told."""
    vms = m.vms
    assert vms is not None
    watch = power.SuspendWatch(lambda slept: vms.tell("resume", slept=slept))
    jobs = power.JobControl(lambda: vms.tell("suspend"), lambda slept: vms.tell("resume", slept=slept))
    yield
    jobs.close()
    watch.close()


@contextlib.contextmanager
def preempt_notifier_init(m: Module) -> Iterator[None]:
    """vcpu_load and vcpu_put around each time slice of a vCPU: the vendor must have both before a guest runs."""
    for name in ("vcpu_load", "vcpu_put"):
        if not callable(getattr(m.ops, name, None)):
            raise TypeError(f"the vendor module has no {name}")
    yield


STEPS: tuple[Step, ...] = (
    kvm_arch_init, kvm_irqfd_init, kvm_arch_hardware_setup, kvm_arch_check_processor_compat, cpuhp_setup_state,
    register_reboot_notifier, misc_register, register_syscore_ops, preempt_notifier_init,
)


def kvm_init(m: Module, steps: tuple[Step, ...] = STEPS) -> contextlib.ExitStack:
    """All steps; ``close()`` of the result undoes them.  Raises InitError, after undoing those that were done."""
    done: list[str] = []
    stack = contextlib.ExitStack()
    for step in steps:
        name = getattr(step, "__name__", str(step))
        try:
            stack.enter_context(step(m))
        except Exception as error:
            log.debug("%s", name, exc_info=True)
            stack.close()           # and not "with stack": an exception in flight would skip what the steps undo
            why = error.strerror or str(error) if isinstance(error, OSError) else str(error)
            raise InitError(f"{name} failed: {why or type(error).__name__}"
                            + (f" (undone: {', '.join(reversed(done))})" if done else "")) from error
        done.append(name)
        m.facts["steps"] = list(done)
        log.info("%s: ok", name)
    return stack
