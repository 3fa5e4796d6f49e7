"""One of several processes that train together, a list of trainings one after another. See test_sharding.py."""

from __future__ import annotations

import contextlib
import json
import sys
from pathlib import Path

import torch
import torch.distributed

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from tasks.json_records import parse_record
from tasks.train.loop import TrainingStopped, run_training
from tasks.train.spec import TrainSpec


def main(rank: int, folder: Path) -> None:
    """Runs what `runs.json` lists: specs, each with the step to stop at or null; rank 0 leaves `ticks.json`."""
    torch.set_num_threads(1)
    runs = json.loads((folder / "runs.json").read_text())
    torch.distributed.init_process_group("gloo", f"file://{folder}/meeting", rank=rank, world_size=2)
    all_ticks: list[list[dict]] = []
    for spec, stop in runs:
        ticks: list[dict] = []
        steps = iter(range(1, 99))
        with contextlib.suppress(TrainingStopped):
            run_training(
                parse_record(TrainSpec, json.dumps(spec)),
                rank,
                2,
                on_tick=ticks.append,
                control=lambda steps=steps, stop=stop: "stop" if next(steps) == stop else "",
            )
        all_ticks.append(ticks)
        torch.distributed.barrier()
    if rank == 0:
        (folder / "ticks.json").write_text(json.dumps(all_ticks))
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]))
