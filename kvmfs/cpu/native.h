// SPDX-License-Identifier: GPL-2.0-or-later
// Private layout of the unicorn 2.1.4 x86-64 Linux wheel, and what native.c shares with Python.
// layout.py mirrors the offsets that Python uses; nv_engine_new() refuses a library where they do not fit.
#pragma once
#include <pthread.h>
#include <signal.h>
#include <setjmp.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdint.h>

typedef uint8_t u8;
typedef uint16_t u16;
typedef uint32_t u32;
typedef uint64_t u64;

enum { // CPUX86State, from env
    EIP = 128, EFLAGS = 136, CC_SRC = 152, CC_OP = 168, DF_ = 172, HFLAGS = 176, HFLAGS2 = 180, SEGS = 184,
    SYSENTER_CS = 4800, SYSENTER_ESP = 4808, SYSENTER_EIP = 4816,
    TR = 352, IDT = 400, CR = 424, EFER = 592, FPSTT = 604, FPUS = 608, FPUC = 610, FPTAGS = 612, FPREGS = 624,
    FPOP = 752, FPIP = 760, FPDP = 768, FP_STATUS = 776, SSE_STATUS = 808, MXCSR = 816, XMM = 824, STAR = 4824, LSTAR = 4840, CSTAR = 4848,
    FMASK = 4856, TSC_AUX = 4896, ERROR_CODE = 5384, IS_INT = 5388, NEXT_EIP = 5392, DR = 5400, OLD_EXCEPTION = 5496,
    VM_VMCB = 5504, TSC_OFFSET = 5512, INTERCEPT = 5520, ICEPT_EXC = 5536, V_TPR = 5556, STATE_SIZE = 5568,
    CPUID_VENDOR = 5616,     // its first four letters, by which the translator knows SYSENTER and SYSEXIT in 64-bit code
    XSAVE_FEATURES = 5784,   // features[FEAT_XSAVE]
    XSAVE_COMPONENTS = 5800, // features[FEAT_XSAVE_COMP_LO]: what XSETBV lets into XCR0
    // CPUState, from env
    C_CPU = -35408, C_EXIT_REQUEST = -35387, C_CFLAGS_NEXT = -35384, C_IRQ = -35380, C_ENV_PTR = -35112,
    C_HALTED = -2232, C_CAN_DO_IO = -2228, C_EXC_INDEX = -2224, C_UC = -2216, C_CLASS = -2208,
    TLB_FAST = -64, TLB_DESC = TLB_FAST - 8 - 3 * 696, TLB_DESC_SIZE = 696, TLB_DESC_VTABLE = 48, VTLB_SIZE = 8,
    ENV_UC = 7000, TB_JMP_CACHE = -0x8918,
    ICOUNT_DECR = -16, // negative: the guest is to be left
    // CPUClass
    K_DO_INTERRUPT = 16, K_TLB_FILL = 72, K_TLB_FILL_CPU = 80, K_PHYS_DEBUG = 96, K_DEBUG_EXCP = 120, K_EXEC_ENTER = 128,
    K_EXEC_EXIT = 136, K_EXEC_INTERRUPT = 144,
    // uc_engine
    UC_MEMORY_MAPPING = 288, UC_INVALIDATE_TB = 376, UC_CPU = 440, UC_TCG = 768, UC_SIZE_RECUR = 1384, UC_STOP_REQUEST = 1389,
    UC_INVALID_ERROR = 1424,
    UC_NO_EXIT_REQUEST = 2034, UC_JMP_BUFS = 2040, UC_JMP_BUF_SIZE = 200, UC_NESTED_LEVEL = 14840,
    UC_LAST_TB = 14848,
    UC_TCG_CTX = 768,
    // TCGContext
    TCG_BUFFER = 0xa0, TCG_BUFFER_SIZE = 0xb8, TCG_BUFFER_END = 0xc0, TCG_INVALIDATED = 0xd8, TCG_FLUSHES = 0x98d0,
    // TCGContext
    TCG_NB_GLOBALS = 44, TCG_NB_TEMPS = 48,
    // MemoryRegion
    MR_PERMS = 136,
};
enum { HF_CPL = 3, HF_INHIBIT = 8, HF_CS32 = 1 << 4, HF_SS32 = 1 << 5, HF_ADDSEG = 1 << 6, HF_VM = 1 << 17, HF_PE = 1 << 7, HF_LMA = 1 << 14, HF_CS64 = 1 << 15 };
enum { FL_TF = 0x100, FL_IF = 0x200, FL_DF = 0x400, FL_IOPL = 0x3000, FL_RF = 0x10000, FL_VM = 0x20000 };
enum { IRQ_VIRQ = 0x100, IRQ_NMI = 0x200, IRQ_OURS = 0x10000 }; // the last is no bit of QEMU's
enum { ICPT_VINTR = 1 << 4, ICPT_RDTSC = 1 << 14, EXIT_CODE_RDTSC = 0x6e };
enum { PDPTRS = 0x3000, VMCB_INT_VECTOR = 0x64, VMCB_INFO2 = 0x80 };
enum { VENDOR_AMD = 0x68747541, VENDOR_INTEL = 0x756e6547 };
enum { XSAVE_XGETBV1 = 4 };
enum { EXCP_INTERRUPT = 0x10000, EXCP_VMEXIT = 0x100 };
enum { TLB_INVALID = 1 << 11, TLB_NOTDIRTY = 1 << 10, TLB_MMIO_BIT = 1 << 9 };

enum { EXIT_NONE, EXIT_SVM, EXIT_IO_IN, EXIT_IO_OUT, EXIT_MMIO_READ, EXIT_MMIO_WRITE, EXIT_FETCH, EXIT_UNKNOWN, EXIT_ERROR,
       EXIT_ALONE }; // the last stays in here: the next instruction is to be executed by itself
enum { PEND_NONE, PEND_OUT, PEND_IN, PEND_INS, PEND_MMIO };
enum { MAX_KNOWN = 128, MAX_EVENTS = 128, SCRATCH_PAGES = 4, IO_DATA = 1024, MAX_CPUS = 4096,
       QUEUES = 64 };
enum { MAX_FETCHED = 8, MAX_COMPARED = 2 }; // pages that are dropped from the TLB one by one; that are compared at once
#define NO_TICKET (~0ull)
#define GPA_END (1ull << 40)      // QEMU's physical addresses have 40 bits
#define NOT_RAM (1ull << 45)      // in the TLB: the page has no memory, or only to read
#define AUX_BASE (1ull << 46)     // the vCPUs' VMCBs: no page table entry reaches them
enum { AUX_SIZE = 0x4000 };       // each: VMCB page, 8 KiB of MSR permission bitmap, the page with PDPTRS

typedef struct Exit { // ctypes: cpu.ExitInfo
    int32_t kind;
    u32 insn_len;
    u64 code, info1, info2, gpa;
    u32 port, size, count, string;
    u8 data[IO_DATA];
} Exit;

typedef struct { u64 gpa; u32 size, part; u8 data[8]; } Known; // part: of an access that crosses pages, 1 or 2
typedef struct { u32 kind, size, port, recur; u64 gpa; u8 data[8]; } Event;
typedef struct { u8 op, two, rep, len, osize, asize, plain, movbe; } Insn;

// struct kvm_dirty_gfn; the client maps them, and writes the flags
typedef struct { u32 flags, slot; u64 offset; } DirtyGfn;
typedef struct { DirtyGfn *gfns; u32 size, soft_limit, dirty_index, reset_index; } DirtyRing; // the indices: see Cpu.open_ring

struct Engine;
typedef struct Vcpu {
    Exit exit; // first: Python maps it
    // the part Python reads and writes, see cpu.VcpuInfo
    char *state;          // env, or the image while several vCPUs share the engine
    u64 vmcb_gpa;
    u8 *vmcb;
    char *home;           // where the state is while the vCPU does not run
    u64 bp[4];            // breakpoints: linear addresses,
    u32 bp_dr7;           // and what they are, as in DR7
    int32_t flush;        // the TLB does not fit the state any more
    int32_t intr_vector;  // interrupt to deliver, -1 none
    int32_t window;       // report when interrupts can be taken (exit 0x64), one shot
    int32_t nmi;          // NMI to deliver
    int32_t exc_vector;   // exception to deliver, -1 none
    int32_t exc_error;    // its error code
    int32_t exc_soft;     // INTn/INT3/INTO: 1 + bytes of it that rip is not past yet
    int32_t pend;
    int32_t ud_exits;     // #UD is reported, not delivered
    atomic_int kick, yield;
    u64 waited;           // nanoseconds that it was ready to run while others had the engine
    u64 preempted_gpa;    // where the guest wants to see that (kvm_steal_time.preempted), 0 nowhere
    int32_t suspect;      // others may have written code: see code.h
    int32_t own_pdptrs;   // PAE paging uses the four entries at PDPTRS of its VMCB's memory, as long as
    u64 pdptrs_cr3;       // CR3 is this
    u64 guest_cycles;     // of the host's TSC, in the guest,
    u64 guest_since;      // and since when it is there, 0: it is not
    // private
    struct Engine *e;
    char *image;
    atomic_flag lk;
    int in_guest, entered, replaying, movbe, steps, used, delivering, delivering_soft, ins_pos, cross_left, cross_size, allow;
    const u8 *in_data;
    Insn insn;
    Known known[MAX_KNOWN];
    u64 page[SCRATCH_PAGES];
    int nknown, npages, nev, evpos;
    int owed;             // the next turn comes at once
    int cr3_away;         // CR3 is where those entries are, for the length of a page walk
    u64 tsc_ratio;        // the guest's TSC is the host's times this >> tsc_frac_bits, plus its offset; 0: times 1
    u32 tsc_frac_bits;
    int alone, restep;    // an instruction is executed by itself; the next one is to be
    u64 hits, trap;       // causes of a #DB that comes after the instruction: data breakpoints; single step
    u64 cross_va, cross_n, cross_ra;
    Event ev[MAX_EVENTS];
    DirtyRing ring;
} Vcpu;

// log: the dirty bitmap of slot `slot`, which the region belongs to, log_page the region's first page in it; NULL: not logged
// touched: a bitmap like it, of the pages that the guest has come to since there is the slot; NULL: all of them
// file, offset: what its memory is, file 0: nobody else's; shared: another region has some of the same memory
typedef struct { u64 gpa, size; u8 *host; u64 readonly, alias; u64 *log, *touched, log_page, slot, file, offset, shared; } Region;
typedef struct { u64 gpa, value; u32 size; } Walked; // a page table entry as it was before a walk
// A page of code, as it was translated; low..high: where in it there are translations
typedef struct { u64 page, generation; bool valid; uint16_t low, high; u64 bytes[4096 / 8]; } Kept;
typedef struct { u64 r, w, x, paddr, addend, pad[3]; } TlbEntry;
typedef struct { u64 mask; TlbEntry *table; } TlbFast;
typedef struct { u32 selector, pad; u64 base; u32 limit, flags; } Seg;

typedef struct Engine {
    char *uc, *env, *cpu, *cc;
    void (*do_interrupt)(void *);
    bool (*tlb_fill)(void *, u64, int, int, int, bool, u64);
    void (*exec_enter)(void *), (*exec_exit)(void *);
    bool (*exec_interrupt)(void *, int);
    u64 (*phys_debug)(void *, u64, u32 *);
    void *(*memory_mapping)(void *, u64);
    u8 *code;      // one bit for each guest page that was executed
    u8 *stored;    // likewise: stores to it may not be seen since the last translation of code of it
    Kept **kept;   // by page, a hash table
    u64 kept_capacity, nkept, generation;
    bool untracked; // there may be translations that no page's low and high show
    u64 fetched[MAX_FETCHED]; // linear addresses of pages of code that the TLB may have
    int nfetched;
    pthread_t looker;
    pthread_cond_t look;
    int looking, parked, closing; // looking: 1 there is a thread, -1 there cannot be one
    u8 *scratch;   // what an instruction that is being completed reads
    char dummy[512], readonly_mr[512], *window_mr;
    u8 *window;    // guest physical memory as one range of addresses
    Region *region; // by address
    int capacity, nregions, ncpus, nlogged;
    int found;     // index of the region that was looked for last: only a guess, which is checked
    Walked walk[4];  // not looked at again yet
    int nwalk;
    u64 cr3;         // at the last walk
    Vcpu *cpus[MAX_CPUS];
    Vcpu *last;    // whose translations the TLB holds
    Vcpu *owner;
    pthread_mutex_t m;
    pthread_cond_t c[QUEUES]; // where ticket n waits: n % QUEUES
    u64 ticket, serving;
    u64 breaks[4]; // execution breakpoints that the translator has
    void *break_ref[4];
    int nbreaks;
    size_t block_hook;
    u64 blocks, block_bytes; // translated so far, and of how much guest code
    int quick;     // waiters that want the engine at once
} Engine;

#define F(t, o) (*(t *)(e->env + (o)))
#define UC(t, o) (*(t *)(e->uc + (o)))
#define TCG(t, o) (*(const t *)(tcg + (o)))
#define S(t, o) (*(t *)(v->state + (o)))
#define REGS(s) ((u64 *)(s))

