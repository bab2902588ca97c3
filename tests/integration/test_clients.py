# SPDX-License-Identifier: GPL-2.0-or-later
"""The sample clients, unmodified, in every surrounding that a client may have."""

from __future__ import annotations

import os
import subprocess

import pytest

from tests.clients import PYTHON_CLIENT, SOURCES, assert_all_ok, assert_hello, program, public_copy, subtests
from tests.daemon import kvmfs_run, ordinary_user

# Without privilege a file that the client has mapped and closed cannot be opened (mechanisms: map_files).
NEEDS_PRIVILEGE = "shared_memory_without_fd"
USER = ["setpriv", "--reuid", "1234", "--regid", "1234", "--clear-groups"]
PROCESSES = 10


def run(*command: str, timeout: float = 110) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, capture_output=True, text=True, timeout=timeout, check=False,
                          stdin=subprocess.DEVNULL)


# ---- on a daemon's node -------------------------------------------------------------------------------------


def test_hello(node):
    assert_hello(run(program("hello"), node))


def test_modes(node):
    assert_all_ok(run(program("modes"), "-n", node))


def test_modes_with_a_copied_kvm_run(start_kvmd, vendor):
    node = start_kvmd("--vendor", vendor, "--passthrough", "off").node
    assert_all_ok(run(program("modes"), "-n", node))


def test_static(node):
    assert_hello(run(program("hello-static"), node))
    assert_all_ok(run(program("modes-static"), "-n", node))


def test_python(node):
    result = run(*PYTHON_CLIENT, node)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "Hello from Python's guest" in result.stdout


def test_ten_processes(kvmd):
    files = kvmd.open_files()
    running = [subprocess.Popen([program("modes"), "-n", kvmd.node, "hlt", "mmio_mov", "exceptions_long"],
                                stdout=subprocess.PIPE, text=True) for _ in range(PROCESSES)]
    for process in running:
        output, _ = process.communicate(timeout=100)
        assert output == "ok hlt\nok mmio_mov\nok exceptions_long\n" and process.returncode == 0
    kvmd.wait_for_vms(0)
    assert kvmd.open_files() == files


def test_three_vms_in_one_process(node):
    result = run(program("modes"), "-n", node, "three_vms")
    assert result.stdout == "ok three_vms\n"


def test_a_node_that_is_none_is_named():
    result = run(program("hello"), "/dev/null")
    assert result.returncode == 1 and result.stdout == "hello: KVM_GET_API_VERSION: Inappropriate ioctl for device\n"


# ---- under kvmfs run ----------------------------------------------------------------------------------------


@pytest.fixture
def copies():
    """Where other users find the clients."""
    with public_copy("hello", "hello-static", "modes", "modes-static") as directory:
        yield directory


def test_kvmfs_run(vendor, nothing_left):
    options = ["--vendor", vendor]
    assert_hello(kvmfs_run(program("hello"), options=options))
    assert_all_ok(kvmfs_run(program("modes"), options=options, timeout=110))


def test_kvmfs_run_static(nothing_left):
    assert_hello(kvmfs_run(program("hello-static")))


def test_another_user(vendor, copies, nothing_left):
    options = ["--vendor", vendor]
    assert_hello(kvmfs_run(*USER, f"{copies}/hello", options=options))
    assert_all_ok(kvmfs_run(*USER, f"{copies}/modes", options=options, timeout=110))


def test_strace(vendor, tmp_path, nothing_left):
    log = tmp_path / "strace"
    result = kvmfs_run("strace", "-f", "-o", str(log), program("hello"), options=["--vendor", vendor])
    assert_hello(result)
    assert "KVM_RUN" in log.read_text()


def test_strace_modes(vendor, nothing_left):
    command = ["strace", "-f", "-o", "/dev/null", program("modes")]
    assert_all_ok(kvmfs_run(*command, options=["--vendor", vendor], timeout=115))


def test_ordinary_user(vendor, copies, nothing_left):
    options, wrapper = ["--vendor", vendor], ordinary_user()
    names = [name for name in subtests() if name != NEEDS_PRIVILEGE]
    assert_hello(kvmfs_run(f"{copies}/hello", options=options, wrapper=wrapper))
    assert_all_ok(kvmfs_run(f"{copies}/modes", *names, options=options, wrapper=wrapper, timeout=110), names)


@pytest.mark.xfail(reason="needs /proc/PID/map_files, and so CAP_CHECKPOINT_RESTORE")
def test_ordinary_user_with_memory_that_has_no_descriptor(copies):
    result = kvmfs_run(f"{copies}/modes", NEEDS_PRIVILEGE, wrapper=ordinary_user())
    assert result.stdout == f"ok {NEEDS_PRIVILEGE}\n"


def test_pid_and_user_namespace(vendor, copies, nothing_left):
    unshare = ["unshare", "--user", "--map-root-user", "--pid", "--fork", "--mount-proc"]
    options = ["--vendor", vendor]
    assert_hello(kvmfs_run(*unshare, f"{copies}/hello", options=options))
    assert_all_ok(kvmfs_run(*unshare, f"{copies}/modes", options=options, timeout=110))


def test_python_under_kvmfs_run(nothing_left):
    result = kvmfs_run(*PYTHON_CLIENT)
    assert result.returncode == 0, result.stdout + result.stderr


# ---- as programs --------------------------------------------------------------------------------------------


def test_clients_compile_without_warnings(tmp_path):
    result = run("make", "-C", str(SOURCES), f"BUILD={tmp_path}")
    assert result.returncode == 0 and "warning" not in result.stderr, result.stderr
    assert set(os.listdir(tmp_path)) == {"hello", "hello-static", "modes", "modes-static"}


def test_modes_refuses_unknown_names():
    result = run(program("modes"), "nonsense")
    assert result.returncode == 2 and "no subtest nonsense" in result.stderr
