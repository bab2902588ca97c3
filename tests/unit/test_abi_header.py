# SPDX-License-Identifier: GPL-2.0-or-later
"""kvmfs.abi against the C compiler and the system's own headers.

A program with one line per fact is compiled; lines that this system's headers cannot express (a name that
came later) are dropped and counted. What may be missing from the oldest supported headers (Linux 6.1) is
listed here by name, so that a mistyped name fails instead of being dropped. CPATH selects other headers.
"""

import re
import shutil
import subprocess
from collections.abc import Iterator
from ctypes import Structure, Union, sizeof
from pathlib import Path
from types import ModuleType

import pytest

from kvmfs.abi import caps, exits, flags, ioctls, para, structs, svm, vmx, x86
from kvmfs.abi.cstruct import offset_of

pytestmark = pytest.mark.skipif(shutil.which("gcc") is None, reason="no C compiler")

INCLUDES = """\
#include <errno.h>
#include <stddef.h>
#include <stdio.h>
#include <linux/kvm.h>
#include <linux/kvm_para.h>
#include <asm/processor-flags.h>
#include <asm/svm.h>
#include <asm/vmx.h>
#define FACT(expression) printf("%llu\\n", (unsigned long long)(expression))
"""

# An error must name the line of the program, and an unknown macro with arguments must be one.
FLAGS = ("-ftrack-macro-expansion=0", "-Werror=implicit-function-declaration")

# Not in Linux 6.1.
NEWER_IOCTLS = {
    "KVM_SET_USER_MEMORY_REGION2",
    "KVM_SET_MEMORY_ATTRIBUTES",
    "KVM_CREATE_GUEST_MEMFD",
    "KVM_PRE_FAULT_MEMORY",
}
NEWER_STRUCTS = {
    "kvm_userspace_memory_region2",
    "kvm_memory_attributes",
    "kvm_create_guest_memfd",
    "kvm_pre_fault_memory",
    "kvm_sev_init",
    "kvm_sev_snp_launch_start",
    "kvm_sev_snp_launch_update",
    "kvm_sev_snp_launch_finish",
}
NEWER_FIELDS = {
    "kvm_run.hypercall.flags",
    "kvm_run.memory_fault",
    "kvm_xen_hvm_attr.u.runstate_update_flag",
    "kvm_xen_hvm_attr.u.shared_info.hva",
    "kvm_xen_hvm_attr.u.xen_version",
    "kvm_xen_vcpu_attr.u.hva",
}
# The SEV structs had the same holes before the holes got names.
NAMED_HOLE = re.compile(r"kvm_sev_\w+\.pad\d")
# Had one more field, that only the guest used, until Linux 6.10.
SHRUNK_STRUCTS = {"kvm_vcpu_pv_apf_data"}
# Not in a header for programs at all.
KERNEL_STRUCTS = {"pvclock_vcpu_time_info", "pvclock_wall_clock"}


def compile_facts(directory: Path, expressions: list[str]) -> dict[str, int]:
    """The value of each expression; those that do not compile are left out."""
    source, program = directory / "facts.c", directory / "facts"
    left = list(expressions)
    while True:
        head = INCLUDES.count("\n") + 1
        body = "".join(f"FACT({expression});\n" for expression in left)
        source.write_text(f"{INCLUDES}int main(void) {{\n{body}return 0; }}\n")
        command = ["gcc", *FLAGS, "-o", program, source]
        result = subprocess.run(command, capture_output=True, text=True, check=False)
        if result.returncode == 0:
            break
        bad = {int(line) - head - 1 for line in re.findall(r"facts\.c:(\d+):\d+: error", result.stderr)}
        assert bad, result.stderr
        left = [expression for index, expression in enumerate(left) if index not in bad]
    output = subprocess.run([program], capture_output=True, text=True, check=True).stdout
    return dict(zip(left, map(int, output.split()), strict=True))


def c_structs() -> Iterator[tuple[str, type[Structure]]]:
    """(C name, class) of every class that stands for a named C struct."""
    for value in vars(structs).values():
        if isinstance(value, type) and issubclass(value, Structure) and value.__doc__:
            name = re.match(r"struct (\w+)", value.__doc__)
            if name:
                yield name[1], value


def fields(cls: type[Structure | Union], prefix: str = "") -> Iterator[tuple[str, str]]:
    """(path in C, path in ctypes) of every field, embedded structs included."""
    anonymous = getattr(cls, "_anonymous_", ())
    for name, ctype, *_ in cls._fields_:
        inner = isinstance(ctype, type) and issubclass(ctype, Structure | Union)
        if name in anonymous:
            for c_path, path in fields(ctype):
                yield prefix + c_path, f"{prefix}{name}.{path}"
            continue
        yield prefix + name, prefix + name
        if inner:
            for c_path, path in fields(ctype):
                yield f"{prefix}{name}.{c_path}", f"{prefix}{name}.{path}"


def field_size(cls: type[Structure | Union], path: str) -> int:
    ctype = cls
    for name in path.split("."):
        ctype = dict((field[0], field[1]) for field in ctype._fields_)[name]
    return sizeof(ctype)


def test_ioctl_numbers(tmp_path: Path) -> None:
    found = compile_facts(tmp_path, [entry.name for entry in ioctls.TABLE])
    assert {entry.name: entry.number for entry in ioctls.TABLE if entry.name in found} == {
        # read and write together make a negative int in C
        name: value & 0xFFFFFFFF
        for name, value in found.items()
    }
    assert {entry.name for entry in ioctls.TABLE} - set(found) <= NEWER_IOCTLS


def test_struct_sizes(tmp_path: Path) -> None:
    expected = {name: sizeof(cls) for name, cls in c_structs() if name not in KERNEL_STRUCTS | SHRUNK_STRUCTS}
    assert len(expected) > 90
    found = compile_facts(tmp_path, [f"sizeof(struct {name})" for name in expected])
    got = {expression[len("sizeof(struct ") : -1]: value for expression, value in found.items()}
    assert got == {name: expected[name] for name in got}
    assert set(expected) - set(got) <= NEWER_STRUCTS


def test_struct_fields(tmp_path: Path) -> None:
    expected: dict[str, tuple[str, int]] = {}
    for name, cls in c_structs():
        if name in KERNEL_STRUCTS:
            continue
        for c_path, path in fields(cls):
            key = f"{name}.{c_path}"
            expected[f"offsetof(struct {name}, {c_path})"] = key, offset_of(cls, path)
            expected[f"sizeof(((struct {name} *)0)->{c_path})"] = key, field_size(cls, path)
    found = compile_facts(tmp_path, list(expected))
    wrong = {key: (value, expected[key][1]) for key, value in found.items() if value != expected[key][1]}
    assert not wrong
    missing = {key for expression, (key, _) in expected.items() if expression not in found}
    unknown = {
        key
        for key in missing
        if key.split(".")[0] not in NEWER_STRUCTS
        and not NAMED_HOLE.fullmatch(key)
        and not any(key == newer or key.startswith(newer + ".") for newer in NEWER_FIELDS)
    }
    assert not unknown
    assert len(found) > 1200


def constants(module: ModuleType, prefix: str = "") -> dict[str, int]:
    """Name in C to value, of a module's integer constants."""
    return {
        prefix + name: value
        for name, value in vars(module).items()
        if name.isupper() and isinstance(value, int) and not name.startswith("_")
    }


@pytest.mark.parametrize(
    ("module", "prefix", "at_least"),
    [
        (exits, "", 100),
        (flags, "", 130),
        (para, "", 45),
        (caps, "", 210),
        (svm, "", 85),
        (vmx, "", 60),
        (x86, "", 35),
        (x86, "X86_", 25),
    ],
)
def test_constants(tmp_path: Path, module: ModuleType, prefix: str, at_least: int) -> None:
    expected = constants(module, prefix)
    # BITUL and friends give unsigned long, a plain 1 << 31 an int: compare what both mean in 64 bits
    found = compile_facts(tmp_path, list(expected))
    wrong = {name: value for name, value in found.items() if value != expected[name] & (1 << 64) - 1}
    assert not wrong
    print(f"{module.__name__}: {len(found)} compared, {len(expected) - len(found)} not in these headers")
    assert len(found) >= at_least


def test_pvclock_sizes() -> None:
    assert sizeof(structs.PvclockVcpuTimeInfo) == 32
    assert sizeof(structs.PvclockWallClock) == 12
