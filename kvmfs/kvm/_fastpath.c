// SPDX-License-Identifier: GPL-2.0-or-later
// KVM_RUN without Python, as long as nothing is to be decided: the client wants the guest to go on, nothing is pending for it, and it
// stops for a port, MMIO or HLT that is the client's to answer. What is in force was decided by fastpath.py when it armed the vCPU
// after a KVM_RUN of its own; whatever is different from then on makes this give the vCPU back, before or after the guest ran.
//
// Who owns a vCPU is in `state`. FREE: Python, by its mutex. ARMED: nobody. RUNNING: the thread that is in here, or Python's thread
// that goes on with what this one has begun. WANTED: the same, and somebody sleeps until it is FREE.
#include <linux/futex.h>
#include <string.h>
#include <sys/syscall.h>
#include <unistd.h>
#include "../cpu/native.h"
#include "../fuse/shortcut.h"

enum { FREE, ARMED, RUNNING, WANTED };
enum { COMPLETE_NONE, COMPLETE_OUT, COMPLETE_IN, COMPLETE_READ, COMPLETE_WRITE }; // fastpath.py has the same
enum { WITH_PORTS = 1, WITH_HLT = 2, WITH_APIC = 4, READY = 8, NOT_READY = 16 };
enum { KVM_RUN = 0xae80, KVM_EXIT_UNKNOWN = 0, KVM_EXIT_IO = 2, KVM_EXIT_HLT = 5, KVM_EXIT_MMIO = 6, KVM_EXIT_IO_OUT = 1 };
enum { SVM_EXIT_HLT = 0x78, PORT_OUT_7E = 0x7e };
enum { PLACES = 8, KINDS = 8, PIO_DATA = 4096 };
enum { PLACE_READ = 1, PLACE_WRITE = 2, PLACE_PORT = 4 }; // beside a page, or a port << 12

struct kvm_run_head { // struct kvm_run
    u8 request_interrupt_window, immediate_exit, padding1[6];
    u32 exit_reason;
    u8 ready_for_interrupt_injection, if_flag;
    u16 flags;
    u64 cr8, apic_base;
    union {
        struct { u8 direction, size; u16 port; u32 count; u64 data_offset; } io;
        struct { u64 phys_addr; u8 data[8]; u32 len; u8 is_write; } mmio;
        u8 padding[256];
    };
    u64 kvm_valid_regs, kvm_dirty_regs;
};
_Static_assert(sizeof(struct kvm_run_head) == 304, "struct kvm_run");

typedef struct { // fastpath.py: LaneState
    atomic_int state;
    atomic_int stop;      // something may have changed: to be looked at by Python first
    u32 tid, with;        // the client's thread; which exits, and what else is different from vCPU to vCPU
    int32_t complete;     // how the last exit is completed
    int32_t kind;         // BEGUN: the exit that is to be handled;
    int32_t completing;   // COMPLETE_*: it came from completing the one before
    u32 nplaces;
    u64 apic_base;
    u64 runs, mmio_exits, halt_exits, exits[KINDS]; // what was counted in here
    u64 place[PLACES];    // accesses there are the client's: PLACE_* and a page of MMIO, or a port
    Vcpu *v;
    struct kvm_run_head *run;
} Lane;

typedef struct { struct shortcut shortcut; u64 first_inode, count; _Atomic(Lane *) lane[]; } Lanes;

static int (*p_run)(Vcpu *), (*p_complete)(Vcpu *);
static void (*p_kick)(Vcpu *), (*p_skip)(Vcpu *, int);

void fp_link(void *run, void *complete, void *kick, void *skip) {
    p_run = run;
    p_complete = complete;
    p_kick = kick;
    p_skip = skip;
}

static void futex(atomic_int *word, int op, int value) { syscall(SYS_futex, word, op | FUTEX_PRIVATE_FLAG, value, NULL, NULL, 0); }

// Python wants the vCPU. 0: it runs, and the caller does not wait.
int fp_claim(Lane *l, int wait) {
    for (;;) {
        int state = ARMED;
        if (atomic_compare_exchange_strong(&l->state, &state, FREE) || state == FREE) return 1;
        if (!wait) return 0;
        if (state == RUNNING && !atomic_compare_exchange_strong(&l->state, &state, WANTED)) continue;
        futex(&l->state, FUTEX_WAIT, WANTED);
    }
}

// The owner gives it back; armed: to this file, unless somebody waits for it.
void fp_release(Lane *l, int armed) {
    int state = atomic_load(&l->state);
    while (!atomic_compare_exchange_strong(&l->state, &state, armed && state != WANTED ? ARMED : FREE)) {}
    if (state == WANTED) futex(&l->state, FUTEX_WAKE, 1 << 30);
}

static bool is_clients(const Lane *l, u64 place) {
    for (u32 i = 0; i < l->nplaces && i < PLACES; i++)
        if (l->place[i] == place) return true;
    return false;
}

void fp_arm(Lane *l, u32 tid, u32 with, int complete, u64 apic_base, u64 place) {
    l->tid = tid;
    l->with = with;
    l->complete = complete;
    l->apic_base = apic_base;
    if (place && !is_clients(l, place)) l->place[l->nplaces++ % PLACES] = place;
    fp_release(l, 1);
}

static bool wants_to_run(const Lane *l) {
    const Vcpu *v = l->v;
    const struct kvm_run_head *run = l->run;
    return !run->request_interrupt_window && !run->immediate_exit && !run->kvm_valid_regs && !run->kvm_dirty_regs
           && (l->with & WITH_APIC || run->cr8 == (*(u8 *)(v->state + V_TPR) & 15)) && !(S(u64, EFLAGS) & FL_TF);
}

// What the last exit left open, with what the client answered. The kind of a further exit of the same instruction, or EXIT_NONE.
static int complete(Lane *l) {
    Vcpu *v = l->v;
    Exit *x = &v->exit;
    int how = l->complete;
    l->complete = COMPLETE_NONE;
    switch (how) {
    case COMPLETE_IN: memcpy(x->data, (u8 *)l->run + PIO_DATA, x->size * x->count); break;
    case COMPLETE_READ: memcpy(x->data, l->run->mmio.data, x->size); break;
    case COMPLETE_WRITE: break;
    default: return EXIT_NONE; // entering the guest completes an OUT
    }
    l->completing = how;
    return p_complete(v);
}

// Is that exit one for the client, and nothing else to be thought of? Then kvm_run shows it.
static bool show(Lane *l, int kind) {
    Vcpu *v = l->v;
    const Exit *x = &v->exit;
    struct kvm_run_head *run = l->run;
    switch (kind) {
    case EXIT_IO_OUT:
    case EXIT_IO_IN: {
        u64 place = (u64)x->port << 12 | PLACE_PORT | (kind == EXIT_IO_OUT ? PLACE_WRITE : PLACE_READ);
        if (x->string || x->port == PORT_OUT_7E || !(l->with & WITH_PORTS || is_clients(l, place))) return false;
        run->io.direction = kind == EXIT_IO_OUT;
        run->io.size = x->size;
        run->io.port = x->port;
        run->io.count = x->count;
        run->io.data_offset = PIO_DATA;
        if (kind == EXIT_IO_OUT) memcpy((u8 *)run + PIO_DATA, x->data, x->size);
        run->exit_reason = KVM_EXIT_IO;
        l->complete = kind == EXIT_IO_OUT ? COMPLETE_OUT : COMPLETE_IN;
        return true;
    }
    case EXIT_MMIO_READ:
    case EXIT_MMIO_WRITE: {
        int write = kind == EXIT_MMIO_WRITE;
        if ((!write && x->info1) || !is_clients(l, (x->gpa & ~0xfffull) | (write ? PLACE_WRITE : PLACE_READ))) return false;
        run->mmio.phys_addr = x->gpa;
        memset(run->mmio.data, 0, sizeof run->mmio.data);
        if (write) memcpy(run->mmio.data, x->data, x->size);
        run->mmio.len = x->size;
        run->mmio.is_write = write;
        run->exit_reason = KVM_EXIT_MMIO;
        l->complete = write ? COMPLETE_WRITE : COMPLETE_READ;
        l->mmio_exits++;
        return true;
    }
    case EXIT_SVM:
        if (!(l->with & WITH_HLT) || x->code != SVM_EXIT_HLT || S(u64, EFLAGS) & FL_TF) return false;
        p_skip(v, 1 + x->insn_len);
        run->exit_reason = KVM_EXIT_HLT;
        l->halt_exits++;
        return true;
    }
    return false;
}

static void save(Lane *l) { // post_kvm_run_save
    const Vcpu *v = l->v;
    struct kvm_run_head *run = l->run;
    bool open = (S(u64, EFLAGS) & FL_IF) != 0;
    bool ready = open && !(S(u32, HFLAGS) & HF_INHIBIT) && v->intr_vector < 0 && v->exc_vector < 0;
    run->ready_for_interrupt_injection = l->with & READY || (ready && !(l->with & NOT_READY));
    run->if_flag = open;
    run->flags = 0;
    run->cr8 = *(u8 *)(v->state + V_TPR) & 15;
    run->apic_base = l->apic_base;
}

static Lane *lane_of(void *self, u64 inode) {
    Lanes *all = self;
    return inode - all->first_inode < all->count ? atomic_load(&all->lane[inode - all->first_inode]) : NULL;
}

static int fp_serve(void *self, u64 inode, u32 tid, u32 cmd, u64 arg, int32_t *result) {
    Lane *l = cmd == KVM_RUN && !arg ? lane_of(self, inode) : NULL;
    int state = ARMED;
    if (!l || !atomic_compare_exchange_strong(&l->state, &state, RUNNING)) return SHORTCUT_NOT_MINE;
    if (tid != l->tid || atomic_load(&l->stop) || !wants_to_run(l)) {
        fp_release(l, 1);
        return SHORTCUT_NOT_MINE;
    }
    l->runs++;
    l->run->exit_reason = KVM_EXIT_UNKNOWN;
    l->v->suspect = 1; // the client, and all whom that talks to, could write memory meanwhile
    l->kind = complete(l);
    if (l->kind) return SHORTCUT_BEGUN;
    l->completing = COMPLETE_NONE;
    l->kind = p_run(l->v);
    l->exits[l->kind & (KINDS - 1)]++;
    if (atomic_load(&l->stop) || !show(l, l->kind)) return SHORTCUT_BEGUN;
    save(l);
    fp_release(l, 1);
    *result = 0;
    return SHORTCUT_ANSWERED;
}

static void fp_interrupt(void *self, u64 inode) {
    Lane *l = lane_of(self, inode);
    if (l) p_kick(l->v);
}

void fp_open(Lanes *all, u64 first_inode, u64 count) {
    all->shortcut = (struct shortcut){all, fp_serve, fp_interrupt};
    all->first_inode = first_inode;
    all->count = count;
}

void fp_set(Lanes *all, u64 index, Lane *lane) { atomic_store(&all->lane[index], lane); }

// An importable module, so that setuptools builds it as one; there is nothing in it.
void *PyInit__fastpath(void) { return NULL; }
