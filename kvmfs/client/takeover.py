# SPDX-License-Identifier: GPL-2.0-or-later
"""The client's guest memory as files that the worker can map too.

What the client mapped shared from a file already is one; `resolve` opens it. What it mapped privately is
replaced in place: `take_over` copies it into a memfd while the client stands still and maps that over the
same addresses. From then on both sides use the same pages and nobody copies.

What that changes for the client: MADV_DONTNEED does not zero such memory any more, and a forked child
shares it. What it cannot see: writes by devices and kernel threads that pinned pages before (O_DIRECT,
io_uring, vhost) go to the old pages.
"""

import contextlib
import ctypes
import errno
import fcntl
import mmap
import os
import stat
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

from kvmfs.client.maps import Vma
from kvmfs.client.process import Process, status_field
from kvmfs.client.stop import StoppedProcess
from kvmfs.client.syscalls import Iovec, process_vm_readv
from kvmfs.client.tracer import ClientGoneError, Thread, settle

MEMFD_NAME: Final = "kvmfs-guest"
PAGE_SIZE: Final = 4096
PAGEMAP_SCAN: Final = 0xC0606610  # 6.7
PAGE_IS_PRESENT: Final = 1 << 3
PAGE_IS_SWAPPED: Final = 1 << 4
PAGE_IS_PFNZERO: Final = 1 << 5
_SCAN_ARG: Final = struct.Struct("<12Q")  # struct pm_scan_arg
_SCAN_REGIONS: Final = 4096
_PAGEMAP_POPULATED: Final = 3 << 62  # present or swapped
_IOV_MAX: Final = 1024
_COPY_BYTES: Final = 1 << 20

MAP_SHARED_FIXED: Final = 0x11
MAP_PRIVATE_ANON_FIXED: Final = 0x32

# Files of mounts inside the kernel, which are in no mount table and are never FUSE.
_INTERNAL_FILES: Final = ("/memfd:", "/dev/zero (deleted)", "/SYSV", "/anon_hugepage (deleted)")


@dataclass(frozen=True, slots=True)
class Segment:
    """Guest memory [hva, hva + size) of the client, in bytes.

    It is `fd` at `offset`; the descriptor belongs to the segment's holder, close-on-exec. A hole (nothing
    mapped there, or something that is no memory) has fd -1. `writable`: the client may write it.
    """

    hva: int
    size: int
    fd: int
    offset: int
    writable: bool
    dev: int
    inode: int

    @property
    def hole(self) -> bool:
        """Whether there is no memory behind this range."""
        return self.fd < 0

    def close(self) -> None:
        """Close the descriptor."""
        if self.fd >= 0:
            os.close(self.fd)


@dataclass(frozen=True, slots=True)
class _Part:
    """A piece of the range that lies in one mapping, or in none."""

    start: int
    end: int
    vma: Vma | None


def resolve(process: Process, hva: int, size: int) -> list[Segment] | None:
    """The range as shared files, in address order without gaps, or None when a part must be taken over.

    The client may run. Without CAP_CHECKPOINT_RESTORE in the initial user namespace (map_files) the files
    are looked for among the client's descriptors. Errors: OSError ESRCH, EACCES (no right to the file),
    EOPNOTSUPP (a shared file mapping that can neither be opened nor replaced).
    """
    return _resolve(process, _parts(process, hva, size))


def take_over(process: Process, thread: Thread, hva: int, size: int) -> list[Segment]:
    """As `resolve`, after replacing what is private by a memfd. `thread` is an arrived thread of the client.

    The other threads are stopped meanwhile. Errors: those of StoppedProcess and of Thread, OSError ENOMEM,
    EMFILE, EINVAL (a part of a huge page); the client then has its memory as it was (pieces of private file
    mappings may have been replaced by equal contents).
    """
    try:
        with StoppedProcess(process, thread.tid, timeout=thread.timeout):
            parts = _parts(process, hva, size)
            replaced = [part for part in parts if part.vma is not None and _must_replace(process, part.vma)]
            if replaced:
                _replace(process, thread, replaced)
            segments = _resolve(process, _parts(process, hva, size))
    except ClientGoneError:
        settle(1.0)  # a leader can be reaped only now that its other threads are let go
        raise
    if segments is None:
        raise OSError(errno.EFAULT, f"client memory {hva:#x}+{size:#x} could not be taken over")
    return segments


def close_segments(segments: list[Segment]) -> None:
    """Close the descriptors of all segments."""
    for segment in segments:
        segment.close()


def forget(tgid: int) -> None:
    """Drop what was remembered about the files of a client that has ended."""
    for key, (owner, fd) in list(_remembered.items()):
        if owner == tgid:
            del _remembered[key]
            os.close(fd)


# -- finding ---------------------------------------------------------------------------------------

# (dev, inode) → (tgid, descriptor) of the memfds made here, kept only where map_files may not be used: the
# client has no descriptor of them, so nothing else could lead back to the file when the same memory becomes
# another slot.
_remembered: Final[dict[tuple[int, int], tuple[int, int]]] = {}


def _parts(process: Process, hva: int, size: int) -> list[_Part]:
    if size <= 0 or (hva | size) % PAGE_SIZE:
        raise OSError(errno.EINVAL, f"guest memory {hva:#x}+{size:#x} is not made of whole pages")
    parts, at, end = [], hva, hva + size
    for vma in process.vmas(hva, end):
        start, stop = max(vma.start, at), min(vma.end, end)
        if start > at:
            parts.append(_Part(at, start, None))
        # The kernel's own pages cannot be replaced and are nobody's guest memory.
        parts.append(_Part(start, stop, None if vma.path.startswith("[v") else vma))
        at = stop
    if at < end:
        parts.append(_Part(at, end, None))
    return parts


def _resolve(process: Process, parts: list[_Part]) -> list[Segment] | None:
    if any(part.vma is not None and not part.vma.shared for part in parts):
        return None
    segments: list[Segment] = []
    try:
        for part in parts:
            vma = part.vma
            fd: int | None = -1
            if vma is not None:
                fd = _open_shared(process, vma)
                if fd is None:
                    if vma.path.startswith(_INTERNAL_FILES):
                        close_segments(segments)
                        return None
                    raise OSError(
                        errno.EOPNOTSUPP,
                        f"the file {vma.path} that the client mapped at {vma.start:#x} cannot be opened:"
                        " it is on FUSE or no longer reachable, and the client has no descriptor of it",
                    )
            if vma is None or fd is None or fd < 0:
                _append(segments, Segment(part.start, part.end - part.start, -1, 0, False, 0, 0))
            else:
                offset = vma.offset + part.start - vma.start
                size = part.end - part.start
                _append(segments, Segment(part.start, size, fd, offset, _writable(vma), vma.dev, vma.inode))
    except BaseException:
        close_segments(segments)
        raise
    return segments


def _append(segments: list[Segment], new: Segment) -> None:
    """Append, joined with the last one when it goes on there in the same file."""
    last = segments[-1] if segments else None
    if (
        last is not None
        and (last.hole, last.writable, last.dev, last.inode) == (new.hole, new.writable, new.dev, new.inode)
        and (last.hole or last.offset + last.size == new.offset)
    ):
        new.close()
        segments[-1] = Segment(last.hva, last.size + new.size, last.fd, last.offset, last.writable, last.dev, last.inode)
    else:
        segments.append(new)


def _writable(vma: Vma) -> bool:
    # Memory of ours that is reserved without access may be opened up by mprotect later, which nobody tells
    # us. A file of the client's own stays as the client mapped it: it may have no right to write it.
    return "w" in vma.perms or (vma.perms.startswith("---") and vma.path.startswith(f"/memfd:{MEMFD_NAME} "))


def _must_replace(process: Process, vma: Vma) -> bool:
    if not vma.shared:
        return True
    if not vma.path.startswith(_INTERNAL_FILES):
        return False
    fd = _open_shared(process, vma)
    if fd is None:
        return True
    if fd >= 0:
        os.close(fd)
    return False


def _open_shared(process: Process, vma: Vma) -> int | None:
    """A descriptor of the file behind a shared mapping; -1: no regular file; None: no way to it."""
    mode = os.O_RDWR if _writable(vma) else os.O_RDONLY
    if _may_open(process, vma):
        link = f"/proc/{process.tid}/map_files/{vma.start:x}-{vma.end:x}"
        with contextlib.suppress(FileNotFoundError, PermissionError):
            # O_PATH first: to open a device file for real could do something.
            path_fd = os.open(link, os.O_PATH | os.O_CLOEXEC)
            try:
                found = os.fstat(path_fd)
                if not stat.S_ISREG(found.st_mode):
                    return -1
                if found.st_ino == vma.inode:
                    return os.open(f"/proc/self/fd/{path_fd}", mode | os.O_CLOEXEC)
            finally:
                os.close(path_fd)
    known = _remembered.get((vma.dev, vma.inode))
    if known is not None:
        return fcntl.fcntl(known[1], fcntl.F_DUPFD_CLOEXEC, 0)
    return _from_descriptors(process, vma, mode)


def _may_open(process: Process, vma: Vma) -> bool:
    """Whether the file is certainly not on FUSE: opening one that this process serves would hang both."""
    if vma.path.startswith(_INTERNAL_FILES):
        return True
    try:
        with open(process.proc("mountinfo"), encoding="utf-8", errors="surrogateescape") as f:
            for line in f:
                mount, _, kind = line.partition(" - ")
                major, _, minor = mount.split(" ", 3)[2].partition(":")
                if os.makedev(int(major), int(minor)) == vma.dev:
                    return not kind.startswith(("fuse", "virtiofs"))
    except OSError:
        pass
    return False


def _from_descriptors(process: Process, vma: Vma, mode: int) -> int | None:
    """The mapped file's descriptor taken from the client, if it still has one. Asks no file system."""
    try:
        names = os.listdir(process.proc("fd"))
    except OSError:
        return None
    for name in names:
        try:
            if os.readlink(process.proc(f"fd/{name}")) != vma.path:
                continue
            with open(process.proc(f"fdinfo/{name}"), encoding="ascii", errors="replace") as f:
                info = dict(line.rstrip("\n").split(":\t", 1) for line in f if ":\t" in line)
            if int(info.get("ino", vma.inode)) != vma.inode:  # the inode is there since 5.14
                continue
            if mode == os.O_RDWR and int(info["flags"], 8) & os.O_ACCMODE != os.O_RDWR:
                continue
            return process.getfd(int(name))
        except (OSError, ValueError, KeyError):
            continue
    return None


# -- replacing -------------------------------------------------------------------------------------


def _replace(process: Process, thread: Thread, parts: list[_Part]) -> None:
    """Put a memfd with the same contents in the place of `parts`. The client stands still."""
    low = parts[0].start
    size = parts[-1].end - low
    memfd = os.memfd_create(MEMFD_NAME, os.MFD_CLOEXEC)
    try:
        os.ftruncate(memfd, size)
        with mmap.mmap(memfd, size) as window:
            copied = [_copy(process, thread.tid, part, window, low) for part in parts]
            number, sock_no = thread.receive(memfd)
            thread.close(sock_no)
            done = 0
            try:
                for part in parts:
                    assert part.vma is not None
                    thread.mmap(
                        part.start,
                        part.end - part.start,
                        _prot(part.vma),
                        MAP_SHARED_FIXED,
                        number,
                        part.start - low,
                    )
                    done += 1
            except ClientGoneError:
                raise
            except OSError:
                for part, ranges in zip(parts[:done], copied[:done], strict=True):
                    _put_back(process, thread, part, ranges, window, low)
                thread.close(number)
                raise
        thread.close(number)
        _remember(process, memfd, low)
    finally:
        os.close(memfd)


def _remember(process: Process, memfd: int, mapped_at: int) -> None:
    for owner in {owner for owner, _ in _remembered.values()}:
        if not os.path.exists(f"/proc/{owner}"):
            forget(owner)
    made = os.fstat(memfd)
    for vma in process.vmas(mapped_at, mapped_at + PAGE_SIZE):
        if vma.inode == made.st_ino and vma.path.startswith(f"/memfd:{MEMFD_NAME}"):
            try:
                os.close(os.open(f"/proc/{process.tid}/map_files/{vma.start:x}-{vma.end:x}", os.O_PATH | os.O_CLOEXEC))
            except PermissionError:
                kept = fcntl.fcntl(memfd, fcntl.F_DUPFD_CLOEXEC, 0)
                _remembered[(vma.dev, vma.inode)] = (process.tgid, kept)
            return


def _put_back(process: Process, thread: Thread, part: _Part, ranges: list[tuple[int, int]], window: mmap.mmap, low: int) -> None:
    """Undo one replaced part: private memory again, with the same contents. A file's part keeps its copy."""
    assert part.vma is not None
    if part.vma.inode:
        return
    with contextlib.suppress(OSError), memoryview(window) as view:
        thread.mmap(part.start, part.end - part.start, _prot(part.vma), MAP_PRIVATE_ANON_FIXED)
        for start, end in ranges:
            for at in range(start, end, _COPY_BYTES):
                with view[at - low : min(at + _COPY_BYTES, end) - low] as piece:
                    process.memory.write(at, piece)


def _prot(vma: Vma) -> int:
    return sum(bit for letter, bit in (("r", mmap.PROT_READ), ("w", mmap.PROT_WRITE), ("x", mmap.PROT_EXEC)) if letter in vma.perms)


def _copy(process: Process, tid: int, part: _Part, window: mmap.mmap, low: int) -> list[tuple[int, int]]:
    """Copy `part` into the window, whose first byte is address `low`; returns the address ranges copied.

    Anonymous memory: only pages that were ever touched, so an untouched guest costs nothing. A file's pages
    are in the file, not in the page tables, so all of those.
    """
    assert part.vma is not None
    ranges = [(part.start, part.end)] if part.vma.inode else list(populated(tid, part.start, part.end))
    anchor = (ctypes.c_char * len(window)).from_buffer(window)
    base = ctypes.addressof(anchor)
    local, remote = (Iovec * _IOV_MAX)(), (Iovec * _IOV_MAX)()
    try:
        for batch in _batches(ranges):
            total = 0
            for i, (start, end) in enumerate(batch):
                local[i].base, local[i].len = base + start - low, end - start
                remote[i].base, remote[i].len = start, end - start
                total += end - start
            if process_vm_readv(tid, local, remote, len(batch)) != total:
                for span in batch:
                    _copy_slowly(process, tid, span, window, low)
    finally:
        del anchor
    return ranges


def _batches(ranges: list[tuple[int, int]]) -> Iterator[list[tuple[int, int]]]:
    """The ranges in pieces that one process_vm_readv reads whole (it ends early after 2 GiB)."""
    batch: list[tuple[int, int]] = []
    total = 0
    for start, end in ranges:
        for at in range(start, end, 1 << 28):
            piece = (at, min(at + (1 << 28), end))
            batch.append(piece)
            total += piece[1] - piece[0]
            if len(batch) == _IOV_MAX or total >= 1 << 30:
                yield batch
                batch, total = [], 0
    if batch:
        yield batch


def _copy_slowly(process: Process, tid: int, span: tuple[int, int], window: mmap.mmap, low: int) -> None:
    """Copy page by page through /proc/PID/mem, which also reads what the client itself may not.

    What cannot be read at all (a file's mapping behind the end of the file) stays zero. OSError ESRCH when
    the client died.
    """
    failed = 0
    with memoryview(window) as view:
        for at in range(*span, PAGE_SIZE):
            try:
                with view[at - low : at - low + PAGE_SIZE] as page:
                    process.memory.readinto(at, page)
            except OSError:
                if failed % 256 == 0 and (status_field(tid, "State") or "X")[0] in "ZX":
                    raise ProcessLookupError(errno.ESRCH, f"thread {tid} is gone") from None
                failed += 1


def populated(tid: int, low: int, high: int) -> Iterator[tuple[int, int]]:
    """The ranges of [low, high) that hold pages: present or swapped out, and not the zero page."""
    fd = os.open(f"/proc/{tid}/pagemap", os.O_RDONLY | os.O_CLOEXEC)
    try:
        try:
            yield from _scan(fd, low, high)
        except OSError as e:
            if e.errno not in (errno.ENOTTY, errno.EINVAL):
                raise
            yield from _walk_pagemap(fd, low, high)
    finally:
        os.close(fd)


def _scan(fd: int, low: int, high: int) -> Iterator[tuple[int, int]]:
    regions = (ctypes.c_uint64 * (3 * _SCAN_REGIONS))()
    kinds = PAGE_IS_PRESENT | PAGE_IS_SWAPPED
    while low < high:
        arg = bytearray(
            _SCAN_ARG.pack(
                *(_SCAN_ARG.size, 0, low, high, 0, ctypes.addressof(regions), _SCAN_REGIONS, 0),
                *(PAGE_IS_PFNZERO, PAGE_IS_PFNZERO, kinds, kinds),
            )
        )
        n = fcntl.ioctl(fd, PAGEMAP_SCAN, arg, True)
        for i in range(n):
            yield regions[3 * i], regions[3 * i + 1]
        reached = _SCAN_ARG.unpack(arg)[4]
        if reached <= low:
            raise OSError(errno.EINVAL, "PAGEMAP_SCAN does not advance")
        low = reached


def _walk_pagemap(fd: int, low: int, high: int) -> Iterator[tuple[int, int]]:
    start = None
    for at in range(low, high, PAGE_SIZE * 65536):
        data = os.pread(fd, min(65536, (high - at) // PAGE_SIZE) * 8, at // PAGE_SIZE * 8)
        for i, (entry,) in enumerate(struct.iter_unpack("<Q", data)):
            if entry & _PAGEMAP_POPULATED:
                if start is None:
                    start = at + i * PAGE_SIZE
            elif start is not None:
                yield start, at + i * PAGE_SIZE
                start = None
    if start is not None:
        yield start, high
