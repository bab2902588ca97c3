# SPDX-License-Identifier: GPL-2.0-or-later
"""The control words: every ioctl number that KVM answers on x86, in the order of linux/kvm.h.

One line of TABLE per ioctl. From a number (strace prints it) a reader finds the line, and from the line the
handler: it is the function named like the ioctl, without KVM_ and in lower case, in the module of the level:
kvmfs/api/system.py, vm.py, vcpu.py or device.py.
"""

from ctypes import Structure, c_uint64, c_ulong, sizeof
from dataclasses import dataclass
from enum import Enum, Flag, auto
from typing import Final

from .structs import (
    KvmClearDirtyLog,
    KvmClockData,
    KvmCoalescedMmioZone,
    KvmCpuid,
    KvmCpuid2,
    KvmCreateDevice,
    KvmCreateGuestMemfd,
    KvmDebugregs,
    KvmDeviceAttr,
    KvmDirtyLog,
    KvmEnableCap,
    KvmEncRegion,
    KvmFpu,
    KvmGuestDebug,
    KvmHypervEventfd,
    KvmInterrupt,
    KvmIoeventfd,
    KvmIrqchip,
    KvmIrqfd,
    KvmIrqLevel,
    KvmIrqRouting,
    KvmIrqRoutingXenEvtchn,
    KvmLapicState,
    KvmMemoryAttributes,
    KvmMpState,
    KvmMsi,
    KvmMsrFilter,
    KvmMsrList,
    KvmMsrs,
    KvmNestedState,
    KvmOneReg,
    KvmPitConfig,
    KvmPitState,
    KvmPitState2,
    KvmPmuEventFilter,
    KvmPreFaultMemory,
    KvmRegList,
    KvmRegs,
    KvmReinjectControl,
    KvmSignalMask,
    KvmSregs,
    KvmSregs2,
    KvmTprAccessCtl,
    KvmTranslation,
    KvmUserspaceMemoryRegion,
    KvmUserspaceMemoryRegion2,
    KvmVapicAddr,
    KvmVcpuEvents,
    KvmX86Mce,
    KvmXcrs,
    KvmXenHvmAttr,
    KvmXenHvmConfig,
    KvmXenVcpuAttr,
    KvmXsave,
)

KVMIO: Final = 0xAE

IOC_NONE: Final = 0
IOC_WRITE: Final = 1  # the caller writes: data goes to the kernel
IOC_READ: Final = 2  # the caller reads: data comes back

IOC_NRSHIFT: Final = 0
IOC_TYPESHIFT: Final = 8
IOC_SIZESHIFT: Final = 16
IOC_DIRSHIFT: Final = 30
IOC_SIZEMASK: Final = 0x3FFF


def ioc(direction: int, nr: int, size: int) -> int:
    """The 32-bit request number of KVM's ioctl `nr` (asm-generic/ioctl.h)."""
    return direction << IOC_DIRSHIFT | size << IOC_SIZESHIFT | KVMIO << IOC_TYPESHIFT | nr << IOC_NRSHIFT


class Level(Flag):
    """The kinds of descriptor that answer an ioctl."""

    SYSTEM = auto()
    VM = auto()
    VCPU = auto()
    DEVICE = auto()


class Payload(Enum):
    """How an ioctl's data travels."""

    NONE = auto()  # no argument
    VALUE = auto()  # the argument itself
    FIXED = auto()  # a struct, wholly moved by the kernel in the direction that the number says
    FLEX = auto()  # a header, moved by the kernel, and an array behind it that only the client's memory has
    POINTER = auto()  # the argument is a pointer though the number has no size: nothing is moved


@dataclass(frozen=True, slots=True)
class Ioctl:
    """One control word.

    `struct` is what the number's size is computed from, or what the pointer of Payload.POINTER leads to.
    `capability` names the KVM_CAP_* that announce it, separated by blanks; empty: always there.
    `backwards`: the number says that data only comes back, yet it is input. The kernel then delivers no
    input (read it from the client) and copies the reply over the caller's struct (send the same bytes).
    """

    name: str
    number: int
    levels: Level
    struct: type[Structure] | type[c_uint64] | type[c_ulong] | None
    payload: Payload
    capability: str
    handler: str
    backwards: bool = False

    @property
    def nr(self) -> int:
        """The number's low byte."""
        return self.number & 0xFF

    @property
    def in_size(self) -> int:
        """Bytes that the kernel delivers with the request."""
        return self.number >> IOC_SIZESHIFT & IOC_SIZEMASK if self.number >> IOC_DIRSHIFT & IOC_WRITE else 0

    @property
    def out_size(self) -> int:
        """Bytes that the kernel copies back with the reply."""
        return self.number >> IOC_SIZESHIFT & IOC_SIZEMASK if self.number >> IOC_DIRSHIFT & IOC_READ else 0


_Struct = type[Structure] | type[c_uint64] | type[c_ulong]


def _ioctl(
    direction: int, name: str, nr: int, levels: Level, struct: _Struct | None, payload: Payload, caps: str
) -> Ioctl:
    size = sizeof(struct) if struct and direction != IOC_NONE else 0
    capability = " ".join(f"KVM_CAP_{cap}" for cap in caps.split())
    handler = name.removeprefix("KVM_").lower()
    number = ioc(direction, nr, size)
    return Ioctl(name, number, levels, struct, payload, capability, handler, name in _BACKWARDS)


def _io(
    name: str, nr: int, levels: Level, payload: Payload, caps: str = "", struct: _Struct | None = None
) -> Ioctl:
    return _ioctl(IOC_NONE, name, nr, levels, struct, payload, caps)


def _iow(name: str, nr: int, levels: Level, struct: _Struct, payload: Payload, caps: str = "") -> Ioctl:
    return _ioctl(IOC_WRITE, name, nr, levels, struct, payload, caps)


def _ior(name: str, nr: int, levels: Level, struct: _Struct, payload: Payload, caps: str = "") -> Ioctl:
    return _ioctl(IOC_READ, name, nr, levels, struct, payload, caps)


def _iowr(name: str, nr: int, levels: Level, struct: _Struct, payload: Payload, caps: str = "") -> Ioctl:
    return _ioctl(IOC_WRITE | IOC_READ, name, nr, levels, struct, payload, caps)


_SYSTEM, _VM, _VCPU, _DEVICE = Level
_NONE, _VALUE, _FIXED, _FLEX, _POINTER = Payload

# Announced differently at each level.
_ATTRIBUTES = "DEVICE_CTRL SYS_ATTRIBUTES VCPU_ATTRIBUTES"
_HV_CPUID = "HYPERV_CPUID SYS_HYPERV_CPUID"

_BACKWARDS = frozenset(
    ("KVM_SET_IRQCHIP", "KVM_SET_PIT", "KVM_MEMORY_ENCRYPT_REG_REGION", "KVM_MEMORY_ENCRYPT_UNREG_REGION")
)

# fmt: off
TABLE: Final[tuple[Ioctl, ...]] = (
    _io("KVM_GET_API_VERSION", 0x00, _SYSTEM, _NONE),
    _io("KVM_CREATE_VM", 0x01, _SYSTEM, _VALUE),
    _iowr("KVM_GET_MSR_INDEX_LIST", 0x02, _SYSTEM, KvmMsrList, _FLEX),
    _io("KVM_CHECK_EXTENSION", 0x03, _SYSTEM | _VM, _VALUE, "CHECK_EXTENSION_VM"),
    _io("KVM_GET_VCPU_MMAP_SIZE", 0x04, _SYSTEM, _NONE),
    _iowr("KVM_GET_SUPPORTED_CPUID", 0x05, _SYSTEM, KvmCpuid2, _FLEX, "EXT_CPUID"),
    _iowr("KVM_GET_EMULATED_CPUID", 0x09, _SYSTEM, KvmCpuid2, _FLEX, "EXT_EMUL_CPUID"),
    _iowr("KVM_GET_MSR_FEATURE_INDEX_LIST", 0x0A, _SYSTEM, KvmMsrList, _FLEX, "GET_MSR_FEATURES"),
    _io("KVM_CREATE_VCPU", 0x41, _VM, _VALUE),
    _iow("KVM_GET_DIRTY_LOG", 0x42, _VM, KvmDirtyLog, _FIXED),
    _io("KVM_SET_NR_MMU_PAGES", 0x44, _VM, _VALUE, "MMU_SHADOW_CACHE_CONTROL"),
    _iow("KVM_SET_USER_MEMORY_REGION", 0x46, _VM, KvmUserspaceMemoryRegion, _FIXED, "USER_MEMORY"),
    _io("KVM_SET_TSS_ADDR", 0x47, _VM, _VALUE, "SET_TSS_ADDR"),
    _iow("KVM_SET_IDENTITY_MAP_ADDR", 0x48, _VM, c_uint64, _FIXED, "SET_IDENTITY_MAP_ADDR"),
    _iow("KVM_SET_USER_MEMORY_REGION2", 0x49, _VM, KvmUserspaceMemoryRegion2, _FIXED, "USER_MEMORY2"),
    _io("KVM_CREATE_IRQCHIP", 0x60, _VM, _NONE, "IRQCHIP"),
    _iow("KVM_IRQ_LINE", 0x61, _VM, KvmIrqLevel, _FIXED, "IRQCHIP"),
    _iowr("KVM_GET_IRQCHIP", 0x62, _VM, KvmIrqchip, _FIXED, "IRQCHIP"),
    _ior("KVM_SET_IRQCHIP", 0x63, _VM, KvmIrqchip, _FIXED, "IRQCHIP"),
    _io("KVM_CREATE_PIT", 0x64, _VM, _NONE, "PIT"),
    _iowr("KVM_GET_PIT", 0x65, _VM, KvmPitState, _FIXED, "PIT"),
    _ior("KVM_SET_PIT", 0x66, _VM, KvmPitState, _FIXED, "PIT"),
    _iowr("KVM_IRQ_LINE_STATUS", 0x67, _VM, KvmIrqLevel, _FIXED, "IRQ_INJECT_STATUS"),
    _iow("KVM_REGISTER_COALESCED_MMIO", 0x67, _VM, KvmCoalescedMmioZone, _FIXED, "COALESCED_MMIO"),
    _iow("KVM_UNREGISTER_COALESCED_MMIO", 0x68, _VM, KvmCoalescedMmioZone, _FIXED, "COALESCED_MMIO"),
    _iow("KVM_SET_GSI_ROUTING", 0x6A, _VM, KvmIrqRouting, _FLEX, "IRQ_ROUTING"),
    _io("KVM_REINJECT_CONTROL", 0x71, _VM, _POINTER, "REINJECT_CONTROL", KvmReinjectControl),
    _iow("KVM_IRQFD", 0x76, _VM, KvmIrqfd, _FIXED, "IRQFD"),
    _iow("KVM_CREATE_PIT2", 0x77, _VM, KvmPitConfig, _FIXED, "PIT2"),
    _io("KVM_SET_BOOT_CPU_ID", 0x78, _VM, _VALUE, "SET_BOOT_CPU_ID"),
    _iow("KVM_IOEVENTFD", 0x79, _VM, KvmIoeventfd, _FIXED, "IOEVENTFD"),
    _iow("KVM_XEN_HVM_CONFIG", 0x7A, _VM, KvmXenHvmConfig, _FIXED, "XEN_HVM"),
    _iow("KVM_SET_CLOCK", 0x7B, _VM, KvmClockData, _FIXED, "ADJUST_CLOCK"),
    _ior("KVM_GET_CLOCK", 0x7C, _VM, KvmClockData, _FIXED, "ADJUST_CLOCK"),
    _ior("KVM_GET_PIT2", 0x9F, _VM, KvmPitState2, _FIXED, "PIT_STATE2"),
    _iow("KVM_SET_PIT2", 0xA0, _VM, KvmPitState2, _FIXED, "PIT_STATE2"),
    _io("KVM_SET_TSC_KHZ", 0xA2, _VM | _VCPU, _VALUE, "TSC_CONTROL VM_TSC_CONTROL"),
    _io("KVM_GET_TSC_KHZ", 0xA3, _VM | _VCPU, _NONE, "GET_TSC_KHZ VM_TSC_CONTROL"),
    _iow("KVM_SIGNAL_MSI", 0xA5, _VM, KvmMsi, _FIXED, "SIGNAL_MSI"),
    _iow("KVM_SET_PMU_EVENT_FILTER", 0xB2, _VM, KvmPmuEventFilter, _FLEX, "PMU_EVENT_FILTER"),
    _iowr("KVM_CREATE_DEVICE", 0xE0, _VM, KvmCreateDevice, _FIXED, "DEVICE_CTRL"),
    _iow("KVM_SET_DEVICE_ATTR", 0xE1, _VCPU | _DEVICE, KvmDeviceAttr, _FIXED, "DEVICE_CTRL VCPU_ATTRIBUTES"),
    _iow("KVM_GET_DEVICE_ATTR", 0xE2, _SYSTEM | _VCPU | _DEVICE, KvmDeviceAttr, _FIXED, _ATTRIBUTES),
    _iow("KVM_HAS_DEVICE_ATTR", 0xE3, _SYSTEM | _VCPU | _DEVICE, KvmDeviceAttr, _FIXED, _ATTRIBUTES),
    _io("KVM_RUN", 0x80, _VCPU, _NONE),
    _ior("KVM_GET_REGS", 0x81, _VCPU, KvmRegs, _FIXED),
    _iow("KVM_SET_REGS", 0x82, _VCPU, KvmRegs, _FIXED),
    _ior("KVM_GET_SREGS", 0x83, _VCPU, KvmSregs, _FIXED),
    _iow("KVM_SET_SREGS", 0x84, _VCPU, KvmSregs, _FIXED),
    _iowr("KVM_TRANSLATE", 0x85, _VCPU, KvmTranslation, _FIXED),
    _iow("KVM_INTERRUPT", 0x86, _VCPU, KvmInterrupt, _FIXED),
    _iowr("KVM_GET_MSRS", 0x88, _SYSTEM | _VCPU, KvmMsrs, _FLEX, "GET_MSR_FEATURES"),
    _iow("KVM_SET_MSRS", 0x89, _VCPU, KvmMsrs, _FLEX),
    _iow("KVM_SET_CPUID", 0x8A, _VCPU, KvmCpuid, _FLEX),
    _iow("KVM_SET_SIGNAL_MASK", 0x8B, _VCPU, KvmSignalMask, _FLEX),
    _ior("KVM_GET_FPU", 0x8C, _VCPU, KvmFpu, _FIXED),
    _iow("KVM_SET_FPU", 0x8D, _VCPU, KvmFpu, _FIXED),
    _ior("KVM_GET_LAPIC", 0x8E, _VCPU, KvmLapicState, _FIXED, "IRQCHIP"),
    _iow("KVM_SET_LAPIC", 0x8F, _VCPU, KvmLapicState, _FIXED, "IRQCHIP"),
    _iow("KVM_SET_CPUID2", 0x90, _VCPU, KvmCpuid2, _FLEX, "EXT_CPUID"),
    _iowr("KVM_GET_CPUID2", 0x91, _VCPU, KvmCpuid2, _FLEX, "EXT_CPUID"),
    _iowr("KVM_TPR_ACCESS_REPORTING", 0x92, _VCPU, KvmTprAccessCtl, _FIXED, "VAPIC"),
    _iow("KVM_SET_VAPIC_ADDR", 0x93, _VCPU, KvmVapicAddr, _FIXED, "VAPIC"),
    _ior("KVM_GET_MP_STATE", 0x98, _VCPU, KvmMpState, _FIXED, "MP_STATE"),
    _iow("KVM_SET_MP_STATE", 0x99, _VCPU, KvmMpState, _FIXED, "MP_STATE"),
    _io("KVM_NMI", 0x9A, _VCPU, _NONE, "USER_NMI"),
    _iow("KVM_SET_GUEST_DEBUG", 0x9B, _VCPU, KvmGuestDebug, _FIXED, "SET_GUEST_DEBUG"),
    _iow("KVM_X86_SETUP_MCE", 0x9C, _VCPU, c_uint64, _FIXED, "MCE"),
    _ior("KVM_X86_GET_MCE_CAP_SUPPORTED", 0x9D, _SYSTEM, c_uint64, _FIXED, "MCE"),
    _iow("KVM_X86_SET_MCE", 0x9E, _VCPU, KvmX86Mce, _FIXED, "MCE"),
    _ior("KVM_GET_VCPU_EVENTS", 0x9F, _VCPU, KvmVcpuEvents, _FIXED, "VCPU_EVENTS"),
    _iow("KVM_SET_VCPU_EVENTS", 0xA0, _VCPU, KvmVcpuEvents, _FIXED, "VCPU_EVENTS"),
    _ior("KVM_GET_DEBUGREGS", 0xA1, _VCPU, KvmDebugregs, _FIXED, "DEBUGREGS"),
    _iow("KVM_SET_DEBUGREGS", 0xA2, _VCPU, KvmDebugregs, _FIXED, "DEBUGREGS"),
    _iow("KVM_ENABLE_CAP", 0xA3, _VM | _VCPU, KvmEnableCap, _FIXED, "ENABLE_CAP ENABLE_CAP_VM"),
    _ior("KVM_GET_XSAVE", 0xA4, _VCPU, KvmXsave, _FIXED, "XSAVE"),
    _iow("KVM_SET_XSAVE", 0xA5, _VCPU, KvmXsave, _FIXED, "XSAVE XSAVE2"),
    _ior("KVM_GET_XCRS", 0xA6, _VCPU, KvmXcrs, _FIXED, "XCRS"),
    _iow("KVM_SET_XCRS", 0xA7, _VCPU, KvmXcrs, _FIXED, "XCRS"),
    _iow("KVM_GET_ONE_REG", 0xAB, _VCPU, KvmOneReg, _FIXED, "ONE_REG"),
    _iow("KVM_SET_ONE_REG", 0xAC, _VCPU, KvmOneReg, _FIXED, "ONE_REG"),
    _io("KVM_KVMCLOCK_CTRL", 0xAD, _VCPU, _NONE, "KVMCLOCK_CTRL"),
    _iowr("KVM_GET_REG_LIST", 0xB0, _VCPU, KvmRegList, _FLEX, "ONE_REG"),
    _io("KVM_SMI", 0xB7, _VCPU, _NONE, "X86_SMM"),
    _iowr("KVM_MEMORY_ENCRYPT_OP", 0xBA, _VM | _VCPU, c_ulong, _FIXED),
    _ior("KVM_MEMORY_ENCRYPT_REG_REGION", 0xBB, _VM, KvmEncRegion, _FIXED),
    _ior("KVM_MEMORY_ENCRYPT_UNREG_REGION", 0xBC, _VM, KvmEncRegion, _FIXED),
    _iow("KVM_HYPERV_EVENTFD", 0xBD, _VM, KvmHypervEventfd, _FIXED, "HYPERV_EVENTFD"),
    _iowr("KVM_GET_NESTED_STATE", 0xBE, _VCPU, KvmNestedState, _FLEX, "NESTED_STATE"),
    _iow("KVM_SET_NESTED_STATE", 0xBF, _VCPU, KvmNestedState, _FLEX, "NESTED_STATE"),
    _iowr("KVM_CLEAR_DIRTY_LOG", 0xC0, _VM, KvmClearDirtyLog, _FIXED, "MANUAL_DIRTY_LOG_PROTECT2"),
    _iowr("KVM_GET_SUPPORTED_HV_CPUID", 0xC1, _SYSTEM | _VCPU, KvmCpuid2, _FLEX, _HV_CPUID),
    _iow("KVM_X86_SET_MSR_FILTER", 0xC6, _VM, KvmMsrFilter, _FIXED, "X86_MSR_FILTER"),
    _io("KVM_RESET_DIRTY_RINGS", 0xC7, _VM, _NONE, "DIRTY_LOG_RING"),
    _iowr("KVM_XEN_HVM_GET_ATTR", 0xC8, _VM, KvmXenHvmAttr, _FIXED, "XEN_HVM"),
    _iow("KVM_XEN_HVM_SET_ATTR", 0xC9, _VM, KvmXenHvmAttr, _FIXED, "XEN_HVM"),
    _iowr("KVM_XEN_VCPU_GET_ATTR", 0xCA, _VCPU, KvmXenVcpuAttr, _FIXED, "XEN_HVM"),
    _iow("KVM_XEN_VCPU_SET_ATTR", 0xCB, _VCPU, KvmXenVcpuAttr, _FIXED, "XEN_HVM"),
    _iow("KVM_XEN_HVM_EVTCHN_SEND", 0xD0, _VM, KvmIrqRoutingXenEvtchn, _FIXED, "XEN_HVM"),
    _ior("KVM_GET_SREGS2", 0xCC, _VCPU, KvmSregs2, _FIXED, "SREGS2"),
    _iow("KVM_SET_SREGS2", 0xCD, _VCPU, KvmSregs2, _FIXED, "SREGS2"),
    _io("KVM_GET_STATS_FD", 0xCE, _VM | _VCPU, _NONE, "BINARY_STATS_FD"),
    _ior("KVM_GET_XSAVE2", 0xCF, _VCPU, KvmXsave, _FIXED, "XSAVE2"),
    _iow("KVM_SET_MEMORY_ATTRIBUTES", 0xD2, _VM, KvmMemoryAttributes, _FIXED, "MEMORY_ATTRIBUTES"),
    _iowr("KVM_CREATE_GUEST_MEMFD", 0xD4, _VM, KvmCreateGuestMemfd, _FIXED, "GUEST_MEMFD"),
    _iowr("KVM_PRE_FAULT_MEMORY", 0xD5, _VCPU, KvmPreFaultMemory, _FIXED, "PRE_FAULT_MEMORY"),
)
# fmt: on

BY_NUMBER: Final[dict[int, Ioctl]] = {entry.number: entry for entry in TABLE}
BY_NAME: Final[dict[str, Ioctl]] = {entry.name: entry for entry in TABLE}

# The request numbers.
KVM_GET_API_VERSION: Final = 0x0000AE00
KVM_CREATE_VM: Final = 0x0000AE01
KVM_GET_MSR_INDEX_LIST: Final = 0xC004AE02
KVM_CHECK_EXTENSION: Final = 0x0000AE03
KVM_GET_VCPU_MMAP_SIZE: Final = 0x0000AE04
KVM_GET_SUPPORTED_CPUID: Final = 0xC008AE05
KVM_GET_EMULATED_CPUID: Final = 0xC008AE09
KVM_GET_MSR_FEATURE_INDEX_LIST: Final = 0xC004AE0A
KVM_CREATE_VCPU: Final = 0x0000AE41
KVM_GET_DIRTY_LOG: Final = 0x4010AE42
KVM_SET_NR_MMU_PAGES: Final = 0x0000AE44
KVM_SET_USER_MEMORY_REGION: Final = 0x4020AE46
KVM_SET_TSS_ADDR: Final = 0x0000AE47
KVM_SET_IDENTITY_MAP_ADDR: Final = 0x4008AE48
KVM_SET_USER_MEMORY_REGION2: Final = 0x40A0AE49
KVM_CREATE_IRQCHIP: Final = 0x0000AE60
KVM_IRQ_LINE: Final = 0x4008AE61
KVM_GET_IRQCHIP: Final = 0xC208AE62
KVM_SET_IRQCHIP: Final = 0x8208AE63
KVM_CREATE_PIT: Final = 0x0000AE64
KVM_GET_PIT: Final = 0xC048AE65
KVM_SET_PIT: Final = 0x8048AE66
KVM_IRQ_LINE_STATUS: Final = 0xC008AE67
KVM_REGISTER_COALESCED_MMIO: Final = 0x4010AE67
KVM_UNREGISTER_COALESCED_MMIO: Final = 0x4010AE68
KVM_SET_GSI_ROUTING: Final = 0x4008AE6A
KVM_REINJECT_CONTROL: Final = 0x0000AE71
KVM_IRQFD: Final = 0x4020AE76
KVM_CREATE_PIT2: Final = 0x4040AE77
KVM_SET_BOOT_CPU_ID: Final = 0x0000AE78
KVM_IOEVENTFD: Final = 0x4040AE79
KVM_XEN_HVM_CONFIG: Final = 0x4038AE7A
KVM_SET_CLOCK: Final = 0x4030AE7B
KVM_GET_CLOCK: Final = 0x8030AE7C
KVM_GET_PIT2: Final = 0x8070AE9F
KVM_SET_PIT2: Final = 0x4070AEA0
KVM_SET_TSC_KHZ: Final = 0x0000AEA2
KVM_GET_TSC_KHZ: Final = 0x0000AEA3
KVM_SIGNAL_MSI: Final = 0x4020AEA5
KVM_SET_PMU_EVENT_FILTER: Final = 0x4020AEB2
KVM_CREATE_DEVICE: Final = 0xC00CAEE0
KVM_SET_DEVICE_ATTR: Final = 0x4018AEE1
KVM_GET_DEVICE_ATTR: Final = 0x4018AEE2
KVM_HAS_DEVICE_ATTR: Final = 0x4018AEE3
KVM_RUN: Final = 0x0000AE80
KVM_GET_REGS: Final = 0x8090AE81
KVM_SET_REGS: Final = 0x4090AE82
KVM_GET_SREGS: Final = 0x8138AE83
KVM_SET_SREGS: Final = 0x4138AE84
KVM_TRANSLATE: Final = 0xC018AE85
KVM_INTERRUPT: Final = 0x4004AE86
KVM_GET_MSRS: Final = 0xC008AE88
KVM_SET_MSRS: Final = 0x4008AE89
KVM_SET_CPUID: Final = 0x4008AE8A
KVM_SET_SIGNAL_MASK: Final = 0x4004AE8B
KVM_GET_FPU: Final = 0x81A0AE8C
KVM_SET_FPU: Final = 0x41A0AE8D
KVM_GET_LAPIC: Final = 0x8400AE8E
KVM_SET_LAPIC: Final = 0x4400AE8F
KVM_SET_CPUID2: Final = 0x4008AE90
KVM_GET_CPUID2: Final = 0xC008AE91
KVM_TPR_ACCESS_REPORTING: Final = 0xC028AE92
KVM_SET_VAPIC_ADDR: Final = 0x4008AE93
KVM_GET_MP_STATE: Final = 0x8004AE98
KVM_SET_MP_STATE: Final = 0x4004AE99
KVM_NMI: Final = 0x0000AE9A
KVM_SET_GUEST_DEBUG: Final = 0x4048AE9B
KVM_X86_SETUP_MCE: Final = 0x4008AE9C
KVM_X86_GET_MCE_CAP_SUPPORTED: Final = 0x8008AE9D
KVM_X86_SET_MCE: Final = 0x4040AE9E
KVM_GET_VCPU_EVENTS: Final = 0x8040AE9F
KVM_SET_VCPU_EVENTS: Final = 0x4040AEA0
KVM_GET_DEBUGREGS: Final = 0x8080AEA1
KVM_SET_DEBUGREGS: Final = 0x4080AEA2
KVM_ENABLE_CAP: Final = 0x4068AEA3
KVM_GET_XSAVE: Final = 0x9000AEA4
KVM_SET_XSAVE: Final = 0x5000AEA5
KVM_GET_XCRS: Final = 0x8188AEA6
KVM_SET_XCRS: Final = 0x4188AEA7
KVM_GET_ONE_REG: Final = 0x4010AEAB
KVM_SET_ONE_REG: Final = 0x4010AEAC
KVM_KVMCLOCK_CTRL: Final = 0x0000AEAD
KVM_GET_REG_LIST: Final = 0xC008AEB0
KVM_SMI: Final = 0x0000AEB7
KVM_MEMORY_ENCRYPT_OP: Final = 0xC008AEBA
KVM_MEMORY_ENCRYPT_REG_REGION: Final = 0x8010AEBB
KVM_MEMORY_ENCRYPT_UNREG_REGION: Final = 0x8010AEBC
KVM_HYPERV_EVENTFD: Final = 0x4018AEBD
KVM_GET_NESTED_STATE: Final = 0xC080AEBE
KVM_SET_NESTED_STATE: Final = 0x4080AEBF
KVM_CLEAR_DIRTY_LOG: Final = 0xC018AEC0
KVM_GET_SUPPORTED_HV_CPUID: Final = 0xC008AEC1
KVM_X86_SET_MSR_FILTER: Final = 0x4188AEC6
KVM_RESET_DIRTY_RINGS: Final = 0x0000AEC7
KVM_XEN_HVM_GET_ATTR: Final = 0xC048AEC8
KVM_XEN_HVM_SET_ATTR: Final = 0x4048AEC9
KVM_XEN_VCPU_GET_ATTR: Final = 0xC048AECA
KVM_XEN_VCPU_SET_ATTR: Final = 0x4048AECB
KVM_XEN_HVM_EVTCHN_SEND: Final = 0x400CAED0
KVM_GET_SREGS2: Final = 0x8140AECC
KVM_SET_SREGS2: Final = 0x4140AECD
KVM_GET_STATS_FD: Final = 0x0000AECE
KVM_GET_XSAVE2: Final = 0x9000AECF
KVM_SET_MEMORY_ATTRIBUTES: Final = 0x4020AED2
KVM_CREATE_GUEST_MEMFD: Final = 0xC040AED4
KVM_PRE_FAULT_MEMORY: Final = 0xC040AED5
