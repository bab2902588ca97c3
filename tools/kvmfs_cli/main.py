# SPDX-License-Identifier: GPL-2.0-or-later
"""``kvmfs``: the programs for people, one subcommand each."""

from __future__ import annotations

import os
import sys

import click

_VENDOR = click.option("--vendor", type=click.Choice(["auto", "intel", "amd"]), default="auto", show_default=True,
                       help="Which CPU the guests see: Linux's kvm-intel or kvm-amd; auto: as the host's CPU.")
def _check_faults(context: click.Context, parameter: click.Parameter, rules: tuple[str, ...]) -> tuple[str, ...]:
    from kvmd.main import check_faults

    return check_faults(context, parameter, rules) if rules else rules


_FAULT = click.option("--fault", "faults", multiple=True, metavar="RULE", callback=_check_faults,
                      help="Inject a fault, KVM_CREATE_VCPU:ENOMEM:after=2 for example; may be given more than once "
                           "('kvmfs mount --help' explains the rules).")
_PASSTHROUGH = click.option("--passthrough", type=click.Choice(["auto", "on", "off"]), default="auto",
                            show_default=True,
                            help="Share kvm_run with the program by FUSE passthrough (Linux 6.9, root), or copy it at each "
                                 "exit; auto: share it where that works, on: fail where it does not.")


@click.group(context_settings={"help_option_names": ["-h", "--help"]},
             epilog="'kvmfs COMMAND --help' explains each. Start with: kvmfs run -- PROGRAM")
def main() -> None:
    """A /dev/kvm that needs no hardware.

    Programs open the node, issue the ioctls that they would issue to Linux's KVM, and their guests run: in an emulated CPU,
    on any x86-64 Linux with FUSE.
    """


@main.command(context_settings={"ignore_unknown_options": True, "allow_interspersed_args": False},
              short_help="Run a program whose /dev/kvm is the fake node.")
@_VENDOR
@_PASSTHROUGH
@_FAULT
@click.option("--node", type=click.Path(), metavar="PATH",
              help="Use the node of a running daemon ('kvmfs mount DIRECTORY' makes DIRECTORY/kvm) and start none.")
@click.option("--log-level", type=click.Choice(["debug", "info", "warning", "error"]), default="warning",
              show_default=True, help="What the private daemon says on stderr.")
@click.argument("command", nargs=-1, required=True, type=click.UNPROCESSED, metavar="[--] PROGRAM [ARGUMENT]...")
def run(vendor: str, passthrough: str, faults: tuple[str, ...], node: str | None, log_level: str,
        command: tuple[str, ...]) -> None:
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
    """
    from kvmfs_cli import run as runner

    try:
        status = runner.run(command, node=node, vendor=vendor, passthrough=passthrough, faults=faults, log_level=log_level)
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
    Linux's KVM_CAP_ are answered), "vendor" (what auto means here), "steps" (of the daemon's start) and "nodes".
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
    """
    from kvmfs_cli.doctor import doctor as examine

    sys.exit(examine(as_json=as_json))


@main.command()
@click.option("--device", type=click.Path(), default="/dev/kvm", show_default=True, help="The node.")
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
    """
    from kvmfs_cli import conformance as suite

    try:
        status = suite.conformance(patterns, device=device, level=level, junit=junit, json=json_file,
                                   compare_with=compare_with, guests=guests)
    except (suite.ConformanceError, OSError) as error:
        click.echo(f"kvmfs conformance: {error}", err=True)
        status = suite.UNUSABLE
    sys.exit(status)
