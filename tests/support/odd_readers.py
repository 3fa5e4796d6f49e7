"""Readers for the decoder's children in tests: the real one, but a marked video does to its process what it names."""

from __future__ import annotations

import contextlib
import ctypes
import os
import sys
import time
from typing import Any

from tasks.video.decode import Clip, read_windows


def read_or_misbehave(source: bytes, **arguments: Any) -> list[Clip]:
    """`read_windows`, unless the bytes begin with a word for something worse."""
    if source.startswith(b"crash"):
        ctypes.string_at(0)
    if source.startswith(b"abort"):
        os.abort()
    if source.startswith(b"sleep"):
        time.sleep(600)
    if source.startswith(b"stuck"):  # as a decoder that loops in C: no line of Python runs any more
        while True:
            ctypes.PyDLL(None).sleep(600)
    if source.startswith(b"hoard"):
        bytearray(1 << 34)
    if source.startswith(b"leave"):
        sys.exit(3)
    if source.startswith(b"fault"):
        raise AssertionError("a fault of the reader")
    if source.startswith(b"print"):
        os.write(1, b"a library that talks\n" * 20)
        source = source[5:]
    if source.startswith(b"forge"):  # answers by itself, with what follows the word
        for descriptor in range(3, 9):
            with contextlib.suppress(OSError):
                os.write(descriptor, source[5:])
        time.sleep(600)
    return read_windows(source, **arguments)
