// SPDX-License-Identifier: GPL-2.0-or-later
// Part of native.c: Unicorn's callbacks and what is put around QEMU's exception delivery.
#pragma once
#include "native.h"

// QEMU aborts the process when it needs a stack from a TSS that is none; with an empty one it raises #TS.
static void usable_tss(Engine *e) {
    Seg *tr = &F(Seg, TR);
    if (!(F(u64, CR) & 1) || ((tr->flags & 0x8000) && (tr->flags >> 8 & 7) == 1)) return;
    tr->flags = 0x8900;
    tr->limit = 0;
}

// CMPXCHG8B and CMPXCHG16B start from a cc_op that the translator has not stored, and can leave anything in CC_SRC: only
// the arithmetic flags may come out of it when EFLAGS is folded.
static void mask_flags(Engine *e) {
    if (F(u32, CC_OP) == 1) F(u64, CC_SRC) &= 0x8d5;
}

static void deliver(Vcpu *v, int vector, int soft) {
    Engine *e = v->e;
    usable_tss(e);
    mask_flags(e);
    if (!soft && vector != 1) v->hits = 0; // the instruction did not end
    if (soft) F(u64, EFLAGS) &= ~(u64)FL_RF;
    v->delivering = vector;
    v->delivering_soft = soft;
    e->do_interrupt(e->cpu); // a nested fault jumps into cpu_exec and comes back through h_intr
    v->delivering = -1;
    F(int32_t, IS_INT) = 0;
    if (v->replaying) p_emu_stop(e->uc);
}

static void vmexit(Vcpu *v, u32 code) {
    Engine *e = v->e;
    v->exit.code = code;
    v->exit.insn_len = prefix_length(e, e->env);
    v->exit.info1 = (u32)F(int32_t, ERROR_CODE);
    v->exit.info2 = *(u64 *)(v->vmcb + VMCB_INFO2);
    if (code == 0x41) { // info2: what would become bits of DR6
        v->exit.info2 = ((DR6(e->env) ^ DR6_ACTIVE_LOW) & 0xe000) | v->hits;
        v->hits = 0;
        if (v->replaying) { // after the instruction's I/O
            v->trap = v->exit.info2;
            leave(v, EXIT_NONE);
        }
    }
    v->delivering = -1;
    leave(v, EXIT_SVM);
}

// RDTSC or RDTSCP of a guest whose TSC has a speed of its own, at its intercept.
static void read_tsc(Vcpu *v) {
    Engine *e = v->e;
    u8 b[2] = {0};
    int length = prefix_length(e, e->env) + 2;
    guest_fetch(e, e->env, F(Seg, SEGS + 24).base + F(u64, EIP) + length - 2, b, 2);
    u64 now = (u64)((unsigned __int128)__builtin_ia32_rdtsc() * v->tsc_ratio >> v->tsc_frac_bits) + F(u64, TSC_OFFSET);
    REGS(e->env)[0] = (u32)now;
    REGS(e->env)[2] = now >> 32;
    if (b[1] == 1) { // 0F 01 F9: RDTSCP
        REGS(e->env)[1] = (u32)F(u64, TSC_AUX);
        length++;
    }
    int kind = skip(v, length);
    if (kind || v->exc_vector == 1 || v->alone) leave(v, kind);
}

static void h_intr(void *uc, u32 no, void *user) {
    (void)uc;
    (void)user;
    Vcpu *v = cur;
    Engine *e = v->e;
    UC(int, UC_SIZE_RECUR) = 0;
    cr3_back(e);
    if (no >= EXCP_VMEXIT) {
        u32 code = no - EXCP_VMEXIT;
        if (code == 0x64) v->window = 0;
        if (code == EXIT_CODE_RDTSC && v->tsc_ratio) {
            read_tsc(v);
            return;
        }
        if (code == 0x46) {
            // Every #UD is intercepted, else Unicorn ends; VMCALL is one for it, as on AMD's CPUs.
            u8 b[3];
            u64 ip = F(Seg, SEGS + 24).base + F(u64, EIP);
            int n = guest_fetch(e, e->env, ip, b, 3);
            if (n && b[0] == 0xf1) { // ICEBP, which this build does not know: #DB, as a trap
                set_eip(e->env, F(u64, EIP) + 1);
                F(int32_t, ERROR_CODE) = 0;
                if (F(u32, ICEPT_EXC) & 2) vmexit(v, 0x41);
                F(int32_t, C_EXC_INDEX) = 1;
                F(int32_t, IS_INT) = 0;
                deliver(v, 1, 0);
                return;
            }
            if (n == 3 && b[0] == 0x0f && b[1] == 1 && b[2] == 0xc1) {
                F(int32_t, ERROR_CODE) = 1;
                vmexit(v, 0x81);
            }
            if (v->ud_exits) vmexit(v, code);
            no = 6;
            F(int32_t, C_EXC_INDEX) = 6;
            F(int32_t, ERROR_CODE) = 0;
            F(int32_t, IS_INT) = 0;
        } else {
            vmexit(v, code);
        }
    }
    int32_t *ec = &F(int32_t, ERROR_CODE);
    if (v->delivering >= 0 && !v->delivering_soft && no >= 10 && no <= 13) *ec |= 1; // EXT
    if ((no == 11 || no == 13) && (F(u32, HFLAGS) & HF_LMA) && (*ec & 2))
        *ec = (((*ec & ~3) / 16) * 8) | (*ec & 3); // QEMU counts 16 bytes a gate, hardware 8
    int soft = F(int32_t, IS_INT);
    if (soft) { // so that a fault while it is delivered has INT's own rip
        u8 b = 0;
        guest_fetch(e, e->env, F(Seg, SEGS + 24).base + F(u64, EIP) - 1, &b, 1);
        int short_form = (no == 3 && b == 0xcc) || (no == 4 && b == 0xce);
        F(u64, EIP) -= short_form ? 1 : 2;
        if (short_form && (F(u32, ICEPT_EXC) >> no & 1)) { // QEMU looks only at the intercept of INT n
            F(int32_t, ERROR_CODE) = F(int32_t, IS_INT) = 0;
            vmexit(v, 0x40 + no);
        }
    }
    deliver(v, no, soft);
}

// The instruction that Unicorn calls back for does not end; an exception without an error code, or with 0, comes of it.
static _Noreturn void fault(Engine *e, int index) {
    F(int32_t, C_EXC_INDEX) = index;
    F(int32_t, ERROR_CODE) = F(int32_t, IS_INT) = 0;
    F(u32, C_CAN_DO_IO) = 1;
    int n = UC(int, UC_NESTED_LEVEL);
    siglongjmp(*(sigjmp_buf *)(e->uc + UC_JMP_BUFS + UC_JMP_BUF_SIZE * (n - 1)), 1);
}

// Unicorn leaves all of SYSENTER to this, but #GP in real mode and #UD in AMD's 64-bit code.
static void h_sysenter(void *uc, void *user) {
    (void)uc;
    (void)user;
    Engine *e = cur->e;
    u32 cs = F(u32, SYSENTER_CS) & 0xfffc, hf = F(u32, HFLAGS), lma = hf & HF_LMA;
    if (lma && F(u32, CPUID_VENDOR) != VENDOR_INTEL) fault(e, EXCP_VMEXIT + 0x46);
    if (!cs) fault(e, 13);
    int length = prefix_length(e, e->env) + 2; // added afterwards
    u64 mask = lma ? ~0ull : 0xffffffff;
    Seg *s = &F(Seg, SEGS);
    s[1] = (Seg){cs, 0, 0, 0xffffffff, lma ? 0x00a09b00 : 0x00c09b00};
    s[2] = (Seg){cs + 8, 0, 0, 0xffffffff, 0x00c09300};
    F(u64, EIP) = (F(u64, SYSENTER_EIP) & mask) - length;
    REGS(e->env)[4] = F(u64, SYSENTER_ESP) & mask;
    hf = (hf & ~(HF_CPL | HF_VM | HF_ADDSEG | HF_CS64)) | HF_CS32 | HF_SS32;
    if (lma) hf |= HF_CS64;
    else if (s[0].base || s[3].base) hf |= HF_ADDSEG;
    F(u32, HFLAGS) = hf;
    F(u64, EFLAGS) &= ~(u64)(FL_IF | FL_VM | FL_RF);
}

static void h_syscall(void *uc, void *user) {
    (void)user;
    Vcpu *v = cur;
    Engine *e = v->e;
    u64 fl = 0, eip = F(u64, EIP), nf, *regs = REGS(e->env), star = F(u64, STAR);
    if (!(F(u64, EFER) & 1)) fault(e, EXCP_VMEXIT + 0x46); // #UD as if intercepted
    mask_flags(e);
    p_reg_read(uc, 25, &fl); // UC_X86_REG_EFLAGS
    u32 sel = (star >> 32) & 0xfffc, hf = F(u32, HFLAGS);
    Seg *s = &F(Seg, SEGS);
    if (hf & HF_LMA) {
        regs[1] = eip + 2;
        regs[11] = fl & ~(u64)FL_RF;
        nf = fl & ~(F(u64, FMASK) | FL_RF);
        s[1] = (Seg){sel, 0, 0, 0xffffffff, 0x00a09b00};
        F(u64, EIP) = (hf & HF_CS64 ? F(u64, LSTAR) : F(u64, CSTAR)) - 2; // the length is added afterwards
        hf = (hf & ~(HF_CPL | 0x40u)) | 0x30 | HF_CS64;
    } else {
        regs[1] = (u32)(eip + 2);
        nf = fl & ~(u64)(FL_IF | FL_RF | FL_VM);
        s[1] = (Seg){sel, 0, 0, 0xffffffff, 0x00c09b00};
        F(u64, EIP) = (u64)(u32)star - 2;
        hf = (hf & ~(HF_CPL | 0x40u | HF_CS64)) | 0x30;
    }
    s[2] = (Seg){sel + 8, 0, 0, 0xffffffff, 0x00c09300};
    F(u32, HFLAGS) = hf;
    F(u64, CC_SRC) = nf & 0x8d5;
    F(u32, CC_OP) = 1;
    F(int32_t, DF_) = nf & FL_DF ? -1 : 1;
    F(u64, EFLAGS) = (nf & ~(0x8d5ull | FL_DF)) | 2;
}

static void check_io(Engine *e, u32 port, int size) {
    u64 fl = F(u64, EFLAGS);
    u32 hf = F(u32, HFLAGS);
    if ((hf & HF_PE) && ((fl & FL_VM) || (hf & HF_CPL) > (fl >> 12 & 3))) p_check_io[size >> 1](e->env, port); // may raise #GP(0)
}

static u32 h_in(void *uc, u32 port, int size, void *user) {
    (void)user;
    Vcpu *v = cur;
    Engine *e = v->e;
    check_io(e, port, size);
    if (v->replaying && v->in_data) {
        u32 val = 0;
        memcpy(&val, v->in_data, size);
        v->nev = 0; // INS wrote a zero first, to find page faults
        v->used = 1;
        p_emu_stop(uc);
        return val;
    }
    Exit *x = &v->exit;
    Insn *i = &v->insn;
    decode(e, e->env, i);
    x->port = port;
    x->size = size;
    x->count = 1;
    x->insn_len = i->len;
    x->string = !i->plain;
    if (i->rep && !i->plain) {
        u64 left = REGS(e->env)[1] & addr_mask(i), off = REGS(e->env)[7] & 0xfff;
        u64 in_page = F(int32_t, DF_) < 0 ? off : 4096 - off, n = left; // DF of a running guest is in env->df
        if (n > in_page) n = in_page;
        if (n > (u64)(IO_DATA / size)) n = IO_DATA / size;
        x->count = n ? n : 1;
    }
    leave(v, EXIT_IO_IN);
}

static void h_out(void *uc, u32 port, int size, u32 val, void *user) {
    (void)user;
    Vcpu *v = cur;
    Engine *e = v->e;
    check_io(e, port, size);
    if (v->replaying) {
        if (v->nev < MAX_EVENTS) {
            Event *ev = &v->ev[v->nev++];
            *ev = (Event){.kind = EXIT_IO_OUT, .size = size, .port = port};
            memcpy(ev->data, &val, 4);
        }
        v->used = 1;
        p_emu_stop(uc);
        return;
    }
    Exit *x = &v->exit;
    decode(e, e->env, &v->insn);
    x->port = port;
    x->size = size;
    x->count = 1;
    x->insn_len = v->insn.len;
    x->string = !v->insn.plain;
    *(u64 *)x->data = val;
    leave(v, EXIT_IO_OUT);
}

static void record(Vcpu *v, u64 gpa, int size, u64 val, int recur) {
    Event *last = v->nev ? &v->ev[v->nev - 1] : NULL;
    if (recur && last && last->recur && last->gpa + last->size == gpa && last->size < 8 && (gpa & 0xfff)) {
        last->data[last->size++] = val; // the pieces of an unaligned store are bytes
    } else if (v->nev < MAX_EVENTS) {
        if (v->movbe && !recur) val = __builtin_bswap64(val) >> (64 - 8 * size); // the callback gets the register's order
        v->ev[v->nev] = (Event){.kind = EXIT_MMIO_WRITE, .size = size, .recur = recur, .gpa = gpa};
        memcpy(v->ev[v->nev++].data, &val, 8);
    }
}

enum { MEM_READ_UNMAPPED = 19, MEM_WRITE_UNMAPPED, MEM_FETCH_UNMAPPED, MEM_WRITE_PROT };

static bool h_mem(void *uc, int type, u64 gpa, int size, int64_t val, void *user) {
    (void)user;
    Vcpu *v = cur;
    Engine *e = v->e;
    Exit *x = &v->exit;
    gpa &= ~NOT_RAM;
    int recur = UC(int, UC_SIZE_RECUR), crossing = (gpa & 0xfff) + size > 4096;
    x->gpa = gpa;
    x->size = size;
    x->info2 = v->delivering >= 0;
    if (type == MEM_FETCH_UNMAPPED) leave(v, EXIT_FETCH);
    if (type == MEM_READ_UNMAPPED) {
        if (crossing) { // first the part in this page
            v->cross_size = size;
            x->size = 4096 - (gpa & 0xfff);
            v->cross_left = size - x->size;
        } else if (recur && !(gpa & 0xfff) && v->cross_left) {
            x->size = v->cross_left;
        }
        // A read that began in RAM comes as the whole aligned piece of this page; how much it wants is Python's to find.
        x->info1 = recur && !(gpa & 0xfff) && !v->cross_left;
        leave(v, EXIT_MMIO_READ);
    }
    if (!v->replaying) leave(v, EXIT_MMIO_WRITE); // executed again at once
    if (crossing && !recur) { // byte by byte: the other page may be memory
        v->allow = 1;
        return true;
    }
    v->used = 1;
    record(v, gpa, size, val, recur);
    p_emu_stop(uc);
    return false;
}

static bool our_exec_interrupt(void *cs, int request) {
    Engine *e = engine_of(cs);
    Vcpu *v = cur;
    if (!v) return e->exec_interrupt(cs, request);
    if (v->replaying || v->alone) { // the second call: the one instruction is done
        if (v->steps++) p_emu_stop(e->uc);
        return false;
    }
    if (v->exc_vector >= 0) {
        int vector = v->exc_vector;
        v->exc_vector = -1;
        F(u32, C_IRQ) &= ~(u32)IRQ_OURS;
        F(int32_t, C_EXC_INDEX) = vector;
        F(int32_t, ERROR_CODE) = v->exc_error;
        F(int32_t, IS_INT) = v->exc_soft != 0;
        F(u64, NEXT_EIP) = F(u64, EIP) + (v->exc_soft ? v->exc_soft - 1 : 0);
        F(int32_t, OLD_EXCEPTION) = vector == 8 || vector == 14 || vector == 0 || (vector >= 10 && vector <= 13) ? vector : -1;
        deliver(v, vector, v->exc_soft);
        return true;
    }
    mask_flags(e);
    u32 before = F(u32, C_IRQ);
    bool done = e->exec_interrupt(cs, request); // may jump out: exit 0x64, or a fault in the delivery
    if ((before & IRQ_VIRQ) && !(F(u32, C_IRQ) & IRQ_VIRQ)) {
        v->intr_vector = -1;
        if (v->window) {
            F(u64, INTERCEPT) |= ICPT_VINTR;
            F(u32, C_IRQ) |= IRQ_VIRQ;
        }
    }
    return done;
}
