// SPDX-License-Identifier: GPL-2.0-or-later
// Part of native.c: guest memory as Unicorn's own functions access it (page tables, descriptors, an event's stack frame, IRET's).
//
// Translated code looks into the soft TLB and is done; those functions take a way with a search of Unicorn's regions and of its hooks
// for each entry and each word. What is in the TLB without a flag, so that translated code would access it, and what the page walk
// reads, is accessed here; all else goes the old way.
#pragma once
#include "native.h"

// The host's address of `size` bytes that the TLB has for a load or a store; NULL: there is more to be done about them.
static inline void *tlb_hit(char *env, u64 va, unsigned size, int mmu, bool store) {
    const TlbFast *f = (const TlbFast *)(env + TLB_FAST + 16 * mmu);
    const TlbEntry *t = &f->table[va >> 12 & f->mask >> 6];
    return (store ? t->w : t->r) == ((va + size - 1) & ~0xfffull) ? (void *)(va + t->addend) : NULL;
}

#define LOADS(do) do(ub, u8, u32) do(uw, u16, u32) do(l, u32, u32) do(q, u64, u64)
#define LOAD(name, type, result)                                              \
    static result (*p_ld##name)(char *, u64, int, u64);                       \
    static result our_ld##name(char *env, u64 va, int mmu, u64 ra) {          \
        const void *at = tlb_hit(env, va, sizeof(type), mmu, false);          \
        type value;                                                           \
        if (!at) return p_ld##name(env, va, mmu, ra);                         \
        memcpy(&value, at, sizeof value);                                     \
        return value;                                                         \
    }
LOADS(LOAD)

#define STORES(do) do(b, u8, u32) do(w, u16, u32) do(l, u32, u32) do(q, u64, u64)
#define STORE(name, type, argument)                                           \
    static void (*p_st##name)(char *, u64, argument, int, u64);               \
    static void our_st##name(char *env, u64 va, argument v, int mmu, u64 ra) { \
        void *at = tlb_hit(env, va, sizeof(type), mmu, true);                 \
        type value = (type)v;                                                 \
        if (at) memcpy(at, &value, sizeof value);                             \
        else p_st##name(env, va, v, mmu, ra);                                 \
    }
STORES(STORE)

// Where guest physical memory is that the page walk reads, or AUX_BASE's part of the vCPU that runs; NULL: elsewhere. Where no slot is, the
// window reads as zeroes.
static inline void *walked(void *cs, u64 pa) {
    const Vcpu *v = cur;
    if (!v || v->e->cpu != cs) return NULL;
    if (pa < GPA_END) return v->e->window + pa;
    return pa - v->vmcb_gpa < AUX_SIZE ? v->vmcb + (pa - v->vmcb_gpa) : NULL;
}

static u32 (*p_ldl_phys)(void *, u64);
static u32 our_ldl_phys(void *cs, u64 pa) {
    const void *at = pa & 3 ? NULL : walked(cs, pa);
    return at ? *(const u32 *)at : p_ldl_phys(cs, pa);
}

static u64 (*p_ldq_phys)(void *, u64);
static u64 our_ldq_phys(void *cs, u64 pa) {
    const void *at = pa & 7 ? NULL : walked(cs, pa);
    return at ? *(const u64 *)at : p_ldq_phys(cs, pa);
}

// The walk's accessed and dirty bits, of which no translation knows.
static void (*p_stl_phys_notdirty)(void *, u64, u32);
static void our_stl_phys_notdirty(void *cs, u64 pa, u32 value) {
    void *at = pa & 3 || pa >= GPA_END ? NULL : walked(cs, pa);
    if (at) *(u32 *)at = value;
    else p_stl_phys_notdirty(cs, pa, value);
}

// Delivery of an event takes note of itself in the VMCB.
static void (*p_stl_phys)(void *, u64, u32);
static void our_stl_phys(void *cs, u64 pa, u32 value) {
    void *at = pa & 3 || pa < GPA_END ? NULL : walked(cs, pa);
    if (at) *(u32 *)at = value;
    else p_stl_phys(cs, pa, value);
}
