# SPDX-License-Identifier: GPL-2.0-or-later
"""Binary statistics of VMs and vCPUs (Linux: virt/kvm/binary_stats.c, x86.c's descriptors; api.rst 4.133).

What is read is a header, the id, the descriptors and the values, each found by the offsets in the header.  All of
Linux's statistics are there under their names.  Those of what this machine does not have stay 0: shadow pages,
halt polling, nested guests, an FPU or host state that is loaded at an entry.
"""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING, Final, NamedTuple

from kvmfs.abi import svm
from kvmfs.cpu.cpu import (
    EXIT_FETCH,
    EXIT_IO_IN,
    EXIT_IO_OUT,
    EXIT_MMIO_READ,
    EXIT_MMIO_WRITE,
    EXIT_NONE,
    EXIT_UNKNOWN,
)
from kvmfs.kvm.tsc import tsc_khz

if TYPE_CHECKING:
    from kvmfs.kvm.kvm_main import Vcpu, Vm

KVM_STATS_NAME_SIZE: Final = 48
TYPE_CUMULATIVE, TYPE_INSTANT, TYPE_PEAK, TYPE_LINEAR_HIST, TYPE_LOG_HIST = range(5)
UNIT_NONE, UNIT_BYTES, UNIT_SECONDS, UNIT_CYCLES, UNIT_BOOLEAN = (unit << 4 for unit in range(5))
HALT_POLL_HIST_COUNT: Final = 32
EXIT_KINDS: Final = 8           # of kvmfs.cpu: EXIT_NONE to EXIT_UNKNOWN

_HEADER = struct.Struct("<6I")          # flags, name_size, num_desc, id_offset, desc_offset, data_offset
_DESC = struct.Struct(f"<IhHII{KVM_STATS_NAME_SIZE}s")  # flags, exponent, size, offset, bucket_size, name
_NANO = -9


class Stat(NamedTuple):
    """One statistic: ``size`` 64-bit numbers, in units of ten to the power of ``exponent``."""

    name: str
    flags: int = TYPE_CUMULATIVE | UNIT_NONE
    exponent: int = 0
    size: int = 1


def _counters(names: str) -> tuple[Stat, ...]:
    return tuple(Stat(name) for name in names.split())


def _times(names: str) -> tuple[Stat, ...]:
    return tuple(Stat(name, TYPE_CUMULATIVE | UNIT_SECONDS, _NANO) for name in names.split())


def _histograms(names: str) -> tuple[Stat, ...]:
    return tuple(Stat(name, TYPE_LOG_HIST | UNIT_SECONDS, _NANO, HALT_POLL_HIST_COUNT) for name in names.split())


VM_STATS: Final = (
    *_counters("remote_tlb_flush remote_tlb_flush_requests mmu_shadow_zapped mmu_pte_write mmu_pde_zapped mmu_flooded "
               "mmu_recycled mmu_cache_miss"),
    *(Stat(name, TYPE_INSTANT) for name in ("mmu_unsync", "pages_4k", "pages_2m", "pages_1g", "nx_lpage_splits")),
    *(Stat(name, TYPE_PEAK) for name in ("max_mmu_rmap_size", "max_mmu_page_hash_collisions")),
)
# Linux describes the last two the other way round than they lie in memory.
_VM_LAYOUT: Final = (*VM_STATS[:-2], VM_STATS[-1], VM_STATS[-2])

VCPU_STATS: Final = (
    *_counters("halt_successful_poll halt_attempted_poll halt_poll_invalid halt_wakeup"),
    *_times("halt_poll_success_ns halt_poll_fail_ns halt_wait_ns"),
    *_histograms("halt_poll_success_hist halt_poll_fail_hist halt_wait_hist"),
    Stat("blocking", TYPE_INSTANT | UNIT_BOOLEAN),
    *_counters("pf_taken pf_fixed pf_emulate pf_spurious pf_fast pf_mmio_spte_created pf_guest tlb_flush invlpg exits "
               "io_exits mmio_exits signal_exits irq_window_exits nmi_window_exits l1d_flush halt_exits request_irq_exits "
               "irq_exits host_state_reload fpu_reload insn_emulation insn_emulation_fail hypercalls irq_injections "
               "nmi_injections req_event nested_run directed_yield_attempted directed_yield_successful "
               "preemption_reported preemption_other"),
    Stat("guest_mode", TYPE_INSTANT | UNIT_BOOLEAN),
    Stat("notify_window_exits"),
)

# What Linux does not count, or elsewhere: nanoseconds of a vCPU in its guest, and waiting for the engine while others had it;
# of a VM, what the translator did: blocks, the guest's bytes in them, blocks that were dropped because their code changed, how
# often its buffer was emptied, and how full that is.
VCPU_TIMES: Final = ("guest_time_ns", "wait_time_ns")
TRANSLATION: Final = ("tb_translated", "tb_guest_bytes", "tb_invalidated", "tb_flushed", "code_buffer_bytes", "code_buffer_size")
_KINDS: Final = {EXIT_NONE: svm.SVM_EXIT_INTR, EXIT_IO_IN: svm.SVM_EXIT_IOIO, EXIT_IO_OUT: svm.SVM_EXIT_IOIO,
                 **dict.fromkeys((EXIT_MMIO_READ, EXIT_MMIO_WRITE, EXIT_FETCH, EXIT_UNKNOWN), svm.SVM_EXIT_NPF)}


class VcpuStat:
    """``struct kvm_vcpu_stat``, as far as something is counted; written by the vCPU's own thread only."""

    __slots__ = ("blocking", "directed_yield_attempted", "exits", "halt_exits", "halt_wait_hist", "halt_wait_ns", "halt_wakeup",
                 "hypercalls", "insn_emulation", "insn_emulation_fail", "irq_injections", "irq_window_exits",
                 "mmio_exits", "nmi_injections", "reasons", "req_event", "request_irq_exits", "signal_exits", "wrmsr_exits")

    def __init__(self) -> None:
        self.exits = [0] * EXIT_KINDS       # by the engine's kind of exit: one addition on the hot path
        self.reasons: dict[int, int] = {}   # of those that are an SVM exit of the engine, by its code
        self.wrmsr_exits = 0
        self.halt_wait_hist = [0] * HALT_POLL_HIST_COUNT
        self.blocking = self.directed_yield_attempted = self.halt_exits = self.halt_wait_ns = self.halt_wakeup = 0
        self.hypercalls = self.insn_emulation = self.insn_emulation_fail = self.irq_injections = self.irq_window_exits = 0
        self.mmio_exits = self.nmi_injections = self.req_event = self.request_irq_exits = self.signal_exits = 0

    def waited(self, nanoseconds: int) -> None:
        """A halt that lasted so long is over (``kvm_vcpu_halt``)."""
        self.halt_wait_ns += nanoseconds
        self.halt_wait_hist[min(nanoseconds.bit_length(), HALT_POLL_HIST_COUNT - 1)] += 1


def _describe(stats: tuple[Stat, ...], layout: tuple[Stat, ...]) -> bytes:
    """Header and descriptors, with the id (zeros) between them."""
    offsets, end = {}, 0
    for stat in layout:
        offsets[stat.name] = end
        end += 8 * stat.size
    descriptors = _HEADER.size + KVM_STATS_NAME_SIZE
    header = _HEADER.pack(0, KVM_STATS_NAME_SIZE, len(stats), _HEADER.size, descriptors, descriptors + _DESC.size * len(stats))
    return header + bytes(KVM_STATS_NAME_SIZE) + b"".join(
        _DESC.pack(stat.flags, stat.exponent, stat.size, offsets[stat.name], 0, stat.name.encode()) for stat in stats)


_VM_DESCRIPTION: Final = _describe(VM_STATS, _VM_LAYOUT)
_VCPU_DESCRIPTION: Final = _describe(VCPU_STATS, VCPU_STATS)
_VM_VALUES: Final = bytes(8 * len(VM_STATS))
_VCPU_VALUES: Final = struct.Struct(f"<{sum(stat.size for stat in VCPU_STATS)}Q")


def _content(description: bytes, identity: str, values: bytes) -> bytes:
    name = identity.encode()[:KVM_STATS_NAME_SIZE - 1].ljust(KVM_STATS_NAME_SIZE, b"\0")
    return description[:_HEADER.size] + name + description[_HEADER.size + KVM_STATS_NAME_SIZE:] + values


def read_vm(vm: Vm) -> bytes:
    """Everything that can be read from a VM's descriptor now.

    All numbers are 0: Linux counts what its own MMU does with page tables, which are not there.
    """
    return _content(_VM_DESCRIPTION, f"kvm-{vm.host.creator}", _VM_VALUES)


def _exits(vcpu: Vcpu) -> list[int]:
    """By the engine's kind of exit, those that Python did not see included."""
    return [python + native for python, native in zip(vcpu.arch.stat.exits, vcpu.lane.info.exits, strict=True)]


def values(vcpu: Vcpu) -> dict[str, int | list[int]]:
    """A vCPU's statistics by name, in the order of VCPU_STATS; histograms are lists.  Any thread may ask."""
    stat, lane = vcpu.arch.stat, vcpu.lane.info
    kinds = _exits(vcpu)
    mmio = kinds[EXIT_MMIO_READ] + kinds[EXIT_MMIO_WRITE]
    known = {
        "exits": sum(kinds),
        "io_exits": kinds[EXIT_IO_IN] + kinds[EXIT_IO_OUT],
        "mmio_exits": stat.mmio_exits + lane.mmio_exits,
        "halt_exits": stat.halt_exits + lane.halt_exits,
        "irq_exits": kinds[EXIT_NONE],                  # a kick is what a host's interrupt is to KVM
        "insn_emulation": mmio + stat.insn_emulation,   # KVM emulates whatever touches MMIO
    }
    found: dict[str, int | list[int]] = {}
    for name, _, _, size in VCPU_STATS:
        value = known[name] if name in known else getattr(stat, name, 0)
        found[name] = [0] * size if size > 1 and not value else list(value) if isinstance(value, list) else value
    return found


def exit_reasons(vcpu: Vcpu) -> dict[int, int]:
    """How many exits there were by SVM's exit code, as the tracepoint kvm:kvm_exit would count them.  Any thread may ask."""
    found, kinds, halts = dict(vcpu.arch.stat.reasons), _exits(vcpu), vcpu.lane.info.halt_exits
    for code, count in ((svm.SVM_EXIT_HLT, halts), *((code, kinds[kind]) for kind, code in _KINDS.items())):
        if count:
            found[code] = found.get(code, 0) + count
    return found


def times(vcpu: Vcpu) -> dict[str, int]:
    """VCPU_TIMES until now.  Any thread may ask."""
    return dict(zip(VCPU_TIMES, (vcpu.cpu.guest_cycles * 10**6 // tsc_khz(), vcpu.cpu.waited), strict=True))


def translation(vm: Vm) -> dict[str, int]:
    """TRANSLATION until now.  Any thread may ask."""
    done = vm.engine.translation()
    return dict(zip(TRANSLATION, (done.blocks, done.guest_bytes, done.invalidated, done.flushes, done.code_bytes,
                                  done.code_capacity), strict=True))


def read_vcpu(vcpu: Vcpu) -> bytes:
    """Everything that can be read from a vCPU's descriptor now."""
    numbers: list[int] = []
    for value in values(vcpu).values():
        numbers += value if isinstance(value, list) else [value]
    return _content(_VCPU_DESCRIPTION, f"kvm-{vcpu.creator}/vcpu-{vcpu.vcpu_id}", _VCPU_VALUES.pack(*numbers))
