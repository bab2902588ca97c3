# SPDX-License-Identifier: GPL-2.0-or-later
"""The guests' exits in the words of Linux's tracepoint kvm:kvm_exit (arch/x86/kvm/trace.h; its names: asm/svm.h, asm/vmx.h).

The engine leaves a guest as SVM hardware does.  For a VM with an Intel CPU that is told as VMX would have it; what the engine
does not know (the register of a MOV to CR, the event being delivered) is 0.
"""

from __future__ import annotations

from typing import Any, Final, NamedTuple

from kvmfs.abi import svm, vmx
from kvmfs.abi import x86 as x
from kvmfs.cpu.cpu import (
    EXIT_FETCH,
    EXIT_IO_IN,
    EXIT_IO_OUT,
    EXIT_MMIO_READ,
    EXIT_MMIO_WRITE,
    EXIT_NONE,
    EXIT_SVM,
    EXIT_UNKNOWN,
)


def _names(module: Any, prefix: str) -> dict[int, str]:
    return {value: name.removeprefix(prefix) for name, value in vars(module).items() if name.startswith(prefix)}


# Where Linux's word is not the constant's name.
_SVM_WORDS: Final = {
    svm.SVM_EXIT_INTR: "interrupt", svm.SVM_EXIT_IOIO: "io", svm.SVM_EXIT_VMMCALL: "hypercall",
    **{getattr(svm, f"SVM_EXIT_{table}_{way.upper()}"): f"{way}_{'rt' if table == 'TR' else table.lower()}"
       for table in ("IDTR", "GDTR", "LDTR", "TR") for way in ("read", "write")},
    **{getattr(svm, f"SVM_EXIT_{register}_WRITE_TRAP"): f"write_{register.lower()}_trap"
       for register in ("EFER", "CR0", "CR4", "CR8")},
    **{svm.SVM_EXIT_EXCP_BASE + vector: f"{name} excp" for vector, name in (
        (x.DE_VECTOR, "DE"), (x.DB_VECTOR, "DB"), (x.BP_VECTOR, "BP"), (x.OF_VECTOR, "OF"), (x.BR_VECTOR, "BR"),
        (x.UD_VECTOR, "UD"), (x.NM_VECTOR, "NM"), (x.DF_VECTOR, "DF"), (x.TS_VECTOR, "TS"), (x.NP_VECTOR, "NP"),
        (x.SS_VECTOR, "SS"), (x.GP_VECTOR, "GP"), (x.PF_VECTOR, "PF"), (x.MF_VECTOR, "MF"), (x.AC_VECTOR, "AC"),
        (x.MC_VECTOR, "MC"), (x.XM_VECTOR, "XF"))},
}
SVM_NAMES: Final = {code: name.lower() for code, name in _names(svm, "SVM_EXIT_").items()
                    if code not in (svm.SVM_EXIT_EXCP_BASE, svm.SVM_EXIT_LAST_EXCP, svm.SVM_EXIT_MWAIT_COND)} | _SVM_WORDS
VMX_NAMES: Final = _names(vmx, "EXIT_REASON_")

_VMX_REASONS: Final = {
    svm.SVM_EXIT_INTR: vmx.EXIT_REASON_EXTERNAL_INTERRUPT, svm.SVM_EXIT_NMI: vmx.EXIT_REASON_EXCEPTION_NMI,
    svm.SVM_EXIT_VINTR: vmx.EXIT_REASON_INTERRUPT_WINDOW, svm.SVM_EXIT_RDPMC: vmx.EXIT_REASON_RDPMC,
    svm.SVM_EXIT_CPUID: vmx.EXIT_REASON_CPUID, svm.SVM_EXIT_INVD: vmx.EXIT_REASON_INVD, svm.SVM_EXIT_HLT: vmx.EXIT_REASON_HLT,
    svm.SVM_EXIT_IOIO: vmx.EXIT_REASON_IO_INSTRUCTION, svm.SVM_EXIT_TASK_SWITCH: vmx.EXIT_REASON_TASK_SWITCH,
    svm.SVM_EXIT_SHUTDOWN: vmx.EXIT_REASON_TRIPLE_FAULT, svm.SVM_EXIT_VMMCALL: vmx.EXIT_REASON_VMCALL,
    svm.SVM_EXIT_WBINVD: vmx.EXIT_REASON_WBINVD, svm.SVM_EXIT_MONITOR: vmx.EXIT_REASON_MONITOR_INSTRUCTION,
    svm.SVM_EXIT_MWAIT: vmx.EXIT_REASON_MWAIT_INSTRUCTION, svm.SVM_EXIT_MWAIT_COND: vmx.EXIT_REASON_MWAIT_INSTRUCTION,
    svm.SVM_EXIT_XSETBV: vmx.EXIT_REASON_XSETBV, svm.SVM_EXIT_NPF: vmx.EXIT_REASON_EPT_VIOLATION,
    svm.SVM_EXIT_MSR: vmx.EXIT_REASON_MSR_READ,
    **dict.fromkeys(range(svm.SVM_EXIT_READ_CR0, svm.SVM_EXIT_READ_DR0), vmx.EXIT_REASON_CR_ACCESS),
    **dict.fromkeys(range(svm.SVM_EXIT_READ_DR0, svm.SVM_EXIT_EXCP_BASE), vmx.EXIT_REASON_DR_ACCESS),
}
_WITH_ERROR_CODE: Final = (x.DF_VECTOR, x.TS_VECTOR, x.NP_VECTOR, x.SS_VECTOR, x.GP_VECTOR, x.PF_VECTOR, x.AC_VECTOR)
_NPF: Final = {EXIT_MMIO_READ: 4, EXIT_MMIO_WRITE: 6, EXIT_FETCH: 0x14}     # the page fault's error code: user, write, fetch
_EPT: Final = {EXIT_MMIO_READ: 1, EXIT_MMIO_WRITE: 2, EXIT_FETCH: 4}        # SDM vol. 3C, table 28-7
_EPT_LINEAR: Final = 3 << 7                                                 # there is a linear address, and it was translated


class Told(NamedTuple):
    """The tracepoint's fields."""

    reason: str
    info1: int = 0
    info2: int = 0
    intr_info: int = 0
    error_code: int = 0


def svm_name(code: int) -> str:
    """Linux's word for an SVM exit code; one that has none is a number there, too."""
    return SVM_NAMES.get(code, f"{code:#x}")


def vmx_reason(code: int) -> int:
    """The VMX exit reason that an Intel CPU would have where the engine has an SVM exit code."""
    # Exceptions; and instructions of SVM's, which are undefined on an Intel CPU.
    return _VMX_REASONS.get(code, vmx.EXIT_REASON_EXCEPTION_NMI)


def by_reason(vcpu: dict[str, Any], vendor: str) -> dict[str, int]:
    """A vCPU's counted exits by Linux's words for that vendor."""
    found: dict[str, int] = {}
    for text, count in vcpu["reasons"].items():
        code = int(text)
        if vendor == "amd":
            parts = {svm_name(code): count}
        elif code == svm.SVM_EXIT_MSR:
            parts = {"MSR_READ": count - vcpu["wrmsr_exits"], "MSR_WRITE": vcpu["wrmsr_exits"]}
        else:
            parts = {VMX_NAMES[vmx_reason(code)]: count}
        for name, part in parts.items():
            found[name] = found.get(name, 0) + part
    return {name: count for name, count in found.items() if count}


def kvm_exit(record: dict[str, Any]) -> str:
    """A record "exit" (kvmd.window.exit_of) in the tracepoint's form."""
    told = (svm_exit if record["vendor"] == "amd" else vmx_exit)(record)
    return (f"kvm_exit: vcpu {record['vcpu']} reason {told.reason} rip 0x{record['rip']:x} info1 0x{told.info1:016x} "
            f"info2 0x{told.info2:016x} intr_info 0x{told.intr_info:08x} error_code 0x{told.error_code:08x}")


def _access(record: dict[str, Any]) -> int:
    """The kind of a memory access; that of an unknown instruction is in info1."""
    if record["kind"] == EXIT_UNKNOWN:
        return EXIT_MMIO_WRITE if record["info1"] else EXIT_MMIO_READ
    return int(record["kind"])


def svm_exit(record: dict[str, Any]) -> Told:
    """With EXITINFO1 and 2 (APM vol. 2, 15.10.2 and 15.25.6)."""
    kind = record["kind"]
    if kind == EXIT_NONE:
        return Told(svm_name(svm.SVM_EXIT_INTR))
    if kind == EXIT_SVM:
        return Told(svm_name(record["code"]), record["info1"], record["info2"])
    if kind in (EXIT_IO_IN, EXIT_IO_OUT):
        string = 1 << 2 | (1 << 3 if record["count"] != 1 else 0) if record["string"] else 0
        return Told(svm_name(svm.SVM_EXIT_IOIO), record["port"] << 16 | record["size"] << 4 | string | (kind == EXIT_IO_IN))
    return Told(svm_name(svm.SVM_EXIT_NPF), _NPF[_access(record)] | 1 << 32, record["gpa"])


def vmx_exit(record: dict[str, Any]) -> Told:
    """With the exit qualification as info1 (SDM vol. 3C, 28.2.1)."""
    kind = record["kind"]
    if kind == EXIT_NONE:
        return Told(VMX_NAMES[vmx.EXIT_REASON_EXTERNAL_INTERRUPT])
    if kind == EXIT_SVM:
        return _vmx_instruction(record)
    if kind in (EXIT_IO_IN, EXIT_IO_OUT):
        string = 1 << 4 | (1 << 5 if record["count"] != 1 else 0) if record["string"] else 0
        qualification = record["port"] << 16 | string | (1 << 3 if kind == EXIT_IO_IN else 0) | record["size"] - 1
        return Told(VMX_NAMES[vmx.EXIT_REASON_IO_INSTRUCTION], qualification)
    return Told(VMX_NAMES[vmx.EXIT_REASON_EPT_VIOLATION], _EPT[_access(record)] | _EPT_LINEAR)


def _vmx_instruction(record: dict[str, Any]) -> Told:
    code, info1, info2 = record["code"], record["info1"], record["info2"]
    reason = vmx_reason(code)
    if reason == vmx.EXIT_REASON_EXCEPTION_NMI:
        vector = code - svm.SVM_EXIT_EXCP_BASE if svm.SVM_EXIT_EXCP_BASE <= code <= svm.SVM_EXIT_LAST_EXCP else x.UD_VECTOR
        return _exception(x.NMI_VECTOR if code == svm.SVM_EXIT_NMI else vector, info1, info2)
    if code == svm.SVM_EXIT_MSR and info1:
        reason = vmx.EXIT_REASON_MSR_WRITE
    qualification = 0
    if reason == vmx.EXIT_REASON_CR_ACCESS:
        qualification = code & 0xF | (0 if code >= svm.SVM_EXIT_WRITE_CR0 else 1 << 4)
    elif reason == vmx.EXIT_REASON_DR_ACCESS:
        qualification = code & 7 | (0 if code >= svm.SVM_EXIT_WRITE_DR0 else 1 << 4)
    return Told(VMX_NAMES[reason], qualification)


def _exception(vector: int, error_code: int, info2: int) -> Told:
    kind = {x.NMI_VECTOR: vmx.INTR_TYPE_NMI_INTR, x.BP_VECTOR: vmx.INTR_TYPE_SOFT_EXCEPTION,
            x.OF_VECTOR: vmx.INTR_TYPE_SOFT_EXCEPTION}.get(vector, vmx.INTR_TYPE_HARD_EXCEPTION)
    has_code = vector in _WITH_ERROR_CODE
    return Told(VMX_NAMES[vmx.EXIT_REASON_EXCEPTION_NMI], info2 if vector in (x.DB_VECTOR, x.PF_VECTOR) else 0, 0,
                vmx.INTR_INFO_VALID_MASK | kind | vector | (vmx.INTR_INFO_DELIVER_CODE_MASK if has_code else 0),
                error_code if has_code else 0)
