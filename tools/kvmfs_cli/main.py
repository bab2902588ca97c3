# SPDX-License-Identifier: GPL-2.0-or-later
"""``kvmfs``: the programs for people, one subcommand each."""

from __future__ import annotations

import contextlib
import errno
import os
import sys
from typing import Any, NoReturn

import click

from kvmfs.kvm import profile as profiles


class _Number(click.ParamType):
    """A number in decimal, or with 0x in hexadecimal."""

    name = "number"

    def convert(self, value: object, param: click.Parameter | None, ctx: click.Context | None) -> int:
        try:
            number = int(str(value), 0)
        except ValueError:
            self.fail(f"{value} is no number", param, ctx)
        if not 0 <= number < 1 << 64:
            self.fail(f"{value} has more than 64 bits", param, ctx)
        return number


_NUMBER = _Number()
_PROFILE = click.option("--profile", type=click.Choice(profiles.names()), default=profiles.DEFAULT, show_default=True,
                        help="Which kernel's KVM the program sees: an older one has fewer ioctls, capabilities and flags.")
_VENDOR = click.option("--vendor", type=click.Choice(["auto", "intel", "amd"]), default="auto", show_default=True,
                       help="Which CPU the guests see: Linux's kvm-intel or kvm-amd; auto: as the host's CPU.")
def _check_faults(context: click.Context, parameter: click.Parameter, rules: tuple[str, ...]) -> tuple[str, ...]:
    from kvmd.main import check_faults

    return check_faults(context, parameter, rules) if rules else rules


def _check_command(context: click.Context, parameter: click.Parameter, command: tuple[str, ...]) -> tuple[str, ...]:
    # Options after the program's name are the program's, so click does not look at any: not at mistyped ones before it either.
    if command and command[0].startswith("-"):
        raise click.NoSuchOption(command[0], ctx=context)
    return command


def _check_patterns(context: click.Context, parameter: click.Parameter, patterns: tuple[str, ...]) -> tuple[str, ...]:
    from kvmfs.abi.ioctls import BY_NAME
    from kvmfs_cli.trace import matches

    for pattern in patterns:
        if not pattern.startswith("0x") and not any(matches(name, pattern) for name in BY_NAME):
            raise click.BadParameter(f"no ioctl matches {pattern} (docs/supported.md has them all)")
    return patterns


_FAULT = click.option("--fault", "faults", multiple=True, metavar="RULE", callback=_check_faults,
                      help="Inject a fault, KVM_CREATE_VCPU:ENOMEM:after=2 for example; may be given more than once "
                           "('kvmfs mount --help' explains the rules).")
_PASSTHROUGH = click.option("--passthrough", type=click.Choice(["auto", "on", "off"]), default="auto",
                            show_default=True,
                            help="Share kvm_run with the program by FUSE passthrough (Linux 6.9, root), or copy it at each "
                                 "exit; auto: share it where that works, on: fail where it does not.")


class _Kvmfs(click.Group):
    """Output that cannot be written (a full disk) is an error like others, not a traceback."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            result = super().invoke(ctx)
            sys.stdout.flush()
            return result
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EIO) or error.filename is not None:
                raise
            with contextlib.suppress(OSError):
                os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())     # what is buffered fails at exit else
            raise click.ClickException(f"the output cannot be written: {error.strerror}; make room, or write elsewhere") from None


@click.group(cls=_Kvmfs, context_settings={"help_option_names": ["-h", "--help"]},
             epilog="'kvmfs COMMAND --help' explains each. Start with: kvmfs run -- PROGRAM")
def main() -> None:
    """A /dev/kvm that needs no hardware.

    Programs open the node, issue the ioctls that they would issue to Linux's KVM, and their guests run: in an emulated CPU,
    on any x86-64 Linux with FUSE.

    \b
    Exit status:
      0 done, 1 not found or failed, 2 the command line is wrong; those of run,
      trace, doctor and conformance say more

    \b
    Files:
      /dev/fuse               must be there, and may be opened
      /dev/kvm                where 'kvmfs run' shows the node to its PROGRAM
      DIRECTORY/kvm           the node of 'kvmfs mount DIRECTORY'
      DIRECTORY/state         what runs there, as JSON
      DIRECTORY/stats/        the statistics, as in /sys/kernel/debug/kvm

    \b
    Environment:
      TMPDIR                  where 'kvmfs run' makes its mount point
      KVMFS_SANDBOX_LOG=1     the kernel logs what a worker's seccomp filter
                              refuses
      NO_COLOR                tables and doctor without colours

    \b
    Examples:
      kvmfs run -- qemu-system-x86_64 -accel kvm ...
      kvmfs doctor
    """


@main.command(context_settings={"ignore_unknown_options": True, "allow_interspersed_args": False},
              short_help="Run a program whose /dev/kvm is the fake node.")
@_VENDOR
@_PROFILE
@_PASSTHROUGH
@_FAULT
@click.option("--node", metavar="PATH",
              help="Use the node of a running daemon ('kvmfs mount DIRECTORY' makes DIRECTORY/kvm) and start none.")
@click.option("--pretend-cpu", is_flag=True,
              help="Show PROGRAM a machine with KVM: by the vendor, a /proc/cpuinfo with the flag svm or vmx, and a /sys/module "
                   "with the parameters of kvm and kvm_amd or kvm_intel.  For programs that look there before they open the "
                   "node (kvm-ok, virt-host-validate, the kernel's selftests).")
@click.option("--log-level", type=click.Choice(["debug", "info", "warning", "error"]), default="warning",
              show_default=True, help="What the private daemon says on stderr.")
@click.argument("command", nargs=-1, required=True, type=click.UNPROCESSED, metavar="[--] PROGRAM [ARGUMENT]...",
                callback=_check_command)
def run(vendor: str, profile: str, passthrough: str, faults: tuple[str, ...], node: str | None, pretend_cpu: bool,
        log_level: str, command: tuple[str, ...]) -> None:
    """Run PROGRAM with the fake node at /dev/kvm.

    A private daemon is started, and its node put over /dev/kvm in a private mount namespace: nobody else sees it, it
    works where there is no /dev/kvm, and all of it is gone when PROGRAM has ended.  An ordinary user needs user namespaces and
    a /dev/fuse that may be opened; root needs neither.

    \b
    The exit status is PROGRAM's, or
      128 + N   signal N ended it
      125       kvmfs itself failed, and says why
      126, 127  PROGRAM could not be executed, or does not exist
      2         the command line is wrong

    \b
    Examples:
      kvmfs run -- build/hello
      kvmfs run --vendor intel -- sh -c 'ls -l /dev/kvm; build/hello'
      kvmfs run -- strace -f -e ioctl build/hello
      kvmfs run --fault KVM_CREATE_VCPU:ENOMEM -- build/hello
      kvmfs run --pretend-cpu -- kvm-ok
    """
    from kvmfs_cli import run as runner

    try:
        status = runner.run(command, node=node, vendor=vendor, profile=profile, passthrough=passthrough, faults=faults,
                            log_level=log_level, pretend_cpu=pretend_cpu)
    except runner.RunError as error:
        click.echo(f"kvmfs run: {error}", err=True)
        status = runner.EXIT_OURS
    sys.stdout.flush()
    os._exit(status)


@main.command(context_settings={"ignore_unknown_options": True, "allow_interspersed_args": False,
                                "help_option_names": []}, add_help_option=False,
              short_help="Run a daemon whose node everybody may use.")
@click.argument("arguments", nargs=-1, type=click.UNPROCESSED)
def mount(arguments: tuple[str, ...]) -> None:
    """Run the daemon on a directory, in the foreground (its help and options are kvmd's)."""
    from kvmd.main import main as kvmd

    kvmd(list(arguments), prog_name="kvmfs mount")


@main.command(short_help="Show versions, what this machine offers, and the daemons on it.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object instead of tables.")
def version(as_json: bool) -> None:
    """Show versions, what kvmfs finds on this machine, and every mounted node with its VMs.

    With --json: "versions", "host" (what works here: fuse, passthrough, user_namespaces), "capabilities" (how many of
    Linux's KVM_CAP_ are answered), "vendor" (what auto means here), "profiles", "steps" (of the daemon's start) and "nodes".
    The exit status is 0.

    \b
    Examples:
      kvmfs version
      kvmfs version --json | jq .nodes
    """
    from kvmfs_cli import version as facts

    if as_json:
        click.echo(facts.as_json(facts.collect()))
    else:
        facts.show(facts.collect())


@main.command(short_help="Check what this host has, and say how to get what it lacks.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object instead of lines.")
def doctor(as_json: bool) -> None:
    """Try each thing that kvmfs needs, and run a guest.

    A line for each: ok, degraded (then it says what is slower or does not work) or missing (kvmfs does not work at all), and what
    to do about it.

    \b
    The exit status is that of the worst line:
      0  all ok
      1  something is degraded
      3  something is missing
      2  the command line is wrong

    \b
    Examples:
      kvmfs doctor
      kvmfs doctor --json | jq -r '.checks[] | select(.status != "ok").advice'
    """
    from kvmfs_cli.doctor import doctor as examine

    sys.exit(examine(as_json=as_json))


_DAEMON = click.option("--daemon", "daemon", type=int, metavar="PID", help="Which daemon, when several run.")


def _fail(command: str, error: Exception) -> NoReturn:
    click.echo(f"kvmfs {command}: {error}", err=True)
    sys.exit(1)


@main.command(short_help="List the VMs that run, or look into one.")
@_DAEMON
@click.option("--vcpu", type=click.IntRange(0), default=0, show_default=True, help="Which vCPU to look at.")
@click.option("--registers", is_flag=True, help="Show its registers, and the code at rip (the default with a VM).")
@click.option("--disassemble", is_flag=True, help="Show the code at rip only.")
@click.option("--walk", type=_NUMBER, metavar="ADDRESS", help="Show the page-table entries that translate this linear address.")
@click.option("--memory", type=_NUMBER, metavar="ADDRESS", help="Show memory at this linear address.")
@click.option("--physical", type=_NUMBER, metavar="ADDRESS", help="Show memory at this guest physical address.")
@click.option("--length", type=click.IntRange(1, 16384), default=64, show_default=True, help="How many bytes of memory.")
@click.option("--json", "as_json", is_flag=True, help="The list as JSON.")
@click.argument("vm", type=int, required=False)
def vms(daemon: int | None, vcpu: int, registers: bool, disassemble: bool, walk: int | None, memory: int | None,
        physical: int | None, length: int, as_json: bool, vm: int | None) -> None:
    """List every VM that you may see: whose it is, since when, its memory, and what its vCPUs do.

    \b
    A vCPU is in its
      guest     in KVM_RUN, executing
      halted    in KVM_RUN, waiting for an interrupt
      ioctl     in another ioctl
      client    nobody has entered it

    With the number of a VM, look into it while it runs; a vCPU that is in its guest is made to leave it for a moment.  The exit
    status is 1 when there is no such VM.

    \b
    Examples:
      kvmfs vms
      kvmfs vms 0 --registers
      kvmfs vms 0 --walk 0xffffffff81000000
      kvmfs vms 0 --physical 0x7c00 --length 512
      kvmfs vms --json | jq '.[].process'
    """
    from kvmfs_cli import vms as window
    from kvmfs_cli.daemons import Daemon, DaemonError, find_vm

    try:
        if vm is None and not (registers or disassemble) and walk is memory is physical is None:
            window.show_all(daemon, as_json=as_json)
            return
        pid, number = find_vm(vm, daemon)
        with Daemon(pid) as connected:
            if walk is not None:
                found = window.Registers.of(connected, number, vcpu)
                window.show_walk(*window.walk(connected, number, found, walk), va=walk)
            if memory is not None:
                answer = connected.ask("virtual", vm=number, vcpu=vcpu, address=memory, size=length)
                window.show_memory(bytes.fromhex(answer["data"]), memory)
            if physical is not None:
                answer = connected.ask("physical", vm=number, address=physical, size=length)
                window.show_memory(bytes.fromhex(answer["data"]), physical)
            if disassemble:
                window.show_code(window.Registers.of(connected, number, vcpu))
            elif registers or walk is memory is physical is None:
                window.show_registers(window.Registers.of(connected, number, vcpu))
    except DaemonError as error:
        _fail("vms", error)


@main.command(short_help="Show what VMs do, in numbers, live.")
@_DAEMON
@click.option("--vm", type=int, metavar="N", help="Only this VM.")
@click.option("--once", is_flag=True, help="Show the totals and end.")
@click.option("--interval", type=click.FloatRange(0.1, 3600), default=1.0, show_default=True, metavar="SECONDS", help="How often.")
@click.option("--json", "as_json", is_flag=True, help="JSON objects instead of tables.")
def stat(daemon: int | None, vm: int | None, once: bool, interval: float, as_json: bool) -> None:
    """Show exits by reason, interrupts, ioctls by name, CPU time and memory of every VM, and of all together.

    The names of the statistics are Linux's (KVM_GET_STATS_FD gives a program the same numbers, and so do the files in the stats/ of
    'kvmfs mount'); kvm_exit(REASON) counts what the tracepoint would.  guest_time_ns is from entries to exits, wait_time_ns while
    other vCPUs had the VM's engine; tb_ and code_buffer_ are about the translator's blocks.  On a terminal it is a live table,
    ended by ^C; elsewhere one table after the other.  The exit status is 1 when there is no such VM or daemon.

    \b
    Examples:
      kvmfs stat
      kvmfs stat --once --json | jq '.total.exits'
      kvmfs stat --vm 0 --interval 5 > numbers.log
    """
    from kvmfs_cli.daemons import DaemonError
    from kvmfs_cli.stat import stat as show

    try:
        show(pid=daemon, vm=vm, once=once, interval=interval, as_json=as_json)
    except DaemonError as error:
        _fail("stat", error)


@main.command(context_settings={"ignore_unknown_options": True, "allow_interspersed_args": False},
              short_help="Show every ioctl of a program, or of VMs that run.")
@_DAEMON
@click.option("--vm", type=int, metavar="N", help="Only this VM.")
@click.option("--vcpu", type=int, metavar="N", help="Only this vCPU.")
@click.option("--level", type=click.Choice(["system", "vm", "vcpu", "device"]), help="Only ioctls of this kind of descriptor.")
@click.option("-e", "--ioctl", "ioctls", multiple=True, metavar="PATTERN", callback=_check_patterns,
              help="Only these, KVM_RUN or '*MSRS' for example; may be given more than once.")
@click.option("--exits", is_flag=True, help="The guests' exits, as Linux's tracepoint kvm:kvm_exit shows them, not the ioctls.")
@click.option("-t", "--time", "times", is_flag=True, help="Begin each line with the time of day.")
@click.option("-o", "--output", type=click.Path(dir_okay=False), help="Write there, not to stderr (stdout when attached).")
@click.option("--json", "as_json", is_flag=True, help="One JSON object a line (kvmfs/api/trace.py describes it).")
@_VENDOR
@_PROFILE
@_PASSTHROUGH
@_FAULT
@click.option("--log-level", type=click.Choice(["debug", "info", "warning", "error"]), default="warning", show_default=True,
              help="What the private daemon says on stderr.")
@click.argument("command", nargs=-1, type=click.UNPROCESSED, metavar="[--] [PROGRAM [ARGUMENT]...]", callback=_check_command)
def trace(daemon: int | None, vm: int | None, vcpu: int | None, level: str | None, ioctls: tuple[str, ...], exits: bool,
          times: bool, output: str | None, as_json: bool, vendor: str, profile: str, passthrough: str,
          faults: tuple[str, ...], log_level: str, command: tuple[str, ...]) -> None:
    """Show each ioctl with its fields, its result and how long it took; KVM_RUN with the exit that ended it.

    With PROGRAM it is run as 'kvmfs run' does, and the exit status is that of 'kvmfs run'.  Without, the VMs of a daemon that
    runs are shown until ^C; the exit status is 1 when there is none.  Nothing is slower while nobody traces.

    \b
    Examples:
      kvmfs trace -- build/hello
      kvmfs trace -e KVM_RUN -o exits.log -- qemu-system-x86_64 -accel kvm ...
      kvmfs trace --exits --vm 0
    """
    from kvmfs_cli import run as runner
    from kvmfs_cli import trace as tracer
    from kvmfs_cli.daemons import DaemonError

    shown = tracer.Filter(vm, vcpu, level, ioctls, exits)
    try:
        if not command:
            tracer.trace_running(daemon, shown, output, as_json=as_json, times=times)
            return
        status = tracer.trace_command(command, shown, output, as_json=as_json, times=times, node=None, vendor=vendor,
                                      profile=profile, passthrough=passthrough, faults=faults, log_level=log_level)
    except runner.RunError as error:
        click.echo(f"kvmfs trace: {error}", err=True)
        status = runner.EXIT_OURS
    except DaemonError as error:
        _fail("trace", error)
    except OSError as error:
        click.echo(f"kvmfs trace: {error.strerror or error}", err=True)
        status = runner.EXIT_OURS if command else 1
    sys.stdout.flush()
    os._exit(status)


@main.command(short_help="Print a shell's completion script.")
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
def completion(shell: str) -> None:
    """Print the script with which SHELL completes kvmfs's commands and options.  The exit status is 0.

    \b
    Examples:
      kvmfs completion bash > /etc/bash_completion.d/kvmfs
      kvmfs completion fish > ~/.config/fish/completions/kvmfs.fish
      eval "$(kvmfs completion zsh)"
    """
    from click.shell_completion import get_completion_class

    found = get_completion_class(shell)
    assert found is not None
    click.echo(found(main, {}, "kvmfs", "_KVMFS_COMPLETE").source())


@main.command(short_help="Inject faults into VMs that run.")
@_DAEMON
@click.option("--clear", is_flag=True, help="Follow no rules any more.")
@click.argument("rules", nargs=-1, metavar="[RULE]...", callback=_check_faults)
def fault(daemon: int | None, clear: bool, rules: tuple[str, ...]) -> None:
    """Have a running daemon follow these rules, and no others; counting starts anew.  Without a rule, show those that it follows.

    'kvmfs mount --help' explains the rules.  The exit status is 1 when there is no such daemon, or it does not obey this user.

    \b
    Examples:
      kvmfs fault KVM_SET_USER_MEMORY_REGION:ENOMEM:times=1
      kvmfs fault --daemon 1234 KVM_RUN:EINTR:probability=0.01:seed=7
      kvmfs fault --clear
    """
    from kvmfs_cli.daemons import DaemonError, one

    try:
        with one(daemon) as connected:
            if rules or clear:
                connected.ask("fault", rules=list(rules))
            else:
                click.echo("".join(f"{rule}\n" for rule in connected.ask("state")["faults"]), nl=False)
    except DaemonError as error:
        _fail("fault", error)


@main.command()
@click.option("--device", default="/dev/kvm", metavar="PATH", show_default=True, help="The node.")
@click.option("--level", type=click.Choice(["system", "vm", "vcpu", "device"]), help="Only ioctls of this kind of descriptor.")
@click.option("--junit", type=click.Path(dir_okay=False), help="Write the results as JUnit XML.")
@click.option("--json", "json_file", type=click.Path(dir_okay=False), help="Write everything that was found; --compare reads it.")
@click.option("--compare", "compare_with", metavar="OTHER",
              help="Show where OTHER differs: a second node, a file that --json wrote, or recorded facts by name.")
@click.option("--guest", "guests", type=click.Choice(["auto", "yes", "no"]), default="auto", show_default=True,
              help="Run the cases that execute guest code; auto: unless the node is PVM's.")
@click.argument("patterns", nargs=-1, metavar="[PATTERN]...")
def conformance(device: str, level: str | None, junit: str | None, json_file: str | None, compare_with: str | None,
                guests: str, patterns: tuple[str, ...]) -> None:
    """Check that a node answers every ioctl as Linux does.

    PATTERN is a part of a case's name (level/ioctl/title), or a glob.  The exit status is 0 when everything that is
    required passed and, with --compare, every difference has a known reason; 1 otherwise, 2 when the suite
    could not run.

    \b
    Examples:
      kvmfs run -- kvmfs conformance
      kvmfs conformance --device /dev/kvm KVM_SET_MSRS
      kvmfs run -- kvmfs conformance --compare linux-6.18-pvm
    """
    from kvmfs_cli import conformance as suite

    try:
        status = suite.conformance(patterns, device=device, level=level, junit=junit, json=json_file,
                                   compare_with=compare_with, guests=guests)
    except (suite.ConformanceError, OSError) as error:
        click.echo(f"kvmfs conformance: {error}", err=True)
        status = suite.UNUSABLE
    sys.exit(status)
