# SPDX-License-Identifier: GPL-2.0-or-later
"""Architecture constants that every part of the machine uses, and KVM's fixed limits on x86.

Control registers, RFLAGS, EFER, DR6 and DR7: SDM vol. 3A ch. 2 and 18, APM vol. 2 ch. 3 and 13, with Linux's
names (asm/processor-flags.h, asm/msr-index.h) less the X86_ of the control registers. Vectors: asm/kvm.h.
"""

from typing import Final

PAGE_SHIFT: Final = 12
PAGE_SIZE: Final = 1 << PAGE_SHIFT
PAGE_MASK: Final = ~(PAGE_SIZE - 1)

# --- CR0
CR0_PE: Final = 1 << 0  # protection enable
CR0_MP: Final = 1 << 1  # monitor coprocessor
CR0_EM: Final = 1 << 2  # emulation
CR0_TS: Final = 1 << 3  # task switched
CR0_ET: Final = 1 << 4  # extension type, always 1
CR0_NE: Final = 1 << 5  # numeric error
CR0_WP: Final = 1 << 16  # write protect
CR0_AM: Final = 1 << 18  # alignment mask
CR0_NW: Final = 1 << 29  # not write-through
CR0_CD: Final = 1 << 30  # cache disable
CR0_PG: Final = 1 << 31  # paging
CR0_DEFINED: Final = (
    CR0_PE | CR0_MP | CR0_EM | CR0_TS | CR0_ET | CR0_NE | CR0_WP | CR0_AM | CR0_NW | CR0_CD | CR0_PG
)
CR0_RESET: Final = CR0_CD | CR0_NW | CR0_ET

# --- CR3
CR3_PCID_MASK: Final = 0xFFF  # with CR4.PCIDE
CR3_NOFLUSH: Final = 1 << 63  # in a MOV to CR3 with CR4.PCIDE; never stored
CR3_LAM_U57: Final = 1 << 61
CR3_LAM_U48: Final = 1 << 62

# --- CR4
CR4_VME: Final = 1 << 0  # virtual-8086 extensions
CR4_PVI: Final = 1 << 1  # protected-mode virtual interrupts
CR4_TSD: Final = 1 << 2  # time stamp disable
CR4_DE: Final = 1 << 3  # debugging extensions
CR4_PSE: Final = 1 << 4  # 4 MiB pages
CR4_PAE: Final = 1 << 5  # physical address extension
CR4_MCE: Final = 1 << 6  # machine check
CR4_PGE: Final = 1 << 7  # global pages
CR4_PCE: Final = 1 << 8  # RDPMC at any CPL
CR4_OSFXSR: Final = 1 << 9
CR4_OSXMMEXCPT: Final = 1 << 10
CR4_UMIP: Final = 1 << 11
CR4_LA57: Final = 1 << 12  # 5-level paging
CR4_VMXE: Final = 1 << 13
CR4_SMXE: Final = 1 << 14
CR4_FSGSBASE: Final = 1 << 16
CR4_PCIDE: Final = 1 << 17
CR4_OSXSAVE: Final = 1 << 18
CR4_SMEP: Final = 1 << 20
CR4_SMAP: Final = 1 << 21
CR4_PKE: Final = 1 << 22
CR4_CET: Final = 1 << 23
CR4_LAM_SUP: Final = 1 << 28
CR4_FRED: Final = 1 << 32

# --- CR8
CR8_TPR: Final = 0xF

# --- EFER
EFER_SCE: Final = 1 << 0  # SYSCALL, SYSRET
EFER_LME: Final = 1 << 8  # long mode enable
EFER_LMA: Final = 1 << 10  # long mode active
EFER_NX: Final = 1 << 11
EFER_SVME: Final = 1 << 12
EFER_LMSLE: Final = 1 << 13
EFER_FFXSR: Final = 1 << 14
EFER_AUTOIBRS: Final = 1 << 21

# --- RFLAGS
X86_EFLAGS_CF: Final = 1 << 0
X86_EFLAGS_FIXED: Final = 1 << 1  # always 1
X86_EFLAGS_PF: Final = 1 << 2
X86_EFLAGS_AF: Final = 1 << 4
X86_EFLAGS_ZF: Final = 1 << 6
X86_EFLAGS_SF: Final = 1 << 7
X86_EFLAGS_TF: Final = 1 << 8
X86_EFLAGS_IF: Final = 1 << 9
X86_EFLAGS_DF: Final = 1 << 10
X86_EFLAGS_OF: Final = 1 << 11
X86_EFLAGS_IOPL: Final = 3 << 12
X86_EFLAGS_IOPL_SHIFT: Final = 12
X86_EFLAGS_NT: Final = 1 << 14
X86_EFLAGS_RF: Final = 1 << 16
X86_EFLAGS_VM: Final = 1 << 17
X86_EFLAGS_AC: Final = 1 << 18
X86_EFLAGS_VIF: Final = 1 << 19
X86_EFLAGS_VIP: Final = 1 << 20
X86_EFLAGS_ID: Final = 1 << 21

# --- DR6 (DR6_ACTIVE_LOW: read as 1 while nothing happened)
DR6_B0: Final = 1 << 0
DR6_B1: Final = 1 << 1
DR6_B2: Final = 1 << 2
DR6_B3: Final = 1 << 3
DR6_TRAP_BITS: Final = 0xF
DR6_BUS_LOCK: Final = 1 << 11
DR6_BD: Final = 1 << 13
DR6_BS: Final = 1 << 14
DR6_BT: Final = 1 << 15
DR6_RTM: Final = 1 << 16
DR6_FIXED_1: Final = 0xFFFE07F0
DR6_ACTIVE_LOW: Final = 0xFFFF0FF0
DR6_VOLATILE: Final = 0x0001E80F

# --- DR7
DR7_LOCAL_MASK: Final = 0x55
DR7_GLOBAL_MASK: Final = 0xAA
DR7_BP_EN_MASK: Final = 0xFF
DR7_GE: Final = 1 << 9
DR7_FIXED_1: Final = 0x400
DR7_GD: Final = 1 << 13
DR7_VOLATILE: Final = 0xFFFF2BFF

# --- Exception vectors
DE_VECTOR: Final = 0
DB_VECTOR: Final = 1
NMI_VECTOR: Final = 2
BP_VECTOR: Final = 3
OF_VECTOR: Final = 4
BR_VECTOR: Final = 5
UD_VECTOR: Final = 6
NM_VECTOR: Final = 7
DF_VECTOR: Final = 8
TS_VECTOR: Final = 10
NP_VECTOR: Final = 11
SS_VECTOR: Final = 12
GP_VECTOR: Final = 13
PF_VECTOR: Final = 14
MF_VECTOR: Final = 16
AC_VECTOR: Final = 17
MC_VECTOR: Final = 18
XM_VECTOR: Final = 19
VE_VECTOR: Final = 20
CP_VECTOR: Final = 21
HV_VECTOR: Final = 28
VC_VECTOR: Final = 29
SX_VECTOR: Final = 30

# The exceptions that push an error code (SDM vol. 3A table 6-1), one bit per vector as KVM has it.
EXCEPTION_HAS_ERROR_CODE: Final = (
    1 << DF_VECTOR
    | 1 << TS_VECTOR
    | 1 << NP_VECTOR
    | 1 << SS_VECTOR
    | 1 << GP_VECTOR
    | 1 << PF_VECTOR
    | 1 << AC_VECTOR
)

# --- Page fault error code
PFERR_PRESENT: Final = 1 << 0
PFERR_WRITE: Final = 1 << 1
PFERR_USER: Final = 1 << 2
PFERR_RSVD: Final = 1 << 3
PFERR_FETCH: Final = 1 << 4
PFERR_PK: Final = 1 << 5
PFERR_SS: Final = 1 << 6
PFERR_SGX: Final = 1 << 15
PFERR_GUEST_FINAL: Final = 1 << 32
PFERR_GUEST_PAGE: Final = 1 << 33

# --- Page table entries
PT_PRESENT: Final = 1 << 0
PT_WRITABLE: Final = 1 << 1
PT_USER: Final = 1 << 2
PT_PWT: Final = 1 << 3
PT_PCD: Final = 1 << 4
PT_ACCESSED: Final = 1 << 5
PT_DIRTY: Final = 1 << 6
PT_PAGE_SIZE: Final = 1 << 7  # in a directory entry
PT_PAT: Final = 1 << 7  # in a 4 KiB entry
PT_GLOBAL: Final = 1 << 8
PT_PAT_LARGE: Final = 1 << 12
PT_NX: Final = 1 << 63
PT64_ADDR_MASK: Final = 0x000FFFFF_FFFFF000

# --- XCR0, and the state components of an XSAVE image
XFEATURE_MASK_FP: Final = 1 << 0
XFEATURE_MASK_SSE: Final = 1 << 1
XFEATURE_MASK_YMM: Final = 1 << 2
XSAVE_LEGACY_SIZE: Final = 512
XSAVE_HDR_OFFSET: Final = 512
XSAVE_HDR_SIZE: Final = 64
MXCSR_DEFAULT: Final = 0x1F80

# --- Limits of KVM on x86 (arch/x86/include/asm/kvm_host.h, include/linux/kvm_host.h)
KVM_MAX_VCPUS: Final = 1024  # CONFIG_KVM_MAX_NR_VCPUS
KVM_MAX_VCPU_IDS: Final = 4 * KVM_MAX_VCPUS
KVM_USER_MEM_SLOTS: Final = 32764  # SHRT_MAX less KVM_INTERNAL_MEM_SLOTS
KVM_INTERNAL_MEM_SLOTS: Final = 3
KVM_MAX_NR_ADDRESS_SPACES: Final = 2  # the second one is SMM's
KVM_MEM_MAX_NR_PAGES: Final = (1 << 31) - 1
KVM_MAX_IRQ_ROUTES: Final = 4096
KVM_MAX_CPUID_ENTRIES: Final = 256
MAX_IO_MSRS: Final = 256  # entries of one KVM_GET_MSRS or KVM_SET_MSRS
KVM_MAX_MCE_BANKS: Final = 32
KVM_NR_INTERRUPTS: Final = 256
KVM_MIN_ALLOC_MMU_PAGES: Final = 64
KVM_DIRTY_RING_MAX_ENTRIES: Final = 65536
KVM_DIRTY_RING_RSVD_ENTRIES: Final = 64
KVM_PMU_EVENT_FILTER_MAX_EVENTS: Final = 300
KVM_MAX_XCRS: Final = 16
KVM_IOAPIC_NUM_PINS: Final = 24
KVM_APIC_REG_SIZE: Final = 0x400
KVM_COALESCED_MMIO_MAX: Final = (PAGE_SIZE - 8) // 24
NR_IOBUS_DEVS: Final = 1000

# --- Fixed guest-physical addresses
APIC_DEFAULT_PHYS_BASE: Final = 0xFEE00000
IO_APIC_DEFAULT_PHYS_BASE: Final = 0xFEC00000
VMX_EPT_IDENTITY_PAGETABLE_ADDR: Final = 0xFFFBC000
