"""Runs a seccomp program as the kernel would, for machines that are not at hand."""

from __future__ import annotations

import struct

ALLOW, KILL = 0x7FFF0000, 0
AUDIT_ARCH = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}
"""The kernel's numbers of architectures."""


def decide(program: bytes, architecture: int, call: int, *arguments: int) -> int:
    """What the program returns for a system call, on a little-endian machine.

    Args:
        program: instructions of the classic Berkeley packet filter.
        architecture: of :data:`AUDIT_ARCH`.
        call: the system call's number.
        arguments: of the call; the rest are 0.
    """
    values = [value & (1 << 64) - 1 for value in (*arguments, *[0] * (6 - len(arguments)))]
    data = struct.pack("<IIQ6Q", call & 0xFFFFFFFF, architecture, 0, *values)
    instructions = list(struct.iter_unpack("<HBBI", program))
    accumulator, place = 0, 0
    while True:
        code, then, otherwise, constant = instructions[place]
        place += 1
        if code == 0x20:
            (accumulator,) = struct.unpack_from("<I", data, constant)
        elif code == 0x54:
            accumulator &= constant
        elif code == 0x05:
            place += constant
        elif code == 0x06:
            return int(constant)
        else:
            compare = {0x15: int.__eq__, 0x25: int.__gt__, 0x35: int.__ge__, 0x45: int.__and__}[code]
            place += then if compare(accumulator, constant) else otherwise
