"""Kills a training on Ray at random moments, and repeats the command.

    python -m tests.chaos.train_kills [--moments 10] [--seed 0] [--first 0] [--count N]

Two workers on this machine, CPU, a checkpoint every ten steps. The kinds take turns: SIGKILL of one worker; of both
while a checkpoint is being written; of the driver; of the driver with the newest complete checkpoint cut short
afterwards; of the raylet. The moments are drawn from the time in which an undisturbed run, which comes first, trains.
Then the same command is repeated until it succeeds. Compared bit by bit: the files of the last checkpoint (weights,
average, optimiser), the exported model, and the curves of loss, gradient norm and learning rates in MLflow,
one point per step. Prints one JSON. `--first` and `--count` select a part of the moments.
"""

from __future__ import annotations

import argparse
import json
import signal
import sys
import tempfile
import time
from contextlib import ExitStack, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import psutil
from mlflow.entities import Metric
from mlflow.tracking import MlflowClient

from infra.settings import apply_environment_defaults
from infra.tracking import connect
from tasks.shards import Sample, open_dataset, publish_dataset, write_shard
from tasks.train.checkpoints import COMPLETE, CheckpointStore
from tasks.train.spec import TrackingSpec, TrainSpec
from tests.chaos.family import Leftovers, adopt_orphans, end_family, family, role
from tests.chaos.kills import BASE, Ended, Run, share_of
from tests.chaos.train_driver import TrainJob
from trip_model.config import FusionConfig, ScheduleConfig, TripConfig

KINDS = ("worker", "write", "driver", "truncated", "raylet")
CURVES = ("loss", "frame_1", "frame_last", "grad_norm", "lr_unet", "lr_fusion")
_FRAMES, _CHECKPOINT_EVERY, _MOST_RERUNS, _GRACE_SECONDS = 4, 10, 3, 90.0


@dataclass(frozen=True)
class Outcome:
    """The results of a finished training, which must be the same after a kill."""

    checkpoint: dict[str, str]  # the newest one's files and their sha256
    model: str
    curves: dict[str, list[tuple[int, float]]]


@dataclass(frozen=True)
class Calm:
    """An undisturbed run: its length, when it trained (seconds from the start), and its results."""

    seconds: float
    trained: tuple[float, float]
    outcome: Outcome


def write_dataset(uri: str, side: int) -> None:
    """Twelve clips of random latents in one shard."""
    rng = np.random.default_rng(0)
    recipe = {"made": "random latents"}
    rows = [
        [
            Sample(
                key=f"clip{row:02d}_000",
                caption="a red circle",
                latents=rng.normal(size=(_FRAMES, 4, side, side)).astype(np.float16),
                first=np.zeros((8 * side, 8 * side, 3), np.uint8),
                tokens=rng.integers(2, 500, size=32).astype(np.int32),
                meta={},
            )
        ]
        for row in range(12)
    ]
    open_dataset(uri, recipe)
    publish_dataset(uri, recipe, "hash", {}, [write_shard(uri, 0, (0, 12), rows, "hash").summary()])


def job_of(folder: Path, name: str, dataset: str, base: str, size: int, steps: int) -> TrainJob:
    model = TripConfig(
        size=size,
        num_frames=_FRAMES,
        residual_std=(0.0, 0.5, 0.5, 0.5),  # measured at the start
        fusion=FusionConfig(width=16, heads=2),
        schedule=ScheduleConfig(sampling_steps=2),
        unet_dropout=0.1,
    )
    spec = TrainSpec(
        dataset=dataset,
        output=str(folder / name),
        base=base,
        model=model,
        steps=steps,
        global_batch=4,
        learning_rate_unet=1e-3,
        learning_rate_fusion=1e-3,
        average_decay=0.9,
        checkpoint_every=_CHECKPOINT_EVERY,
        tick_every=1,
        workers=2,
        cpus_per_worker=1,
    )
    return TrainJob(spec, TrackingSpec(f"sqlite:///{folder}/mlflow.db", name, name))


def outcome(job: TrainJob, report: dict[str, Any]) -> Outcome:
    store = checkpoints(job)
    mark = json.loads((Path(store.address(store.steps()[0])) / COMPLETE).read_text())
    return Outcome(mark["files"], report["model_digest"], {name: curve(job.tracking, name) for name in CURVES})


def curve(tracking: TrackingSpec, name: str) -> list[tuple[int, float]]:
    """Every point of a metric as MLflow holds it, those of one step twice if it was logged twice."""
    client = MlflowClient(tracking.uri)
    experiment = client.get_experiment_by_name(tracking.experiment)
    assert experiment is not None
    (run,) = client.search_runs([experiment.experiment_id])
    points: list[Metric] = client.get_metric_history(run.info.run_id, name)
    return sorted((point.step, point.value) for point in points)


def checkpoints(job: TrainJob) -> CheckpointStore:
    return CheckpointStore(f"{job.spec.output}/checkpoints")


def start(job: TrainJob, folder: Path) -> Run:
    return Run(job, folder, "tests.chaos.train_driver")


def steps_done(folder: Path) -> int:
    """The last step reported to the driver of the run; 0 before the first."""
    lines = (folder / "stdout").read_text().splitlines()
    with suppress(IndexError, ValueError, KeyError):
        return int(json.loads(lines[-1])["step"])
    return 0


def run_calmly(job: TrainJob, folder: Path) -> Calm:
    run, seen = start(job, folder), [0.0, 0.0]

    def poll() -> None:
        step = steps_done(folder)
        if 0 < step < job.spec.steps:
            seen[:] = [seen[0] or run.seconds, run.seconds]

    ended = run.wait(400, poll)
    assert ended.report is not None, f"the undisturbed run failed: {ended.last_line}"
    return Calm(run.seconds, (seen[0], seen[1]), outcome(job, ended.report))


def writing(job: TrainJob) -> bool:
    """Whether there is a checkpoint without its mark."""
    store = Path(job.spec.output) / "checkpoints"
    return store.is_dir() and any(not (step / COMPLETE).exists() for step in store.iterdir())


def strike(kind: str, run: Run, job: TrainJob, rng: np.random.Generator) -> str:
    """Kills processes, and returns the state of the checkpoints at that moment."""
    store = checkpoints(job)
    if kind == "truncated":
        while len(store.steps()) < 2 and not run.over():
            time.sleep(0.02)
    if kind == "write":
        while not writing(job) and not run.over():
            time.sleep(0.0005)
    below = {"driver": [psutil.Process(run.process.pid)]}
    for process in family() if kind in ("worker", "write", "raylet") else []:
        below.setdefault(role(process), []).append(process)
    victims = below["worker" if kind == "write" else "driver" if kind == "truncated" else kind]
    for process in [victims[int(rng.integers(len(victims)))]] if kind == "worker" else victims:
        process.send_signal(signal.SIGKILL)
    return f"checkpoints {store.steps()}" + (", one half-written" if writing(job) else "")


def cut_newest(job: TrainJob, left: Leftovers) -> str:
    """Takes the last bytes from the newest complete checkpoint's weights, once nobody writes there; its name."""
    while left.poll() and any(role(process) == "worker" for process in family()):
        time.sleep(0.05)
    store = checkpoints(job)
    folder = Path(store.address(store.steps()[0]))
    file = folder / "weights.safetensors"
    file.write_bytes(file.read_bytes()[:-10])
    return folder.name


def kill_and_repeat(job: TrainJob, calm: Calm, kind: str, share: float, folder: Path, rng: Any) -> dict[str, Any]:
    """One moment: after `share` (0 to 1) of the steps whose ticks the undisturbed run has sent."""
    wanted = 1 + int(share * (job.spec.steps - 1))
    run = start(job, folder)
    limit = 4 * calm.seconds + 90
    while steps_done(folder) < wanted and not run.over() and run.seconds < limit:
        time.sleep(0.01)
    time.sleep(float(rng.random()) * 0.2)
    if run.over():
        return {"kind": kind, "identical": False, "missed": True}
    step, stage = steps_done(folder), strike(kind, run, job, rng)
    killed = time.monotonic()
    ended = run.wait(run.seconds + limit)
    told = {"status": ended.status, "seconds_after_kill": round(time.monotonic() - killed, 1), "said": ended.last_line}
    left, reruns, warned = Leftovers(), 0, (folder / "stderr").read_text()
    cut = cut_newest(job, left) if kind == "truncated" else None
    while ended.status != 0 and reruns < _MOST_RERUNS:
        reruns += 1
        ended = start(job, folder).wait(limit, left.poll)
        warned += (folder / "stderr").read_text()
    recovered = time.monotonic() - killed
    while left.poll() and left.seconds < _GRACE_SECONDS:
        time.sleep(0.2)
    orphans = sorted(role(process) for process in family())
    end_family()
    return {
        "kind": kind,
        "step": step,
        "stage": stage,
        "first": told,
        "reruns": reruns,
        "last": {"status": ended.status, "said": ended.last_line},
        "recovery_seconds": round(recovered, 1),
        **_compared(job, ended, calm.outcome),
        **({"walked_back_and_said_so": f"{cut} is damaged" in warned} if cut else {}),
        "left_running_seconds": left.stayed,
        "orphans": orphans,
    }


def _compared(job: TrainJob, ended: Ended, calm: Outcome) -> dict[str, bool]:
    if ended.report is None:
        return {"identical": False}
    found = outcome(job, ended.report)
    same = {
        "same_checkpoint": found.checkpoint == calm.checkpoint,
        "same_model": found.model == calm.model,
        "same_curves": found.curves == calm.curves,
    }
    return same | {"identical": all(same.values())}


def measure(moments: int, seed: int, first: int, count: int, steps: int, size: int, base: str) -> dict[str, Any]:
    """The moments from `first` on, `count` of the `moments` at most, of a training of `steps` steps."""
    apply_environment_defaults()
    adopt_orphans()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # nothing is left running, not even then
    done = []
    with tempfile.TemporaryDirectory(prefix="tk-") as name, ExitStack() as stack:  # short: sockets of Ray's lie in it
        stack.callback(end_family)
        folder = Path(name)
        dataset = str(folder / "set")
        write_dataset(dataset, size // 8)
        job = job_of(folder, "calm", dataset, base, size, steps)
        connect(job.tracking.uri).search_experiments()  # makes the database
        calm = run_calmly(job, folder)
        assert [step for step, _ in calm.outcome.curves["loss"]] == list(range(1, steps + 1))
        print(f"calm: {calm.seconds:.1f} s, trained {calm.trained}", file=sys.stderr, flush=True)
        for moment in range(first, min(first + count, moments)):
            kind, share = share_of(moment, moments, seed, 0, KINDS)
            own = f"moment-{moment}"
            tracking = replace(job.tracking, experiment=own)
            killed = replace(job, spec=replace(job.spec, output=str(folder / own)), tracking=tracking)
            rng = np.random.default_rng([seed, moment, 1])
            told = kill_and_repeat(killed, calm, kind, share, folder, rng)
            done.append({"moment": moment} | told)
            print(json.dumps(done[-1]), file=sys.stderr, flush=True)
    return {
        "calm_seconds": round(calm.seconds, 1),
        "trained_seconds": [round(second, 1) for second in calm.trained],
        "steps": steps,
        "moments": done,
        "identical": f"{sum(one['identical'] for one in done)} of {len(done)}",
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--moments", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--first", type=int, default=0, help="the first of the moments that this call does")
    parser.add_argument("--count", type=int, default=1000, help="how many of them")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--size", type=int, default=64)
    parser.add_argument("--base", default=BASE)
    print(json.dumps(measure(**vars(parser.parse_args())), indent=2))


if __name__ == "__main__":
    main()
