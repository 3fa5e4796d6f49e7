"""Options of the decoder processes."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class DecodeSpec:
    """Number, queue and limits of the decoder processes. No field changes a sample."""

    processes: int | None = None  # decoder processes; None: one for each CPU of the worker
    ahead: int = 4  # videos per process that are being decoded or wait for the encoder
    seconds: float = 60.0  # wall-clock limit of one video
    memory_bytes: int = 2 << 30  # limit of one process's address space and of its reply for one video
