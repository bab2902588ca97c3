# SPDX-License-Identifier: GPL-2.0-or-later
"""struct kvm_segment to and from the 12-bit attributes of a VMCB segment (APM vol. 2, 15.5.1)."""

from __future__ import annotations

from struct import Struct

from kvmfs.abi.structs import KvmSegment

# struct kvm_segment: base, limit, selector, and a byte for each of the bits.
SEGMENT = Struct("<QIH10s")
BITS_AT = 14
TYPE, S, DPL, P, AVL, L, DB, G = 0xF, 1 << 4, 3 << 5, 1 << 7, 1 << 8, 1 << 9, 1 << 10, 1 << 11


def to_attrib(segment: KvmSegment) -> int:
    """Attributes; a segment that is unusable is not present."""
    return (segment.type & TYPE | (segment.s & 1) << 4 | (segment.dpl & 3) << 5
            | (segment.present & 1 and not segment.unusable) << 7 | (segment.avl & 1) << 8
            | (segment.l & 1) << 9 | (segment.db & 1) << 10 | (segment.g & 1) << 11)


def from_attrib(attrib: int) -> KvmSegment:
    """The bits that the hardware holds, without any vendor's touches; not present means unusable."""
    present = attrib >> 7 & 1
    return KvmSegment(type=attrib & TYPE, present=present, dpl=attrib >> 5 & 3, db=attrib >> 10 & 1, s=attrib >> 4 & 1,
                      l=attrib >> 9 & 1, g=attrib >> 11 & 1, avl=attrib >> 8 & 1, unusable=not present)


def bits_of(segment: KvmSegment) -> bytes:
    """The bytes of a struct kvm_segment behind its selector."""
    return bytes(segment)[BITS_AT:]
