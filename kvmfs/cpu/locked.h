// SPDX-License-Identifier: GPL-2.0-or-later
// Part of native.c: LOCK against the client's threads, which share the guest's memory.
//
// A VM's vCPUs take turns, so the translator takes itself for alone, and makes a load and a store of a locked instruction (CMPXCHG that
// fails stores what it has read). Where it asks for an atomic operation ours says that others run, too, and then it calls a helper
// that uses the host's own. What such a helper cannot do (an operand that is not aligned, MMIO) is executed alone, the old way.
#pragma once
#include "native.h"

enum { TCG_TB_CFLAGS = 0x64, CF_PARALLEL = 0x80000 }; // TCGContext.tb_cflags, as tcg_gen_atomic_cmpxchg_i64() looks at it

static u32 begin_parallel(char *tcg) {
    u32 *flags = (u32 *)(tcg + TCG_TB_CFLAGS), before = *flags;
    if (cur && !cur->replaying && !cur->alone) *flags |= CF_PARALLEL;
    return before;
}

static void end_parallel(char *tcg, u32 before) { *(u32 *)(tcg + TCG_TB_CFLAGS) = before; }

#define ATOMICS(do) do(add_fetch) do(and_fetch) do(or_fetch) do(xor_fetch) do(fetch_add) do(fetch_and) do(fetch_or) do(fetch_xor) do(xchg)
#define ATOMIC(name)                                                                        \
    static void (*p_##name)(char *, u64, u64, u64, u64, u32);                               \
    static void our_##name(char *tcg, u64 ret, u64 addr, u64 value, u64 index, u32 memop) { \
        u32 before = begin_parallel(tcg);                                                   \
        p_##name(tcg, ret, addr, value, index, memop);                                      \
        end_parallel(tcg, before);                                                          \
    }
ATOMICS(ATOMIC)

static void (*p_cmpxchg)(char *, u64, u64, u64, u64, u64, u32);
static void our_cmpxchg(char *tcg, u64 ret, u64 addr, u64 compare, u64 value, u64 index, u32 memop) {
    u32 before = begin_parallel(tcg);
    p_cmpxchg(tcg, ret, addr, compare, value, index, memop);
    end_parallel(tcg, before);
}

// Each of them looks at that bit there: testb $CF_PARALLEL >> 16,TCG_TB_CFLAGS + 2(%rdi), near its begin.
static bool atomics_are_known(void) {
    const u8 test[] = {0xf6, 0x47, TCG_TB_CFLAGS + 2, CF_PARALLEL >> 16};
    void *const functions[] = {p_cmpxchg,
#define FUNCTION(name) p_##name,
        ATOMICS(FUNCTION)
    };
    for (size_t i = 0; i < sizeof functions / sizeof *functions; i++)
        if (!memmem(functions[i], 64, test, sizeof test)) return false;
    return true;
}

// In the place of cpu_loop_exit_atomic(): the instruction has done nothing yet.
_Noreturn static void our_exit_atomic(void *cs, u64 ra) {
    p_restore_state(cs, ra, true);
    leave(cur, EXIT_ALONE);
}
