# SPDX-License-Identifier: GPL-2.0-or-later
"""Instructions a guest may use, with what hardware does: what CPUID offers works, what it does not is #UD."""

import pytest

from kvmfs.abi.exits import KVM_EXIT_IO
from kvmfs.abi.structs import KvmRun
from tests.unit.irq_machine import IrqMachine

DONE = 1
SSE = "mov ecx, cr4; or ecx, 0x40200; mov cr4, ecx\n"       # OSFXSR, OSXSAVE
DATA = 0x4000
DE, DB, BP, OF, BR, UD, GP = 0, 1, 3, 4, 5, 6, 13

FINE = {                                        # → eax
    "xlatb": (f"mov ebx, {DATA}; mov byte ptr [{DATA + 5}], 0x7e; mov eax, 5; xlatb", 0x7E),
    "bound": (f"mov dword ptr [{DATA}], 1; mov dword ptr [{DATA + 4}], 9; mov eax, 5; bound eax, [{DATA}]", 5),
    "aad": ("mov eax, 0x0205; aad", 25),
    "daa": ("mov eax, 0x9b; daa", 1),
    "salc": ("xor eax, eax; stc; .byte 0xd6", 0xFF),
    "pushad": ("mov eax, 7; pushad; xor eax, eax; popad", 7),
    "enter": ("mov ebp, 0x6000; mov eax, 3; enter 16, 3; leave; mov eax, ebp", 0x6000),
    "cmpxchg8b": (f"xor eax, eax; xor edx, edx; mov ebx, 7; mov ecx, 8; lock cmpxchg8b [{DATA}]; mov eax, [{DATA + 4}]", 8),
    "far call": ("call 8:there; jmp past; there: mov eax, 0x77; retf; past: nop", 0x77),
    "iret": ("mov eax, 9; pushfd; push 8; push offset past; iretd; past: nop", 9),
    "arpl": ("mov eax, 0x10; mov ebx, 3; arpl ax, bx", 0x13),
    "lss": (f"mov dword ptr [{DATA}], 0x6f00; mov word ptr [{DATA + 4}], 16; lss esp, [{DATA}]; mov eax, esp", 0x6F00),
    "smsw": ("smsw eax", 0x11),
    "fisttp": (f"fninit; fld1; fisttp dword ptr [{DATA}]; mov eax, [{DATA}]", 1),
    "fpu environment": (f"fninit; fnstenv [{DATA}]; fldenv [{DATA}]; fnsave [{DATA}]; frstor [{DATA}]; mov ax, [{DATA}]; cwde",
                        0x37F),
    "movnti": (f"mov ebx, 5; movnti [{DATA}], ebx; mov eax, [{DATA}]", 5),
    "maskmovdqu": (SSE + f"pcmpeqd xmm0, xmm0; mov edi, {DATA}; maskmovdqu xmm0, xmm0; mov eax, [{DATA + 12}]", 0xFFFFFFFF),
    "movbe": (f"mov ebx, 0x11223344; movbe [{DATA}], ebx; mov eax, [{DATA}]", 0x44332211),
    "bit string": (f"mov ebx, 100; lock bts [{DATA}], ebx; mov eax, [{DATA + 12}]", 0x10),
    "lock": (f"mov dword ptr [{DATA}], 2; lock add dword ptr [{DATA}], 3; lock neg dword ptr [{DATA}]\n"
             f"lock inc dword ptr [{DATA}]; lock btc dword ptr [{DATA}], 4; mov eax, 1; lock xchg eax, [{DATA}]", 0xFFFFFFEC),
    "les, lds": (f"mov dword ptr [{DATA}], 7; mov word ptr [{DATA + 4}], 16; les ebx, [{DATA}]; lds eax, [{DATA}]", 7),
    "xadd": (f"mov dword ptr [{DATA}], 3; mov eax, 4; lock xadd [{DATA}], eax", 3),
    "crc32": ("xor eax, eax; mov ebx, 1; crc32 eax, ebx", 0xDD45AAB8),
    "popcnt": ("mov ebx, 255; popcnt eax, ebx", 8), "lzcnt": ("mov ebx, 255; lzcnt eax, ebx", 24),
    "tzcnt": ("mov ebx, 256; tzcnt eax, ebx", 8),
    "adcx": (SSE + "mov eax, 1; mov ebx, 2; stc; adcx eax, ebx", 4),
    "adox": ("mov eax, 1; mov ebx, 2; xor ecx, ecx; adox eax, ebx", 3),
    "aes": (SSE + "pxor xmm0, xmm0; pxor xmm1, xmm1; aesenc xmm0, xmm1; movd eax, xmm0", 0x63636363),
    "pclmulqdq": (SSE + "mov eax, 3; movd xmm0, eax; pclmulqdq xmm0, xmm0, 0; movd eax, xmm0", 5),
    "xgetbv": (SSE + "mov eax, 3; xor edx, edx; xor ecx, ecx; xsetbv; xor eax, eax; xgetbv", 3),
    "vmovdqu": (SSE + f"mov dword ptr [{DATA}], 7; vmovdqu xmm1, [{DATA}]; vmovdqa xmm0, xmm1; movd eax, xmm0", 7),
    "xsave": (SSE + f"mov eax, 3; xor edx, edx; xsave [{DATA}]; xsaveopt [{DATA}]; xrstor [{DATA}]", 3),
    "hints": (f"mov eax, 1; prefetcht0 [{DATA}]; prefetchw [{DATA}]; clflush [{DATA}]; clflushopt [{DATA}]; pause; endbr32", 1),
    "caches": (f"mov eax, 1; invlpg [{DATA}]; wbinvd; invd", 1),
    "tables": (f"sgdt [{DATA}]; sidt [{DATA + 8}]; movzx eax, word ptr [{DATA}]", 31),
    "debug register 4": ("mov eax, dr4", 0xFFFF0FF0),
    # Prefixes that mean nothing count as bytes of the instruction.
    "sysenter": ("xor edx, edx; mov ecx, 0x174; mov eax, 8; wrmsr; inc ecx; mov eax, 0x6000; wrmsr; inc ecx\n"
                 "mov eax, offset past; wrmsr; .byte 0x3e; sysenter; hlt; past: mov eax, esp; add eax, 2", 0x6002),
    "prefixed cpuid": ("xor eax, eax; .byte 0x66, 0x3e; cpuid; mov eax, 5", 5),
    "prefixed wbinvd": ("mov eax, 5; .byte 0xf3; wbinvd", 5),
    "prefixed rdmsr": ("mov ecx, 0x1b; .byte 0x3e; rdmsr; and eax, 0x800", 0x800),
    "prefixed wrmsr": ("mov ecx, 0xc0000102; xor edx, edx; mov eax, 7; .byte 0x2e; wrmsr; rdmsr", 7),
}
FAULTS = {
    "bound": (f"mov dword ptr [{DATA}], 1; mov dword ptr [{DATA + 4}], 9; mov eax, 15; bound eax, [{DATA}]", BR),
    "into": ("mov al, 0x7f; add al, 1; into", OF), "int3": ("int3", BP), "icebp": (".byte 0xf1", DB),
    "aam 0": ("aam 0", DE), "div": ("xor ebx, ebx; div ebx", DE),
    "idiv": ("mov eax, 0x80000000; cdq; mov ebx, -1; idiv ebx", DE),
    "rdpmc": ("xor ecx, ecx; rdpmc", GP), "xsetbv": (SSE + "xor ecx, ecx; xor edx, edx; mov eax, 2; xsetbv", GP),
    "16 bytes": (".byte " + "0x66, " * 15 + "0x90", GP),
    "xgetbv 1": (SSE + "mov ecx, 1; xgetbv", GP), "sysenter": ("mov ecx, 0x174; xor edx, edx; mov eax, 3; wrmsr; sysenter", GP),
    "sysexit": ("xor eax, eax; mov ecx, 0x174; xor edx, edx; wrmsr; sysexit", GP),
    **{name: (code, UD) for name, code in {
        "ud2": "ud2", "ud1": ".byte 0x0f, 0xb9, 0xc0", "ud0": ".byte 0x0f, 0xff, 0xc0", "0f 04": ".byte 0x0f, 0x04",
        "xgetbv without OSXSAVE": "xor ecx, ecx; xgetbv", "rdpid": ".byte 0xf3, 0x0f, 0xc7, 0xf8", "clwb": f"clwb [{DATA}]",
        "invpcid": f"mov eax, 2; invpcid eax, [{DATA}]", "xsavec": SSE + f"mov eax, 3; xor edx, edx; xsavec [{DATA}]",
        "xsaves": SSE + f"mov eax, 3; xor edx, edx; xsaves [{DATA}]", "sha": SSE + "sha256rnds2 xmm1, xmm2, xmm0",
        "gfni": SSE + "gf2p8mulb xmm0, xmm1", "3dnow": "pfadd mm0, mm1", "rdpkru": ".byte 0x0f, 0x01, 0xee",
        "xtest": "xtest", "serialize": ".byte 0x0f, 0x01, 0xe8", "clzero": ".byte 0x0f, 0x01, 0xfc",
        "monitorx": ".byte 0x0f, 0x01, 0xfa", "swapgs": ".byte 0x0f, 0x01, 0xf8", "syscall": "syscall", "rsm": "rsm",
        "vmlaunch": "vmlaunch", "vmxon": f"vmxon [{DATA}]", "vmrun": "vmrun", "stgi": "stgi", "skinit": "skinit",
        "getsec": "getsec", "encls": ".byte 0x0f, 0x01, 0xcf", "lock nop": ".byte 0xf0, 0x90", "mov cs": ".byte 0x8e, 0xc8",
        **{f"lock {name}": f".byte 0xf0; {code}" for name, code in {
            "mov": f"mov [{DATA}], eax", "cmp": f"cmp [{DATA}], eax", "cmp with an immediate": f"cmp dword ptr [{DATA}], 1",
            "add to a register": f"add eax, [{DATA}]", "add of registers": "add eax, ebx", "btc of a register": "btc eax, edx",
            "bt": f"bt dword ptr [{DATA}], 1", "bts of a register": "bts eax, 3", "xchg of registers": ".byte 0x87, 0xc3",
            "not of a register": "not eax", "div": "div ebx", "push": f"push dword ptr [{DATA}]", "movsb": "movsb",
            "shl": f"shl dword ptr [{DATA}], 1", "cmpxchg of registers": "cmpxchg eax, ebx", "jmp": ".byte 0xeb, 0"}.items()},
        "vzeroupper": SSE + "vzeroupper", "vaddps": SSE + "vaddps xmm0, xmm1, xmm2", "vmovd": SSE + "vmovd xmm0, eax",
        "vpxor": SSE + "vpxor ymm0, ymm1, ymm2", "vpmulld": SSE + "vpmulld xmm0, xmm1, xmm2",
        "vmovdqu without XSAVE": f"vmovdqu xmm0, [{DATA}]", "vmovdqu ymm": SSE + f"vmovdqu ymm0, [{DATA}]",
        "andn with L": ".byte 0xc4, 0xe2, 0x64, 0xf2, 0xc1",
        "andn": "andn eax, ebx, ecx", "bzhi": "bzhi eax, ebx, ecx", "rorx": "rorx eax, ecx, 1",
        "xbegin": ".byte 0xc7, 0xf8, 0, 0, 0, 0",
        "xabort": ".byte 0xc6, 0xf8, 0",
        "c7 /1": ".byte 0xc7, 0xc8, 0, 0, 0, 0", "xop": ".byte 0x8f, 0xe8, 0x78, 0xa2, 0xc0, 0",
        "mov cr1": ".byte 0x0f, 0x20, 0xc8", "mov cr5": ".byte 0x0f, 0x20, 0xe8",
        "debug register 4 with CR4.DE": "mov eax, cr4; or eax, 8; mov cr4, eax; mov eax, dr4"}.items()}}
VECTORS = sorted({vector for _, vector in FAULTS.values()} | {8, 10, 11, 12, 14, 16, 17, 19})


CASES = [code for code, _ in (*FINE.values(), *FAULTS.values())]


def source():
    """All of them in one program: assembling takes longer than running."""
    cases = "".join(f"case_{i}: {code.replace('past', f'past_{i}')}\nmov ebp, {DONE}; out 0xf4, al; hlt\n"
                    for i, code in enumerate(CASES))
    handlers = "".join(f"vec_{v:02x}: mov ebp, {0x100 + v}; out 0xf4, al; hlt\n" for v in VECTORS)
    return f"hlt\n{cases}{handlers}"


def after(vendor, code):
    """(DONE, eax) or (0x100 + vector, eax)."""
    machine = IrqMachine(vendor, source())
    try:
        machine.set_regs(rip=machine.symbols[f"case_{CASES.index(code)}"], rsp=0x7000)
        assert machine.run_within() == 0
        assert KvmRun.from_buffer_copy(machine.run_page[:4096]).exit_reason == KVM_EXIT_IO
        values = machine.regs()
        return values["rbp"], values["rax"]
    finally:
        machine.close()


@pytest.mark.parametrize("name", FINE)
@pytest.mark.parametrize("vendor", ["amd", "intel"])
def test_it_works(vendor, name):
    code, value = FINE[name]
    assert after(vendor, code) == (DONE, value)


@pytest.mark.parametrize("name", FAULTS)
@pytest.mark.parametrize("vendor", ["amd", "intel"])
def test_it_faults(vendor, name):
    code, vector = FAULTS[name]
    assert after(vendor, code)[0] == 0x100 + vector
