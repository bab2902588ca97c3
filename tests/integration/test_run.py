# SPDX-License-Identifier: GPL-2.0-or-later
"""`kvmfs` as somebody meets it who has just cloned it: help, errors, exit codes, and places where a node can be used."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.clients import assert_hello, program, public_copy
from tests.daemon import ENVIRONMENT, KVMFS, ROOT, kvmfs, kvmfs_run, ordinary_user

# A /dev in which there is no kvm, as on most machines.
_NO_KVM = """
set -e
mount --make-rprivate /
mount -t tmpfs -o mode=755,dev kvmfs-test /mnt
for name in null zero full random urandom tty fuse; do
    touch /mnt/$name
    mount --bind /dev/$name /mnt/$name
done
mount --move /mnt /dev
exec "$@"
"""
NO_KVM = ["unshare", "--mount", "sh", "-c", _NO_KVM, "sh"]

# The checkout and its Python below a directory that only root may enter, as a clone in /root is.
_PRIVATE_CHECKOUT = f"""
set -e
mount --make-rprivate /
mount -t tmpfs -o mode=700 kvmfs-test /mnt
mkdir /mnt/kvmfs
mount --rbind {ROOT} /mnt/kvmfs
cd /mnt/kvmfs
export PYTHONPATH=/mnt/kvmfs:/mnt/kvmfs/daemon:/mnt/kvmfs/tools
exec "$@"
"""

# A container: a root of its own with nothing in it but a static client and the node, bind-mounted as a single file.
_CONTAINER = """
set -e
mount --make-rprivate /
mount -t tmpfs kvmfs-test /mnt
cp "$1" /mnt/client
touch /mnt/node
mount --bind "$2" /mnt/node
shift 2
exec "$@" chroot /mnt /client /node
"""

# No way to a user namespace: not one may be made any more, and nothing is left of root but the number.
_NO_NAMESPACES = """
echo 0 > /proc/sys/user/max_user_namespaces && exec setpriv --bounding-set=-all --inh-caps=-all "$@"
"""


# ---- places -------------------------------------------------------------------------------------------------


def test_no_dev_kvm(nothing_left):
    assert subprocess.run([*NO_KVM, "test", "-e", "/dev/kvm"], check=False).returncode == 1
    assert_hello(kvmfs_run(program("hello"), wrapper=NO_KVM))


def test_no_dev_kvm_as_an_ordinary_user(nothing_left):
    with public_copy("hello") as copies:
        assert_hello(kvmfs_run(f"{copies}/hello", wrapper=[*NO_KVM, *ordinary_user()]))


def test_the_rest_of_dev_stays(nothing_left):
    """Where /dev/kvm has to be made, everything else in /dev is what it was."""
    result = kvmfs_run("sh", "-c", "ls /dev && echo x > /dev/null && head -c 4 /dev/zero | wc -c", wrapper=NO_KVM)
    assert result.returncode == 0, result.stderr
    assert result.stdout.split() == ["full", "fuse", "kvm", "null", "random", "tty", "urandom", "zero", "4"]


def test_a_checkout_that_only_root_can_read(nothing_left, vendor):
    python = sys.executable.replace(f"{ROOT}/", "/mnt/kvmfs/", 1)
    command = [python, "-m", "kvmfs_cli", "run", "--vendor", vendor, "--", program("hello").replace(f"{ROOT}/", "", 1)]
    result = subprocess.run(["unshare", "--mount", "sh", "-c", _PRIVATE_CHECKOUT, "sh", *command], env=ENVIRONMENT,
                            capture_output=True, text=True, check=False, timeout=60, stdin=subprocess.DEVNULL)
    assert_hello(result)
    assert result.stderr == ""


@pytest.mark.parametrize("namespaces", [[], ["--pid", "--fork"], ["--user", "--map-root-user", "--pid", "--fork"]],
                         ids=["mount", "pid", "user-and-pid"])
def test_in_a_container_with_the_single_file(node, namespaces):
    inner = ["unshare", *namespaces] if namespaces else []
    result = subprocess.run(["unshare", "--mount", "sh", "-c", _CONTAINER, "sh", program("hello-static"), node, *inner],
                            capture_output=True, text=True, check=False, timeout=60)
    assert_hello(result)


def test_kvmfs_mount_and_a_node_given(tmp_path, nothing_left):
    """One daemon for several `kvmfs run`; it ends with 0 and takes its mount along."""
    directory, reader_writer = tmp_path / "kvm", os.pipe()
    daemon = subprocess.Popen([*KVMFS, "mount", "--log-level", "error", "--ready-fd", str(reader_writer[1]), str(directory)],
                              pass_fds=[reader_writer[1]], env=ENVIRONMENT)
    os.close(reader_writer[1])
    try:
        with os.fdopen(reader_writer[0], "rb") as file:
            assert file.read() == b"ready\n"
        for _ in range(2):
            assert_hello(kvmfs_run(program("hello"), options=["--node", str(directory / "kvm")]))
        state = json.loads(kvmfs("version", "--json").stdout)["nodes"]
        mine, = (node for node in state if node["node"] == str(directory / "kvm"))
        assert (mine["vms"], mine["vms_created"]) == ([], 2)
        second = kvmfs("mount", str(directory))
        assert second.returncode == 1 and f"another daemon serves {directory} ('kvmfs version' shows it)" in second.stderr
    finally:
        daemon.send_signal(signal.SIGTERM)
        assert daemon.wait(15) == 0
    assert not os.path.ismount(directory)


# ---- exit codes and messages --------------------------------------------------------------------------------


@pytest.mark.parametrize(("arguments", "status", "message"), [
    (["run", "--node", "/nonexistent/kvm", "--", "true"], 125,
     "kvmfs run: cannot open /nonexistent/kvm: No such file or directory; 'kvmfs mount /nonexistent' would make it"),
    (["run", "--node", "/etc/passwd", "--", "true"], 125, "kvmfs run: /etc/passwd is no KVM node"),
    (["trace", "-o", "/nonexistent/file", "--", "true"], 125, "kvmfs trace: cannot write /nonexistent/file: No such file"),
    (["run", "--", "/etc"], 126, "kvmfs run: /etc cannot be executed: Permission denied (it is a directory)"),
    (["run", "--", "no-such-program"], 127, "kvmfs run: no-such-program: there is no such program"),
    (["run", "--", "/etc/passwd"], 126, "kvmfs run: /etc/passwd cannot be executed: Permission denied (is it a program"),
    (["run"], 2, "Missing argument"),
    (["run", "--vendor", "cyrix", "--", "true"], 2, "'cyrix' is not one of 'auto', 'intel', 'amd'"),
    (["mount"], 2, "Missing argument 'MOUNTPOINT'"),
    (["mount", "/etc/passwd"], 2, "is a file"),
    (["nonsense"], 2, "No such command 'nonsense'"),
])
def test_errors_say_what_is_wrong(nothing_left, arguments, status, message):
    result = kvmfs(*arguments)
    assert result.returncode == status
    assert message in result.stderr and "Traceback" not in result.stderr


def test_dev_fuse_that_may_not_be_opened(nothing_left):
    wrapper = tuple(part.replace("mknod -m 666", "mknod -m 600") for part in ordinary_user())
    result = kvmfs("run", "--", "true", wrapper=wrapper)
    assert result.returncode == 125
    assert result.stderr == ("kvmfs run: cannot open /dev/fuse: Permission denied. "
                             "The user may not open it: try 'chmod 666 /dev/fuse', which is the usual mode\n")


def test_no_user_namespaces(nothing_left):
    result = kvmfs("run", "--", "true", wrapper=("unshare", "--user", "--map-root-user", "sh", "-c", _NO_NAMESPACES, "sh"))
    assert result.returncode == 125
    assert "this user may not make a user namespace" in result.stderr and "user.max_user_namespaces" in result.stderr


# ---- what is told -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("arguments", [["--help"], ["-h"], *([name, "--help"] for name in (
    "completion", "conformance", "doctor", "fault", "mount", "run", "stat", "trace", "version", "vms"))])
def test_help(arguments):
    result = kvmfs(*arguments)
    assert result.returncode == 0 and result.stdout.startswith("Usage: ")
    assert max(map(len, result.stdout.splitlines())) <= 80


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion(shell):
    """The script asks kvmfs itself, which knows its commands."""
    assert "_KVMFS_COMPLETE" in kvmfs("completion", shell).stdout
    where = "st" if shell == "fish" else "1"        # fish gives the word itself
    words = {"COMP_WORDS": "kvmfs st", "COMP_CWORD": where, "_KVMFS_COMPLETE": f"{shell}_complete"}
    result = kvmfs(wrapper=["env", *(f"{name}={value}" for name, value in words.items())])
    assert "stat" in result.stdout, result.stderr


def test_version_json(kvmd, vendor):
    result = kvmfs("version", "--json")
    facts = json.loads(result.stdout)
    assert set(facts) == {"versions", "host", "capabilities", "vendor", "profiles", "steps", "nodes"}
    assert facts["versions"]["unicorn"] == "2.1.4"
    assert facts["host"]["fuse"] is True
    assert facts["steps"][0] == "kvm_arch_init" and "misc_register" in facts["steps"]
    mine, = (node for node in facts["nodes"] if node["node"] == kvmd.node)
    assert (mine["vendor"], mine["vms"], mine["steps"]) == (vendor, [], facts["steps"])


def test_version_as_tables(kvmd):
    result = kvmfs("version")
    assert result.returncode == 0 and "unicorn" in result.stdout and "2.1.4" in result.stdout
    assert "vms_created" in result.stdout


@pytest.mark.parametrize("wrapper", [[], ordinary_user()], ids=["root", "ordinary user"])
def test_pretended_cpu(nothing_left, vendor, wrapper):
    """The program's /proc/cpuinfo has the vendor's flag at each CPU, not the other's, and all the rest; nobody else's has."""
    before = Path("/proc/cpuinfo").read_text()
    result = kvmfs_run("cat", "/proc/cpuinfo", options=["--vendor", vendor, "--pretend-cpu"], wrapper=wrapper)
    assert result.returncode == 0, result.stderr
    ours, other = ("svm", "vmx") if vendor == "amd" else ("vmx", "svm")
    flags = [line.split() for line in result.stdout.splitlines() if line.startswith("flags")]
    assert len(flags) == before.count("\nflags") and all(ours in line and other not in line for line in flags)
    lines = [line for line in before.splitlines() if line.startswith(("processor", "model name", "address sizes"))]
    assert [line for line in result.stdout.splitlines() if line.startswith(("processor", "model name", "address sizes"))] == lines
    after = Path("/proc/cpuinfo").read_text()
    assert all(after.count(flag) == before.count(flag) for flag in ("svm", "vmx"))


@pytest.mark.parametrize("wrapper", [[], ordinary_user()], ids=["root", "ordinary user"])
def test_pretended_modules(nothing_left, vendor, wrapper):
    """Of KVM's modules the vendor's, of the others all that there are, and nobody can write there."""
    show = "cd /sys/module && echo * && grep -H . kvm/parameters/force_emulation_prefix kvm_*/parameters/nested; touch x; ls -d x"
    before = os.listdir("/sys/module")
    result = kvmfs_run("sh", "-c", show, options=["--vendor", vendor, "--pretend-cpu"], wrapper=wrapper)
    modules, *parameters = result.stdout.splitlines()
    assert set(modules.split()) == {m for m in before if not m.startswith("kvm_")} | {"kvm", f"kvm_{vendor}"}, result.stderr
    assert parameters == ["kvm/parameters/force_emulation_prefix:0", "kvm_amd/parameters/nested:0" if vendor == "amd"
                          else "kvm_intel/parameters/nested:N"]
    assert sorted(os.listdir("/sys/module")) == sorted(before)


def test_version_and_a_daemon_that_hangs(start_kvmd):
    """It is named, and the others are shown."""
    good, stopped = start_kvmd(name="good"), start_kvmd(name="stopped")
    os.kill(stopped.process.pid, signal.SIGSTOP)
    try:
        nodes = json.loads(kvmfs("version", "--json").stdout)["nodes"]
    finally:
        os.kill(stopped.process.pid, signal.SIGCONT)
    assert good.node in [node["node"] for node in nodes]
    hanging, = (node for node in nodes if node["node"] == str(stopped.mountpoint))
    assert "no answer" in hanging["hangs"]
