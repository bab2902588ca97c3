// SPDX-License-Identifier: GPL-2.0-or-later
// The part of the CPU that must not run in Python: Unicorn's callbacks, the way in and out of the guest, completing an
// instruction that left for I/O. Everything that decides is Python. The module is loaded with ctypes (see layout.py); that it is
// an extension module only gets it built with the package.
//
// An instruction that touches a port or memory without RAM behind it leaves the engine by a longjmp out of the
// callback (bail), before it has changed anything. To complete it, plain IN and OUT are skipped; anything else is executed again
// alone (replay: cflags_next_tb = 1), with what was read supplied and what it writes recorded as events, which are then handed
// out one by one. Interrupts are masked meanwhile: they come after the instruction.
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <time.h>
#include "native.h"

// The vCPU this thread runs. Its address is asked for at each access: no call for that.
static __thread Vcpu *cur __attribute__((tls_model("initial-exec")));
static Engine *engines[MAX_CPUS + 1];
static int (*p_emu_start)(void *, u64, u64, u64, size_t), (*p_emu_stop)(void *);
static int (*p_hook_add)(void *, size_t *, int, void *, void *, u64, u64, ...), (*p_hook_del)(void *, size_t);
static int (*p_map_ptr)(void *, u64, u64, u32, void *);
static int (*p_reg_read)(void *, int, void *);
static void (*p_check_io[3])(void *, u32), (*p_tlb_flush)(void *), (*p_tlb_flush_page)(void *, u64), (*p_tb_flush)(void *);
static void (*p_tb_invalidate)(void *, u64, u64), (*p_mxcsr)(void *), (*p_fpuc)(void *);
static u64 (*p_ram_addr)(void *, void *);
static bool (*p_restore_state)(void *, u64, bool);
static void (*p_check_exit)(void *, u32);
static int (*p_bp_insert)(void *, u64, int, void **);
static void (*p_bp_remove)(void *, void *);

static Engine *engine_of(void *cs) {
    if (cur && cur->e->cpu == cs) return cur->e;
    for (int i = 0; engines[i]; i++)
        if (engines[i]->cpu == cs) return engines[i];
    abort();
}

_Noreturn static void leave(Vcpu *v, int kind);
static int skip(Vcpu *v, int len);
static void stop(Vcpu *v, atomic_int *why);
static Region *region_at(Engine *e, u64 gpa);
#include "blocks.h"
#include "code.h"
#include "tlb.h"
#include "decode.h"
#include "emulated.h"
#include "undefined.h"
#include "interpose.h"
#include "pcmpstr.h"
#include "locked.h"
#include "access.h"
#include "stores.h"
#include "floats.h"

_Noreturn static void bail(Engine *e) {
    p_emu_stop(e->uc);
    F(int32_t, C_EXC_INDEX) = EXCP_INTERRUPT;
    F(u32, C_CAN_DO_IO) = 1;
    int n = UC(int, UC_NESTED_LEVEL);
    siglongjmp(*(sigjmp_buf *)(e->uc + UC_JMP_BUFS + UC_JMP_BUF_SIZE * (n - 1)), 1);
}

_Noreturn static void leave(Vcpu *v, int kind) {
    v->exit.kind = kind;
    v->delivering = -1;
    bail(v->e);
}

static void invalidate_nothing(void *uc, u64 address, size_t size) {
    (void)uc;
    (void)address;
    (void)size;
}

#include "debug.h"
#include "hooks.h"

// --- the guest runs -------------------------------------------------------------------------------------------------------

static void lock(Vcpu *v) { while (atomic_flag_test_and_set_explicit(&v->lk, memory_order_acquire)) __builtin_ia32_pause(); }
static void unlock(Vcpu *v) { atomic_flag_clear_explicit(&v->lk, memory_order_release); }

// uc_emu_start clears the stop flags after it was called; the one that comes now stays.
static void our_exec_enter(void *cs) {
    Engine *e = engine_of(cs);
    e->exec_enter(cs);
    Vcpu *v = cur;
    if (!v || v->replaying || v->alone) return;
    // Entered again within a run: the guest executed PAUSE, so somebody who waits may be who it waits for.
    if (v->entered++) {
        code_suspect(e);
        if (e->ticket - e->serving > 1) atomic_store(&v->yield, 1);
    }
    if (atomic_load(&v->kick) || atomic_load(&v->yield)) p_emu_stop(e->uc);
}

static void our_exec_exit(void *cs) {
    Engine *e = engine_of(cs);
    mask_flags(e);
    e->exec_exit(cs);
}

static void stop(Vcpu *v, atomic_int *why) {
    atomic_store(why, 1);
    lock(v);
    if (v->in_guest) p_emu_stop(v->e->uc);
    unlock(v);
}

static void start(Vcpu *v, int guest) {
    Engine *e = v->e;
    v->exit.kind = EXIT_NONE;
    v->entered = 0;
    lock(v);
    v->in_guest = guest;
    unlock(v);
    // As hardware loads it for a guest that is being debugged; the guest's own is what its debugger's #DB does not change.
    u64 dr6 = DR6(e->env);
    int debugged = F(u32, ICEPT_EXC) & 2;
    if (debugged) DR6(e->env) = DR6_ACTIVE_LOW;
    u64 since = __builtin_ia32_rdtsc();
    if (guest) v->guest_since = since;
    p_emu_start(e->uc, F(u64, EIP), 0, 0, 0);
    v->guest_cycles += __builtin_ia32_rdtsc() - since;
    v->guest_since = 0;
    if (debugged) DR6(e->env) = dr6;
    lock(v);
    v->in_guest = 0;
    unlock(v);
    F(u8, C_EXIT_REQUEST) = 0;
    F(u32, C_CFLAGS_NEXT) = ~0u;
}

static int is_iret(Engine *e, const Vcpu *v) {
    Insn in;
    decode(e, v->state, &in);
    return !in.two && in.op == 0xcf;
}

// One instruction and no event; RF keeps its breakpoint from coming (again).
static void single(Vcpu *v) {
    Engine *e = v->e;
    int keep = !e->nbreaks || is_iret(e, v);
    v->steps = 0;
    if (e->nbreaks) F(u64, EFLAGS) |= FL_RF;
    F(u32, C_IRQ) = IRQ_OURS;
    F(u32, C_CFLAGS_NEXT) = 1;
    start(v, 0);
    if (!keep) F(u64, EFLAGS) &= ~(u64)FL_RF;
    F(u32, C_IRQ) = 0;
}

static int replay(Vcpu *v) {
    Engine *e = v->e;
    Insn in;
    decode(e, v->state, &in);
    v->movbe = in.movbe;
    v->exit.code = S(u64, EIP);
    v->nev = v->evpos = 0;
    v->used = v->allow = 0;
    v->npages = 0;
    for (int i = 0; i < v->nknown; i++) {
        Known *k = &v->known[i];
        u64 page = k->gpa & ~0xfffull;
        int p = 0;
        while (p < v->npages && v->page[p] != page) p++;
        if (p == v->npages) {
            if (p == SCRATCH_PAGES) continue;
            v->page[v->npages++] = page;
        }
        memcpy(e->scratch + 4096 * p + (k->gpa & 0xfff), k->data, k->size);
    }
    v->replaying = 1;
    v->trap = 0;
    single(v);
    v->replaying = 0;
    if (v->nev) v->trap = 0; // nor does Linux's emulator trap after an access that the client has to complete
    if (v->exit.kind) {
        v->nev = 0;
        return v->exit.kind;
    }
    v->nknown = 0;
    v->cross_left = 0;
    return EXIT_NONE;
}

static int next_event(Vcpu *v) {
    Event *ev = &v->ev[v->evpos++];
    Exit *x = &v->exit;
    if (v->evpos == v->nev) v->evpos = v->nev = 0;
    x->gpa = ev->gpa;
    x->port = ev->port;
    x->size = ev->size;
    x->count = 1;
    x->string = ev->kind == EXIT_IO_OUT;
    memcpy(x->data, ev->data, 8);
    return x->kind = ev->kind;
}

static void advance(Vcpu *v, int len) {
    set_eip(v->state, S(u64, EIP) + len);
    S(u32, HFLAGS) &= ~HF_INHIBIT;
    S(u64, EFLAGS) &= ~(u64)FL_RF;
}

static int skip(Vcpu *v, int len) {
    advance(v, len);
    if (!(S(u64, EFLAGS) & FL_TF)) return EXIT_NONE;
    if (S(u32, ICEPT_EXC) & 2) {
        report_db(v, DR6_BS);
        return EXIT_SVM;
    }
    DR6(v->state) |= DR6_BS;
    v->exc_vector = 1;
    v->exc_error = v->exc_soft = 0;
    return EXIT_NONE;
}

// #DB after an instruction that has come to its end, its I/O included.
static int trapped(Vcpu *v) {
    if (v->nev || v->pend || !(v->hits | v->trap)) return EXIT_NONE;
    report_db(v, v->hits | v->trap);
    v->hits = v->trap = 0;
    return EXIT_SVM;
}

// After a replay (or a first pass that has to be replayed): what Python is told.
static int finish(Vcpu *v, int kind) {
    while (kind == EXIT_MMIO_WRITE || (kind == EXIT_IO_OUT && v->exit.string)) kind = replay(v);
    if (kind) {
        if (kind == EXIT_IO_IN) v->pend = v->insn.plain ? PEND_IN : PEND_INS;
        else if (kind == EXIT_IO_OUT) v->pend = PEND_OUT;
        else if (kind == EXIT_MMIO_READ) v->pend = PEND_MMIO;
        else if (kind == EXIT_SVM || kind == EXIT_FETCH) v->nknown = 0;
        v->ins_pos = 0;
        return kind;
    }
    return v->nev ? next_event(v) : EXIT_NONE;
}

static int complete(Vcpu *v) {
    Exit *x = &v->exit;
    if (v->nev) return next_event(v);
    int pend = v->pend, kind;
    switch (pend) {
    case PEND_NONE: return EXIT_NONE;
    case PEND_OUT: v->pend = PEND_NONE; return skip(v, v->insn.len);
    case PEND_IN: {
        u64 *rax = REGS(v->state), in = *(u32 *)x->data;
        *rax = x->size == 1 ? (*rax & ~0xffull) | (in & 0xff) : x->size == 2 ? (*rax & ~0xffffull) | (in & 0xffff) : in;
        v->pend = PEND_NONE;
        return skip(v, v->insn.len);
    }
    case PEND_INS:
        while (v->ins_pos < (int)x->count) {
            u32 count = x->count, size = x->size;
            v->in_data = x->data + size * v->ins_pos++;
            kind = replay(v);
            v->in_data = NULL;
            if (kind || !v->used) break; // a fault: what is left is asked for again, as Linux's emulator does
            if (v->nev && v->ins_pos < (int)count) {
                // several MMIO writes would overwrite x->data: the rest is asked for again
                v->pend = PEND_NONE;
                return next_event(v);
            }
        }
        v->pend = PEND_NONE;
        if (v->nev) return next_event(v);
        return v->exit.kind ? finish(v, v->exit.kind) : EXIT_NONE;
    default: {
        Known *k = &v->known[v->nknown < MAX_KNOWN ? v->nknown : MAX_KNOWN - 1];
        k->gpa = x->gpa;
        k->size = x->size;
        memcpy(k->data, x->data, 8);
        if (v->nknown < MAX_KNOWN) v->nknown++;
        v->pend = PEND_NONE;
        kind = replay(v);
        return finish(v, kind);
    }
    }
}

enum { PREEMPTED = 1, PREEMPTED_FLUSH_TLB = 2 }; // KVM_VCPU_*

static u64 monotonic_ns(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec * 1000000000ull + t.tv_nsec;
}

// The engine runs one vCPU at a time; waiters are served in order and get it after a slice, or at once. The first of them sees
// to it that the slice ends; the others sleep until they are the first.
// `my`: the ticket that leave_engine() took, or NO_TICKET.
static void enter_with(Engine *e, Vcpu *v, int quick, u64 my) {
    pthread_mutex_lock(&e->m);
    if (my == NO_TICKET) my = e->ticket++;
    if (e->serving != my) {
        u64 since = v ? monotonic_ns() : 0;
        e->quick += quick;
        while (e->serving != my) {
            pthread_cond_t *c = &e->c[my % QUEUES];
            if (e->quick && e->owner) stop(e->owner, &e->owner->yield);
            if (!quick && my != e->serving + 1) {
                pthread_cond_wait(c, &e->m);
                continue;
            }
            struct timespec t;
            clock_gettime(CLOCK_REALTIME, &t);
            t.tv_nsec += e->quick ? 100000 : 1000000;
            if (t.tv_nsec >= 1000000000) { t.tv_nsec -= 1000000000; t.tv_sec++; }
            if (pthread_cond_timedwait(c, &e->m, &t) == ETIMEDOUT && e->owner) stop(e->owner, &e->owner->yield);
        }
        e->quick -= quick;
        if (v) v->waited += monotonic_ns() - since;
    }
    e->owner = v;
    if (v && e->parked) pthread_cond_signal(&e->look);
    pthread_mutex_unlock(&e->m);
    if (!v) return;
    cur = v;
    if (v->state != e->env) {
        memcpy(e->env, v->image, STATE_SIZE);
        v->state = e->env;
    }
    if (e->nbreaks || v->bp_dr7 & 0xff) sync_breaks(e, v);
    if (v->preempted_gpa) {
        if (e->window[v->preempted_gpa] & PREEMPTED_FLUSH_TLB) v->flush = 1;
        if (e->window[v->preempted_gpa]) e->window[v->preempted_gpa] = 0;
    }
    if (e->last != v || v->flush) {
        e->generation += e->last != v;
        e->last = v;
        v->flush = 0;
        p_tlb_flush(e->cpu);
        e->nfetched = 0;
    }
    if (v->suspect) {
        v->suspect = 0;
        code_suspect(e);
    }
}

static void enter(Engine *e, Vcpu *v, int quick) { enter_with(e, v, quick, NO_TICKET); }

// `again`: the caller wants it back after the others. Its ticket is taken here, so that none of them ever finds itself alone.
static u64 give_turn(Engine *e, Vcpu *v, int again) {
    if (v) {
        cur = NULL;
        if (e->ncpus > 1) {
            memcpy(v->image, e->env, STATE_SIZE);
            v->state = v->image;
        }
    }
    pthread_mutex_lock(&e->m);
    e->owner = NULL;
    u64 my = again ? e->ticket++ : NO_TICKET, next = ++e->serving, waiters = e->ticket - next;
    pthread_mutex_unlock(&e->m);
    if (waiters) pthread_cond_broadcast(&e->c[next % QUEUES]);
    if (waiters > 1) pthread_cond_broadcast(&e->c[(next + 1) % QUEUES]);
    return my;
}

static void leave_engine(Engine *e, Vcpu *v) { give_turn(e, v, 0); }

void nv_lock(Engine *e) { enter(e, NULL, 1); }
void nv_unlock(Engine *e) { leave_engine(e, NULL); }
void nv_kick(Vcpu *v) { stop(v, &v->kick); }

static void arm(Vcpu *v) {
    Engine *e = v->e;
    u32 irq = v->nmi ? IRQ_NMI : 0;
    usable_tss(e);
    F(u64, INTERCEPT) &= ~(u64)(ICPT_VINTR | ICPT_RDTSC);
    if (v->tsc_ratio) F(u64, INTERCEPT) |= ICPT_RDTSC;
    if (v->exc_vector >= 0) irq |= IRQ_OURS;
    if (v->intr_vector >= 0) {
        *(u32 *)(v->vmcb + VMCB_INT_VECTOR) = v->intr_vector;
        irq |= IRQ_VIRQ;
    } else if (v->window) {
        F(u64, INTERCEPT) |= ICPT_VINTR;
        irq |= IRQ_VIRQ;
    }
    F(u32, C_IRQ) = irq;
}

int nv_complete(Vcpu *v) {
    Engine *e = v->e;
    if (!v->nev && !v->pend) return v->exit.kind = EXIT_NONE;
    enter(e, v, 0);
    int kind = complete(v);
    if (!kind) kind = trapped(v);
    leave_engine(e, v);
    return v->exit.kind = kind;
}

int nv_run(Vcpu *v) {
    Engine *e = v->e;
    u64 ticket = NO_TICKET;
    if (!e->looking) start_looking(e);
    for (;;) {
        enter_with(e, v, v->owed, ticket);
        int kind = complete(v), ran = v->owed = 0;
        while (!kind && !atomic_load(&v->yield)) {
            if (atomic_exchange(&v->kick, 0)) {
                v->owed = !ran; // its turn goes by with looking at what came while it waited
                leave_engine(e, v);
                return v->exit.kind = EXIT_NONE;
            }
            kind = trapped(v);
            if (kind) break;
            arm(v);
            ran = 1;
            if (v->exc_vector < 0 && (v->restep || (e->nbreaks && F(u64, EFLAGS) & FL_RF))) {
                v->restep = 0;
                v->alone = 1;
                single(v);
                v->alone = 0;
            } else {
                v->nknown = 0; // of an instruction that was given up
                start(v, 1);
                v->nmi = (F(u32, C_IRQ) & IRQ_NMI) != 0;
                F(u32, C_IRQ) = 0;
            }
            UC(int, UC_SIZE_RECUR) = 0;
            if (v->exit.kind == EXIT_ALONE) {
                v->restep = 1;
                v->hits = 0;
                continue;
            }
            kind = v->exit.kind;
            if ((kind == EXIT_MMIO_READ || kind == EXIT_MMIO_WRITE) && !v->exit.info2 && !emulated(e, v->state)) {
                v->exit.info1 = kind == EXIT_MMIO_WRITE;
                kind = EXIT_UNKNOWN;
                v->cross_left = 0;
            }
            kind = finish(v, kind);
        }
        atomic_store(&v->yield, 0);
        if (!kind && v->preempted_gpa) e->window[v->preempted_gpa] = PREEMPTED;
        ticket = give_turn(e, v, !kind);
        if (kind) return v->exit.kind = kind;
    }
}

#include "state.h"

// An importable module, so that setuptools builds it as one; there is nothing in it.
void *PyInit__native(void) { return NULL; }
