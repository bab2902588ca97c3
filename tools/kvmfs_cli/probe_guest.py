# SPDX-License-Identifier: GPL-2.0-or-later
"""A guest that writes and halts, on /dev/kvm: what ``kvmfs doctor`` runs last.  Prints one line; raises what fails."""

import time

from kvmfs.testing import Kvm

PORT = 0xE9
GUEST = bytes.fromhex("b0 6f e6 e9 b0 6b e6 e9 f4")     # mov al, 'o'; out PORT, al; mov al, 'k'; out PORT, al; hlt


def main() -> None:
    """Run GUEST."""
    began = time.monotonic()
    with Kvm() as kvm, kvm.create_vm() as vm:
        vm.add_memory(0, 0x10000)
        vm.write(0x1000, GUEST)
        vcpu = vm.create_vcpu()
        vcpu.set_real_mode(start=0x1000)
        written = vcpu.run_to("HLT").written(PORT)
    assert written == b"ok", written
    print(f"a guest ran and halted, {(time.monotonic() - began) * 1000:.0f} ms from opening the node")


if __name__ == "__main__":
    main()
