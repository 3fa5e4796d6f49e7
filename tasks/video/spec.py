"""Options of the decoder processes, and of the shots that a video is split into."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class DecodeSpec:
    """Number, queue and limits of the decoder processes. No field changes a sample."""

    processes: int | None = None  # decoder processes; None: one for each CPU of the worker
    ahead: int = 4  # videos per process that are being decoded or wait for the encoder
    seconds: float = 60.0  # wall-clock limit of one video
    memory_bytes: int = 2 << 30  # limit of one process's address space and of its reply for one video


@dataclass(frozen=True)
class ShotSpec:
    """How a video is split into shots (`tasks.video.shots`). Every field changes the samples.

    `transnetv2` needs the extra `shots` on every worker and about a second of one core for 30 frames; the decoder
    processes then get 20 times their limit of time, and 4 GiB of address space more for its libraries.
    """

    rule: Literal["difference", "transnetv2"] = "difference"
    threshold: float = 0.5  # of the rule's score for a cut, from 0 to 1
    least_seconds: float = 0.0  # a shorter shot is left out, as is one with too few frames for a window
    most_seconds: float = 60.0  # a longer shot is split there
    most: int = 64  # shots of one row, from its start; the others are left out
