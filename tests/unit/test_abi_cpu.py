# SPDX-License-Identifier: GPL-2.0-or-later
"""CPUID, MSR, SVM and VMX constants: relations that hardware guarantees between them."""

from kvmfs.abi import cpuid, msrs, para, svm, vmcs, vmx, x86


def named(module: object, prefix: str) -> dict[str, int]:
    return {
        name: value
        for name, value in vars(module).items()
        if name.startswith(prefix) and isinstance(value, int)
    }


def test_every_cpuid_bit_once() -> None:
    assert len(set(cpuid.FEATURES.values())) == len(cpuid.FEATURES) > 200
    assert all(0 <= feature.bit < 32 and feature.reg in range(4) for feature in cpuid.FEATURES.values())
    assert cpuid.FEATURES["NX"] == (0x80000001, 0, cpuid.EDX, 20)
    assert cpuid.Feature(7, 0, cpuid.EBX, 7) == cpuid.X86_FEATURE_SMEP
    assert cpuid.X86_FEATURE_HYPERVISOR.mask == 1 << 31


def test_svm_intercepts_are_the_exit_codes() -> None:
    # Words 0, 1, 3 and 4 of the intercepts and the exit codes are the same list (APM vol. 2 appendix C).
    exit_codes = set(named(svm, "SVM_EXIT_").values())
    for name, bit in named(svm, "INTERCEPT_").items():
        if bit < 64:
            assert bit in exit_codes, name
        elif 96 <= bit < 143:
            assert bit - 96 + 0x60 in exit_codes, name
    assert svm.SVM_EXIT_HLT - 0x60 == svm.INTERCEPT_HLT - 96
    assert svm.SVM_EXIT_VMMCALL - 0x80 == svm.INTERCEPT_VMMCALL - 128
    assert svm.SVM_EXIT_INVPCID - 0xA0 == svm.INTERCEPT_INVPCID - 160
    assert svm.SVM_EXIT_EXCP_BASE + x86.UD_VECTOR == 0x46


def test_vmcb_offsets() -> None:
    # APM vol. 2 appendix B
    assert svm.VMCB_ASID == 0x58
    assert svm.VMCB_INT_CTL == 0x60
    assert svm.VMCB_INT_VECTOR == 0x64
    assert svm.VMCB_EXIT_CODE == 0x70
    assert svm.VMCB_EVENT_INJ == 0xA8
    assert svm.VMCB_NESTED_CR3 == 0xB0
    assert svm.VMCB_NEXT_RIP == 0xC8
    assert svm.VMCB_SAVE_CS == 0x410
    assert svm.VMCB_SAVE_CPL == 0x4CB
    assert svm.VMCB_SAVE_EFER == 0x4D0
    assert svm.VMCB_SAVE_CR0 == 0x558
    assert svm.VMCB_SAVE_RIP == 0x578
    assert svm.VMCB_SAVE_RSP == 0x5D8
    assert svm.VMCB_SAVE_RAX == 0x5F8
    assert svm.VMCB_SAVE_CR2 == 0x640
    assert svm.VMCB_SAVE_G_PAT == 0x668


def test_vmcs_encodings() -> None:
    encodings = named(vmcs, "")
    encodings = {name: value for name, value in encodings.items() if not name.startswith("_")}
    assert len(set(encodings.values())) == len(encodings)
    assert all(value & 1 == 0 and value >> 15 == 0 for value in encodings.values())
    assert vmcs.GUEST_RIP == 0x681E
    assert vmcs.HOST_RIP == 0x6C16
    assert vmcs.EXIT_QUALIFICATION == 0x6400


def test_vmx_controls_are_single_bits() -> None:
    for prefix in ("PIN_BASED_", "CPU_BASED_", "SECONDARY_EXEC_", "VM_EXIT_", "VM_ENTRY_"):
        controls = named(vmx, prefix)
        values = [value for name, value in controls.items() if "ALWAYSON" not in name]
        assert values
        assert all(value.bit_count() == 1 and value < 1 << 32 for value in values)
        assert len(set(values)) == len(values)


def test_msrs() -> None:
    assert all(0 <= value < 1 << 32 for value in named(msrs, "MSR_KVM_").values())
    assert msrs.MSR_EFER == 0xC0000080
    assert msrs.MSR_IA32_APICBASE == 0x1B
    assert msrs.MSR_IA32_APICBASE_ENABLE == 1 << 11
    assert msrs.MSR_KVM_SYSTEM_TIME_NEW == 0x4B564D01
    assert len(para.KVM_SIGNATURE) == 12


def test_reset_values() -> None:
    assert x86.CR0_RESET == 0x60000010  # SDM vol. 3A table 10-1
    assert x86.DR6_FIXED_1 == x86.DR6_ACTIVE_LOW & ~x86.DR6_VOLATILE
    assert x86.EXCEPTION_HAS_ERROR_CODE.bit_count() == 7
