# SPDX-License-Identifier: GPL-2.0-or-later
"""Every x86 struct of the KVM ABI, named after its C struct (kvm_regs is KvmRegs): import them from here."""
# ruff: noqa: F403

from .structs_para import *
from .structs_run import *
from .structs_sev import *
from .structs_vcpu import *
from .structs_vm import *
from .structs_xen import *
