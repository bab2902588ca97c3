# SPDX-License-Identifier: GPL-2.0-or-later
"""The daemon and its workers: life, death of each part, and that nothing is left."""

from __future__ import annotations

import fcntl
import os
import re
import signal
import stat
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import pytest

from tests.daemon import ENVIRONMENT, KVMFS, Kvmd, census, kvmfs_run, ordinary_user, settle

CLIENT = [sys.executable, str(Path(__file__).with_name("client.py"))]
HELLO = "Hi /kvm-vm /kvm-vcpu:0\n"


def client(node: str, *what: str, wrapper: Sequence[str] = (), timeout: float = 60) -> str:
    """Run the client; its output.  It must end well."""
    done = subprocess.run([*wrapper, *CLIENT, node, *what], capture_output=True, text=True, timeout=timeout, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def client_in_phase(node: str, *what: str) -> subprocess.Popen[str]:
    """Start the client and wait until it is there."""
    process = subprocess.Popen([*CLIENT, node, *what], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    return process


# ---- the node ---------------------------------------------------------------------------------------------


def test_hello(node):
    assert client(node, "hello") == HELLO


def test_hello_both_ways_of_kvm_run(start_kvmd, vendor, passthrough):
    kvmd = start_kvmd("--vendor", vendor, "--passthrough", passthrough)
    assert client(kvmd.node, "hello") == HELLO


def test_the_node_looks_as_asked_for(start_kvmd):
    info = os.stat(start_kvmd("--mode", "640", "--owner", "1000", "--group", "1001").node)
    assert (stat.S_IMODE(info.st_mode), info.st_uid, info.st_gid) == (0o640, 1000, 1001)


def test_default_permissions(start_kvmd):
    kvmd = start_kvmd()
    assert stat.S_IMODE(os.stat(kvmd.node).st_mode) == 0o660
    user = ["setpriv", "--reuid", "1000", "--regid", "1000", "--clear-groups"]
    assert subprocess.run([*user, "test", "-r", kvmd.node], check=False).returncode == 1


def test_another_user(start_kvmd, tmp_path):
    """The client is another user than the daemon, in a mount namespace of its own, and sees the node at another path."""
    kvmd = start_kvmd("--mode", "666")
    (place := tmp_path / "node").touch()
    script = 'open N, "+<", "/proc/self/fd/0" or die $!; $vm = ioctl N, 0xae01, 0 or die $!; print "$< $vm"'
    done = subprocess.run(
        ["unshare", "--mount", "sh", "-c",
         'mount --bind "$0" "$1" && exec setpriv --reuid 1000 --clear-groups perl -e "$2" < "$1"', kvmd.node, place, script],
        capture_output=True, text=True, check=False)
    assert done.stdout == "1000 4", done.stderr


def test_read_write_and_unknown_ioctls(node):
    fd = os.open(node, os.O_RDWR)
    try:
        for attempt in (lambda: os.read(fd, 10), lambda: os.write(fd, b"x"), lambda: fcntl.ioctl(fd, 0xAEFF, 0)):
            with pytest.raises(OSError, match="Errno 22"):
                attempt()
    finally:
        os.close(fd)


def test_state_file(kvmd, vendor):
    process = client_in_phase(kvmd.node, "hold", "vcpu")
    state = kvmd.state()
    assert (state["vendor"], state["vms_created"]) == (vendor, 1)
    assert state["vms"][0]["process"] == process.pid
    process.kill()
    process.wait()
    process.stdout.close()
    kvmd.wait_for_vms(0)


# ---- many -------------------------------------------------------------------------------------------------


def test_one_after_the_other_without_growth(start_kvmd):
    kvmd = start_kvmd()
    client(kvmd.node, "many", "5")
    kvmd.wait_for_vms(0)
    files, threads = kvmd.open_files(), len(os.listdir(f"/proc/{kvmd.process.pid}/task"))
    client(kvmd.node, "many", "40")
    kvmd.wait_for_vms(0)
    assert (kvmd.open_files(), len(os.listdir(f"/proc/{kvmd.process.pid}/task"))) == (files, threads)


def test_three_in_one_process(node):
    assert client(node, "together", "3").split() == ["Hi"] * 3


def test_ten_processes(node):
    running = [subprocess.Popen([*CLIENT, node, "hello"], stdout=subprocess.PIPE, text=True) for _ in range(10)]
    assert [process.communicate(timeout=60)[0] for process in running] == [HELLO] * 10


# ---- death ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("phase", ["node", "vm", "running"])
def test_a_killed_client_leaves_nothing(start_kvmd, phase):
    kvmd = start_kvmd()
    before = census()
    process = client_in_phase(kvmd.node, "hold", phase)
    process.kill()
    process.wait()
    process.stdout.close()
    settle(before)
    assert client(kvmd.node, "hello") == HELLO


def test_clients_killed_while_they_create(start_kvmd):
    kvmd = start_kvmd()
    before = census()
    for delay in range(12):
        process = subprocess.Popen([*CLIENT, kvmd.node, "many", "100"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        time.sleep(0.1 + delay * 0.0137)
        process.kill()
        process.wait()
    settle(before)
    assert client(kvmd.node, "hello") == HELLO


def test_a_killed_worker_takes_only_its_vm(start_kvmd):
    kvmd = start_kvmd()
    others = client_in_phase(kvmd.node, "hold", "running")
    process = client_in_phase(kvmd.node, "outlive")
    time.sleep(0.2)
    os.kill(kvmd.workers()[1], signal.SIGKILL)
    assert int(process.communicate(timeout=10)[0]) > 0      # an error, at once
    assert others.poll() is None
    assert client(kvmd.node, "hello") == HELLO
    kvmd.wait_for_vms(1)
    others.kill()
    others.wait()
    others.stdout.close()


def test_the_daemon_killed_and_started_again(start_kvmd):
    kvmd = start_kvmd()
    before = census()
    process = client_in_phase(kvmd.node, "outlive")
    kvmd.process.kill()
    assert int(process.communicate(timeout=10)[0]) > 0
    kvmd.process.wait()
    settle(before)
    assert client(start_kvmd().node, "hello") == HELLO       # over the stale mount


def test_the_daemon_ends_while_vms_run(start_kvmd):
    kvmd = start_kvmd()
    process = client_in_phase(kvmd.node, "outlive")
    assert kvmd.stop() == 0
    assert int(process.communicate(timeout=10)[0]) > 0


def test_suspend_and_resume(start_kvmd):
    kvmd = start_kvmd()
    process = client_in_phase(kvmd.node, "hold", "running")
    worker = kvmd.workers()[0]

    def used() -> int:
        fields = Path(f"/proc/{worker}/stat").read_text().rpartition(")")[2].split()
        return int(fields[11]) + int(fields[12])

    kvmd.process.send_signal(signal.SIGTSTP)
    os.waitid(os.P_PID, kvmd.process.pid, os.WSTOPPED | os.WNOWAIT)
    time.sleep(0.2)
    before = used()
    time.sleep(0.5)
    assert used() - before < 10                             # ticks: the guest does not run
    kvmd.process.send_signal(signal.SIGCONT)
    time.sleep(0.3)
    before = used()
    time.sleep(0.5)
    assert used() - before > 10
    process.kill()
    process.wait()
    process.stdout.close()


def test_another_process_gets_eio(node):
    assert client(node, "fork") == "5\nHi\n"


def test_a_signal_ends_kvm_run(node):
    assert client(node, "alarm") == "-1 4\n"


def test_a_traced_client_is_refused_with_the_reason(start_kvmd):
    kvmd = start_kvmd()
    done = subprocess.run(["strace", "-f", "-o", "/dev/null", *CLIENT, kvmd.node, "hello"],
                          capture_output=True, text=True, check=False)
    assert "Operation not permitted" in done.stderr
    assert kvmd.log.count("is traced by process") == 1


# ---- start-up ---------------------------------------------------------------------------------------------


def test_a_failing_start_says_which_step_and_leaves_nothing(tmp_path, nothing_left):
    kvmd = Kvmd(tmp_path / "dev", "--group", "no-such-group")
    assert not kvmd.ready
    assert kvmd.process.wait(10) == 1
    assert "misc_register failed: there is no group 'no-such-group'" in kvmd.log


def test_the_steps_are_logged_in_order(start_kvmd):
    names = [line.split()[-2].rstrip(":") for line in start_kvmd().log.splitlines() if line.endswith(": ok")]
    assert names == ["kvm_arch_init", "kvm_irqfd_init", "kvm_arch_hardware_setup", "kvm_arch_check_processor_compat",
                     "cpuhp_setup_state", "register_reboot_notifier", "misc_register", "register_syscore_ops",
                     "preempt_notifier_init"]


# ---- kvmfs run --------------------------------------------------------------------------------------------


def test_run(nothing_left, vendor):
    done = kvmfs_run(*CLIENT, "/dev/kvm", "hello", options=["--vendor", vendor])
    assert (done.returncode, done.stdout, done.stderr) == (0, HELLO, "")


@pytest.mark.parametrize("passthrough", ["auto", "off"])
def test_run_with_a_traced_client(nothing_left, passthrough):
    """Descriptors come by seccomp notification; guest memory must be shared already, as nobody can inject an mmap."""
    done = kvmfs_run("strace", "-f", "-e", "trace=ioctl", *CLIENT, "/dev/kvm", "shared", options=["--passthrough", passthrough])
    assert (done.returncode, done.stdout) == (0, HELLO), done.stderr
    assert re.search(r"KVM_RUN, 0\) += 0", done.stderr)


def test_run_as_an_ordinary_user(nothing_left, vendor):
    done = kvmfs_run(*CLIENT, "/dev/kvm", "hello", options=["--vendor", vendor], wrapper=ordinary_user())
    assert (done.returncode, done.stdout) == (0, HELLO), done.stderr


@pytest.mark.parametrize(("command", "status"), [
    (["true"], 0), (["sh", "-c", "exit 7"], 7), (["sh", "-c", "kill -9 $$"], 137), (["no-such-command"], 127),
    (["/etc/passwd"], 126),
])
def test_run_passes_the_exit_status(nothing_left, command, status):
    assert kvmfs_run(*command).returncode == status


def test_run_forwards_signals(nothing_left):
    process = subprocess.Popen([*KVMFS, "run", "--", "sh", "-c", 'trap "exit 9" TERM; echo ready; while :; do sleep 0.1; done'],
                               stdout=subprocess.PIPE, env=ENVIRONMENT, text=True)
    assert process.stdout.readline() == "ready\n"
    process.terminate()
    assert process.wait(10) == 9
    process.stdout.close()


def test_run_killed_leaves_nothing_but_its_directory(tmp_path):
    before = census()
    process = subprocess.Popen([*KVMFS, "run", "--", *CLIENT, "/dev/kvm", "hold", "node"], stdout=subprocess.PIPE, text=True,
                               env={**ENVIRONMENT, "TMPDIR": str(tmp_path)})
    assert process.stdout.readline() == "ready\n"
    process.kill()
    process.wait()
    process.stdout.close()
    subprocess.run(["pkill", "-f", f"{CLIENT[1]} /dev/kvm hold node"], check=False)
    settle(before)
