"""Runs the training loop under Ray Train, or in this process; either way the loop itself keeps the books.

Resuming is the same call again: the loop's own checkpoint store says where to go on, Ray's snapshots are not used.
"""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import ray
import ray.train
import ray.train.torch

from infra.tracking import Tracking
from tasks.records import UserError
from tasks.train.loop import TrainReport, TrainSpec, finished_report, run_training, spec_digest

Tick = Callable[[dict[str, Any]], None]
MAX_FAILURES = 2  # a lost worker starts the group again from the newest checkpoint


@dataclass(frozen=True)
class TrackingSpec:
    """Where the run is logged in MLflow; an empty `uri` logs nowhere."""

    uri: str = ""
    experiment: str = "trip"
    run_name: str = "train"
    artifact_location: str | None = None


def train(
    spec: TrainSpec,
    progress: Tick | None = None,
    tracking: TrackingSpec = TrackingSpec(),
    in_process: bool = False,
) -> TrainReport:
    """Trains a model, or returns the report of the same training if it is complete.

    Args:
        progress: called in this process with every tick of `run_training`.
        in_process: run the loop here, with one worker and without Ray.
    Raises:
        UserError: an unusable spec. RuntimeError: the workers failed more than `MAX_FAILURES` times.
    """
    done = finished_report(spec)
    if done is not None:
        return done
    if spec.global_batch % spec.workers:
        raise UserError(f"a global batch of {spec.global_batch} cannot be split over {spec.workers} workers evenly")
    if in_process:
        log = _Log(spec, tracking)
        try:
            return log.finish(run_training(spec, on_tick=_both(log.tick, progress)))
        finally:
            log.close()

    ticks = _Ticks.options(num_cpus=0).remote() if progress is not None else None
    errors: list[BaseException] = []

    def fit() -> None:
        try:
            ray.train.torch.TorchTrainer(
                _worker,
                train_loop_config={"spec": spec, "tracking": tracking, "ticks": ticks},
                torch_config=ray.train.torch.TorchConfig(backend=None if spec.gpus_per_worker else "gloo"),
                scaling_config=ray.train.ScalingConfig(
                    num_workers=spec.workers,
                    use_gpu=spec.gpus_per_worker > 0,
                    resources_per_worker=_resources(spec),
                ),
                run_config=ray.train.RunConfig(
                    name=f"trip-{spec_digest(spec)}-{time.time_ns():x}",
                    storage_path=os.path.join(os.path.expanduser("~"), ".cache", "trip-ray"),
                    failure_config=ray.train.FailureConfig(max_failures=MAX_FAILURES),
                ),
            ).fit()
        except Exception as error:  # noqa: BLE001 - handed to the caller below
            errors.append(error)

    thread = threading.Thread(target=fit, name="ray-train", daemon=True)
    thread.start()
    while thread.is_alive():
        thread.join(timeout=1.0)
        if ticks is not None and progress is not None:
            for tick in ray.get(ticks.take.remote()):
                progress(tick)
    report = finished_report(spec)
    if report is None:
        cause = errors[0] if errors else None
        raise RuntimeError(f"training ended without a report: {cause or 'no worker finished'}") from cause
    return report


def _resources(spec: TrainSpec) -> dict[str, float]:
    gpus = {"GPU": float(spec.gpus_per_worker)} if spec.gpus_per_worker else {}
    return {"CPU": float(spec.cpus_per_worker)} | gpus


def _worker(config: dict[str, Any]) -> dict[str, Any]:
    """What each Ray Train worker runs; rank 0 logs and reports ticks."""
    import torch

    spec: TrainSpec = config["spec"]
    context = ray.train.get_context()
    rank, world = context.get_world_rank(), context.get_world_size()
    torch.set_num_threads(max(1, spec.cpus_per_worker))
    device = "cuda" if spec.gpus_per_worker else "cpu"
    if rank != 0:
        return asdict(run_training(spec, rank, world, device))
    log = _Log(spec, config["tracking"])
    ticks = config["ticks"]
    send = (lambda tick: ticks.put.remote(tick)) if ticks is not None else None
    try:
        return asdict(log.finish(run_training(spec, rank, world, device, _both(log.tick, send))))
    finally:
        log.close()


def _both(first: Tick, second: Tick | None) -> Tick:
    def tick(values: dict[str, Any]) -> None:
        first(values)
        if second is not None:
            second(values)

    return tick


class _Log:
    """Rank 0's side of tracking: one MLflow run per training, the same one after a resume."""

    def __init__(self, spec: TrainSpec, tracking: TrackingSpec) -> None:
        self._tracking: Tracking | None = None
        if not tracking.uri:
            return
        self._tracking = Tracking(tracking.uri, tracking.experiment, tracking.artifact_location)
        key = f"train-{spec_digest(spec)}"
        params = {k: v for k, v in asdict(spec).items() if not isinstance(v, dict)}
        self._tracking.start_run(tracking.run_name, key=key, params=params, tags={"trip.stage": "train"})
        self._tracking.dataset_input("latents", spec_digest(spec), spec.dataset)

    def tick(self, values: dict[str, Any]) -> None:
        if self._tracking is not None:
            numbers = {k: float(v) for k, v in values.items() if k not in ("step", "steps", "seconds_left")}
            self._tracking.metrics(numbers, values["step"])

    def finish(self, report: TrainReport) -> TrainReport:
        if self._tracking is not None:
            self._tracking.finish("FINISHED")
        return report

    def close(self) -> None:
        if self._tracking is not None:
            self._tracking.finish("FAILED" if sys.exc_info()[0] else "FINISHED")


@ray.remote
class _Ticks:
    """Carries ticks from rank 0 to the driver."""

    def __init__(self) -> None:
        self._waiting: list[dict[str, Any]] = []

    def put(self, tick: dict[str, Any]) -> None:
        self._waiting.append(tick)

    def take(self) -> list[dict[str, Any]]:
        taken, self._waiting = self._waiting, []
        return taken
