"""How many processes decode, and what one video may cost."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class DecodeSpec:
    """How many processes decode, how far ahead, and what one video may cost. None of it changes a sample."""

    processes: int | None = None  # None: one for each CPU of the worker
    ahead: int = 4  # clips per process that are being decoded or wait for the encoder
    seconds: float = 60.0  # wall clock, one video
    memory_bytes: int = 2 << 30  # address space of one process, and the most that it may send for one video
