# SPDX-License-Identifier: GPL-2.0-or-later
"""The documents: what is generated is fresh, what is linked exists, what is told of commands is so."""

import re
from pathlib import Path

import click
import pytest

from kvmfs_cli.main import main
from tools import reference

ROOT = Path(__file__).resolve().parents[2]
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def test_the_reference_is_fresh():
    assert reference.PATH.read_text() == reference.document(), "run .venv/bin/python tools/reference.py"


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_links_lead_somewhere(path):
    for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", path.read_text()):
        assert (path.parent / target).exists(), target


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_commands_exist(path):
    """Every ``kvmfs COMMAND --option`` in a code span or block is one."""
    context = click.Context(main)
    for name, rest in re.findall(r"kvmfs ([a-z]+)((?: --?[a-z][a-z-]*(?:[= ][^\s`-]\S*)?)*)", path.read_text()):
        command = main.get_command(context, name)
        if command is None or name == "mount":
            continue
        known = {option for parameter in command.params for option in parameter.opts}
        assert set(re.findall(r"--[a-z][a-z-]*", rest)) <= known | {"--help"}, (name, rest)
