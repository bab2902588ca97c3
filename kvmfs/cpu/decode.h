// SPDX-License-Identifier: GPL-2.0-or-later
// Part of native.c: as much of the instruction at rip as completing it needs.
#pragma once
#include "native.h"

static int is_string(u8 op) {
    return (op >= 0x6c && op <= 0x6f) || (op >= 0xa4 && op <= 0xa7) || (op >= 0xaa && op <= 0xaf);
}

static void decode(Engine *e, const char *state, Insn *in) {
    u8 b[15];
    u32 hf = *(u32 *)(state + HFLAGS);
    int n = guest_fetch(e, state, ((Seg *)(state + SEGS))[1].base + *(u64 *)(state + EIP), b, sizeof b), i = 0;
    int size = hf & HF_CS64 ? 4 : hf & HF_CS32 ? 4 : 2, addr = hf & HF_CS64 ? 8 : size, rexw = 0, o66 = 0;
    memset(in, 0, sizeof *in);
    for (; i < n; i++) {
        u8 p = b[i];
        if (p == 0x66) o66 = 1;
        else if (p == 0x67) addr = addr == 8 ? 4 : addr == 4 ? 2 : 4;
        else if (p == 0xf2 || p == 0xf3) in->rep = p;
        else if (p == 0xf0 || p == 0x26 || p == 0x2e || p == 0x36 || p == 0x3e || p == 0x64 || p == 0x65) {
        } else if ((hf & HF_CS64) && (p & 0xf0) == 0x40) {
            rexw = p & 8;
            i++;
            break;
        } else break;
    }
    if (i >= n) return;
    in->op = b[i++];
    if (in->op == 0x0f && i < n) {
        in->two = 1;
        in->op = b[i++];
    }
    if (o66 && !rexw) size = size == 4 ? 2 : 4;
    in->osize = rexw ? 8 : size;
    in->asize = addr;
    if (in->two) {
        in->movbe = in->op == 0x38 && i < n && b[i] == 0xf1 && in->rep != 0xf2;
        in->rep = 0;
        return;
    }
    if ((in->op & 0xfc) == 0xe4) { in->plain = 1; i++; }
    else if ((in->op & 0xfc) == 0xec) in->plain = 1;
    else if (!is_string(in->op)) { in->rep = 0; return; }
    in->len = i;
}

// Bytes of prefixes, REX included, of the instruction in b; wide: in 64-bit code.
static int prefixes(const u8 *b, int n, int wide) {
    for (int i = 0; i < n; i++) {
        u8 p = b[i];
        if (p == 0x66 || p == 0x67 || p == 0xf0 || p == 0xf2 || p == 0xf3 || p == 0x64 || p == 0x65 || (p & 0xe7) == 0x26) continue;
        return i + (wide && (p & 0xf0) == 0x40);
    }
    return 0;
}

// The same of the instruction at rip.
static int prefix_length(Engine *e, const char *state) {
    u8 b[15];
    int n = guest_fetch(e, state, ((Seg *)(state + SEGS))[1].base + *(u64 *)(state + EIP), b, sizeof b);
    return prefixes(b, n, (*(u32 *)(state + HFLAGS) & HF_CS64) != 0);
}

static u64 addr_mask(const Insn *i) { return i->asize == 8 ? ~0ull : i->asize == 4 ? 0xffffffffull : 0xffff; }

static void set_eip(char *state, u64 eip) {
    u32 hf = *(u32 *)(state + HFLAGS);
    *(u64 *)(state + EIP) = hf & HF_CS64 ? eip : hf & HF_CS32 ? (u32)eip : (u16)eip;
}
