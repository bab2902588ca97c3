# SPDX-License-Identifier: GPL-2.0-or-later
"""Wrong usages of ``kvmfs``: each says what is wrong, and what would be right; nothing was started."""

import os
import subprocess
import sys

import pytest
from click.testing import CliRunner

from kvmfs_cli.main import main
from kvmfs_cli.nodes import NodeError, check_node


@pytest.mark.parametrize(("arguments", "message"), [
    (["frobnicate"], "No such command 'frobnicate'"),
    (["run"], "Missing argument '[--] PROGRAM"),
    (["run", "--vendor", "via", "--", "true"], "'via' is not one of 'auto', 'intel', 'amd'"),
    (["run", "--profile", "linux-2.6", "--", "true"], "'linux-2.6' is not one of 'linux-5.15'"),
    (["run", "--fault", "KVM_RUN:EWHAT", "--", "true"], "EWHAT is neither an errno nor an exit (INTERNAL_ERROR"),
    (["run", "--fault", "NOPE:EIO", "--", "true"], "there is no ioctl NOPE"),
    (["run", "--fault", "KVM_RUN:EIO:at=zero", "--", "true"], "at=zero is out of range"),
    (["run", "--mistyped", "--", "true"], "No such option: --mistyped"),
    (["trace", "--mistyped", "true"], "No such option: --mistyped"),
    (["trace", "-e", "KVM_GET_RAGS", "--", "true"], "no ioctl matches KVM_GET_RAGS"),
    (["fault", "KVM_CAP_NOTHING:absent"], "there is no capability KVM_CAP_NOTHING"),
    (["mount"], "Missing argument 'MOUNTPOINT'"),
    (["mount", "/etc/passwd"], "'/etc/passwd' is a file"),
    (["mount", "--mode", "999", "/mnt"], "'999' is not an octal mode"),
    (["vms", "0", "--walk", "zzz"], "zzz is no number"),
    (["stat", "--interval", "0"], "0.0 is not in the range"),
    (["completion", "tcsh"], "'tcsh' is not one of 'bash', 'zsh', 'fish'"),
    (["conformance", "--device", "/etc/passwd"], "/etc/passwd is no KVM node (KVM_GET_API_VERSION: Inappropriate ioctl"),
    (["conformance", "--device", "/no/node"], "cannot open /no/node: No such file or directory; 'kvmfs mount /no' would make it"),
    (["conformance", "nothing like this"], "no case matches nothing like this"),
])
def test_the_command_line(arguments, message):
    result = CliRunner().invoke(main, arguments, prog_name="kvmfs")
    assert result.exit_code == 2, result.output
    assert message in result.output


@pytest.mark.parametrize("command", ["version", "doctor"])
def test_output_that_cannot_be_written(command):
    with open("/dev/full", "w", encoding="ascii") as full:
        result = subprocess.run([sys.executable, "-m", "kvmfs_cli", command], stdout=full, stderr=subprocess.PIPE, text=True,
                                timeout=60, check=False)
    assert result.returncode == 1
    assert result.stderr == "Error: the output cannot be written: No space left on device; make room, or write elsewhere\n"


@pytest.mark.parametrize("command", ["run", "mount", "doctor", "conformance", "trace", "stat", "vms", "version", "fault",
                                     "completion"])
def test_help_is_for_strangers(command):
    """What it does, an example, the exit status; within the width that groff and terminals have."""
    text = CliRunner().invoke(main, [command, "--help"], prog_name="kvmfs", terminal_width=100).output
    words = " ".join(text.split())
    assert text.startswith(f"Usage: kvmfs {command}") and "Example" in words and "xit status" in words, text


def test_no_node(tmp_path):
    with pytest.raises(NodeError, match=f"the node of a daemon on that directory is {tmp_path}/kvm"):
        check_node(str(tmp_path))
    file = tmp_path / "file"
    file.touch()
    with pytest.raises(NodeError, match="is no KVM node"):
        check_node(str(file))
    with pytest.raises(NodeError, match="Not a directory"):
        check_node(f"{file}/kvm")
    if os.geteuid():
        file.chmod(0)
        with pytest.raises(NodeError, match="usermod"):
            check_node(str(file))
