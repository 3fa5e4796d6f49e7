"""Measures this machine for a plan: matrix products, memory, and the exchange of gradients between its devices."""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from flows.planning.hardware import Device, find_device
from tasks.train.utilisation import matmul_flops_per_second

COPY_BYTES = {"cuda": 2**30, "cpu": 2**27}  # of the array that is copied; no cache holds it
SENT_BYTES = {"cuda": 2**28, "cpu": 2**25}  # of the gradients whose sum is exchanged
REPEATS = 5


def measured_device(workers: int, cores: int) -> Device:
    """This machine's GPU, without one its processors for each worker, with rates measured in a few seconds.

    Several workers exchange gradients as they would in training, where the machine has a device for each; otherwise the
    rate of the link is the table's.
    """
    kind = "cuda" if torch.cuda.is_available() else "cpu"
    devices = torch.cuda.device_count() if kind == "cuda" else (os.cpu_count() or 1) // cores
    table = find_device("h100" if kind == "cuda" else "cpu", workers, cores)
    threads = torch.get_num_threads()
    if kind == "cpu":
        torch.set_num_threads(cores)
    try:
        rates = {precision: matmul_flops_per_second(kind, precision) for precision in ("float32", "bfloat16")}
        memory = _copy_rate(kind)
    finally:
        torch.set_num_threads(threads)
    link = _link_rate(kind, workers) if 1 < workers <= devices else table.link_bytes_per_second
    size = torch.cuda.get_device_properties(0).total_memory if kind == "cuda" else table.memory_bytes
    return Device(
        "here" if kind == "cuda" else "cpu",
        size,
        f"measured: {torch.cuda.get_device_name()}" if kind == "cuda" else table.memory_source,
        rates,
        "measured: matrix product on this machine",
        memory,
        link,
        measured_flops_per_second=rates,
        utilisation=table.utilisation,
        utilisation_source=table.utilisation_source,
    )


def _copy_rate(kind: str) -> float:
    """Bytes per second that a copy reads and writes."""
    source = torch.zeros(COPY_BYTES[kind], dtype=torch.uint8, device=kind)
    target = torch.empty_like(source)
    return 2 * source.nbytes / min(run_seconds(kind, lambda: target.copy_(source)))


def _link_rate(kind: str, workers: int) -> float:
    """Bytes per second and direction at which each of several processes exchanges its part of a sum."""
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.spawn(_exchange, (kind, workers, folder), nprocs=workers)
        seconds = float((Path(folder) / "seconds").read_text())
    return 2 * (workers - 1) / workers * SENT_BYTES[kind] / seconds


def _exchange(rank: int, kind: str, workers: int, folder: str) -> None:
    """One process of the exchange; the first writes its seconds."""
    if kind == "cuda":
        torch.cuda.set_device(rank)
    else:
        torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "nccl" if kind == "cuda" else "gloo", f"file://{folder}/group", rank=rank, world_size=workers
    )
    gradients = torch.zeros(SENT_BYTES[kind] // 4, device=kind)
    seconds = min(run_seconds(kind, lambda: torch.distributed.all_reduce(gradients)))
    if rank == 0:
        (Path(folder) / "seconds").write_text(repr(seconds))
    torch.distributed.destroy_process_group()


def run_seconds(kind: str, work: Callable[[], Any], repeats: int = REPEATS) -> list[float]:
    """The seconds of some runs after one that warms up; waits for the device."""
    seconds = []
    for _ in range(repeats + 1):
        begin = time.perf_counter()
        work()
        if kind == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - begin)
    return seconds[1:]
