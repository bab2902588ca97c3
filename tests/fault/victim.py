# SPDX-License-Identifier: GPL-2.0-or-later
"""A client that is made to die, or whose VM is: ``victim.py NODE PHASE [N]``, with the client of kvmfs.testing.

It prints ``ready`` when it is in the phase.
"""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Callable

from kvmfs.testing import Kvm, KvmCallError, Vcpu, Vm

SPIN = bytes.fromhex("eb fe")
COUNT = bytes.fromhex("66 b8 00 00 00 00  66 40  e6 10  eb fa")       # mov eax, 0; 1: inc eax; out 0x10, al; jmp 1b
READ_DEVICE = bytes.fromhex("b8 00 a0  8e d8  a0 00 00  f4")          # mov al, [0xa0000]; hlt
MEMORY = 0x90000


def guest(vm: Vm, code: bytes) -> Vcpu:
    vm.add_memory(0, MEMORY)
    vm.write(0x8000, code)
    vcpu = vm.create_vcpu()
    vcpu.set_real_mode(start=0x8000, stack=0x8000)
    return vcpu


def ready() -> None:
    print("ready", flush=True)


def create_for_ever(node: Kvm) -> None:
    while True:
        with node.create_vm() as vm, guest(vm, COUNT) as vcpu:
            assert vcpu.run().name == "IO"


def in_run(node: Kvm) -> None:
    """KVM_RUN of a guest that never ends, in another thread."""
    vcpu = guest(node.create_vm(), SPIN)
    threading.Thread(target=vcpu.run, daemon=True).start()
    time.sleep(0.2)


def after_death(node: Kvm) -> None:
    """KVM_RUN until the worker is killed, then other calls: a line with the errno of each."""
    def errno_of(call: Callable[[], object]) -> int:
        try:
            call()
        except OSError as error:
            return error.errno or 0
        return 0

    vm = node.create_vm()
    vcpu = guest(vm, SPIN)
    ready()
    print("in-flight", errno_of(vcpu.run))
    for name, call in {"KVM_RUN": vcpu.run, "KVM_GET_REGS": lambda: vcpu.regs, "KVM_CREATE_VCPU": vm.create_vcpu,
                       "KVM_CREATE_IRQCHIP": vm.create_irqchip, "read": lambda: os.read(vcpu.fd, 1),
                       "KVM_CHECK_EXTENSION": lambda: vm.check_extension(0), "memory": lambda: vm.add_memory(1 << 20, 4096),
                       }.items():
        print(name, errno_of(call))
    vcpu.state.immediate_exit = 1       # kvm_run is still memory
    print("close", errno_of(lambda: os.close(vcpu.fd)) or errno_of(lambda: os.close(vm.fd)), flush=True)
    with node.create_vm() as other:
        other.create_irqchip()
    os._exit(0)


def count_for_ever(node: Kvm) -> None:
    """Exits without end; a line for each hundred, and the errno when it is over."""
    vcpu, exits = guest(node.create_vm(), COUNT), 0
    try:
        while vcpu.run().name == "IO":
            exits += 1
            if exits % 100 == 0:
                print(exits, flush=True)
    except KvmCallError as error:
        print(f"errno {error.errno} from {error.call}", flush=True)


def main() -> None:
    path, phase, *arguments = sys.argv[1:]
    node = Kvm(path)
    if phase == "count":
        ready()
        count_for_ever(node)
        return
    if phase == "many":
        for _ in range(int(arguments[0])):
            with node.create_vm() as vm, guest(vm, COUNT) as vcpu:
                assert vcpu.run().name == "IO"
        ready()
        return
    if phase == "dead":
        after_death(node)
    keep: list[object] = []
    if phase == "vm":
        keep.append(node.create_vm())
    elif phase == "memory":
        vm = node.create_vm()
        vm.add_memory(0, MEMORY)
        keep.append(vm)
    elif phase == "vcpu":
        keep.append(guest(node.create_vm(), COUNT))
    elif phase == "io":                         # stopped at an exit that is not completed
        vcpu = guest(node.create_vm(), COUNT)
        assert vcpu.run().name == "IO"
        keep.append(vcpu)
    elif phase == "mmio":
        vcpu = guest(node.create_vm(), READ_DEVICE)
        assert vcpu.run().name == "MMIO"
        keep.append(vcpu)
    elif phase == "run":
        in_run(node)
    elif phase == "three":                      # three VMs, one of them running
        keep += [node.create_vm(), guest(node.create_vm(), COUNT)]
        in_run(node)
    elif phase == "creating":
        for _ in range(3):
            threading.Thread(target=create_for_ever, args=[node], daemon=True).start()
    else:
        assert phase == "open", phase
    ready()
    time.sleep(100)


main()
