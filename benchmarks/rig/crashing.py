"""A reader for the rig's decoders that crashes its process for files with a mark.

No file is known that crashes the current FFmpeg.
"""

from __future__ import annotations

import ctypes
from typing import Any

from tasks.video.decode import Clip, read_windows

MARK = b"the rig asks this decoder to crash"


def read_or_crash(source: bytes, **arguments: Any) -> list[Clip]:
    """Calls `read_windows`, unless the file ends with the mark."""
    if source.endswith(MARK):
        ctypes.string_at(0)
    return read_windows(source, **arguments)


def install() -> None:
    """Makes the encoders of this process use this reader; Ray calls it when a worker process starts."""
    from tasks.encode import encoder

    encoder.read_windows = read_or_crash
