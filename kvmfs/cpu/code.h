// SPDX-License-Identifier: GPL-2.0-or-later
// Part of native.c: code that somebody else than the guest writes (the client's stores, its devices' DMA, a debugger).
//
// The translator does not see those. So the bytes of every page that was executed are kept, and compared with what is there now, at
// the page's first fetch after a moment at which the guest can have learnt that there are others (code_suspect). Unicorn goes from page
// to page only by way of its TLB, as mappings may change there; without its entries each page's next block is therefore looked
// up again and comes to our_tlb_fill. Only translations of bytes that differ go: data in the same page costs a comparison.
// What the guest itself has written meanwhile and executes is kept when it is translated.
//
// A guest that learns by looking into memory gives no such moment. PAUSE, in a loop that waits, is taken for one; so is a run that
// had none for LOOK_NS (a thread of the engine sees to that, and sleeps while no vCPU runs).
//
// Write protection by userfaultfd in the client would tell at once, but is worse: a debugger's write through /proc/PID/mem
// then fails (EIO), and it says nothing of what comes through pinned pages, another process's mapping or a fork's.
#pragma once
#include "native.h"

enum { RUN_GAP = 16 };   // bytes that are equal within what is taken for one change
enum { LOOK_NS = 10000000, IDLE_LOOKS = 10 };
typedef struct { u64 pc; uint16_t icount, size; } UcTb;

static Kept **kept_slot(Kept **table, u64 capacity, u64 page) {
    u64 i = page * 0x9e3779b97f4a7c15ull >> 20 & (capacity - 1);
    while (table[i] && table[i]->page != page) i = (i + 1) & (capacity - 1);
    return &table[i];
}

// What is kept of a page, NULL: nothing, or out of memory for it.
static Kept *kept_of(Engine *e, u64 page, bool make) {
    if (e->kept_capacity) {
        Kept *k = *kept_slot(e->kept, e->kept_capacity, page);
        if (k || !make) return k;
    } else if (!make) {
        return NULL;
    }
    if (2 * e->nkept >= e->kept_capacity) {
        u64 capacity = e->kept_capacity ? 2 * e->kept_capacity : 256;
        Kept **more = calloc(capacity, sizeof *more);
        if (!more) return NULL;
        for (u64 i = 0; i < e->kept_capacity; i++)
            if (e->kept[i]) *kept_slot(more, capacity, e->kept[i]->page) = e->kept[i];
        free(e->kept);
        e->kept = more;
        e->kept_capacity = capacity;
    }
    Kept *k = malloc(sizeof *k);
    if (!k) return NULL;
    k->page = page;
    k->valid = false;
    k->low = 4096;
    k->high = 0;
    *kept_slot(e->kept, e->kept_capacity, page) = k;
    e->nkept++;
    return k;
}

static void drop_changed(Engine *e, u64 pa, const u64 *old, const u64 *new) {
    enum { WORDS = 4096 / 8 };
    u64 ram = p_ram_addr(e->uc, e->window) + pa;
    for (int i = 0; i < WORDS; i++) {
        if (old[i] == new[i]) continue;
        int start = i, last = i;
        while (++i < WORDS && i - last <= RUN_GAP / 8)
            if (old[i] != new[i]) last = i;
        p_tb_invalidate(e->uc, ram + 8 * start, ram + 8 * (last + 1));
        i = last;
    }
}

// Is the page as it was when code of it was translated? What was translated of other bytes goes. The bytes are taken before the
// translator reads them, so what is written while it does is a difference the next time.
static bool code_unchanged(Engine *e, const Region *r, u64 pa) {
    Kept *k = kept_of(e, pa >> 12, true);
    if (!k) {
        u64 ram = p_ram_addr(e->uc, e->window) + pa;
        p_tb_invalidate(e->uc, ram, ram + 4096);
        return false;
    }
    if (k->valid && k->generation == e->generation) return true;
    const u8 *host = r->host + (pa - r->gpa);
    bool same = k->valid && !memcmp(k->bytes, host, sizeof k->bytes);
    k->generation = e->generation;
    if (same) return true;
    u64 now[4096 / 8];
    memcpy(now, host, sizeof now);
    bool known = k->valid;
    if (known) drop_changed(e, pa, k->bytes, now);
    memcpy(k->bytes, now, sizeof now);
    k->valid = true;
    return !known;
}

static TlbEntry *code_entry(Engine *e, u64 va) {
    for (int m = 0; m < 3; m++) {
        TlbFast *f = &F(TlbFast, TLB_FAST + 16 * m);
        TlbEntry *t = &f->table[(va >> 12) & (f->mask >> 6)];
        if (t->x != ~0ull && !((t->x ^ va) >> 12)) return t;
        TlbEntry *victim = &F(TlbEntry, TLB_DESC + TLB_DESC_SIZE * m + TLB_DESC_VTABLE);
        for (int i = 0; i < VTLB_SIZE; i++)
            if (victim[i].x != ~0ull && !((victim[i].x ^ va) >> 12)) return &victim[i];
    }
    return NULL;
}

// A block was translated. Where its bytes are not those that are kept, the guest has written them since, or somebody else while they
// were translated: this translation runs once, as if fetched before.
static void h_translated(void *uc, const UcTb *tb, const UcTb *before, void *user) {
    (void)uc;
    (void)before;
    Engine *e = user;
    shorten_head(e, tb->pc);
    e->blocks++;
    e->block_bytes += tb->size;
    for (u64 va = tb->pc, left = tb->size; left;) {
        u64 offset = va & 0xfff, n = left < 4096 - offset ? left : 4096 - offset;
        TlbEntry *t = code_entry(e, va);
        u64 pa = t ? t->paddr & ~(0xfffull | NOT_RAM) : GPA_END;
        const Region *r = pa < GPA_END ? region_at(e, pa) : NULL;
        Kept *k = r ? kept_of(e, pa >> 12, false) : NULL;
        if (k && offset < k->low) k->low = offset;
        if (k && offset + n > k->high) k->high = offset + n;
        e->untracked |= !t || (r && !k);
        if (k && k->valid) {
            u8 *kept = (u8 *)k->bytes + offset;
            const u8 *host = r->host + (pa - r->gpa) + offset;
            if (memcmp(kept, host, n)) {
                memcpy(kept, host, n);
                u64 ram = p_ram_addr(e->uc, e->window) + pa + offset;
                p_tb_invalidate(e->uc, ram, ram + n);
            }
        }
        va += n;
        left -= n;
    }
}

static void note_fetch(Engine *e, u64 va) {
    va &= ~0xfffull;
    for (int i = 0; i < e->nfetched && i < MAX_FETCHED; i++)
        if (e->fetched[i] == va) return;
    if (e->nfetched < MAX_FETCHED) e->fetched[e->nfetched] = va;
    if (e->nfetched <= MAX_FETCHED) e->nfetched++; // one more than there is room for: all of them
}

// Is what the TLB has for code at va as it was translated? Then it may stay there. False also where that is not quickly known.
static bool same_code(Engine *e, u64 va) {
    u64 pa = GPA_END;
    for (int m = 0; m < 3; m++) {
        TlbFast *f = &F(TlbFast, TLB_FAST + 16 * m);
        TlbEntry *t = &f->table[(va >> 12) & (f->mask >> 6)], *victim = &F(TlbEntry, TLB_DESC + TLB_DESC_SIZE * m + TLB_DESC_VTABLE);
        for (int i = 0; i < VTLB_SIZE; i++)
            if (victim[i].x != ~0ull && !((victim[i].x ^ va) >> 12)) return false;
        if (t->x == ~0ull || (t->x ^ va) >> 12) continue;
        u64 at = t->paddr & ~(0xfffull | NOT_RAM);
        if (pa != GPA_END && pa != at) return false;
        pa = at;
    }
    const Region *r = pa < GPA_END ? region_at(e, pa) : NULL;
    Kept *k = r ? kept_of(e, pa >> 12, false) : NULL;
    // Of the page's other bytes there is no translation, and h_translated looks at those that get one.
    if (!k || !k->valid) return false;
    u64 low = e->untracked ? 0 : k->low, high = e->untracked ? 4096 : k->high;
    if (low < high && memcmp((u8 *)k->bytes + low, r->host + (pa - r->gpa) + low, high - low)) return false;
    k->generation = e->generation;
    return true;
}

// From here on every page of code is compared before it is executed. Few pages are compared at once: a guest that leaves again and
// again in one place then keeps its TLB entries.
static void code_suspect(Engine *e) {
    e->generation++;
    if (e->nfetched <= MAX_COMPARED) {
        int kept = 0;
        for (int i = 0; i < e->nfetched; i++) {
            u64 va = e->fetched[i];
            if (same_code(e, va)) e->fetched[kept++] = va;
            else p_tlb_flush_page(e->cpu, va);
        }
        e->nfetched = kept;
        return;
    }
    if (e->nfetched > MAX_FETCHED) p_tlb_flush(e->cpu);
    else
        for (int i = 0; i < e->nfetched; i++) p_tlb_flush_page(e->cpu, e->fetched[i]);
    e->nfetched = 0;
}

static void forget_code(Engine *e, u64 page) {
    Kept *k = kept_of(e, page, false);
    if (k) k->valid = false;
}

static void drop(TlbEntry *t, u64 pa, const TlbEntry *keep) {
    if (t != keep && (t->paddr & ~(0xfffull | NOT_RAM)) == pa && t->w != ~0ull) t->r = t->w = t->x = ~0ull;
}

static void drop_entries(Engine *e, u64 pa, const TlbEntry *keep) {
    for (int m = 0; m < 3; m++) {
        TlbFast *f = &F(TlbFast, TLB_FAST + 16 * m);
        u64 n = (f->mask >> 6) + 1;
        for (u64 i = 0; i < n; i++) drop(&f->table[i], pa, keep);
        TlbEntry *victim = &F(TlbEntry, TLB_DESC + TLB_DESC_SIZE * m + TLB_DESC_VTABLE);
        for (int i = 0; i < VTLB_SIZE; i++) drop(&victim[i], pa, keep);
    }
}

// --- memory that is at several guest physical addresses ---
//
// Unicorn knows translations by guest physical address, so it does not see a store through another one. Therefore a page whose memory
// has been executed elsewhere is not writable in the TLB; the store that comes to our_tlb_fill for it makes an end of that code,
// whose next fetch makes an end of the writable entries again.

static void find_sharers(Engine *e, Region *r) {
    for (int i = 0; r->file && i < e->nregions; i++) {
        Region *o = &e->region[i];
        if (o != r && o->file == r->file && o->offset < r->offset + r->size && r->offset < o->offset + o->size)
            o->shared = r->shared = 1;
    }
}

// The next place of the memory at pa of r; from: where the search starts, and goes on.
static bool next_sharer(Engine *e, const Region *r, u64 pa, int *from, u64 *other) {
    u64 at = r->offset + (pa - r->gpa);
    while (*from < e->nregions) {
        const Region *o = &e->region[(*from)++];
        if (o->file != r->file || o == r || at - o->offset >= o->size) continue;
        *other = o->gpa + (at - o->offset);
        return true;
    }
    return false;
}

static bool shares_code(Engine *e, const Region *r, u64 pa) {
    u64 other;
    for (int i = 0; next_sharer(e, r, pa, &i, &other);)
        if (e->code[other >> 15] >> (other >> 12 & 7) & 1) return true;
    return false;
}

static void drop_shared_code(Engine *e, const Region *r, u64 pa) {
    u64 other;
    for (int i = 0; next_sharer(e, r, pa, &i, &other);) {
        if (!(e->code[other >> 15] >> (other >> 12 & 7) & 1)) continue;
        u64 ram = p_ram_addr(e->uc, e->window) + other;
        p_tb_invalidate(e->uc, ram, ram + 4096);
        drop_entries(e, other, NULL);
        e->code[other >> 15] &= ~(1 << (other >> 12 & 7));
    }
}

static void drop_sharers(Engine *e, const Region *r, u64 pa) {
    u64 other;
    for (int i = 0; next_sharer(e, r, pa, &i, &other);) drop_entries(e, other, NULL);
}

// Lets the vCPU that runs look, when it has had no reason to for a while.
static void *look_now_and_then(void *engine) {
    Engine *e = engine;
    pthread_mutex_lock(&e->m);
    for (int idle = 0; !e->closing;) {
        if (idle == IDLE_LOOKS) {
            e->parked = 1;
            pthread_cond_wait(&e->look, &e->m);
            e->parked = idle = 0;
            continue;
        }
        Vcpu *owner = e->owner;
        u64 serving = e->serving, generation = e->generation;
        struct timespec t;
        clock_gettime(CLOCK_REALTIME, &t);
        t.tv_nsec += LOOK_NS;
        if (t.tv_nsec >= 1000000000) { t.tv_nsec -= 1000000000; t.tv_sec++; }
        pthread_cond_timedwait(&e->look, &e->m, &t);
        idle = serving == e->serving && !e->owner ? idle + 1 : 0;
        if ((!owner && serving == e->serving) || generation != e->generation) continue;
        Vcpu *runs = e->owner ? e->owner : e->last; // or it is out for a moment, for what is handled in here
        if (!runs) continue;
        runs->suspect = 1;
        if (runs == e->owner) stop(runs, &runs->yield);
    }
    pthread_mutex_unlock(&e->m);
    return NULL;
}

static void start_looking(Engine *e) {
    sigset_t all, old;
    pthread_attr_t attr;
    pthread_mutex_lock(&e->m);
    if (e->looking) {
        pthread_mutex_unlock(&e->m);
        return;
    }
    sigfillset(&all);
    pthread_attr_init(&attr);
    pthread_attr_setstacksize(&attr, 1 << 16);
    pthread_sigmask(SIG_SETMASK, &all, &old);
    e->looking = pthread_create(&e->looker, &attr, look_now_and_then, e) ? -1 : 1;
    pthread_sigmask(SIG_SETMASK, &old, NULL);
    pthread_attr_destroy(&attr);
    pthread_mutex_unlock(&e->m);
}

static void stop_looking(Engine *e) {
    pthread_mutex_lock(&e->m);
    e->closing = 1;
    pthread_cond_signal(&e->look);
    pthread_mutex_unlock(&e->m);
    if (e->looking > 0) pthread_join(e->looker, NULL);
}

static void free_kept(Engine *e) {
    for (u64 i = 0; i < e->kept_capacity; i++) free(e->kept[i]);
    free(e->kept);
}
