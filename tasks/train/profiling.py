"""A trace of torch's profiler over a few steps, and the peak memory of this process."""

from __future__ import annotations

import contextlib
import resource
import sys
from collections.abc import Iterator

import torch

from infra import storage
from tasks.train.spec import TrainSpec

WAIT, WARM_UP = 1, 1  # steps before the trace: the first one allocates, the second one runs with the profiler on


@contextlib.contextmanager
def profiler(spec: TrainSpec, rank: int, device: str) -> Iterator[torch.profiler.profile | None]:
    """Yields a profiler whose `step` is called after every step; None without `spec.profile`, or on other ranks than 0.

    The trace is `profile/rank-0.json` below the output, in Chrome's format for chrome://tracing or ui.perfetto.dev.
    """
    if not spec.profile or rank != 0:
        yield None
        return

    def write(trace: torch.profiler.profile) -> None:
        with storage.local_draft(storage.join(spec.output, "profile", f"rank-{rank}.json")) as path:
            trace.export_chrome_trace(str(path))

    kinds = [torch.profiler.ProfilerActivity.CPU]
    if device.startswith("cuda"):
        kinds.append(torch.profiler.ProfilerActivity.CUDA)
    schedule = torch.profiler.schedule(wait=WAIT, warmup=WARM_UP, active=spec.profile, repeat=1)
    with torch.profiler.profile(
        activities=kinds, schedule=schedule, on_trace_ready=write, record_shapes=True, profile_memory=True
    ) as profile:
        yield profile


def peak_memory_bytes(device: str) -> int:
    """The most memory that this process has used so far: allocated on its GPU, or resident on the machine."""
    if device.startswith("cuda"):
        return torch.cuda.max_memory_allocated(device)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak
