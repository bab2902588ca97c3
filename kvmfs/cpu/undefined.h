// SPDX-License-Identifier: GPL-2.0-or-later
// Part of native.c: encodings that are #UD for hardware, and something else for the translator, which does not look at LOCK (and ends
// the process at some, as LOCK BTC of a register), takes VEX instructions for those of SSE, and knows no RTM.
//
// Each instruction is looked at before it is translated: in the place of Unicorn's translator_loop() is ours (interpose.h), which puts
// our_translate_insn in front. A bad one is translated as a breakpoint, and our_debug_excp finds it there.
//
// The translator also keeps some temporaries of some instructions (of the FPU's two each), and writes over what is behind the 512
// that a block may have, when a page is full of those: a block ends here before.
#pragma once
#include "native.h"

enum { BP_GDB = 0x10, CR4_OSXSAVE = 1 << 18 };
enum { REG_SHIFT = 3 };
enum { DISAS_NEXT, DISAS_TOO_MANY, MOST_TEMPS = 512 - 192 };
typedef struct { const Tb *tb; u64 pc_first, pc_next; int is_jmp; } Translation; // the head of DisasContextBase
typedef struct { u64 pc; int flags; void *next, *prev; } Breakpoint; // CPUBreakpoint
typedef struct {
    void (*init_disas_context)(void *, void *), (*tb_start)(void *, void *), (*insn_start)(void *, void *);
    bool (*breakpoint_check)(Translation *, void *, const Breakpoint *);
    void (*translate_insn)(Translation *, void *), (*tb_stop)(void *, void *), (*pc_sync)(void *, void *);
} TranslatorOps;
typedef void TranslatorLoop(const TranslatorOps *, void *, void *, void *, int);

static TranslatorLoop *p_translator_loop;
static TranslatorOps theirs, ours;

// What LOCK may stand before (SDM volume 2, LOCK); reg, memory: of the ModRM byte.
static bool lockable(bool two, u8 op, int reg, bool memory) {
    if (!memory) return false;
    if (two) {
        if (op == 0xab || op == 0xb3 || op == 0xbb || op == 0xb0 || op == 0xb1 || op == 0xc0 || op == 0xc1) return true;
        return (op == 0xba && reg > 4) || (op == 0xc7 && reg == 1);
    }
    if (op < 0x38) return (op & 7) < 2;
    switch (op) {
    case 0x80: case 0x81: case 0x82: case 0x83: return reg < 7;
    case 0x86: case 0x87: return true;
    case 0xf6: case 0xf7: return reg == 2 || reg == 3;
    case 0xfe: case 0xff: return reg < 2;
    default: return false;
    }
}

// VMOVDQA, VMOVDQU between an XMM register and memory or another one. Where XSAVE is enabled the translator's MOVDQA and MOVDQU are let
// through: there are programs that do not ask for AVX before, KVM's selftest state_test for one.
static bool moves_xmm(const u8 *b) {
    bool form = b[0] == 0xc5 && (b[1] == 0xfa || b[1] == 0xf9 || b[1] == 0x7a || b[1] == 0x79); // VEX.128.F3, VEX.128.66, no third operand
    return form && (b[2] & 0xef) == 0x6f;
}

// b has 15 bytes; hf: the mode
static bool is_undefined(const u8 *b, u32 hf, u64 cr4) {
    bool wide = hf & HF_CS64, lock = false;
    int i = 0;
    for (; i < 10; i++) {
        u8 p = b[i];
        if (p == 0xf0) lock = true;
        bool prefix = p == 0xf0 || p == 0xf2 || p == 0xf3 || (p & 0xfc) == 0x64 || (p & 0xe7) == 0x26 || (wide && (p & 0xf0) == 0x40);
        if (!prefix) break;
    }
    u8 op = b[i];
    if (op == 0xc6 || op == 0xc7 || op == 0x8f) return lock || (b[i + 1] >> REG_SHIFT & 7); // XABORT, XBEGIN; XOP
    if ((op & 0xfe) == 0xc4 && (wide || b[i + 1] >= 0xc0)) return i || !(cr4 & CR4_OSXSAVE) || !moves_xmm(b); // VEX: neither AVX nor BMI, some of which the translator gets wrong
    if (!lock) return false;
    bool two = op == 0x0f;
    if (two) op = b[++i];
    if (two && (op & 0xfd) == 0x20) return false;       // AMD's MOV CR8
    return !lockable(two, op, b[i + 1] >> REG_SHIFT & 7, b[i + 1] < 0xc0);
}

// Bytes of code from va on, zeroes behind those that can be read.
static void code_bytes(Engine *e, u64 va, u8 *b, int n) {
    memset(b, 0, n);
    for (int done = 0, chunk; done < n; done += chunk) {
        u64 at = va + done;
        TlbEntry *t = code_entry(e, at);
        chunk = 4096 - (at & 0xfff);
        if (chunk > n - done) chunk = n - done;
        if (!t) {
            guest_fetch(e, e->env, at, b + done, chunk);
            continue;
        }
        memcpy(b + done, (const u8 *)(t->addend + at), chunk);
    }
}

static void our_translate_insn(Translation *t, void *cs) {
    Engine *e = engine_of(cs);
    u8 b[15];
    code_bytes(e, t->pc_next, b, sizeof b);
    if (is_undefined(b, t->tb->flags, F(u64, CR + 32))) {
        theirs.breakpoint_check(t, cs, &(Breakpoint){.flags = BP_GDB});
        return;
    }
    theirs.translate_insn(t, cs);
    if (t->is_jmp == DISAS_NEXT && *(int *)(UC(char *, UC_TCG) + TCG_NB_TEMPS) > MOST_TEMPS) t->is_jmp = DISAS_TOO_MANY;
}

static void our_translator_loop(const TranslatorOps *ops, void *context, void *cs, void *tb, int max_insns) {
    if (ours.translate_insn != our_translate_insn) {
        theirs = ours = *ops;
        ours.translate_insn = our_translate_insn;
    }
    p_translator_loop(&ours, context, cs, tb, max_insns);
}

// The instruction at rip is such a one.
static bool at_undefined(Engine *e) {
    u8 b[15];
    u32 hf = F(u32, HFLAGS) | (F(u64, EFLAGS) & FL_VM);
    code_bytes(e, (hf & HF_CS64 ? 0 : F(Seg, SEGS + 24).base) + F(u64, EIP), b, sizeof b);
    return is_undefined(b, hf, F(u64, CR + 32));
}
