// SPDX-License-Identifier: GPL-2.0-or-later
// Part of native.c: breakpoints of the debug registers and single steps (APM volume 2, 13.1).
//
// An execution breakpoint is one of the translator's own (BP_CPU): the translation of that instruction leaves by EXCP_DEBUG (that of
// an undefined one as well), and our_debug_excp reports #DB with RF set, as the state that a fault saves has it. QEMU looks at RF when it translates, for a
// whole block: where RF is set while breakpoints are in force, one instruction is executed alone.
//
// A page with a data breakpoint has TLB entries that never hit, so every access to it comes through our_tlb_fill with its
// address and size. At a hit the instruction is begun again and executed alone; #DB comes after it.
#pragma once
#include "native.h"

enum { BP_CPU = 0x20, HOOK_BLOCK = 8 };
enum { DR7_EXEC, DR7_WRITE, DR7_IO, DR7_ACCESS };
enum { DR6_BS = 0x4000 };
#define DR6_ACTIVE_LOW 0xffff0ff0ull
#define DR6(s) (((u64 *)((s) + DR))[6])

static int bp_enabled(const Vcpu *v, int i) { return v->bp_dr7 >> (2 * i) & 3; }
static int bp_type(const Vcpu *v, int i) { return v->bp_dr7 >> (16 + 4 * i) & 3; }
static u64 bp_size(const Vcpu *v, int i) {
    u32 code = v->bp_dr7 >> (18 + 4 * i) & 3;
    return code == 2 ? 8 : code + 1;
}

static u32 exec_hits(const Vcpu *v, u64 va) {
    u32 hits = 0;
    for (int i = 0; i < 4; i++)
        if (bp_enabled(v, i) && bp_type(v, i) == DR7_EXEC && v->bp[i] == va) hits |= 1u << i;
    return hits;
}

static int is_data(const Vcpu *v, int i) { return bp_enabled(v, i) && (bp_type(v, i) & 1); }

static u32 data_hits(const Vcpu *v, u64 va, u64 size, int access) {
    u32 hits = 0;
    for (int i = 0; i < 4; i++) {
        u64 n = bp_size(v, i), from = v->bp[i] & ~(n - 1);
        if (is_data(v, i) && (access == 1 || bp_type(v, i) == DR7_ACCESS) && va < from + n && from < va + size) hits |= 1u << i;
    }
    return hits;
}

// The page before counts, too: an access that begins there may reach into the watched one.
static int is_watched(const Vcpu *v, u64 va) {
    for (int i = 0; i < 4; i++)
        if (is_data(v, i) && va >> 12 >= (v->bp[i] - 64) >> 12 && va >> 12 <= (v->bp[i] + 7) >> 12) return 1;
    return 0;
}

static void watch(Engine *e, Vcpu *v, u64 va, u64 size, int access, u64 ra) {
    u64 from = va, to = va + size;
    if ((va & 0xfff) + size > 4096) {
        v->cross_va = va;
        v->cross_n = size;
        v->cross_ra = ra;
    } else if (v->cross_n == size && v->cross_ra == ra) { // one of the two aligned pieces that such a load is made of
        u64 first = v->cross_va & ~(size - 1);
        if (va == first || va == first + size) {
            if (from < v->cross_va) from = v->cross_va;
            if (to > v->cross_va + size) to = v->cross_va + size;
        }
        if (va != first) v->cross_n = 0;
    }
    u32 hits = from < to ? data_hits(v, from, to - from, access) : 0;
    if (!hits) return;
    if (v->replaying || v->alone) {
        v->hits |= hits;
    } else if (!ra) { // an event is being delivered: #DB comes before its handler's first instruction
        v->hits |= hits;
        p_emu_stop(e->uc);
    } else {
        p_restore_state(e->cpu, ra, true);
        leave(v, EXIT_ALONE);
    }
}

static bool our_tlb_fill(void *cs, u64 va, int size, int access, int mmu, bool probe, u64 ra) {
    bool ok = fill_entry(cs, va, size, access, mmu, probe, ra);
    Vcpu *v = cur;
    if (!ok || !v) return ok;
    Engine *e = v->e;
    if (e->nlogged && ring_soft_full(&v->ring)) leave_full_ring(e, v, probe, ra);
    if (!(v->bp_dr7 & 0xff) || !is_watched(v, va)) return ok;
    TlbFast *f = &F(TlbFast, TLB_FAST + 16 * mmu);
    TlbEntry *t = &f->table[(va >> 12) & (f->mask >> 6)];
    if (t->r != ~0ull) t->r |= TLB_INVALID;
    if (t->w != ~0ull) t->w |= TLB_INVALID;
    if (access != 2 && !probe && size) watch(e, v, va, size, access, ra);
    return ok;
}

static void report_db(Vcpu *v, u64 cause) {
    v->exit.code = 0x41;
    v->exit.info1 = 0;
    v->exit.info2 = cause;
    v->exit.kind = EXIT_SVM;
}

// To whoever intercepts it, or the guest.
static void report_ud(Engine *e, Vcpu *v) {
    if (!v->ud_exits) {
        v->exc_vector = 6;
        v->exc_error = v->exc_soft = 0;
        return;
    }
    v->exit.code = 0x46;
    v->exit.insn_len = prefix_length(e, e->env);
    v->exit.info1 = v->exit.info2 = 0;
    v->exit.kind = EXIT_SVM;
}

static void our_debug_excp(void *cs) {
    Engine *e = engine_of(cs);
    Vcpu *v = cur;
    if (!v) return;
    u32 hits = exec_hits(v, (F(u32, HFLAGS) & HF_CS64 ? 0 : F(Seg, SEGS + 24).base) + F(u64, EIP));
    p_emu_stop(e->uc);
    if ((!hits || F(u64, EFLAGS) & FL_RF) && at_undefined(e)) {
        report_ud(e, v);
        return;
    }
    report_db(v, hits);
    F(u64, EFLAGS) |= FL_RF;
}

static void h_block(void *uc, u64 address, u32 size, void *user) {
    (void)uc;
    (void)address;
    (void)size;
    (void)user;
    Vcpu *v = cur;
    if (v && !v->replaying && !v->alone && (*(u64 *)(v->e->env + EFLAGS) & FL_RF)) leave(v, EXIT_ALONE);
}

// The translator's breakpoints become those of the vCPU that runs.
static void sync_breaks(Engine *e, const Vcpu *v) {
    u64 want[4];
    int n = 0;
    for (int i = 0; i < 4; i++)
        if (bp_enabled(v, i) && bp_type(v, i) == DR7_EXEC) want[n++] = v->bp[i];
    if (n == e->nbreaks && !memcmp(want, e->breaks, sizeof *want * n)) return;
    while (e->nbreaks) p_bp_remove(e->cpu, e->break_ref[--e->nbreaks]);
    for (int i = 0; i < n; i++) {
        e->breaks[i] = want[i];
        p_bp_insert(e->cpu, want[i], BP_CPU, &e->break_ref[i]);
    }
    e->nbreaks = n;
    if (n && !e->block_hook) {
        p_hook_add(e->uc, &e->block_hook, HOOK_BLOCK, (void *)h_block, NULL, (u64)1, (u64)0);
    } else if (!n && e->block_hook) {
        void *invalidate = UC(void *, UC_INVALIDATE_TB); // see nv_unmap
        UC(void *, UC_INVALIDATE_TB) = (void *)invalidate_nothing;
        p_hook_del(e->uc, e->block_hook);
        UC(void *, UC_INVALIDATE_TB) = invalidate;
        e->block_hook = 0;
    }
    p_tb_flush(e->cpu);
}
