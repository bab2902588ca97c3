# SPDX-License-Identifier: GPL-2.0-or-later
"""``kvmfs trace``, ``stat``, ``vms`` and ``fault``: what they show of a daemon's VMs, and to whom."""

import json
import os
import re
import select
import signal
import subprocess
import sys
import threading
import time

import pytest

from kvmd.control import address
from kvmfs.testing import Kvm, KvmCallError
from tests.clients import program
from tests.daemon import ENVIRONMENT, KVMFS, kvmfs, ordinary_user

# mov rax, 0x1234; again: inc rax; jmp again
LOOP = bytes.fromhex("48 c7 c0 34 12 00 00  48 ff c0  eb fb")
TABLES, CODE = 0x10000, 0x1000
GROUPS = ["exits by reason", "exits", "interrupts", "ioctls", "translation", "time", "memory"]


def ours(kvmd, command, *arguments):
    """A command of ours about that daemon."""
    result = kvmfs(command, "--daemon", str(kvmd.process.pid), *arguments)
    assert result.returncode == 0, result.stderr
    return result.stdout


@pytest.fixture
def busy(kvmd):
    """A VM of that daemon whose guest loops for ever, in long mode."""
    with Kvm(kvmd.node) as kvm, kvm.create_vm() as vm:
        vm.add_memory(0, 0x100000)
        vm.write(CODE, LOOP)
        vcpu = vm.create_vcpu()
        vcpu.set_long_mode(start=CODE, tables=TABLES)

        def play():
            with pytest.raises(KvmCallError):
                vcpu.run()

        thread = threading.Thread(target=play)
        thread.start()
        yield vm
        os.kill(kvmd.workers()[0], signal.SIGKILL)
        thread.join(20)


# ---- trace --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("passthrough", ["auto", "off"])
def test_trace_of_a_command(passthrough, nothing_left):
    result = kvmfs("trace", "--passthrough", passthrough, "--", program("hello"))
    assert result.returncode == 0 and "the guest wrote: Hello from a guest" in result.stdout, result.stderr
    lines = result.stderr.splitlines()
    assert "system: KVM_GET_API_VERSION = 12" in lines[0]
    text = "\n".join(re.sub(r" <\d+ µs>", "", line) for line in lines)
    assert "system: KVM_CHECK_EXTENSION KVM_CAP_SET_TSS_ADDR = 1" in text
    assert "vm 0: KVM_SET_USER_MEMORY_REGION {slot=0, flags=0x0, guest_phys_addr=0, memory_size=0x90000, userspace_addr=0x" in text
    assert "vm 0 vcpu 0: KVM_RUN KVM_EXIT_IO {out port 0x3f8 size 1 count 1 data 48} = 0" in text
    assert "vm 0 vcpu 0: KVM_RUN KVM_EXIT_HLT = 0" in text
    assert re.search(r"vm 0 vcpu 0: KVM_GET_REGS \{rbx=0x6b76, .*rip=0x8013, rflags=0x46\} = 0", text)


def test_filters_and_output(tmp_path):
    out = tmp_path / "trace"
    result = kvmfs("trace", "-e", "GET_*", "--level", "vcpu", "-t", "-o", str(out), "--", program("hello"))
    assert result.stderr == ""
    lines = out.read_text().splitlines()
    assert lines and all(re.match(r"\d\d:\d\d:\d\d\.\d{6} vm 0 vcpu 0: KVM_GET_", line) for line in lines)


@pytest.mark.parametrize(("options", "lines"), [
    (("--vm", "0"), [r"vm 0: KVM_", "vm 0 vcpu 0: KVM_RUN KVM_EXIT_HLT"]), (("--vm", "1"), []), (("--vcpu", "1"), []),
    (("--vcpu", "0", "-e", "GET_REGS"), ["vm 0 vcpu 0: KVM_GET_REGS"]),
    (("--level", "system", "-e", "*VM"), ["system: KVM_CREATE_VM"]),
    (("--exits", "--vm", "0", "--vcpu", "0"), ["kvm_exit: vcpu 0 reason"]), (("--exits", "--vcpu", "1"), []),
])
def test_filters(options, lines):
    result = kvmfs("trace", *options, "--", program("hello"))
    assert result.returncode == 0
    for line in lines:
        assert line in result.stderr
    assert bool(lines) == bool(result.stderr), result.stderr


def test_trace_as_json():
    result = kvmfs("trace", "--json", "-e", "KVM_RUN", "--", program("hello"))
    records = [json.loads(line) for line in result.stderr.splitlines()]
    assert len(records) > 10 and {record["op"] for record in records} == {"ioctl"}
    assert [record["time"] for record in records] == sorted(record["time"] for record in records)


@pytest.mark.parametrize(("vendor", "io", "hlt"), [("amd", "io ", "hlt "), ("intel", "IO_INSTRUCTION ", "HLT ")])
def test_exits_as_the_kernel_shows_them(vendor, io, hlt):
    result = kvmfs("trace", "--exits", "--vendor", vendor, "--", program("hello"))
    lines = result.stderr.splitlines()
    form = (r"kvm_exit: vcpu 0 reason \S+ rip 0x[0-9a-f]+ info1 0x[0-9a-f]{16} info2 0x[0-9a-f]{16} "
            r"intr_info 0x\d{8} error_code 0x\d{8}")
    assert lines and all(re.fullmatch(form, line) for line in lines), lines[:3]
    first = next(line for line in lines if f"reason {io}" in line)
    assert f"info1 0x0000000003f800{'10' if vendor == 'amd' else '00'}" in first
    assert f"reason {hlt}" in lines[-1]


def test_an_injected_fault_is_named():
    result = kvmfs("trace", "--fault", "KVM_CREATE_VCPU:ENOMEM", "--", program("hello"))
    assert result.returncode == 1
    assert re.search(r"vm 0: KVM_CREATE_VCPU = -1 ENOMEM \(Cannot allocate memory\) <\d+ µs>  \[fault KVM_CREATE_VCPU:ENOMEM\]",
                     result.stderr)


def test_the_exit_status_is_the_commands():
    assert kvmfs("trace", "--", "sh", "-c", "exit 7").returncode == 7


def test_attached_to_a_running_daemon(kvmd, nothing_left):
    """What comes after the attaching is shown, of VMs that are made later too; the daemon goes on when the tracer goes."""
    tracer = subprocess.Popen([*KVMFS, "trace", "--daemon", str(kvmd.process.pid)], env=ENVIRONMENT, stdout=subprocess.PIPE,
                              text=True)
    assert tracer.stdout is not None
    with Kvm(kvmd.node) as kvm:
        deadline = time.monotonic() + 20
        while not select.select([tracer.stdout], [], [], 0.05)[0]:
            assert time.monotonic() < deadline
            kvm.check_extension("KVM_CAP_IRQCHIP")
        with kvm.create_vm() as vm:
            vm.ioctl("KVM_SET_TSS_ADDR", 0x1000)
            for line in tracer.stdout:
                if "vm 0: KVM_SET_TSS_ADDR 0x1000" in line:
                    break
            tracer.kill()
            tracer.wait()
            vm.ioctl("KVM_SET_TSS_ADDR", 0x2000)
    tracer.stdout.close()


# ---- vms and stat -------------------------------------------------------------------------------------------


def test_looking_into_a_vm_that_runs(kvmd, busy):
    deadline = time.monotonic() + 10
    while (found := json.loads(ours(kvmd, "vms", "--json")))[0]["vcpus"] != [{"id": 0, "state": "guest"}]:
        assert time.monotonic() < deadline, found
    vm, = found
    assert vm["memory"] == 0x100000 and vm["process"] == os.getpid() and vm["worker"] == kvmd.workers()[0]
    registers = ours(kvmd, "vms", "0")
    assert re.search(r"rip 000000000000100[7a]  rflags [0-9a-f]{8} .* 64-bit code", registers)
    assert re.search(r"=> 000000000000100[7a]  (48 ff c0 +inc rax|eb fb +jmp 0x1007)", registers)
    assert int(re.search(r"rax ([0-9a-f]{16})", registers)[1], 16) > 0x1234
    assert ours(kvmd, "vms", "0", "--memory", "0x1000", "--length", "12").split()[1:13] == LOOP.hex(" ").split()
    assert ours(kvmd, "vms", "0", "--physical", "0x1000", "--length", "2").split()[1:3] == ["48", "c7"]
    walk = ours(kvmd, "vms", "0", "--walk", "0x345678").splitlines()
    assert [line.split()[0] for line in walk] == ["PML4E", "PDPTE", "PDE", "0x345678"] and walk[-1].endswith("physical 0x345678")
    assert ours(kvmd, "vms", "0", "--walk", "0x8000000000").splitlines()[-1] == "0x8000000000 is not mapped"
    statistics = json.loads(ours(kvmd, "stat", "--once", "--json"))
    numbers = statistics["vms"][f"{kvmd.process.pid}/0"]
    assert numbers["KVM_RUN"] == numbers["KVM_CREATE_VCPU"] == 1 and numbers["irq_exits"] >= 1
    assert statistics["total"]["exits"] == numbers["exits"] == sum(
        count for name, count in numbers.items() if name.startswith("kvm_exit("))
    assert numbers["guest_time_ns"] == numbers["vcpu0_guest_time_ns"] > 0 and numbers["tb_translated"] >= 1
    assert 0 < numbers["code_buffer_bytes"] < numbers["code_buffer_size"] and numbers["guest_memory_bytes"] == 0x100000


def test_there_is_no_such_vm(kvmd):
    result = kvmfs("vms", "--daemon", str(kvmd.process.pid), "3")
    assert result.returncode == 1 and "there is no VM 3" in result.stderr
    assert kvmfs("vms", "--daemon", "1", "0").returncode == 1


def test_live_numbers(kvmd, busy):
    """Not on a terminal: one table after the other."""
    process = subprocess.Popen([*KVMFS, "stat", "--daemon", str(kvmd.process.pid), "--interval", "0.2"], env=ENVIRONMENT,
                               stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    seen = []
    for line in process.stdout:
        seen.append(line.strip())
        if line.startswith("  guest_memory_bytes"):
            break
    process.send_signal(signal.SIGINT)
    assert process.wait(10) == 0
    process.stdout.close()
    assert "per second" in seen[0] and f"VM 0 of daemon {kvmd.process.pid}" in seen[0], seen
    assert [line for line in seen if line in GROUPS] == GROUPS, seen
    rate, = (re.fullmatch(r"guest_time_ns +[0-9.]+ s +(\d+) %", line) for line in seen if line.startswith("guest_time_ns"))
    assert rate is not None and int(rate[1]) > 10, seen


def test_numbers_of_nobody(kvmd):
    result = kvmfs("stat", "--once", "--daemon", str(kvmd.process.pid))
    assert (result.returncode, result.stdout) == (0, "No VM runs.\n")
    result = kvmfs("stat", "--once", "--vm", "7", "--daemon", str(kvmd.process.pid))
    assert result.returncode == 1 and "there is no VM 7" in result.stderr
    assert kvmfs("stat", "--once", "--daemon", "1").returncode == 1


# ---- faults, and who may what -------------------------------------------------------------------------------


def test_rules_for_a_running_daemon(kvmd):
    with Kvm(kvmd.node) as kvm, kvm.create_vm() as vm:
        ours(kvmd, "fault", "KVM_SET_TSS_ADDR:EIO:times=1", "KVM_CAP_IRQCHIP:absent")
        assert ours(kvmd, "fault") == "KVM_SET_TSS_ADDR:EIO:times=1\nKVM_CAP_IRQCHIP:absent\n"
        assert kvm.check_extension("KVM_CAP_IRQCHIP") == vm.check_extension("KVM_CAP_IRQCHIP") == 0
        with pytest.raises(KvmCallError, match="Input/output error"):
            vm.ioctl("KVM_SET_TSS_ADDR", 0x1000)
        vm.ioctl("KVM_SET_TSS_ADDR", 0x1000)
        ours(kvmd, "fault", "--clear")
        assert kvm.check_extension("KVM_CAP_IRQCHIP") == vm.check_extension("KVM_CAP_IRQCHIP") == 1


ASK = """
import socket, sys
from kvmd.link import Link
sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
sock.connect("\\0" + sys.argv[1])
link = Link(sock)
with link.call("state") as answer:
    print(answer.op, answer.body["vms"])
for op, fields in (("fault", {"rules": ["KVM_RUN:EIO"]}), ("registers", {"vm": 0, "vcpu": 0}), ("nonsense", {})):
    with link.call(op, **fields) as answer:
        print(answer.op, answer.body.get("text"))
"""


def test_strangers_see_nothing(kvmd, busy):
    """An ordinary user asks a daemon of root's about VMs of root's."""
    result = subprocess.run([*ordinary_user(), sys.executable, "-c", ASK, address(kvmd.process.pid)[1:]], env=ENVIRONMENT,
                            capture_output=True, text=True, timeout=60, check=False)
    lines = result.stdout.splitlines()
    assert lines[0] == "answer []", result.stderr
    assert lines[1].startswith("failed only root") and lines[2] == "failed there is no VM 0", lines
    assert json.loads(ours(kvmd, "vms", "--json"))
