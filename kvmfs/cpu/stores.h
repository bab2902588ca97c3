// SPDX-License-Identifier: GPL-2.0-or-later
// Part of native.c: which stores the translator sees.
//
// A store through a TLB entry with TLB_NOTDIRTY makes an end of the translations of those bytes. Unicorn takes the flag off after the
// first one when the page is not executable there, and after each translation puts it back where the linear address is the same,
// looking through the whole TLB. So it would not see a second store through another linear address of the page (a debugger's or a
// JIT compiler's writable view of code), and the look costs as much as a tenth of a boot. Here the pages are remembered that lost the flag
// while there was code of them; only when such a page is translated again its other entries go.
#pragma once
#include "native.h"

static void clean(Engine *e, TlbEntry *t, u64 va) {
    if (t->w != (va | TLB_NOTDIRTY) || t->x != ~0ull) return;
    u64 page = (t->paddr & ~NOT_RAM) >> 12;
    t->w = va;
    if (page < GPA_END >> 12) e->stored[page >> 3] |= e->code[page >> 3] & 1 << (page & 7);
}

// In the place of tlb_set_dirty(): a store through an entry of this page has been seen.
static void our_set_dirty(void *cs, u64 va) {
    Engine *e = engine_of(cs);
    va &= ~0xfffull;
    for (int m = 0; m < 3; m++) {
        TlbFast *f = &F(TlbFast, TLB_FAST + 16 * m);
        TlbEntry *victim = &F(TlbEntry, TLB_DESC + TLB_DESC_SIZE * m + TLB_DESC_VTABLE);
        clean(e, &f->table[va >> 12 & f->mask >> 6], va);
        for (int i = 0; i < VTLB_SIZE; i++) clean(e, &victim[i], va);
    }
}

// In the place of tlb_reset_dirty_by_vaddr(): a block of that many bytes from the begin of its page on has been translated.
static void (*p_reset_dirty)(void *, u64, u64);
static void our_reset_dirty(void *cs, u64 start, u64 length) {
    Engine *e = engine_of(cs);
    for (u64 va = start; va - start < length; va += 4096) {
        TlbEntry *t = code_entry(e, va);
        u64 pa = t ? t->paddr & ~(0xfffull | NOT_RAM) : GPA_END;
        if (pa >= GPA_END) {
            p_reset_dirty(cs, va, 1);
            continue;
        }
        u8 *code = &e->code[pa >> 15], *stored = &e->stored[pa >> 15], bit = 1 << (pa >> 12 & 7);
        if (*code & bit && !(*stored & bit)) continue;
        const Region *r = *code & bit ? NULL : region_at(e, pa); // its code went, but not the way to it
        *code |= bit;
        *stored &= ~bit;
        drop_entries(e, pa, t);
        if (r && r->shared) drop_sharers(e, r, pa);
    }
}
