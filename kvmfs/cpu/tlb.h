// SPDX-License-Identifier: GPL-2.0-or-later
// Part of native.c: what is put between Unicorn's soft TLB and its page walk, and guest memory seen from outside.
//
// 1. notdirty_write never cleans an entry whose addr_code is set, so stores to writable and executable pages would stay on
//    the slow path for ever. A page that was never executed loses addr_code; at its first fetch every other entry goes.
// 2. For Unicorn all of guest physical memory is one region (the window), so that a slot costs it nothing: what is a slot and
//    what is not is decided here. A page without memory behind it gets an entry that never hits (TLB_INVALID), so that each access comes through the
//    load or store helper and its UNMAPPED callback, which has the exact address and size; while an instruction is completed the
//    entry leads to a scratch page with the bytes that the read exit brought.
// 3. A page of a slot that logs and is not in its dirty bitmap is never writable in the TLB, so that the first store to it comes
//    here. What the page walk itself writes (accessed and dirty bits) is found by comparing the entries before and after.
//    The guest's first access to a page of a new slot makes it dirty, too: Linux maps it writable then (make_spte).
// 4. Memory that is at two places is written through one of them only while there is no code of the other (see code.h).
#pragma once
#include "native.h"

static bool our_tlb_fill(void *cs, u64 va, int size, int access, int mmu, bool probe, u64 ra);

static Region *region_at(Engine *e, u64 gpa) {
    int lo = 0, hi = e->nregions, mid = e->found;
    if (mid < hi && gpa - e->region[mid].gpa < e->region[mid].size) return &e->region[mid];
    while (lo < hi) {
        mid = (lo + hi) / 2;
        Region *r = &e->region[mid];
        if (gpa < r->gpa) hi = mid;
        else if (gpa - r->gpa >= r->size) lo = mid + 1;
        else return &e->region[e->found = mid];
    }
    return NULL;
}

static bool ring_soft_full(const DirtyRing *ring) {
    return ring->gfns && ring->dirty_index - __atomic_load_n(&ring->reset_index, __ATOMIC_RELAXED) >= ring->soft_limit;
}

static void push_dirty(DirtyRing *ring, u64 slot, u64 page) {
    if (!ring->gfns) return;
    DirtyGfn *gfn = &ring->gfns[ring->dirty_index++ & (ring->size - 1)];
    gfn->slot = slot;
    gfn->offset = page;
    __atomic_store_n(&gfn->flags, 1, __ATOMIC_RELEASE);
}

static void mark_dirty(Engine *e, const Region *r, u64 gpa) {
    u64 page = r->log_page + ((gpa - r->gpa) >> 12), bit = 1ull << (page & 63);
    u64 *word = &r->log[page >> 6];
    if (__atomic_load_n(word, __ATOMIC_RELAXED) & bit || __atomic_fetch_or(word, bit, __ATOMIC_RELAXED) & bit) return;
    Vcpu *v = cur ? cur : e->last;
    if (v) push_dirty(&v->ring, r->slot, page);
}

static bool is_dirty(const Region *r, u64 gpa) {
    u64 page = r->log_page + ((gpa - r->gpa) >> 12);
    return __atomic_load_n(&r->log[page >> 6], __ATOMIC_RELAXED) >> (page & 63) & 1;
}

// What the guest comes to for the first time is dirty from then on, also when it only reads.
static void touch(Engine *e, const Region *r, u64 gpa) {
    u64 page = r->log_page + ((gpa - r->gpa) >> 12), bit = 1ull << (page & 63);
    if (!r->touched || r->readonly) return;
    u64 *word = &r->touched[page >> 6];
    if (!(__atomic_load_n(word, __ATOMIC_RELAXED) & bit) && !(__atomic_fetch_or(word, bit, __ATOMIC_RELAXED) & bit)) mark_dirty(e, r, gpa);
}

// Entries that the last walk has changed make their pages dirty; a walk that ended in a fault never came back to its caller.
static void settle_walk(Engine *e) {
    while (e->nwalk) {
        Walked *w = &e->walk[--e->nwalk];
        const Region *r = region_at(e, w->gpa);
        if (r && r->log && memcmp(r->host + (w->gpa - r->gpa), &w->value, w->size)) mark_dirty(e, r, w->gpa);
    }
}

// Hardware loads PDPTRs when CR3 is loaded, Unicorn's page walk reads them from memory each time.
static bool has_own_pdptrs(Engine *e) {
    const Vcpu *v = cur;
    return v && v->own_pdptrs && F(u64, CR + 24) == v->pdptrs_cr3 && F(u64, CR) >> 31 && F(u64, CR + 32) & 1 << 5
           && !(F(u32, HFLAGS) & HF_LMA);
}

static void cr3_to_pdptrs(Engine *e) {
    if (!has_own_pdptrs(e)) return;
    F(u64, CR + 24) = cur->vmcb_gpa + PDPTRS;
    cur->cr3_away = 1;
}

// After a walk, also one that ended in a fault and so has not come back.
static void cr3_back(Engine *e) {
    Vcpu *v = cur;
    if (!v || !v->cr3_away) return;
    F(u64, CR + 24) = v->pdptrs_cr3;
    v->cr3_away = 0;
}

static void note_walk(Engine *e, u64 va) {
    u64 cr0 = F(u64, CR), cr3 = F(u64, CR + 24), cr4 = F(u64, CR + 32), size = 8, bits = 9;
    int shift;
    if (!(cr0 >> 31)) return;
    if (F(u32, HFLAGS) & HF_LMA) {
        shift = 39;
    } else if (cr4 & 1 << 5) {
        shift = 30;
        cr3 = (u32)cr3;
        va = (u32)va;
    } else {
        shift = 22, size = 4, bits = 10;
        cr3 = (u32)cr3;
        va = (u32)va;
    }
    if (shift == 30 && has_own_pdptrs(e)) {
        u64 entry = ((u64 *)(cur->vmcb + PDPTRS))[va >> 30];
        if (!(entry & 1)) return;
        cr3 = entry;
        shift = 21;
    }
    u64 table = cr3 & (shift == 30 ? 0xffffffffe0ull : 0xfffffff000ull);
    for (; shift >= 12; shift -= bits) {
        u64 gpa = table + (va >> shift & ((1 << bits) - 1)) * size, value = 0;
        const Region *r = region_at(e, gpa);
        if (!r) return;
        memcpy(&value, r->host + (gpa - r->gpa), size);
        if (r->log) touch(e, r, gpa);
        if (r->log && !is_dirty(r, gpa)) e->walk[e->nwalk++] = (Walked){gpa, value, size};
        if (!(value & 1) || ((value & 0x80) && shift < 39 && (size == 8 || (cr4 & 1 << 4)))) return; // absent, or a large page
        table = value & 0xfffffff000ull;
    }
}

// CR3 may lead the page walk to what is ours (AUX_BASE). No hardware has such addresses: the bits are reserved.
static void confine_cr3(Engine *e) { F(u64, CR + 24) &= GPA_END - 1; }

static _Noreturn void fault(Engine *e, int index);
static int guest_fetch(Engine *e, const char *state, u64 va, u8 *buf, int n);

// Unicorn's MOV to CR3 takes any value. It empties the TLB, so the next instruction's fetch comes here first: the MOV before it is
// taken back, and is #GP.
static void check_cr3(Engine *e, int access, bool probe) {
    u64 cr3 = F(u64, CR + 24), eip = F(u64, EIP), *regs = REGS(e->env);
    confine_cr3(e);
    const Vcpu *v = cur;
    if (access != 2 || probe || !v || v->delivering >= 0 || !(F(u32, HFLAGS) & HF_CS64)) return;
    u64 confined = F(u64, CR + 24);
    u8 b[4]; // a prefix perhaps, 0F 22 and a ModRM byte with CR3
    F(u64, CR + 24) = e->cr3;
    if (guest_fetch(e, e->env, eip - 4, b, 4) == 4 && b[1] == 0x0f && b[2] == 0x22 && (b[3] >> 3 & 7) == 3) {
        int rm = b[3] & 7, extended = (b[0] & 0xf5) == 0x41;
        if (extended && regs[rm | 8] == cr3) F(u64, EIP) = eip - 4;
        else if (regs[rm] == cr3) F(u64, EIP) = eip - 3;
        if (F(u64, EIP) != eip) {
            p_tlb_flush(e->cpu);
            fault(e, 13);
        }
    }
    F(u64, CR + 24) = confined;
}

static bool fill_entry(void *cs, u64 va, int size, int access, int mmu, bool probe, u64 ra) {
    Engine *e = engine_of(cs);
    if (F(u64, CR + 24) >= GPA_END) check_cr3(e, access, probe);
    e->cr3 = F(u64, CR + 24);
    if (e->nlogged) {
        settle_walk(e);
        note_walk(e, va);
    }
    cr3_to_pdptrs(e);
    bool ok = e->tlb_fill(cs, va, size, access, mmu, probe, ra);
    cr3_back(e);
    if (e->nlogged) settle_walk(e);
    if (!ok) return ok;
    TlbFast *f = &F(TlbFast, TLB_FAST + 16 * mmu);
    TlbEntry *t = &f->table[(va >> 12) & (f->mask >> 6)];
    u64 pa = t->paddr & ~0xfffull, page = pa >> 12;
    if (pa >= GPA_END) return ok;
    const Region *r = region_at(e, pa);
    if (!r) {
        u8 *host = e->scratch;
        Vcpu *v = cur;
        if (v && v->replaying)
            for (int i = 0; i < v->npages; i++)
                if (v->page[i] == pa) host = e->scratch + 4096 * i;
        t->addend = (u64)host - (va & ~0xfffull);
        t->paddr |= NOT_RAM;
        t->r = t->w = t->x = ~0ull; // the walk has just allowed this access, and no other
        if (access == 0) t->r = (va & ~0xfffull) | TLB_INVALID;
        if (access == 1) t->w = (va & ~0xfffull) | TLB_INVALID | TLB_MMIO_BIT;
        return ok;
    }
    if (r->log) touch(e, r, pa);
    if (r->readonly) {
        t->paddr |= NOT_RAM;
        if (t->w != ~0ull) t->w = (va & ~0xfffull) | TLB_INVALID | TLB_MMIO_BIT;
    } else if (r->log && t->w != ~0ull) {
        if (access == 1) mark_dirty(e, r, pa);
        else if (!is_dirty(r, pa)) t->w = ~0ull;
    }
    if (r->shared && t->w != ~0ull && shares_code(e, r, pa)) {
        if (access == 1) drop_shared_code(e, r, pa);
        else t->w = ~0ull;
    }
    u8 bit = 1 << (page & 7);
    if (access == 2) {
        note_fetch(e, va);
        bool same = code_unchanged(e, r, pa);
        if (!(e->code[page >> 3] & bit)) {
            e->code[page >> 3] |= bit;
            drop_entries(e, pa, t);
            if (r->shared) drop_sharers(e, r, pa);
        }
        // The second page of a block is fetched while the block is being looked up, and it may just have gone: look again.
        Vcpu *v = cur;
        if (!same && v && !probe && !v->replaying && !v->alone && v->delivering < 0) leave(v, EXIT_NONE);
    } else if (t->x != ~0ull) {
        if (e->code[page >> 3] & bit) { // the next fetch will find this entry
            note_fetch(e, va);
            code_unchanged(e, r, pa);
        } else {
            t->x = ~0ull;
        }
    }
    return ok;
}

// The ring is kept so full only that it takes what can be written until the guest is left: at once, before the access, as at a page
// fault, or where that cannot be done (an event is being delivered), after the block.
static void leave_full_ring(Engine *e, Vcpu *v, bool probe, u64 ra) {
    atomic_store(&v->kick, 1);
    if (probe || !ra || v->replaying || v->alone || v->delivering >= 0) {
        p_emu_stop(e->uc);
        return;
    }
    p_restore_state(e->cpu, ra, true);
    leave(v, EXIT_NONE);
}

static void *mapping_at(Engine *e, void *uc, u64 pa) {
    if (pa >= GPA_END) return e->memory_mapping(uc, pa);
    const Region *r = region_at(e, pa);
    return !r ? NULL : r->readonly ? e->readonly_mr : e->window_mr;
}

// uc->memory_mapping: during a completion the pages that were read are there, readable only.
static void *our_memory_mapping(void *uc, u64 pa) {
    Vcpu *v = cur;
    Engine *e = v ? v->e : NULL;
    if (!e || e->uc != uc) {
        for (int i = 0; engines[i]; i++)
            if (engines[i]->uc == uc) e = engines[i];
        return mapping_at(e, uc, pa & ~NOT_RAM);
    }
    pa &= ~NOT_RAM;
    void *mr = mapping_at(e, uc, pa);
    if (mr || !v->replaying) return mr;
    UC(int, UC_INVALID_ERROR) = 0; // a skipped store before this access is no error
    if (v->allow) {
        v->allow = 0;
        return e->dummy;
    }
    u64 n = UC(int, UC_SIZE_RECUR); // 0, or the size of the aligned pieces that an access is split into
    for (int i = 0; i < v->nknown; i++) {
        Known *k = &v->known[i];
        if (n ? pa < k->gpa + k->size && k->gpa < pa + n : pa == k->gpa) {
            v->used = 1;
            p_emu_stop(uc);
            return e->dummy;
        }
    }
    return NULL;
}

static int guest_phys(Engine *e, const char *state, u64 va, u64 *gpa) {
    if (!(((u64 *)(state + CR))[0] >> 31)) {
        *gpa = *(u32 *)(state + HFLAGS) & HF_LMA ? va : (u32)va;
        return 1;
    }
    if (state != e->env) return 0;
    confine_cr3(e);
    u32 attrs[4] = {0};
    cr3_to_pdptrs(e);
    u64 pa = e->phys_debug(e->cpu, va & ~0xfffull, attrs);
    cr3_back(e);
    if (pa == ~0ull) return 0;
    *gpa = pa | (va & 0xfff);
    return 1;
}

// Up to n bytes at a linear address, without side effects; the number that could be read.
static int guest_fetch(Engine *e, const char *state, u64 va, u8 *buf, int n) {
    int done = 0;
    while (done < n) {
        u64 gpa;
        if (!guest_phys(e, state, va + done, &gpa)) break;
        const Region *r = region_at(e, gpa);
        if (!r) break;
        int chunk = 4096 - (gpa & 0xfff);
        if (chunk > n - done) chunk = n - done;
        memcpy(buf + done, r->host + (gpa - r->gpa), chunk);
        done += chunk;
    }
    return done;
}

static void install_tlb(Engine *e) {
    *(void **)(e->cc + K_TLB_FILL) = (void *)our_tlb_fill;
    UC(void *, UC_MEMORY_MAPPING) = (void *)our_memory_mapping;
    *(u32 *)(e->dummy + MR_PERMS) = *(u32 *)(e->readonly_mr + MR_PERMS) = 1 | 4;
}
