# SPDX-License-Identifier: GPL-2.0-or-later
"""Registers and messages of the local APIC and the I/O APIC (SDM vol. 3, chapter 11; 82093AA data sheet)."""

from __future__ import annotations

from typing import Final

# --- Register offsets in the APIC's page (SDM table 11-1); x2APIC: MSR 0x800 + offset / 16
APIC_ID: Final = 0x20
APIC_LVR: Final = 0x30
APIC_TASKPRI: Final = 0x80
APIC_ARBPRI: Final = 0x90
APIC_PROCPRI: Final = 0xA0
APIC_EOI: Final = 0xB0
APIC_LDR: Final = 0xD0
APIC_DFR: Final = 0xE0
APIC_SPIV: Final = 0xF0
APIC_ISR: Final = 0x100
APIC_TMR: Final = 0x180
APIC_IRR: Final = 0x200
APIC_ESR: Final = 0x280
APIC_LVTCMCI: Final = 0x2F0
APIC_ICR: Final = 0x300
APIC_ICR2: Final = 0x310
APIC_LVTT: Final = 0x320
APIC_LVTTHMR: Final = 0x330
APIC_LVTPC: Final = 0x340
APIC_LVT0: Final = 0x350
APIC_LVT1: Final = 0x360
APIC_LVTERR: Final = 0x370
APIC_TMICT: Final = 0x380
APIC_TMCCT: Final = 0x390
APIC_TDCR: Final = 0x3E0
APIC_SELF_IPI: Final = 0x3F0
APIC_LAST_REG: Final = 0x3F0
APIC_MMIO_LENGTH: Final = 0x1000

# --- Version, spurious vector
APIC_VERSION: Final = 0x14
APIC_LVR_DIRECTED_EOI: Final = 1 << 24
APIC_SPIV_APIC_ENABLED: Final = 1 << 8
APIC_SPIV_DIRECTED_EOI: Final = 1 << 12

# --- Destination format
APIC_DFR_CLUSTER: Final = 0x0FFFFFFF
APIC_DFR_FLAT: Final = 0xFFFFFFFF

# --- Local vector table and interrupt command
APIC_VECTOR_MASK: Final = 0xFF
APIC_MODE_MASK: Final = 0x700
APIC_DM_FIXED: Final = 0x000
APIC_DM_LOWEST: Final = 0x100
APIC_DM_SMI: Final = 0x200
APIC_DM_REMRD: Final = 0x300
APIC_DM_NMI: Final = 0x400
APIC_DM_INIT: Final = 0x500
APIC_DM_STARTUP: Final = 0x600
APIC_DM_EXTINT: Final = 0x700
APIC_DEST_LOGICAL: Final = 0x800
APIC_DEST_MASK: Final = 0x800
APIC_SEND_PENDING: Final = 1 << 12
APIC_INPUT_POLARITY: Final = 1 << 13
APIC_INT_ASSERT: Final = 1 << 14
APIC_LVT_REMOTE_IRR: Final = 1 << 14
APIC_INT_LEVELTRIG: Final = 1 << 15
APIC_LVT_LEVEL_TRIGGER: Final = 1 << 15
APIC_LVT_MASKED: Final = 1 << 16
APIC_LVT_TIMER_ONESHOT: Final = 0
APIC_LVT_TIMER_PERIODIC: Final = 1 << 17
APIC_LVT_TIMER_TSCDEADLINE: Final = 2 << 17
APIC_SHORT_MASK: Final = 0xC0000
APIC_DEST_NOSHORT: Final = 0
APIC_DEST_SELF: Final = 0x40000
APIC_DEST_ALLINC: Final = 0x80000
APIC_DEST_ALLBUT: Final = 0xC0000

APIC_BROADCAST: Final = 0xFF
X2APIC_BROADCAST: Final = 0xFFFFFFFF

# --- I/O APIC
IOAPIC_MEM_LENGTH: Final = 0x100
IOAPIC_REG_SELECT: Final = 0x00
IOAPIC_REG_WINDOW: Final = 0x10
IOAPIC_REG_ID: Final = 0
IOAPIC_REG_VERSION: Final = 1
IOAPIC_REG_ARB_ID: Final = 2
IOAPIC_VERSION_ID: Final = 0x11
# Bits of a redirection entry
IOAPIC_VECTOR: Final = 0xFF
IOAPIC_DELIVERY_MODE: Final = 0x700
IOAPIC_DEST_LOGICAL: Final = 1 << 11
IOAPIC_DELIVERY_STATUS: Final = 1 << 12
IOAPIC_REMOTE_IRR: Final = 1 << 14
IOAPIC_LEVEL: Final = 1 << 15
IOAPIC_MASKED: Final = 1 << 16
IOAPIC_DEST_SHIFT: Final = 56

# --- MSI (SDM 11.11): address bits, data bits
MSI_ADDR_DEST_LOGICAL: Final = 1 << 2
MSI_ADDR_REDIRECT_HINT: Final = 1 << 3
MSI_ADDR_DEST_SHIFT: Final = 12
MSI_DATA_LEVEL: Final = 1 << 15
