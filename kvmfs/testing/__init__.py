# SPDX-License-Identifier: GPL-2.0-or-later
"""For tests of programs that use KVM: a KVM client in Python, and (``kvmfs.testing.plugin``) fixtures for pytest.

The client works on any node, the machine's own as well as a fake one::

    from kvmfs.testing import Kvm

    with Kvm("/dev/kvm") as kvm, kvm.create_vm() as vm:
        vm.add_memory(0, 0x10000)
        vm.write(0x1000, b"\\xb0\\x48\\xe6\\xe9\\xf4")      # mov al, 'H'; out 0xe9, al; hlt
        vcpu = vm.create_vcpu()
        vcpu.set_real_mode(start=0x1000)
        exits = vcpu.run_to("HLT")
        assert exits.written(0xE9) == b"H"
"""

from kvmfs.testing.client import Descriptor, Exit, Exits, Kvm, KvmCallError, Vcpu, Vm

__all__ = ["Descriptor", "Exit", "Exits", "Kvm", "KvmCallError", "Vcpu", "Vm"]
