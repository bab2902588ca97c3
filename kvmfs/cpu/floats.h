// SPDX-License-Identifier: GPL-2.0-or-later
// Part of native.c: SSE arithmetic on the host's FPU.
//
// Unicorn does that, too, but asks libm of what kind each operand and result is, which is half of the time. Here only what needs no
// question: operands that are normal or zero, to the nearest, a normal result, and something inexact before. All else is Unicorn's.
#pragma once
#include "native.h"

enum { STATUS_ROUNDING = 1, STATUS_FLAGS = 2, STATUS_FLUSH = 4, STATUS_FLUSH_INPUTS = 5, STATUS_SIZE = 16 }; // float_status
enum { FLAG_INEXACT = 0x20 };

static inline bool host_rounds(const u8 *status) {
    return status[STATUS_FLAGS] & FLAG_INEXACT && !status[STATUS_ROUNDING]; // to the nearest, with nothing to take note of
}

#define IS_NORMAL(type, x, bits, least) ((type)(((x) << 1 >> (bits)) - (least)) < (((type)1 << (8 * sizeof(type) - (bits))) - 1 - (least)))
#define IS_OPERAND(type, x, bits) (IS_NORMAL(type, x, bits, 1) || !(type)((x) << 1))

// bits: those of the fraction and the sign. A result with the least exponent of all may have been rounded up to it.
#define ARITHMETIC(name, type, host, bits, op)                                                      \
    static type (*p_##name)(type, type, u8 *);                                                      \
    static type our_##name(type a, type b, u8 *status) {                                            \
        if (host_rounds(status) && IS_OPERAND(type, a, bits) && IS_OPERAND(type, b, bits)) {        \
            host x, y;                                                                              \
            memcpy(&x, &a, sizeof x);                                                               \
            memcpy(&y, &b, sizeof y);                                                               \
            x = x op y;                                                                             \
            type result;                                                                            \
            memcpy(&result, &x, sizeof result);                                                     \
            if (IS_NORMAL(type, result, bits, 2)) return result;                                    \
        }                                                                                           \
        return p_##name(a, b, status);                                                              \
    }
#define FLOATS(do)                                                                                                              \
    do(float32_add, u32, float, 24, +) do(float32_sub, u32, float, 24, -) do(float32_mul, u32, float, 24, *)                    \
    do(float32_div, u32, float, 24, /) do(float64_add, u64, double, 53, +) do(float64_sub, u64, double, 53, -)                  \
    do(float64_mul, u64, double, 53, *) do(float64_div, u64, double, 53, /)
FLOATS(ARITHMETIC)

// Unicorn flushes the x87's results when MXCSR.FTZ says that of SSE's.
static void our_mxcsr(char *env) {
    p_mxcsr(env);
    env[FP_STATUS + STATUS_FLUSH] = 0;
    env[SSE_STATUS + STATUS_FLUSH] = *(u32 *)(env + MXCSR) >> 15 & 1;
}

static bool mxcsr_is_known(Engine *e) {
    u32 before = F(u32, MXCSR);
    F(u32, MXCSR) = 0x9fc0; // FTZ, DAZ
    p_mxcsr(e->env);
    bool known = F(u8, FP_STATUS + STATUS_FLUSH) == 1 && F(u8, SSE_STATUS + STATUS_FLUSH_INPUTS) == 1;
    F(u32, MXCSR) = before;
    p_mxcsr(e->env);
    return known && !F(u8, FP_STATUS + STATUS_FLUSH) && !F(u8, SSE_STATUS + STATUS_FLUSH_INPUTS);
}

// float_status is as written above: 1 + 2^-60 is rounded as it says, and 2^-1074 + 0 flushed.
static bool floats_are_known(void) {
    u64 one = 0x3ffull << 52, tiny = (0x3ffull - 60) << 52;
    u8 nearest[STATUS_SIZE] = {0}, up[STATUS_SIZE] = {[STATUS_ROUNDING] = 2}, flush[STATUS_SIZE] = {[STATUS_FLUSH] = 1};
    return p_float64_add(one, tiny, nearest) == one && nearest[STATUS_FLAGS] == FLAG_INEXACT
           && p_float64_add(one, tiny, up) == one + 1 && p_float64_add(1, 0, flush) == 0;
}
