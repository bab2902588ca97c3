# SPDX-License-Identifier: GPL-2.0-or-later
"""The host's time stamp counter: how fast it is, whether it can be trusted, and what time it is by it.

A guest's RDTSC is the host's times a ratio (TSC scaling), plus an offset.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import struct
import time
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import NamedTuple

from kvmfs.cpu.layout import load

NSEC_PER_SEC = 10**9
M32, M64 = (1 << 32) - 1, (1 << 64) - 1
TSC_TOLERANCE_PPM = 250                     # kvm.tsc_tolerance_ppm
TSC_CLOCKSOURCES = ("tsc", "hyperv_clocksource_tsc_page")
TSC_KHZ_MAX = 0x7FFFFFFF
_CLOCKSOURCE = Path("/sys/devices/system/clocksource/clocksource0/current_clocksource")
_MEASURE = 0.1                              # seconds; the error of reading both clocks is below 100 ns
_PLAUSIBLE = 0.01

# perf_event_open(2): a software event that counts nothing, for the page that goes with it.
_NR_PERF_EVENT_OPEN = 298
_PERF_ATTR = struct.Struct("<IIQQQQQ72x")   # type, size, config, period, sample_type, read_format, flags
_PERF_TYPE_SOFTWARE, _PERF_COUNT_SW_DUMMY = 1, 9
_PERF_FLAGS = 1 << 0 | 1 << 5 | 1 << 6      # disabled, exclude_kernel, exclude_hv
_PERF_CAPABILITIES, _PERF_TIME = 40, struct.Struct("<HI")   # offsets 50 and 52: time_shift, time_mult
_CAP_USER_TIME = 1 << 3


def rdtsc() -> int:
    """The host's TSC now."""
    return int(load().nv_host_tsc())


def clock_and_tsc(clock: int) -> tuple[int, int]:
    """A clock of clock_gettime(2) in nanoseconds, and the TSC at that moment."""
    tsc = ctypes.c_uint64()
    ns = load().nv_clock_and_tsc(clock, ctypes.byref(tsc))
    return int(ns), tsc.value


@cache
def tsc_khz() -> int:
    """The TSC's frequency in kHz (the kernel's ``tsc_khz``).

    The kernel tells it to user space only in perf's page, as the factor from cycles to nanoseconds; where there
    is none (perf forbidden, or the kernel's own clock is not the TSC) it is measured against
    CLOCK_MONOTONIC_RAW.  Call it once before privileges are given up; the answer is kept.
    """
    told = _told_by_perf()
    measured = _measure(0.002 if told else _MEASURE)
    if told and abs(told - measured) < measured * _PLAUSIBLE:
        return told
    return measured if not told else _measure(_MEASURE)


def _told_by_perf() -> int:
    """0: it does not say."""
    libc = ctypes.CDLL(None, use_errno=True)
    attr = _PERF_ATTR.pack(_PERF_TYPE_SOFTWARE, _PERF_ATTR.size, _PERF_COUNT_SW_DUMMY, 0, 0, 0, _PERF_FLAGS)
    fd = libc.syscall(_NR_PERF_EVENT_OPEN, attr, 0, -1, -1, 8)      # PERF_FLAG_FD_CLOEXEC
    if fd < 0:
        return 0
    try:
        with mmap.mmap(fd, mmap.PAGESIZE, mmap.MAP_SHARED, mmap.PROT_READ) as page:
            capabilities, = struct.unpack_from("<Q", page, _PERF_CAPABILITIES)
            shift, mult = _PERF_TIME.unpack_from(page[50:56])
    except OSError:
        return 0
    finally:
        os.close(fd)
    if not capabilities & _CAP_USER_TIME or not mult:
        return 0
    return int(((10**6 << shift) + mult // 2) // mult)


def _measure(seconds: float) -> int:
    ns, tsc = clock_and_tsc(time.CLOCK_MONOTONIC_RAW)
    time.sleep(seconds)
    ns2, tsc2 = clock_and_tsc(time.CLOCK_MONOTONIC_RAW)
    elapsed = ns2 - ns
    return ((tsc2 - tsc) * 10**6 + elapsed // 2) // elapsed


@cache
def host_clock_is_tsc() -> bool:
    """``gtod_is_based_on_tsc``: the kernel keeps time by the TSC, so it is the same on all CPUs and never stops."""
    with suppress(OSError):
        return _CLOCKSOURCE.read_text(encoding="ascii").strip() in TSC_CLOCKSOURCES
    return False


class Scaling(NamedTuple):
    """What a vendor's TSC scaling can do (``kvm_caps.tsc_scaling_ratio_frac_bits``, ``max_tsc_scaling_ratio``)."""

    frac_bits: int
    max_ratio: int

    @property
    def max_khz(self) -> int:
        """``kvm_caps.max_guest_tsc_khz``: guests' TSCs are slower than this."""
        return min(TSC_KHZ_MAX, self.max_ratio * tsc_khz() >> self.frac_bits)

    def ratio(self, khz: int) -> int | None:
        """The ratio for a frequency; None: it cannot be had."""
        ratio = (khz << self.frac_bits) // tsc_khz()
        return ratio if 0 < ratio < self.max_ratio else None


# ---- arithmetic as the kernel and its guests do it -------------------------------------------------------

class Scale(NamedTuple):
    """``(delta << shift) * mult >> 32``; a negative shift is to the right."""

    shift: int
    mult: int

    def apply(self, delta: int) -> int:
        """``pvclock_scale_delta``; ``delta`` and the result are u64."""
        delta &= M64
        delta = delta >> -self.shift if self.shift < 0 else delta << self.shift & M64
        return delta * self.mult >> 32 & M64


def time_scale(scaled_hz: int, base_hz: int) -> Scale:
    """``kvm_get_time_scale``: from a count at ``base_hz`` to one at ``scaled_hz``."""
    shift = 0
    while base_hz > scaled_hz * 2 or base_hz >> 32:
        base_hz >>= 1
        shift -= 1
    while base_hz <= scaled_hz or scaled_hz >> 32:
        if scaled_hz >> 32 or base_hz & 1 << 31:
            scaled_hz >>= 1
        else:
            base_hz <<= 1
        shift += 1
    return Scale(shift, (scaled_hz << 32) // base_hz)


# ---- kvmclock's base -------------------------------------------------------------------------------------

_SUSPENDED = 10**6      # ns; two readings of the offset differ by less
_boot_offset = 0


def _sleep_offset() -> int:
    """Nanoseconds that the machine was suspended since boot (``offs_boot``).

    It is the difference of two clocks that cannot be read at once, and must not jitter: it changes only when
    the machine has slept.
    """
    global _boot_offset
    now = time.clock_gettime_ns(time.CLOCK_BOOTTIME) - time.clock_gettime_ns(time.CLOCK_MONOTONIC)
    if abs(now - _boot_offset) > _SUSPENDED:
        _boot_offset = now
    return _boot_offset


def kvmclock_base() -> tuple[int, int]:
    """``get_kvmclock_base_ns``: nanoseconds since boot, suspend included, uncorrected; and the TSC then."""
    ns, tsc = clock_and_tsc(time.CLOCK_MONOTONIC_RAW)
    return ns + _sleep_offset(), tsc
