// SPDX-License-Identifier: GPL-2.0-or-later
// Part of native.c: which instructions Linux's emulate.c knows, of those that access memory by a ModRM byte.
#pragma once
#include "native.h"

enum { BY_PREFIX_NONE = 1, BY_PREFIX_66 = 2, BY_PREFIX_F3 = 4, BY_PREFIX_F2 = 8, ANY_PREFIX = 15 };

// 0F xx with the prefixes that it has there; 0: with none
static int known_two_byte(u8 op, int reg, int rexw) {
    if (op >= 0x40 && op < 0x50) return ANY_PREFIX;             // CMOVcc
    if (op >= 0x80 && op < 0xb8) return op == 0xae && reg > 1 && reg < 7 ? 0 : ANY_PREFIX; // of FXSAVE's group: also FXRSTOR, CLFLUSH
    switch (op) {
    case 0x00: return reg < 4 ? ANY_PREFIX : 0;                 // without VERR, VERW
    case 0x01: return reg == 5 ? 0 : ANY_PREFIX;
    case 0x10: case 0x11: case 0x28: case 0x29: case 0x2b: return BY_PREFIX_NONE | BY_PREFIX_66; // MOVUPS, MOVAPS, MOVNTPS and PD
    case 0x6f: case 0x7f: return BY_PREFIX_NONE | BY_PREFIX_66 | BY_PREFIX_F3; // MOVQ, MOVDQA, MOVDQU
    case 0xe7: return BY_PREFIX_66;                             // MOVNTDQ
    case 0xc7: return reg == 1 && !rexw ? ANY_PREFIX : 0;       // CMPXCHG8B
    case 0xba: return reg >= 4 ? ANY_PREFIX : 0;                // BT with an immediate
    case 0xbb: case 0xbc: case 0xbd: case 0xbe: case 0xbf: case 0xc0: case 0xc1: case 0xc3: case 0x0d: return ANY_PREFIX;
    default: return op >= 0x18 && op < 0x20 ? ANY_PREFIX : 0;
    }
}

static bool known_one_byte(u8 op, int reg, int wide) {
    if (op >= 0xd8 && op <= 0xdf) return (op == 0xd9 || op == 0xdd) && reg == 7; // of the FPU's: FNSTCW, FNSTSW
    return op != 0x62 && (op != 0x63 || wide);                  // BOUND, ARPL
}

// Whether the instruction at rip, which accesses MMIO, is one that Linux's emulator carries out.
static bool emulated(Engine *e, const char *state) {
    u8 b[15];
    int n = guest_fetch(e, state, ((Seg *)(state + SEGS))[1].base + *(u64 *)(state + EIP), b, sizeof b);
    int wide = (*(u32 *)(state + HFLAGS) & HF_CS64) != 0, i = prefixes(b, n, wide), o66 = 0, rep = 0;
    for (int k = 0; k < i; k++) {
        if (b[k] == 0x66) o66 = 1;
        if (b[k] == 0xf2 || b[k] == 0xf3) rep = b[k];
    }
    int rexw = wide && i && (b[i - 1] & 0xf8) == 0x48;
    int prefix = rep == 0xf2 ? BY_PREFIX_F2 : rep ? BY_PREFIX_F3 : o66 ? BY_PREFIX_66 : BY_PREFIX_NONE;
    if (i + 3 > n) return true;
    u8 op = b[i++];
    bool memory = b[i] < 0xc0;
    if (op == 0xc4 || op == 0xc5) return memory && !wide;       // LES, LDS; otherwise a VEX prefix
    if (op != 0x0f) return !memory || known_one_byte(op, b[i] >> 3 & 7, wide);
    op = b[i++];
    if (op == 0x38) return (b[i] & 0xfe) == 0xf0 && (prefix & (BY_PREFIX_NONE | BY_PREFIX_66)); // MOVBE
    if (op == 0x3a) return false;
    return b[i] >= 0xc0 || (known_two_byte(op, b[i] >> 3 & 7, rexw) & prefix);
}
