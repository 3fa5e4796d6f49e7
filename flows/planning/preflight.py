"""What a recipe asks of a plan, and the check of a training against the memory of the GPUs at hand."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from functools import partial

import torch

from flows.planning.hardware import GPUS
from flows.planning.memory import shortfall
from flows.planning.plan import plan_step
from flows.planning.spec import PlanSpec
from flows.recipes import Recipe
from tasks.records import UserError
from tasks.train.optimizer import choose_trained
from tasks.train.spec import TrainSpec


def plan_spec(
    recipe: Recipe, gpus: int | None, gpu: str | None, price: float | None, mfu: float | None, gbit: float
) -> PlanSpec:
    """The numbers of a recipe that a plan needs."""
    train, prepare = recipe.train, recipe.prepare
    return replace(
        _step_spec(train),
        workers=train.workers if gpus is None else gpus,
        device=gpu or ("h100" if train.gpus_per_worker else "cpu"),
        stored=prepare.clip,
        windows_per_clip=prepare.windows_per_clip,
        longest_track=prepare.longest_track,
        keep_pixels=prepare.keep_pixels,
        keep_logvar=prepare.keep_logvar,
        keep_text=prepare.keep_text,
        prepare_cores=prepare.workers * prepare.cpus_per_worker,
        price=price,
        mfu=mfu,
        gbit=gbit,
    )


def check_gpu_at_hand(train: TrainSpec) -> None:
    """Holds a training's step against the memory of this machine's GPUs; without any nothing is checked.

    Raises:
        UserError: it does not fit.
    """
    if train.gpus_per_worker and torch.cuda.is_available():
        check_gpu_memory(train, _free_gpu_bytes())


def check_gpu_memory(train: TrainSpec, free_bytes: float) -> None:
    """The same for a GPU with that much memory left."""
    device = replace(GPUS["h100"], name="GPU of this machine", memory_bytes=free_bytes)
    _, memory = plan_step(_step_spec(train), device, partial(choose_trained, spec=train))
    told = shortfall(memory, device)
    if told is not None:
        raise UserError(f"the training does not fit: {told}")


def _free_gpu_bytes() -> float:
    """The least that is left on a GPU of this machine; asked in a process of its own, for asking takes some of it."""
    code = "import torch; print(min(torch.cuda.mem_get_info(i)[0] for i in range(torch.cuda.device_count())))"
    return float(subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout)


def _step_spec(train: TrainSpec) -> PlanSpec:
    """What a training's step takes of memory and work."""
    return PlanSpec(
        base=train.base,
        model=train.model,
        steps=train.steps,
        global_batch=train.global_batch,
        workers=train.workers,
        device="",
        cores=train.cpus_per_worker,
        trained=train.trained,
        average=train.average_decay > 0,
        precision=train.precision,
        micro_batch=train.micro_batch,
        recompute=train.recompute_activations,
        fsdp2=train.sharding == "fsdp2",
    )
