// SPDX-License-Identifier: GPL-2.0-or-later
// Part of native.c: PCMPESTRI, PCMPESTRM, PCMPISTRI, PCMPISTRM (SDM volume 1, 12.10, volume 2, table 4-10), for Unicorn's, which
// read beyond the operands where a length is INT_MIN, and are wrong where the first operand is longer than the second.
#pragma once
#include "native.h"

enum { WORDS = 1, SIGNED = 2, EQUAL_ANY = 0, RANGES = 1, EQUAL_EACH = 2, EQUAL_ORDERED = 3, NEGATE = 1 << 4, VALID_ONLY = 1 << 5, TOP = 1 << 6,
       REX_W = 1 << 8 };
enum { FL_C = 1, FL_Z = 0x40, FL_S = 0x80, FL_O = 0x800 };

static int element(const u8 *operand, u32 ctrl, int i) {
    if (ctrl & WORDS) return ctrl & SIGNED ? ((const int16_t *)operand)[i] : ((const u16 *)operand)[i];
    return ctrl & SIGNED ? ((const int8_t *)operand)[i] : operand[i];
}

static int explicit_length(u64 reg, u32 ctrl) {
    int n = ctrl & WORDS ? 8 : 16;
    int64_t value = ctrl & REX_W ? (int64_t)reg : (int32_t)reg;
    return value > n || value < -n ? n : value < 0 ? -value : value;
}

static int implicit_length(const u8 *operand, u32 ctrl) {
    int n = ctrl & WORDS ? 8 : 16, i = 0;
    while (i < n && element(operand, ctrl, i)) i++;
    return i;
}

// Whether bit j, of the second operand's element, is set before the polarity is applied.
static bool matches(const u8 *a, int na, const u8 *b, int nb, u32 ctrl, int j) {
    int n = ctrl & WORDS ? 8 : 16, mode = ctrl >> 2 & 3, value = element(b, ctrl, j);
    if (mode == EQUAL_EACH) return j < na && j < nb ? element(a, ctrl, j) == value : j >= na && j >= nb;
    if (mode == EQUAL_ORDERED) {
        for (int i = 0; i < na && i + j < n; i++)
            if (i + j >= nb || element(a, ctrl, i) != element(b, ctrl, i + j)) return false;
        return true;
    }
    for (int i = 0; j < nb && i < na; i++) {
        if (mode == EQUAL_ANY && element(a, ctrl, i) == value) return true;
        if (mode == RANGES && i & 1 && element(a, ctrl, i - 1) <= value && value <= element(a, ctrl, i)) return true;
    }
    return false;
}

static u32 compare_strings(char *env, const u8 *a, int na, const u8 *b, int nb, u32 ctrl) {
    int n = ctrl & WORDS ? 8 : 16;
    u32 result = 0;
    for (int j = 0; j < n; j++) result |= (u32)matches(a, na, b, nb, ctrl, j) << j;
    if (ctrl & NEGATE) result ^= ctrl & VALID_ONLY ? (1u << nb) - 1 : (1u << n) - 1;
    *(u64 *)(env + CC_SRC) = (result ? FL_C : 0) | (nb < n ? FL_Z : 0) | (na < n ? FL_S : 0) | (result & 1 ? FL_O : 0);
    return result;
}

static void set_index(char *env, u32 result, u32 ctrl) {
    REGS(env)[1] = !result ? (ctrl & WORDS ? 8 : 16) : ctrl & TOP ? 31 - __builtin_clz(result) : __builtin_ctz(result);
}

static void set_mask(char *env, u32 result, u32 ctrl) {
    u8 *xmm0 = (u8 *)env + XMM;
    memset(xmm0, 0, 16);
    if (!(ctrl & TOP)) memcpy(xmm0, &result, 2);
    else
        for (int i = 0; i < 16; i++) xmm0[i] = result >> (ctrl & WORDS ? i / 2 : i) & 1 ? 0xff : 0;
}

static u32 explicit_strings(char *env, const u8 *a, const u8 *b, u32 ctrl) {
    return compare_strings(env, a, explicit_length(REGS(env)[0], ctrl), b, explicit_length(REGS(env)[2], ctrl), ctrl);
}

static u32 implicit_strings(char *env, const u8 *a, const u8 *b, u32 ctrl) {
    return compare_strings(env, a, implicit_length(a, ctrl), b, implicit_length(b, ctrl), ctrl);
}

// In the place of the translator's helpers. a: the first operand, the needle.
static void our_pcmpestri(char *env, const u8 *a, const u8 *b, u32 ctrl) { set_index(env, explicit_strings(env, a, b, ctrl), ctrl); }
static void our_pcmpestrm(char *env, const u8 *a, const u8 *b, u32 ctrl) { set_mask(env, explicit_strings(env, a, b, ctrl), ctrl); }
static void our_pcmpistri(char *env, const u8 *a, const u8 *b, u32 ctrl) { set_index(env, implicit_strings(env, a, b, ctrl), ctrl); }
static void our_pcmpistrm(char *env, const u8 *a, const u8 *b, u32 ctrl) { set_mask(env, implicit_strings(env, a, b, ctrl), ctrl); }
