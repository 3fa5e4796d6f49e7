"""The reader of the rig's decoders: the real one, but a file that bears the mark takes its process down with it.

No file is known that crashes the FFmpeg of today; the day that one turns up, it takes the place of this.
"""

from __future__ import annotations

import ctypes
from typing import Any

from tasks.video.decode import Clip, read_windows

MARK = b"the rig asks this decoder to crash"


def read_or_crash(source: bytes, **arguments: Any) -> list[Clip]:
    """`read_windows`, unless the file ends in the mark."""
    if source.endswith(MARK):
        ctypes.string_at(0)
    return read_windows(source, **arguments)


def install() -> None:
    """Makes the encoders of this process open decoders with this reader; Ray runs it as a worker process starts."""
    from tasks.encode import encoder

    encoder.READER = f"{__name__}:read_or_crash"
