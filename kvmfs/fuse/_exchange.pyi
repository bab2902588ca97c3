def exchange(fd: int, reply: bytes | None, buffer: bytearray) -> int:
    """Write an answer, if there is one, and read the next message; its length. Negative: the answer was refused, -errno."""
