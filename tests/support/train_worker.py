"""One of two processes that train together: all steps at once, then as many with a stop between. See its test."""

from __future__ import annotations

import contextlib
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import torch
import torch.distributed

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from tasks.json_records import parse_record
from tasks.train.loop import TrainingStopped, run_training
from tasks.train.spec import TrainSpec

WORLD, STOP = 2, 3


def main(rank: int, folder: Path) -> None:
    """Leaves the outputs `whole` and `broken` in the folder, and in `early` what `broken` was at the stop."""
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", f"file://{folder}/meeting", rank=rank, world_size=WORLD)
    whole = parse_record(TrainSpec, (folder / "spec.json").read_bytes())
    run_training(whole, rank, WORLD)
    broken = replace(whole, output=str(folder / "broken"))
    steps = iter(range(1, 99))
    with contextlib.suppress(TrainingStopped):
        run_training(broken, rank, WORLD, control=lambda: "stop" if next(steps) == STOP else "")
        raise SystemExit("the training did not stop")
    if rank == 0:
        shutil.copytree(broken.output, folder / "early")
    torch.distributed.barrier()
    run_training(broken, rank, WORLD)
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]))
