# SPDX-License-Identifier: GPL-2.0-or-later
"""``kvmfs``: the programs for people, one subcommand each."""

from __future__ import annotations

import os
import sys

import click

_VENDOR = click.option("--vendor", type=click.Choice(["auto", "intel", "amd"]), default="auto", show_default=True,
                       help="Which CPU the guests see; auto: the host's vendor.")
_PASSTHROUGH = click.option("--passthrough", type=click.Choice(["auto", "on", "off"]), default="auto",
                            show_default=True, help="Share kvm_run by FUSE passthrough, or copy it.")


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
def main() -> None:
    """A /dev/kvm that needs no hardware."""


@main.command(context_settings={"ignore_unknown_options": True, "allow_interspersed_args": False})
@_VENDOR
@_PASSTHROUGH
@click.option("--node", type=click.Path(), help="Use this node instead of a private daemon's.")
@click.option("--log-level", type=click.Choice(["debug", "info", "warning", "error"]), default="warning",
              show_default=True, help="What the private daemon says on stderr.")
@click.argument("command", nargs=-1, required=True, type=click.UNPROCESSED)
def run(vendor: str, passthrough: str, node: str | None, log_level: str, command: tuple[str, ...]) -> None:
    """Run COMMAND with the fake node at /dev/kvm.

    Nobody else sees that node.  The exit status is COMMAND's, 128 + n when signal n ended it, 125 when kvmfs
    itself failed, 126 or 127 when COMMAND could not be started.
    """
    from kvmfs_cli import run as runner

    try:
        status = runner.run(command, node=node, vendor=vendor, passthrough=passthrough, log_level=log_level)
    except runner.RunError as error:
        click.echo(f"kvmfs run: {error}", err=True)
        status = runner.EXIT_OURS
    sys.stdout.flush()
    os._exit(status)


@main.command(context_settings={"ignore_unknown_options": True, "allow_interspersed_args": False,
                                "help_option_names": []}, add_help_option=False)
@click.argument("arguments", nargs=-1, type=click.UNPROCESSED)
def mount(arguments: tuple[str, ...]) -> None:
    """Run the daemon on a directory, in the foreground (options: those of kvmd)."""
    from kvmd.main import main as kvmd

    kvmd(list(arguments), prog_name="kvmfs mount")


@main.command()
@click.option("--json", "as_json", is_flag=True, help="Machine-readable.")
def version(as_json: bool) -> None:
    """Show versions, the vendor chosen here, the start-up steps, and the mounted nodes."""
    from kvmfs_cli import version as facts

    if as_json:
        click.echo(facts.as_json(facts.collect()))
    else:
        facts.show(facts.collect())


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
