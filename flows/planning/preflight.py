"""Checks a training step against the memory of the GPUs of this machine."""

from __future__ import annotations

import math
import subprocess
import sys
from dataclasses import replace

import torch

from flows.planning.hardware import GPUS
from flows.planning.memory import shortfall
from flows.planning.plan import plan_step
from tasks.records import UserError
from tasks.shards import ShardDataset
from tasks.train.spec import TrainSpec


def check_gpu_at_hand(train: TrainSpec) -> None:
    """Checks the training step against the memory of this machine's GPUs; without a GPU it checks nothing.

    Raises:
        UserError: the step does not fit.
    """
    if train.gpus_per_worker and torch.cuda.is_available():
        sizes = [size for size in ShardDataset(train.dataset).frame_sizes if size is not None]
        check_gpu_memory(train, _free_gpu_bytes(), max(sizes, key=math.prod, default=None))


def check_gpu_memory(train: TrainSpec, free_bytes: float, frame_size: tuple[int, int] | None = None) -> None:
    """Checks the training step against a GPU with `free_bytes` of free memory. Raises UserError if it does not fit."""
    device = replace(GPUS["h100"], name="GPU of this machine", memory_bytes=free_bytes)
    _, memory = plan_step(train, device, frame_size)
    problem = shortfall(memory, device)
    if problem is not None:
        raise UserError(f"the training does not fit: {problem}")


def _free_gpu_bytes() -> float:
    """The smallest free memory of this machine's GPUs, measured in a subprocess: the CUDA context takes memory."""
    code = "import torch; print(min(torch.cuda.mem_get_info(i)[0] for i in range(torch.cuda.device_count())))"
    return float(subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout)
