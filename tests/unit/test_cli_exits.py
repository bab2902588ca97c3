# SPDX-License-Identifier: GPL-2.0-or-later
"""Exits in the words of kvm:kvm_exit: Linux's names, and the fields of each vendor's hardware."""

import re
from pathlib import Path

import pytest

from kvmfs.abi import svm, vmx
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
from kvmfs_cli.exits import SVM_NAMES, VMX_NAMES, kvm_exit, svm_exit, vmx_exit

HEADERS = Path("/usr/include/x86_64-linux-gnu/asm")
VECTORS = {"DE": 0, "DB": 1, "BP": 3, "OF": 4, "BR": 5, "UD": 6, "NM": 7, "DF": 8, "TS": 10, "NP": 11, "SS": 12, "GP": 13,
           "PF": 14, "MF": 16, "AC": 17, "MC": 18, "XM": 19}
ABSENT = {"amd": ("VMGEXIT", "ERR"), "intel": ()}       # words for what is no exit of a plain guest


@pytest.mark.parametrize(("vendor", "header", "prefix"), [("amd", "svm.h", "SVM_"), ("intel", "vmx.h", "EXIT_REASON_")])
def test_names_are_those_of_the_header(vendor, header, prefix):
    """The tables that the tracepoint prints by."""
    path = HEADERS / header
    if not path.exists():
        pytest.skip(f"no {path}")
    names, module = (SVM_NAMES, svm) if vendor == "amd" else (VMX_NAMES, vmx)
    found = re.findall(r'\{ (' + prefix + r'\w+)(?: \+ (\w\w)_VECTOR)?,\s+"([^"]+)" \}', path.read_text())
    assert len(found) > 50
    for constant, vector, word in found:
        if not any(part in constant for part in ABSENT[vendor]):
            assert names[getattr(module, constant) + (VECTORS[vector] if vector else 0)] == word, constant


def record(kind, **fields):
    return {"vendor": "amd", "vcpu": 0, "rip": 0x1000, "kind": kind, "code": 0, "info1": 0, "info2": 0, **fields}


@pytest.mark.parametrize(("given", "amd", "intel"), [
    (record(EXIT_NONE), ("interrupt", 0, 0, 0, 0), ("EXTERNAL_INTERRUPT", 0, 0, 0, 0)),
    (record(EXIT_IO_OUT, port=0x3F8, size=1, count=1, string=0), ("io", 0x3F80010, 0, 0, 0),
     ("IO_INSTRUCTION", 0x3F80000, 0, 0, 0)),
    (record(EXIT_IO_IN, port=0x60, size=4, count=3, string=1), ("io", 0x60004D, 0, 0, 0), ("IO_INSTRUCTION", 0x60003B, 0, 0, 0)),
    (record(EXIT_MMIO_READ, gpa=0xFEE00020, size=4), ("npf", 1 << 32 | 4, 0xFEE00020, 0, 0), ("EPT_VIOLATION", 0x181, 0, 0, 0)),
    (record(EXIT_MMIO_WRITE, gpa=0x1000, size=1), ("npf", 1 << 32 | 6, 0x1000, 0, 0), ("EPT_VIOLATION", 0x182, 0, 0, 0)),
    (record(EXIT_UNKNOWN, gpa=0x1000, info1=1), ("npf", 1 << 32 | 6, 0x1000, 0, 0), ("EPT_VIOLATION", 0x182, 0, 0, 0)),
    (record(EXIT_FETCH, gpa=0x2000), ("npf", 1 << 32 | 0x14, 0x2000, 0, 0), ("EPT_VIOLATION", 0x184, 0, 0, 0)),
    (record(EXIT_SVM, code=0x78), ("hlt", 0, 0, 0, 0), ("HLT", 0, 0, 0, 0)),
    (record(EXIT_SVM, code=0x7C, info1=1), ("msr", 1, 0, 0, 0), ("MSR_WRITE", 0, 0, 0, 0)),
    (record(EXIT_SVM, code=0x7C), ("msr", 0, 0, 0, 0), ("MSR_READ", 0, 0, 0, 0)),
    (record(EXIT_SVM, code=0x14), ("write_cr4", 0, 0, 0, 0), ("CR_ACCESS", 4, 0, 0, 0)),
    (record(EXIT_SVM, code=0x27), ("read_dr7", 0, 0, 0, 0), ("DR_ACCESS", 0x17, 0, 0, 0)),
    (record(EXIT_SVM, code=0x4E, info1=2, info2=0x5000), ("PF excp", 2, 0x5000, 0, 0),
     ("EXCEPTION_NMI", 0x5000, 0, 0x80000B0E, 2)),
    (record(EXIT_SVM, code=0x43), ("BP excp", 0, 0, 0, 0), ("EXCEPTION_NMI", 0, 0, 0x80000603, 0)),
    (record(EXIT_SVM, code=0x80), ("vmrun", 0, 0, 0, 0), ("EXCEPTION_NMI", 0, 0, 0x80000306, 0)),
    (record(EXIT_SVM, code=0x8C), ("0x8c", 0, 0, 0, 0), ("MWAIT_INSTRUCTION", 0, 0, 0, 0)),
])
def test_fields(given, amd, intel):
    assert tuple(svm_exit(given)) == amd
    assert tuple(vmx_exit(given)) == intel


def test_the_line():
    line = kvm_exit(record(EXIT_SVM, code=0x72) | {"vendor": "intel", "rip": 0xFFF0, "vcpu": 3})
    assert line == ("kvm_exit: vcpu 3 reason CPUID rip 0xfff0 info1 0x0000000000000000 info2 0x0000000000000000 "
                    "intr_info 0x00000000 error_code 0x00000000")
