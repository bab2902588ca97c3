// SPDX-License-Identifier: GPL-2.0-or-later
// Part of native.c: engines, vCPUs, memory, and the state that is more than a field.
#pragma once
#include "native.h"

enum { HOOK_INTR = 1, HOOK_INSN = 2, HOOK_READ_UNMAPPED = 16, HOOK_WRITE_UNMAPPED = 32, HOOK_FETCH_UNMAPPED = 64,
       HOOK_WRITE_PROT = 256, HOOK_EDGE_GENERATED = 1 << 15 };
enum { PROT_R = 1, PROT_W = 2, PROT_X = 4 };

// Finds, and replaces, what belongs to Unicorn's library; before the first uc_open(), which makes a table of its helpers' addresses.
// 0; 1 another build.
int nv_prepare(const char *path) {
    void *lib = dlopen(path, RTLD_NOW | RTLD_NOLOAD);
    static bool loaded;
    struct { const char *name; void *to; } sym[] = {
        {"uc_emu_start", &p_emu_start}, {"uc_emu_stop", &p_emu_stop}, {"uc_hook_add", &p_hook_add},
        {"uc_hook_del", &p_hook_del}, {"uc_mem_map_ptr", &p_map_ptr},
        {"cpu_restore_state_x86_64", &p_restore_state},
        {"uc_reg_read", &p_reg_read}, {"helper_check_iob_x86_64", &p_check_io[0]},
        {"helper_check_iow_x86_64", &p_check_io[1]}, {"helper_check_iol_x86_64", &p_check_io[2]},
        {"tlb_flush_x86_64", &p_tlb_flush}, {"tlb_flush_page_x86_64", &p_tlb_flush_page}, {"tb_flush_x86_64", &p_tb_flush},
        {"tb_invalidate_phys_range_x86_64", &p_tb_invalidate}, {"update_mxcsr_status_x86_64", &p_mxcsr},
        {"update_fp_status_x86_64", &p_fpuc}, {"qemu_ram_addr_from_host_x86_64", &p_ram_addr},
        {"cpu_breakpoint_insert_x86_64", &p_bp_insert}, {"cpu_breakpoint_remove_by_ref_x86_64", &p_bp_remove}, {"helper_check_exit_request_x86_64", &p_check_exit},
        {"translator_loop_x86_64", &p_translator_loop}, {"tcg_gen_atomic_cmpxchg_i64_x86_64", &p_cmpxchg},
#define SYMBOL(name) {"tcg_gen_atomic_" #name "_i64_x86_64", &p_##name},
        ATOMICS(SYMBOL)
        {"tlb_reset_dirty_by_vaddr_x86_64", &p_reset_dirty}, {"x86_ldl_phys_x86_64", &p_ldl_phys}, {"x86_ldq_phys_x86_64", &p_ldq_phys},
        {"x86_stl_phys_x86_64", &p_stl_phys}, {"x86_stl_phys_notdirty_x86_64", &p_stl_phys_notdirty},
#define LOAD_SYMBOL(name, type, result) {"cpu_ld" #name "_mmuidx_ra_x86_64", &p_ld##name},
#define STORE_SYMBOL(name, type, argument) {"cpu_st" #name "_mmuidx_ra_x86_64", &p_st##name},
        LOADS(LOAD_SYMBOL) STORES(STORE_SYMBOL)
#define FLOAT_SYMBOL(name, type, host, bits, op) {#name "_x86_64", &p_##name},
        FLOATS(FLOAT_SYMBOL)
    };
    struct { const char *name; void *ours; } replaced[] = {
        {"translator_loop_x86_64", our_translator_loop},
        {"helper_pcmpestri_xmm_x86_64", our_pcmpestri}, {"helper_pcmpestrm_xmm_x86_64", our_pcmpestrm},
        {"tcg_gen_atomic_cmpxchg_i64_x86_64", our_cmpxchg}, {"cpu_loop_exit_atomic_x86_64", our_exit_atomic},
#define REPLACEMENT(name) {"tcg_gen_atomic_" #name "_i64_x86_64", our_##name},
        ATOMICS(REPLACEMENT)
        {"tlb_reset_dirty_by_vaddr_x86_64", our_reset_dirty}, {"tlb_set_dirty_x86_64", our_set_dirty},
        {"x86_ldl_phys_x86_64", our_ldl_phys}, {"x86_ldq_phys_x86_64", our_ldq_phys},
        {"x86_stl_phys_x86_64", our_stl_phys}, {"x86_stl_phys_notdirty_x86_64", our_stl_phys_notdirty},
#define OUR_LOAD(name, type, result) {"cpu_ld" #name "_mmuidx_ra_x86_64", our_ld##name},
#define OUR_STORE(name, type, argument) {"cpu_st" #name "_mmuidx_ra_x86_64", our_st##name},
        LOADS(OUR_LOAD) STORES(OUR_STORE)
#define OUR_FLOAT(name, type, host, bits, op) {#name "_x86_64", our_##name},
        FLOATS(OUR_FLOAT)
        {"update_mxcsr_status_x86_64", our_mxcsr},
        {"helper_pcmpistri_xmm_x86_64", our_pcmpistri}, {"helper_pcmpistrm_xmm_x86_64", our_pcmpistrm},
    };
    if (loaded) return 0;
    if (!lib) return 1;
    for (size_t i = 0; i < sizeof sym / sizeof *sym; i++)
        if (!(*(void **)sym[i].to = dlsym(lib, sym[i].name))) return 1;
    if (!atomics_are_known() || !floats_are_known()) return 1;
    for (size_t i = 0; i < sizeof replaced / sizeof *replaced; i++)
        if (interpose(lib, replaced[i].name, replaced[i].ours) < 1) return 1;
    loaded = true;
    return 0;
}

// The pointers that sit at their places in this build and nowhere else.
static int check_layout(Engine *e, const char *path) {
    void *lib = dlopen(path, RTLD_NOW | RTLD_NOLOAD);
    struct { int at; const char *name; } slot[] = {
        {K_DO_INTERRUPT, "x86_cpu_do_interrupt_x86_64"}, {K_TLB_FILL_CPU, "x86_cpu_tlb_fill_x86_64"},
        {K_PHYS_DEBUG, "x86_cpu_get_phys_page_attrs_debug_x86_64"}, {K_EXEC_ENTER, "x86_cpu_exec_enter_x86_64"},
        {K_EXEC_EXIT, "x86_cpu_exec_exit_x86_64"}, {K_EXEC_INTERRUPT, "x86_cpu_exec_interrupt_x86_64"},
        {K_DEBUG_EXCP, "breakpoint_handler_x86_64"},
    };
    if (F(char *, C_ENV_PTR) != e->env || F(char *, C_UC) != e->uc || F(char *, ENV_UC) != e->uc) return 1;
    for (size_t i = 0; i < sizeof slot / sizeof *slot; i++)
        if (*(void **)(e->cc + slot[i].at) != dlsym(lib, slot[i].name)) return 1;
    if (F(u64, XSAVE_COMPONENTS) != 7) return 1; // x87, SSE, AVX: those of the model
    if (F(u32, CPUID_VENDOR) != VENDOR_AMD || !(F(u64, XSAVE_FEATURES) & XSAVE_XGETBV1)) return 1;
    if (UC(void *, UC_MEMORY_MAPPING) != dlsym(lib, "find_memory_mapping_x86_64")) return 1;
    if (UC(void *, UC_LAST_TB)) return 1; // nothing has run yet
    const char *tcg = UC(char *, UC_TCG_CTX);
    if (TCG(u64, TCG_BUFFER_END) - TCG(u64, TCG_BUFFER) > TCG(u64, TCG_BUFFER_SIZE)) return 1;
    if (!head_is_known() || !mxcsr_is_known(e)) return 1;
    int globals = *(int *)(UC(char *, UC_TCG) + TCG_NB_GLOBALS), temps = *(int *)(UC(char *, UC_TCG) + TCG_NB_TEMPS);
    if (globals < 16 || globals > 64 || temps < globals || temps > 512) return 1; // registers of the guest
    for (int m = 0; m < 3; m++) {
        TlbFast *f = &F(TlbFast, TLB_FAST + 16 * m);
        if ((f->mask & 63) || !f->table) return 1;
        const u64 *victims = &F(u64, TLB_DESC + TLB_DESC_SIZE * m + TLB_DESC_VTABLE); // still empty: all ones, and none around
        for (int i = 0; i < VTLB_SIZE * 8; i++)
            if (victims[i] != ~0ull) return 1;
        if (victims[-1] == ~0ull || victims[VTLB_SIZE * 8] == ~0ull) return 1;
    }
    return 0;
}

// All guest memory is one region for Unicorn, whose regions cost a walk through all others and are at most 4096. Where no slot is,
// it reads as zeroes: only Unicorn's page walk looks there.
static int open_window(Engine *e) {
    int flags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE;
    e->window = mmap(NULL, GPA_END, PROT_READ, flags, -1, 0);
    if (e->window == MAP_FAILED) return 2;
    if (p_map_ptr(e->uc, 0, GPA_END, PROT_R | PROT_W | PROT_X, e->window)) return 3;
    e->window_mr = e->memory_mapping(e->uc, 0);
    size_t id; // hooks on RAM would keep its stores on the slow path
    int types[] = {HOOK_READ_UNMAPPED, HOOK_WRITE_UNMAPPED, HOOK_FETCH_UNMAPPED, HOOK_WRITE_PROT};
    for (int i = 0; i < 4; i++)
        if (p_hook_add(e->uc, &id, types[i], (void *)h_mem, NULL, NOT_RAM, NOT_RAM + GPA_END - 1)) return 3;
    return 0;
}

// insns: Unicorn's numbers of SYSCALL, SYSENTER, IN, OUT. 0; 1 another layout, 2 out of memory, 3 refused by Unicorn.
int nv_engine_new(const char *path, char *uc, const int *insns, Engine **out) {
    Engine *e = calloc(1, sizeof *e);
    if (!e) return 2;
    e->uc = uc;
    e->cpu = UC(char *, UC_CPU);
    e->env = e->cpu - C_CPU;
    e->cc = F(char *, C_CLASS);
    if (check_layout(e, path)) { free(e); return 1; }
    e->do_interrupt = *(void (**)(void *))(e->cc + K_DO_INTERRUPT);
    e->tlb_fill = *(bool (**)(void *, u64, int, int, int, bool, u64))(e->cc + K_TLB_FILL);
    e->exec_enter = *(void (**)(void *))(e->cc + K_EXEC_ENTER);
    e->exec_exit = *(void (**)(void *))(e->cc + K_EXEC_EXIT);
    e->exec_interrupt = *(bool (**)(void *, int))(e->cc + K_EXEC_INTERRUPT);
    e->phys_debug = *(u64 (**)(void *, u64, u32 *))(e->cc + K_PHYS_DEBUG);
    e->memory_mapping = UC(void *, UC_MEMORY_MAPPING);
    int flags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE;
    e->code = mmap(NULL, 1 << 25, PROT_READ | PROT_WRITE, flags, -1, 0);
    e->stored = mmap(NULL, 1 << 25, PROT_READ | PROT_WRITE, flags, -1, 0);
    e->scratch = mmap(NULL, 4096 * SCRATCH_PAGES, PROT_READ | PROT_WRITE, flags, -1, 0);
    if (e->code == MAP_FAILED || e->stored == MAP_FAILED || e->scratch == MAP_FAILED) return 2;
    pthread_mutex_init(&e->m, NULL);
    pthread_cond_init(&e->look, NULL);
    for (int i = 0; i < QUEUES; i++) pthread_cond_init(&e->c[i], NULL);
    int i = 0;
    while (engines[i]) i++;
    if (i == MAX_CPUS) return 2;
    engines[i] = e;
    F(u64, XSAVE_COMPONENTS) = 3; // no AVX: guests see none
    F(u64, XSAVE_FEATURES) &= ~(u64)XSAVE_XGETBV1;
    UC(u8, UC_NO_EXIT_REQUEST) = 1; // a stop inside an instruction, after its access, would run it twice
    void *f[] = {(void *)h_syscall, (void *)h_sysenter, (void *)h_in, (void *)h_out}; // those first: a pending stop breaks the loop
    size_t id;
    for (int k = 0; k < 4; k++)
        if (p_hook_add(uc, &id, HOOK_INSN, f[k], NULL, (u64)1, (u64)0, insns[k])) return 3;
    if (p_hook_add(uc, &id, HOOK_INTR, (void *)h_intr, NULL, (u64)1, (u64)0)) return 3;
    if (p_hook_add(uc, &id, HOOK_EDGE_GENERATED, (void *)h_translated, e, (u64)1, (u64)0)) return 3;
    static const Tb none;
    UC(const Tb *, UC_LAST_TB) = &none; // without one h_translated is not called: until a first block has come to its end
    int err = open_window(e);
    if (err) return err;
    install_tlb(e);
    *(void **)(e->cc + K_EXEC_ENTER) = (void *)our_exec_enter;
    *(void **)(e->cc + K_EXEC_EXIT) = (void *)our_exec_exit;
    *(void **)(e->cc + K_EXEC_INTERRUPT) = (void *)our_exec_interrupt;
    *(void **)(e->cc + K_DEBUG_EXCP) = (void *)our_debug_excp;
    *out = e;
    return 0;
}

// SYSENTER and SYSEXIT are known in long mode, as on Intel's CPUs.
void nv_long_mode_sysenter(Engine *e) { F(u32, CPUID_VENDOR) = VENDOR_INTEL; }

Vcpu *nv_cpu_new(Engine *e) {
    Vcpu *v = calloc(1, sizeof *v);
    char *image = calloc(1, STATE_SIZE);
    u8 *aux = mmap(NULL, AUX_SIZE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (!v || !image || aux == MAP_FAILED || e->ncpus == MAX_CPUS) return NULL;
    v->e = e;
    v->image = image;
    v->vmcb = aux;
    v->intr_vector = v->exc_vector = v->delivering = -1;
    enter(e, NULL, 1);
    v->vmcb_gpa = AUX_BASE + (u64)e->ncpus * AUX_SIZE;
    int err = p_map_ptr(e->uc, v->vmcb_gpa, AUX_SIZE, PROT_R | PROT_W, aux);
    if (!err) {
        *(u64 *)(aux + 0x48) = v->vmcb_gpa + 0x1000; // MSRPM
        memset(aux + 0x1000, 0xff, 0x2000);
        if (e->ncpus == 1) { // from now on no state stays in the engine
            Vcpu *first = e->cpus[0];
            memcpy(first->image, e->env, STATE_SIZE);
            first->state = first->home = first->image;
        }
        memcpy(image, e->env, STATE_SIZE);
        v->state = v->home = e->ncpus ? image : e->env;
        v->flush = 1;
        e->cpus[e->ncpus++] = v;
    }
    leave_engine(e, NULL);
    return err ? NULL : v;
}

// The index of the first region that ends after gpa.
static int region_index(Engine *e, u64 gpa) {
    int lo = 0, hi = e->nregions;
    while (lo < hi) {
        int mid = (lo + hi) / 2;
        if (e->region[mid].gpa + e->region[mid].size <= gpa) lo = mid + 1;
        else hi = mid;
    }
    return lo;
}

// Memory that is elsewhere appears in the window, too; it is a shared mapping. 0, 1 overlap, 2 out of memory, or an errno.
int nv_map(Engine *e, u64 gpa, u64 size, u8 *host, int readonly, u64 file, u64 offset) {
    enter(e, NULL, 1);
    int i = region_index(e, gpa), alias = host != e->window + gpa, err = 0;
    if (i < e->nregions && e->region[i].gpa < gpa + size) err = 1;
    if (!err && e->nregions == e->capacity) {
        int capacity = e->capacity ? 2 * e->capacity : 64;
        Region *more = realloc(e->region, capacity * sizeof *more);
        if (more) e->region = more, e->capacity = capacity;
        else err = 2;
    }
    if (!err && alias && mremap(host, 0, size, MREMAP_MAYMOVE | MREMAP_FIXED, e->window + gpa) == MAP_FAILED) err = errno;
    if (!err) {
        memmove(&e->region[i + 1], &e->region[i], (e->nregions++ - i) * sizeof(Region));
        e->region[i] = (Region){gpa, size, e->window + gpa, readonly, alias, NULL, NULL, 0, 0, file, offset, 0};
        find_sharers(e, &e->region[i]);
        p_tlb_flush(e->cpu);
    }
    leave_engine(e, NULL);
    return err;
}

static void drop_code(Engine *e, u64 gpa, u64 size) {
    u64 ram = p_ram_addr(e->uc, e->window), end = (gpa + size) >> 12;
    for (u64 p = gpa >> 12; p < end; p++) {
        if (!e->code[p >> 3]) p |= 7;
        else if (e->code[p >> 3] >> (p & 7) & 1) {
            p_tb_invalidate(e->uc, ram + (p << 12), ram + ((p + 1) << 12));
            e->code[p >> 3] &= ~(1 << (p & 7));
            forget_code(e, p);
        }
    }
}

int nv_unmap(Engine *e, u64 gpa) {
    enter(e, NULL, 1);
    int i = region_index(e, gpa), err = i == e->nregions || e->region[i].gpa != gpa;
    if (!err) {
        Region r = e->region[i];
        settle_walk(e);
        drop_code(e, gpa, r.size);
        for (int c = 0; c < e->ncpus; c++)
            if (e->cpus[c]->preempted_gpa - gpa < r.size) e->cpus[c]->preempted_gpa = 0;
        e->nlogged -= r.log != NULL;
        memmove(&e->region[i], &e->region[i + 1], (--e->nregions - i) * sizeof r);
        int flags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | MAP_FIXED;
        if (r.alias) mmap(e->window + gpa, r.size, PROT_READ, flags, -1, 0);
        p_tlb_flush(e->cpu);
    }
    leave_engine(e, NULL);
    return err;
}

u8 *nv_window(Engine *e) { return e->window; }

static bool has_code(Engine *e, u64 pa) {
    if (e->code[pa >> 15] >> (pa >> 12 & 7) & 1) return true;
    const Region *r = region_at(e, pa);
    return r && r->shared;
}

void nv_invalidate(Engine *e, u64 gpa, u64 size) {
    u64 end = (gpa + size + 4095) & ~0xfffull;
    int locked = 0;
    for (u64 p = gpa & ~0xfffull; p < end; p += 4096) {
        if (p >> 40 || (!locked && !has_code(e, p))) continue;
        if (!locked) enter(e, NULL, 1);
        locked = 1;
        u64 ram = p_ram_addr(e->uc, e->window + p);
        p_tb_invalidate(e->uc, ram, ram + 4096);
        const Region *r = region_at(e, p);
        if (r && r->shared) drop_shared_code(e, r, p);
    }
    if (locked) leave_engine(e, NULL);
}

// The region at gpa logs into a bitmap, from bit `page` on; NULL: no more. Every translation to it is made anew.
int nv_log(Engine *e, u64 gpa, u64 *bitmap, u64 *touched, u64 page, u64 slot) {
    enter(e, NULL, 1);
    settle_walk(e);
    Region *r = region_at(e, gpa);
    if (r) {
        e->nlogged += (bitmap != NULL) - (r->log != NULL);
        r->log = bitmap;
        r->touched = touched;
        r->log_page = page;
        r->slot = slot;
        p_tlb_flush(e->cpu);
    }
    leave_engine(e, NULL);
    return !r;
}

// The machine itself wrote `count` pages; any thread.
void nv_log_set(u64 *bitmap, u64 page, u64 count) {
    for (; count; page++, count--) __atomic_fetch_or(&bitmap[page >> 6], 1ull << (page & 63), __ATOMIC_RELAXED);
}

// The vCPU's dirty ring: n entries, a power of two; the guest is left at soft_limit. Its two indices.
u32 *nv_ring_open(Vcpu *v, DirtyGfn *gfns, u32 n, u32 soft_limit) {
    v->ring = (DirtyRing){gfns, n, soft_limit, 0, 0};
    return &v->ring.dirty_index;
}

// The machine wrote pages of a slot on behalf of a vCPU, which does not run now.
void nv_ring_push(Vcpu *v, u64 *bitmap, u64 slot, u64 page, u64 count) {
    enter(v->e, NULL, 1);
    nv_log_set(bitmap, page, count);
    for (; count; page++, count--)
        if (v->ring.dirty_index - v->ring.reset_index < v->ring.size) push_dirty(&v->ring, slot, page);
    leave_engine(v->e, NULL);
}

// Bits of n words are taken out of a bitmap: with `mask` those that are set in `out`, else all; `out` then has what was taken.
// The next store to their pages is seen again. 1 when there were any.
int nv_log_take(Engine *e, u64 *bitmap, u64 *out, u64 n, int mask) {
    u64 any = 0;
    enter(e, NULL, 1);
    settle_walk(e);
    for (u64 i = 0; i < n; i++) {
        u64 wanted = mask ? out[i] : ~0ull;
        out[i] = 0;
        if (wanted & __atomic_load_n(&bitmap[i], __ATOMIC_RELAXED))
            any |= out[i] = __atomic_fetch_and(&bitmap[i], ~wanted, __ATOMIC_RELAXED) & wanted;
    }
    if (any) p_tlb_flush(e->cpu);
    leave_engine(e, NULL);
    return any != 0;
}

// What is in the bitmap now, the walk under way included.
void nv_log_sync(Engine *e) {
    enter(e, NULL, 1);
    settle_walk(e);
    leave_engine(e, NULL);
}

const u8 *nv_code_pages(Engine *e) { return e->code; }

void nv_engine_close(Engine *e) {
    stop_looking(e);
    int i = 0, last;
    while (engines[i] != e) i++;
    for (last = i; engines[last + 1]; last++) {}
    engines[i] = engines[last];
    engines[last] = NULL;
    munmap(e->window, GPA_END);
    free(e->region);
    free_kept(e);
    munmap(e->code, 1 << 25);
    munmap(e->stored, 1 << 25);
    munmap(e->scratch, 4096 * SCRATCH_PAGES);
    for (i = 0; i < e->ncpus; i++) {
        munmap(e->cpus[i]->vmcb, AUX_SIZE);
        free(e->cpus[i]->image);
        free(e->cpus[i]);
    }
    free(e);
}

// The bits of hflags that follow from segments, control registers and EFER.
void nv_commit(Vcpu *v) {
    u64 *cr = (u64 *)(v->state + CR), efer = S(u64, EFER);
    Seg *s = (Seg *)(v->state + SEGS);
    u32 old = S(u32, HFLAGS), cs = s[1].flags, h = (s[2].flags >> 13) & 3;
    h |= (old & HF_INHIBIT) | 1 << 21 | 1 << 20; // intercepts on; SVME, else VMMCALL is #UD
    h |= (cr[0] & 1) << 7 | ((cr[0] << 8) & 0xe00);
    if (cr[4] & 1 << 9) h |= 1 << 22;
    if (cr[4] & 1 << 21) h |= 1 << 23;
    if (efer & 0x400) h |= HF_LMA;
    if ((h & HF_LMA) && (cs & 1 << 21)) h |= 0x30 | HF_CS64;
    else {
        h |= (cs >> 22 & 1) << 4 | (s[2].flags >> 22 & 1) << 5;
        if (!(cr[0] & 1) || (S(u64, EFLAGS) & FL_VM) || !(h & HF_CS32) || s[3].base || s[0].base || s[2].base) h |= 0x40;
    }
    S(u32, HFLAGS) = h;
    v->flush = 1;
}

void nv_skip(Vcpu *v, int len) { advance(v, len); }

int nv_insn_bytes(Vcpu *v, u8 *buf, int n) {
    enter(v->e, v, 0);
    n = guest_fetch(v->e, v->state, ((Seg *)(v->state + SEGS))[1].base + S(u64, EIP), buf, n);
    leave_engine(v->e, v);
    return n;
}

// Linear to guest physical address without side effects; ~0 when not mapped.
u64 nv_translate(Vcpu *v, u64 va) {
    u64 gpa = ~0ull;
    enter(v->e, v, 0);
    guest_phys(v->e, v->state, va, &gpa);
    leave_engine(v->e, v);
    return gpa;
}

void nv_fxsave(Vcpu *v, u8 *b) {
    memset(b, 0, 512);
    u32 top = S(u32, FPSTT) & 7, tags = 0;
    *(u16 *)b = S(u16, FPUC);
    *(u16 *)(b + 2) = (S(u16, FPUS) & ~0x3800) | top << 11;
    for (int i = 0; i < 8; i++) tags |= (u32)!S(u8, FPTAGS + i) << i;
    b[4] = tags;
    *(u16 *)(b + 6) = S(u16, FPOP);
    *(u64 *)(b + 8) = S(u64, FPIP);
    *(u64 *)(b + 16) = S(u64, FPDP);
    *(u32 *)(b + 24) = S(u32, MXCSR);
    *(u32 *)(b + 28) = 0xffff;
    for (u32 i = 0; i < 8; i++) memcpy(b + 32 + 16 * i, v->state + FPREGS + 16 * ((top + i) & 7), 10);
    for (int i = 0; i < 16; i++) memcpy(b + 160 + 16 * i, v->state + XMM + 64 * i, 16);
}

void nv_fxrstor(Vcpu *v, const u8 *b) {
    u32 top = *(u16 *)(b + 2) >> 11 & 7;
    S(u16, FPUC) = *(u16 *)b;
    S(u32, FPSTT) = top;
    S(u16, FPUS) = *(u16 *)(b + 2) & ~0x3800;
    for (int i = 0; i < 8; i++) S(u8, FPTAGS + i) = !(b[4] >> i & 1);
    S(u16, FPOP) = *(u16 *)(b + 6);
    S(u64, FPIP) = *(u64 *)(b + 8);
    S(u64, FPDP) = *(u64 *)(b + 16);
    S(u32, MXCSR) = *(u32 *)(b + 24) & 0xffff;
    for (u32 i = 0; i < 8; i++) memcpy(v->state + FPREGS + 16 * ((top + i) & 7), b + 32 + 16 * i, 10);
    for (int i = 0; i < 16; i++) memcpy(v->state + XMM + 64 * i, b + 160 + 16 * i, 16);
    our_mxcsr(v->state);
    p_fpuc(v->state);
}

typedef struct { u64 blocks, guest_bytes, flushes, invalidated, code_bytes, code_capacity; } Translated; // layout.Translation

// While a guest runs, too: each number is right, if not of the same moment.
void nv_translation(const Engine *e, Translated *out) {
    const char *tcg = UC(char *, UC_TCG_CTX);
    *out = (Translated){e->blocks, e->block_bytes, TCG(u32, TCG_FLUSHES), TCG(u64, TCG_INVALIDATED),
                         TCG(u64, TCG_BUFFER_END) - TCG(u64, TCG_BUFFER), TCG(u64, TCG_BUFFER_SIZE)};
}

u64 nv_host_tsc(void) { return __builtin_ia32_rdtsc(); }

// The vCPU's TSC runs ratio / 2^frac_bits times as fast as the host's; it does not run now. Another speed than the host's makes RDTSC
// slower: it is intercepted.
void nv_scale_tsc(Vcpu *v, u64 ratio, u32 frac_bits) {
    v->tsc_ratio = ratio != 1ull << frac_bits ? ratio : 0;
    v->tsc_frac_bits = frac_bits;
}

// A clock in nanoseconds and the TSC at the same moment: the closest of a few readings.
u64 nv_clock_and_tsc(int clock, u64 *tsc) {
    u64 best = ~0ull, ns = 0;
    for (int i = 0; i < 5; i++) {
        struct timespec t;
        u64 before = __builtin_ia32_rdtsc();
        clock_gettime(clock, &t);
        u64 width = __builtin_ia32_rdtsc() - before;
        if (width < best) {
            best = width;
            *tsc = before + width / 2;
            ns = t.tv_sec * 1000000000ull + t.tv_nsec;
        }
    }
    return ns;
}
