# SPDX-License-Identifier: GPL-2.0-or-later
"""A vCPU's registers: reset values, round trips, what is refused."""

from __future__ import annotations

import errno as E
import struct

from kvmfs.abi.ioctls import Level
from kvmfs.abi.structs import (
    KvmDebugregs,
    KvmFpu,
    KvmLapicState,
    KvmRegs,
    KvmSregs,
    KvmSregs2,
    KvmTranslation,
    KvmXcr,
    KvmXcrs,
)

from .model import Trial, buffer, case
from .vcpu_cpuid import set_supported_cpuid
from .wire import BAD_POINTER, PAGE

VCPU = Level.VCPU
NAMES = ("rax", "rbx", "rcx", "rdx", "rsi", "rdi", "rsp", "rbp", "r8", "r9", "r10", "r11", "r12", "r13", "r14", "r15")
XMM = 152               # kvm_fpu.xmm
Sregs = KvmSregs | KvmSregs2


@case("KVM_GET_REGS", VCPU, "reset values")
def get_regs(t: Trial) -> None:
    regs = KvmRegs()
    t.need("success", t.ioctl(t.vcpu, "KVM_GET_REGS", regs))
    t.equal("rip", regs.rip, 0xFFF0)
    t.equal("rflags", regs.rflags, 2)
    t.equal("rdx, family 6 while there is no CPUID", regs.rdx, 0x600)
    t.equal("the others", [getattr(regs, name) for name in NAMES if name != "rdx"], [0] * 15)


@case("KVM_SET_REGS", VCPU, "round trip")
def set_regs(t: Trial) -> None:
    regs = KvmRegs(rip=0x8000, rflags=0x246)
    for i, name in enumerate(NAMES):
        setattr(regs, name, 0x1122334455667700 + i)
    t.need("set", t.ioctl(t.vcpu, "KVM_SET_REGS", regs))
    again = KvmRegs()
    t.need("get", t.ioctl(t.vcpu, "KVM_GET_REGS", again))
    t.equal("every register", bytes(again) == bytes(regs), True)
    regs.rflags = 0
    t.need("rflags 0", t.ioctl(t.vcpu, "KVM_SET_REGS", regs))
    t.need("get again", t.ioctl(t.vcpu, "KVM_GET_REGS", again))
    t.equal("bit 1 is always set", again.rflags, 2)


@case("KVM_SET_REGS", VCPU, "clears a pending exception")
def set_regs_exception(t: Trial) -> None:
    events = buffer(64, b"\1\x0d\1\0" + struct.pack("<I", 8))         # #GP(8) injected
    t.need("an exception", t.ioctl(t.vcpu, "KVM_SET_VCPU_EVENTS", events))
    t.need("set", t.ioctl(t.vcpu, "KVM_SET_REGS", KvmRegs(rflags=2)))
    t.need("the events", t.ioctl(t.vcpu, "KVM_GET_VCPU_EVENTS", events))
    t.note("an injected exception after it", events.raw[0])


def _check_reset(t: Trial, sregs: Sregs) -> None:
    cs = sregs.cs
    t.equal("cs selector, base, limit", (cs.selector, cs.base, cs.limit), (0xF000, 0xFFFF0000, 0xFFFF))
    t.equal("cs attributes", (cs.type, cs.present, cs.s, cs.dpl, cs.l), (11, 1, 1, 0, 0), (3, 1, 1, 0, 0))
    for name in ("ds", "es", "fs", "gs", "ss"):
        segment = getattr(sregs, name)
        t.equal(name, (segment.selector, segment.base, segment.limit, segment.present, segment.s), (0, 0, 0xFFFF, 1, 1))
    t.equal("tr, a 16- or 32-bit TSS by vendor", (sregs.tr.type, sregs.tr.present, sregs.tr.limit), (11, 1, 0xFFFF), (3, 1, 0xFFFF))
    t.equal("ldt", (sregs.ldt.type, sregs.ldt.present, sregs.ldt.limit), (2, 1, 0xFFFF))
    t.equal("gdt", (sregs.gdt.base, sregs.gdt.limit), (0, 0xFFFF))
    t.equal("idt", (sregs.idt.base, sregs.idt.limit), (0, 0xFFFF))
    t.equal("cr0", sregs.cr0, 0x60000010)
    t.equal("cr2 cr3 cr4 cr8 efer", (sregs.cr2, sregs.cr3, sregs.cr4, sregs.cr8, sregs.efer), (0,) * 5)
    t.equal("apic_base", sregs.apic_base, 0xFEE00900)


@case("KVM_GET_SREGS", VCPU, "reset values")
def get_sregs(t: Trial) -> None:
    sregs = KvmSregs()
    t.need("success", t.ioctl(t.vcpu, "KVM_GET_SREGS", sregs))
    _check_reset(t, sregs)
    t.equal("no interrupt", list(sregs.interrupt_bitmap), [0] * 4)
    other = t.new_vcpu(t.vm, 1)
    t.need("vCPU 1", t.ioctl(other, "KVM_GET_SREGS", sregs))
    t.equal("its apic_base has no BSP bit", sregs.apic_base, 0xFEE00800)


@case("KVM_GET_SREGS2", VCPU, "reset values", "SREGS2")
def get_sregs2(t: Trial) -> None:
    sregs = KvmSregs2()
    t.need("success", t.ioctl(t.vcpu, "KVM_GET_SREGS2", sregs))
    _check_reset(t, sregs)
    t.equal("flags: no PDPTRs", sregs.flags, 0)


def protected_mode(sregs: Sregs) -> None:
    """Flat 32-bit segments, no paging."""
    for name in ("cs", "ds", "es", "fs", "gs", "ss"):
        segment = getattr(sregs, name)
        segment.selector, segment.base, segment.limit = 0x10, 0, 0xFFFFFFFF
        segment.type, segment.present, segment.dpl, segment.db, segment.s, segment.l, segment.g = 3, 1, 0, 1, 1, 0, 1
    sregs.cs.selector, sregs.cs.type = 8, 11
    sregs.cr0 = 0x11


def long_mode(sregs: Sregs, cr3: int) -> None:
    """64-bit mode with page tables at ``cr3``."""
    protected_mode(sregs)
    sregs.cs.l, sregs.cs.db = 1, 0
    sregs.cr0, sregs.cr3, sregs.cr4, sregs.efer = 0x80000011, cr3, 0x20, 0x500


def _round_trip(t: Trial, suffix: str, kind: type[Sregs]) -> None:
    vcpu, sregs, again = t.vcpu, kind(), kind()
    t.need("get", t.ioctl(vcpu, f"KVM_GET_SREGS{suffix}", sregs))
    t.ok("what was read is accepted", t.ioctl(vcpu, f"KVM_SET_SREGS{suffix}", sregs))
    t.need("get", t.ioctl(vcpu, f"KVM_GET_SREGS{suffix}", again))
    t.equal("nothing changed", bytes(again) == bytes(sregs), True)
    protected_mode(sregs)
    sregs.gdt.base, sregs.gdt.limit, sregs.idt.base, sregs.idt.limit, sregs.cr2, sregs.cr8 = 0x5000, 0x27, 0x6000, 0xFFF, 0x1234, 5
    sregs.fs.base, sregs.gs.base = 0x10000, 0x20000
    t.ok("protected mode", t.ioctl(vcpu, f"KVM_SET_SREGS{suffix}", sregs))
    t.need("get", t.ioctl(vcpu, f"KVM_GET_SREGS{suffix}", again))
    for name in ("cr0", "cr2", "cr3", "cr4", "cr8", "efer"):
        t.equal(f"protected mode: {name}", getattr(again, name), getattr(sregs, name))
    for name in ("cs", "ds", "fs", "gs", "ss"):
        t.equal(f"protected mode: {name}", _segment(again, name), _segment(sregs, name))
    t.equal("gdt", (again.gdt.base, again.gdt.limit), (0x5000, 0x27))
    t.equal("idt", (again.idt.base, again.idt.limit), (0x6000, 0xFFF))
    long_mode(sregs, 0x3000)
    set_supported_cpuid(t, vcpu)
    t.ok("long mode", t.ioctl(vcpu, f"KVM_SET_SREGS{suffix}", sregs))
    t.need("get", t.ioctl(vcpu, f"KVM_GET_SREGS{suffix}", again))
    t.equal("long mode: cr0 cr3 cr4 efer", (again.cr0, again.cr3, again.cr4, again.efer), (0x80000011, 0x3000, 0x20, 0x500))
    t.equal("long mode: cs", _segment(again, "cs"), _segment(sregs, "cs"))


def _segment(sregs: Sregs, name: str) -> tuple[int, ...]:
    segment = getattr(sregs, name)
    return tuple(getattr(segment, part) for part in (
        "selector", "base", "limit", "type", "present", "dpl", "db", "s", "l", "g", "avl", "unusable"))


def _refused(t: Trial, suffix: str, kind: type[Sregs]) -> None:
    vcpu = t.vcpu
    set_supported_cpuid(t, vcpu)

    def refused(label: str, **values: int) -> None:
        sregs = kind()
        t.need("get", t.ioctl(vcpu, f"KVM_GET_SREGS{suffix}", sregs))
        before = bytes(sregs)
        mode = values.pop("long", 0)
        if mode:
            long_mode(sregs, 0x3000)
        for name, value in values.items():
            if name == "l":
                sregs.cs.l = value
            else:
                setattr(sregs, name, value)
        t.errno(label, t.ioctl(vcpu, f"KVM_SET_SREGS{suffix}", sregs), E.EINVAL)
        again = kind()
        t.need("get", t.ioctl(vcpu, f"KVM_GET_SREGS{suffix}", again))
        t.equal(f"{label}: nothing changed", bytes(again) == before, True)

    refused("long mode without PAE", long=1, cr4=0)
    refused("long mode without LMA", long=1, efer=0x100)
    refused("cr3 beyond the address width", long=1, cr3=1 << 60)
    refused("LMA without paging", efer=0x500)
    refused("64-bit cs outside long mode", l=1)
    refused("paging without protection", cr0=0x80000010)
    refused("NW without CD", cr0=0x20000010)
    refused("cr0 above 32 bits", cr0=1 << 32 | 0x10)
    refused("unknown bit of cr4", cr4=1 << 31)
    refused("unknown bit of efer", efer=1 << 9)
    refused("reserved bits of apic_base", apic_base=0xFEE00900 | 1)


@case("KVM_SET_SREGS", VCPU, "round trip", "EXT_CPUID")
def set_sregs(t: Trial) -> None:
    _round_trip(t, "", KvmSregs)


@case("KVM_SET_SREGS", VCPU, "what is refused", "EXT_CPUID")
def set_sregs_refused(t: Trial) -> None:
    _refused(t, "", KvmSregs)


@case("KVM_SET_SREGS", VCPU, "interrupt bitmap")
def set_sregs_interrupt(t: Trial) -> None:
    sregs = KvmSregs()
    t.need("get", t.ioctl(t.vcpu, "KVM_GET_SREGS", sregs))
    sregs.interrupt_bitmap[1] = 1 << 3 | 1 << 9
    t.need("two vectors", t.ioctl(t.vcpu, "KVM_SET_SREGS", sregs))
    t.need("get", t.ioctl(t.vcpu, "KVM_GET_SREGS", sregs))
    t.equal("the lowest is queued", list(sregs.interrupt_bitmap), [0, 1 << 3, 0, 0])
    sregs.interrupt_bitmap[1] = 0
    t.need("none", t.ioctl(t.vcpu, "KVM_SET_SREGS", sregs))
    t.need("get", t.ioctl(t.vcpu, "KVM_GET_SREGS", sregs))
    t.equal("an empty bitmap withdraws nothing", sregs.interrupt_bitmap[1], 1 << 3)


@case("KVM_SET_SREGS2", VCPU, "round trip", "SREGS2", "EXT_CPUID")
def set_sregs2(t: Trial) -> None:
    _round_trip(t, "2", KvmSregs2)


@case("KVM_SET_SREGS2", VCPU, "what is refused", "SREGS2", "EXT_CPUID")
def set_sregs2_refused(t: Trial) -> None:
    _refused(t, "2", KvmSregs2)
    sregs = KvmSregs2()
    t.need("get", t.ioctl(t.vcpu, "KVM_GET_SREGS2", sregs))
    sregs.flags = 2
    t.errno("unknown flag", t.ioctl(t.vcpu, "KVM_SET_SREGS2", sregs), E.EINVAL)
    sregs.flags = 1
    t.errno("PDPTRs without PAE paging", t.ioctl(t.vcpu, "KVM_SET_SREGS2", sregs), E.EINVAL)


# ---- x87, SSE, extended state -------------------------------------------------------------------------------


@case("KVM_GET_FPU", VCPU, "reset values")
def get_fpu(t: Trial) -> None:
    fpu = KvmFpu()
    t.need("success", t.ioctl(t.vcpu, "KVM_GET_FPU", fpu))
    t.equal("fcw fsw ftwx", (fpu.fcw, fpu.fsw, fpu.ftwx), (0x37F, 0, 0))
    t.equal("mxcsr is not part of it", fpu.mxcsr, 0)
    t.equal("registers", any(bytes(fpu.fpr)) or any(bytes(fpu.xmm)), False)


@case("KVM_SET_FPU", VCPU, "round trip")
def set_fpu(t: Trial) -> None:
    fpu = KvmFpu(fcw=0x27F, fsw=0x3800, ftwx=0x80, last_opcode=0x123, last_ip=0x1000, last_dp=0x2000, mxcsr=0x1FA0)
    data = bytearray(bytes(fpu))
    data[XMM:XMM + 256] = bytes(range(256))
    for i in range(8):
        data[16 * i] = i + 1
    fpu = KvmFpu.from_buffer_copy(data)
    t.need("set", t.ioctl(t.vcpu, "KVM_SET_FPU", fpu))
    again = KvmFpu()
    t.need("get", t.ioctl(t.vcpu, "KVM_GET_FPU", again))
    t.equal("fcw fsw ftwx opcode", (again.fcw, again.fsw, again.ftwx, again.last_opcode), (0x27F, 0x3800, 0x80, 0x123))
    t.equal("ip and dp", (again.last_ip, again.last_dp), (0x1000, 0x2000))
    t.equal("xmm", bytes(again.xmm) == bytes(fpu.xmm), True)
    t.equal("st", [bytes(again)[16 * i] for i in range(8)], list(range(1, 9)))
    t.equal("mxcsr is not part of it", again.mxcsr, 0)


@case("KVM_GET_XSAVE", VCPU, "reset values", "XSAVE")
def get_xsave(t: Trial) -> None:
    image = buffer(4096, b"\xff" * 4096)
    t.need("success", t.ioctl(t.vcpu, "KVM_GET_XSAVE", image))
    fcw, fsw = struct.unpack_from("<HH", image, 0)
    t.equal("fcw fsw", (fcw, fsw), (0x37F, 0))
    t.equal("mxcsr", struct.unpack_from("<I", image, 24)[0], 0x1F80)
    xstate_bv, xcomp_bv = struct.unpack_from("<QQ", image, 512)
    t.equal("not compacted", xcomp_bv, 0)
    t.note("xstate_bv", xstate_bv)
    t.equal("reserved words of the header", any(bytes(image)[528:576]), False)


@case("KVM_SET_XSAVE", VCPU, "round trip", "XSAVE")
def set_xsave(t: Trial) -> None:
    image = buffer(max(4096, t.has("XSAVE2")))
    t.need("get", t.ioctl(t.vcpu, "KVM_GET_XSAVE", image))
    struct.pack_into("<H", image, 0, 0x27F)
    struct.pack_into("<I", image, 24, 0x1FA0)
    struct.pack_into("<16s", image, 160, b"sixteen bytes...")
    struct.pack_into("<Q", image, 512, 3)
    t.need("set", t.ioctl(t.vcpu, "KVM_SET_XSAVE", image))
    again = buffer(len(image))
    t.need("get again", t.ioctl(t.vcpu, "KVM_GET_XSAVE", again))
    t.equal("fcw", struct.unpack_from("<H", again, 0)[0], 0x27F)
    t.equal("mxcsr", struct.unpack_from("<I", again, 24)[0], 0x1FA0)
    t.equal("xmm0", bytes(again)[160:176], b"sixteen bytes...")
    struct.pack_into("<Q", image, 512, 1 << 62)
    t.errno("unknown feature", t.ioctl(t.vcpu, "KVM_SET_XSAVE", image), E.EINVAL)
    struct.pack_into("<Q", image, 512, 3)
    struct.pack_into("<I", image, 24, 0xFFFFFFFF)
    t.errno("reserved bits of mxcsr", t.ioctl(t.vcpu, "KVM_SET_XSAVE", image), E.EINVAL)


@case("KVM_GET_XSAVE2", VCPU, "as kvm_get_xsave", "XSAVE2")
def get_xsave2(t: Trial) -> None:
    size = t.has("XSAVE2")
    t.true("not below 4096 bytes", size >= 4096, size)
    image, old = buffer(size + 16, b"\xa5" * (size + 16)), buffer(4096)
    t.need("success", t.ioctl(t.vcpu, "KVM_GET_XSAVE2", image))
    t.need("the old one", t.ioctl(t.vcpu, "KVM_GET_XSAVE", old))
    t.equal("the same 4096 bytes", bytes(image)[:4096] == bytes(old), True)
    t.equal("nothing beyond the size", bytes(image)[size:], b"\xa5" * 16)


@case("KVM_GET_XCRS", VCPU, "reset values", "XCRS")
def get_xcrs(t: Trial) -> None:
    xcrs = KvmXcrs()
    t.need("success", t.ioctl(t.vcpu, "KVM_GET_XCRS", xcrs))
    t.equal("one register, no flags", (xcrs.nr_xcrs, xcrs.flags), (1, 0))
    t.equal("XCR0", (xcrs.xcrs[0].xcr, xcrs.xcrs[0].value), (0, 1))


@case("KVM_SET_XCRS", VCPU, "values and errors", "XCRS", "EXT_CPUID")
def set_xcrs(t: Trial) -> None:
    vcpu, name = t.vcpu, "KVM_SET_XCRS"

    def xcrs(value: int, *, nr: int = 1, flags: int = 0, xcr: int = 0) -> KvmXcrs:
        result = KvmXcrs(nr_xcrs=nr, flags=flags)
        result.xcrs[0] = KvmXcr(xcr=xcr, value=value)
        return result

    t.errno("SSE before CPUID knows of it", t.ioctl(vcpu, name, xcrs(3)), E.EINVAL)
    set_supported_cpuid(t, vcpu)
    t.ok("x87 and SSE", t.ioctl(vcpu, name, xcrs(3)))
    again = KvmXcrs()
    t.need("get", t.ioctl(vcpu, "KVM_GET_XCRS", again))
    t.equal("it was taken", again.xcrs[0].value, 3)
    t.errno("without x87", t.ioctl(vcpu, name, xcrs(2)), E.EINVAL)
    t.errno("AVX without SSE", t.ioctl(vcpu, name, xcrs(5)), E.EINVAL)
    t.errno("unknown bit", t.ioctl(vcpu, name, xcrs(1 << 62 | 1)), E.EINVAL)
    t.errno("17 registers", t.ioctl(vcpu, name, xcrs(1, nr=17)), E.EINVAL)
    t.errno("flags", t.ioctl(vcpu, name, xcrs(1, flags=1)), E.EINVAL)
    t.ok("none", t.ioctl(vcpu, name, xcrs(2, nr=0)))
    t.ok("another register is not looked at", t.ioctl(vcpu, name, xcrs(99, xcr=1)))


# ---- debug registers, APIC, translation ---------------------------------------------------------------------


@case("KVM_GET_DEBUGREGS", VCPU, "reset values", "DEBUGREGS")
def get_debugregs(t: Trial) -> None:
    regs = KvmDebugregs()
    t.need("success", t.ioctl(t.vcpu, "KVM_GET_DEBUGREGS", regs))
    t.equal("addresses", list(regs.db), [0] * 4)
    t.equal("dr6 dr7", (regs.dr6, regs.dr7), (0xFFFF0FF0, 0x400))
    t.equal("flags", regs.flags, 0)


@case("KVM_SET_DEBUGREGS", VCPU, "round trip and errors", "DEBUGREGS")
def set_debugregs(t: Trial) -> None:
    name, regs = "KVM_SET_DEBUGREGS", KvmDebugregs(dr6=0xFFFF0FF1, dr7=0x401)
    regs.db[0], regs.db[3] = 0x1000, 0xFFFFFFFF81000000
    t.need("set", t.ioctl(t.vcpu, name, regs))
    again = KvmDebugregs()
    t.need("get", t.ioctl(t.vcpu, "KVM_GET_DEBUGREGS", again))
    t.equal("every register", bytes(again) == bytes(regs), True)
    t.errno("flags", t.ioctl(t.vcpu, name, KvmDebugregs(dr6=0xFFFF0FF0, dr7=0x400, flags=1)), E.EINVAL)
    t.errno("dr6 above 32 bits", t.ioctl(t.vcpu, name, KvmDebugregs(dr6=1 << 32, dr7=0x400)), E.EINVAL)
    t.errno("dr7 above 32 bits", t.ioctl(t.vcpu, name, KvmDebugregs(dr6=0xFFFF0FF0, dr7=1 << 32)), E.EINVAL)


@case("KVM_GET_LAPIC", VCPU, "reset values", "IRQCHIP")
def get_lapic(t: Trial) -> None:
    without = t.new_vcpu(t.new_vm())
    t.errno("without an irqchip", t.ioctl(without, "KVM_GET_LAPIC", KvmLapicState()), E.EINVAL)
    t.errno("which is looked at before the pointer", t.ioctl(without, "KVM_GET_LAPIC", BAD_POINTER), E.EINVAL)
    t.need("an irqchip", t.ioctl(t.vm, "KVM_CREATE_IRQCHIP"))
    page = buffer(1024)
    t.need("success", t.ioctl(t.vcpu, "KVM_GET_LAPIC", page))
    word = {at: struct.unpack_from("<I", page, at)[0] for at in range(0, 1024, 16)}
    t.equal("id", word[0x20], 0)
    t.equal("version", word[0x30] & 0xFF, 0x14)
    t.equal("spurious vector: off", word[0xF0], 0xFF)
    t.equal("destination format", word[0xE0], 0xFFFFFFFF)
    t.equal("timer and error are masked", (word[0x320], word[0x370]), (0x10000, 0x10000))
    t.equal("LINT0 takes the PIC's", word[0x350], 0x700)


@case("KVM_SET_LAPIC", VCPU, "round trip", "IRQCHIP")
def set_lapic(t: Trial) -> None:
    without = t.new_vcpu(t.new_vm())
    t.errno("without an irqchip", t.ioctl(without, "KVM_SET_LAPIC", KvmLapicState()), E.EINVAL)
    t.need("an irqchip", t.ioctl(t.vm, "KVM_CREATE_IRQCHIP"))
    page = buffer(1024)
    t.need("get", t.ioctl(t.vcpu, "KVM_GET_LAPIC", page))
    struct.pack_into("<I", page, 0xF0, 0x1FF)
    struct.pack_into("<I", page, 0x80, 0x20)
    struct.pack_into("<I", page, 0x210, 1 << 5)                     # irr: vector 37
    t.need("set", t.ioctl(t.vcpu, "KVM_SET_LAPIC", page))
    again = buffer(1024)
    t.need("get again", t.ioctl(t.vcpu, "KVM_GET_LAPIC", again))
    for label, at in (("spurious vector", 0xF0), ("tpr", 0x80), ("irr", 0x210)):
        t.equal(label, struct.unpack_from("<I", again, at)[0], struct.unpack_from("<I", page, at)[0])


@case("KVM_TRANSLATE", VCPU, "without paging")
def translate_flat(t: Trial) -> None:
    for at, valid in ((0, 1), (0x12345, 1), (0xFFFFFFF0, 1), ((1 << 64) - 1, 0)):       # the last is INVALID_GPA
        tr = KvmTranslation(linear_address=at)
        t.need(f"{at:#x}", t.ioctl(t.vcpu, "KVM_TRANSLATE", tr))
        t.equal(f"{at:#x}: itself", (tr.physical_address, tr.valid), (at, valid))
        t.equal(f"{at:#x}: writeable, not user", (tr.writeable, tr.usermode), (1, 0))


@case("KVM_TRANSLATE", VCPU, "long mode tables", "EXT_CPUID")
def translate_long(t: Trial) -> None:
    memory = t.memory(16 * PAGE)
    t.need("memory", t.slot(t.vm, 0, 0, memory))
    set_supported_cpuid(t, t.vcpu)
    for at, value in ((0x3000, 0x4003), (0x4000, 0x5003), (0x5000, 0x200083), (0x5008, 0x6003), (0x6000, 0x7003)):
        memory.write(at, struct.pack("<Q", value))
    sregs = KvmSregs()
    t.need("get", t.ioctl(t.vcpu, "KVM_GET_SREGS", sregs))
    long_mode(sregs, 0x3000)
    t.need("long mode", t.ioctl(t.vcpu, "KVM_SET_SREGS", sregs))
    for label, at, expected in (("2 MiB page", 0x1234, 0x201234), ("4 KiB page", 0x200123, 0x7123), ("not present", 0x201000, None),
                                ("no table", 1 << 39, None), ("table beyond memory", 1 << 30, None)):
        tr = KvmTranslation(linear_address=at)
        t.need(label, t.ioctl(t.vcpu, "KVM_TRANSLATE", tr))
        if expected is None:
            t.equal(f"{label}: not valid", (tr.valid, tr.physical_address), (0, (1 << 64) - 1))
        else:
            t.equal(f"{label}: valid", (tr.valid, tr.physical_address), (1, expected))


