"""Runs the training loop under Ray Train, or in this process.

The same call resumes a training from the loop's own checkpoint store; Ray's checkpoints are not used.
"""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from types import TracebackType
from typing import Any, Literal

import ray
import ray.exceptions
import ray.train
import ray.train.collective
import ray.train.torch
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from infra import storage
from infra.cluster import lost_a_machine
from infra.leases import leased
from infra.telemetry import Tracking
from infra.tracking import default_artifact_location
from tasks.shards import read_manifest
from tasks.train.checkpoints import CheckpointStore, SavedCheckpoint
from tasks.train.loop import ControlSignal, Tick, TrainingStopped, run_training
from tasks.train.preflight import preflight
from tasks.train.spec import TrackingSpec, TrainReport, TrainSpec, finished_report, spec_digest
from tasks.train.spool import Spool
from tasks.train.ticks import TickFile

NO_TRACKING = TrackingSpec()
MAX_FAILURES = 2  # without a new checkpoint in between; after a lost worker the group resumes from the newest one
# Interval at which an elastic training looks for machines. Growing costs a restart and the steps since a checkpoint.
GROW_SECONDS = 600.0
# Until all workers have loaded their libraries, which takes more than a minute on a busy machine; Ray then starts them
# all again. An elastic training waits this long for a lost machine, and is then resized.
START_VARIABLE = "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S"
START_SECONDS, ELASTIC_START_SECONDS = 300, 30
FLUSH_SECONDS = 5.0  # a checkpoint waits this long for the delivery of earlier metrics; then they are spooled
STOP_SECONDS = 10.0  # a stopped training waits this long for MLflow, and for its workers to hear of it
SAVE_SECONDS = 90.0  # and this long for its checkpoint; a preempted machine and Slurm give two minutes
_logger = logging.getLogger(__name__)


class StopRequested(BaseException):
    """Ends `train` under Ray as a signal does."""


@leased
def train(
    spec: TrainSpec,
    progress: Tick | None = None,
    tracking: TrackingSpec = NO_TRACKING,
    in_process: bool = False,
    stop: threading.Event | None = None,
) -> TrainReport:
    """Trains a model, or returns the report if this training is finished.

    Args:
        spec: the training.
        progress: called in this process for every tick of `run_training`.
        tracking: where the run is logged.
        in_process: run the loop here, with one worker and without Ray.
        stop: ends the training under Ray when it is set, for a caller that gets no signals.

    SIGTERM and Ctrl-C end the training after the current step, with a checkpoint; a second signal does not wait for it.
    Under Ray a preemption notice triggers a checkpoint, and Ray Train resumes from it on the remaining machines.

    Raises:
        LeaseHeld: another process writes to the output.
        UserError: an invalid spec. RuntimeError: the workers failed repeatedly without a new checkpoint.
        RayError: the session's machine is lost. TrainingStopped: SIGTERM came, in process; under Ray the exception of
            the signal's handler is raised. StopRequested: `stop` was set. The same call continues after any of these.
    """
    done = finished_report(spec)
    if done is not None:
        if Spool(spec).exists():  # metrics that were not delivered
            with _RunLog(spec, tracking):
                pass
        return done
    for warning in preflight(spec):
        _logger.warning(warning)
    if in_process:
        with _RunLog(spec, tracking) as log, _sigterm() as control:
            return run_training(spec, on_tick=_both(log.tick, progress), listener=log, control=control)

    # On the driver's machine: the loss of a worker's machine must not end it, and the training with it.
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    relay: Any = _Relay.options(num_cpus=0, scheduling_strategy=here).remote()
    errors: list[BaseException] = []
    ended = threading.Event()  # a signal during Thread.join marks the thread as ended in Python 3.11

    def fit() -> None:
        try:
            _fit_while_progressing(spec, {"spec": spec, "tracking": tracking, "relay": relay})
        except Exception as error:  # handed to the caller below
            errors.append(error)
        finally:
            ended.set()

    threading.Thread(target=fit, name="ray-train", daemon=True).start()
    with _closed_when_stopped(spec, tracking), _saved_when_stopped(ended, relay):
        while not ended.is_set():
            ended.wait(1.0)
            if stop is not None and stop.is_set():
                raise StopRequested
            ticks, warnings = ray.get(relay.take.remote())  # raises when the machine is lost
            for warning in warnings:
                _logger.warning(warning)
            if progress is not None:
                for tick in ticks:
                    progress(tick)
    report = finished_report(spec)
    if report is None:
        cause = errors[0] if errors else None
        if cause is not None and lost_a_machine(cause):
            raise cause
        raise RuntimeError(f"training ended without a report: {cause or 'no worker finished'}") from cause
    return report


@contextlib.contextmanager
def _closed_when_stopped(spec: TrainSpec, tracking: TrackingSpec) -> Iterator[None]:
    """Ends the MLflow run as KILLED if a signal ends the block: rank 0, which would, ends with the Ray session."""
    try:
        yield
    except BaseException as error:
        if not isinstance(error, Exception) and tracking.uri:
            run = Tracking(tracking.uri, tracking.experiment, tracking.artifact_location)
            run.start_run(tracking.run_name, None, tracking.key(spec), tags=tracking.tags, wait_seconds=0)
            run.finish("KILLED", STOP_SECONDS)
        raise


@contextlib.contextmanager
def _saved_when_stopped(ended: threading.Event, relay: Any) -> Iterator[None]:
    """If a signal ends the block, the workers write a checkpoint and end before the block does."""
    try:
        yield
    except BaseException as error:
        if not isinstance(error, Exception):
            with contextlib.suppress(ray.exceptions.RayError):  # the machine is lost, or too busy to answer
                if ray.get(relay.request_stop.remote(), timeout=STOP_SECONDS):
                    _logger.warning("the training was stopped; it writes a checkpoint of the current step")
                    ended.wait(SAVE_SECONDS)
        raise


def _fit_while_progressing(spec: TrainSpec, config: dict[str, Any]) -> None:
    """Restarts the trainer as long as there are new checkpoints: Ray counts the failures of a complete run."""
    checkpoints = CheckpointStore(storage.join(spec.output, "checkpoints"))
    while True:
        before = checkpoints.steps()
        try:
            with _start_limit(spec):
                ray.train.torch.TorchTrainer(
                    _worker,
                    train_loop_config=config,
                    torch_config=ray.train.torch.TorchConfig(backend=None if spec.gpus_per_worker else "gloo"),
                    scaling_config=ray.train.ScalingConfig(
                        num_workers=spec.workers if spec.least_workers is None else (spec.least_workers, spec.workers),
                        use_gpu=spec.gpus_per_worker > 0,
                        resources_per_worker=_resources(spec),
                        elastic_resize_monitor_interval_s=GROW_SECONDS,
                    ),
                    run_config=ray.train.RunConfig(
                        name=f"trip-{spec_digest(spec)}-{time.time_ns():x}",
                        storage_path=os.path.join(os.path.expanduser("~"), ".cache", "trip-ray"),
                        failure_config=ray.train.FailureConfig(max_failures=MAX_FAILURES),
                    ),
                ).fit()
            return
        except ray.train.TrainingFailedError:
            if checkpoints.steps()[:1] == before[:1]:
                raise


@contextlib.contextmanager
def _start_limit(spec: TrainSpec) -> Iterator[None]:
    """Sets how long Ray Train waits for a group of workers during one training, unless the operator has set it."""
    if START_VARIABLE in os.environ:
        yield
        return
    os.environ[START_VARIABLE] = str(START_SECONDS if spec.least_workers is None else ELASTIC_START_SECONDS)
    try:
        yield
    finally:
        del os.environ[START_VARIABLE]


def _resources(spec: TrainSpec) -> dict[str, float]:
    gpus = {"GPU": float(spec.gpus_per_worker)} if spec.gpus_per_worker else {}
    return {"CPU": float(spec.cpus_per_worker)} | gpus


def _worker(config: dict[str, Any]) -> dict[str, Any]:
    """The function of every Ray Train worker; rank 0 logs and reports ticks."""
    import torch

    _end_with_the_raylet()
    spec: TrainSpec = config["spec"]
    context = ray.train.get_context()
    rank, world = context.get_world_rank(), context.get_world_size()
    torch.set_num_threads(max(1, spec.cpus_per_worker))
    device = "cuda" if spec.gpus_per_worker else "cpu"
    relay = config["relay"]
    with contextlib.suppress(TrainingStopped):  # an error would make Ray Train start the workers again
        if rank != 0:
            return asdict(run_training(spec, rank, world, device, control=_requests(world, None)))
        relay.started.remote(world, spec.workers)
        with _warnings_to(relay), _RunLog(spec, config["tracking"]) as log:
            tick = _both(log.tick, lambda tick: relay.tick.remote(tick))
            return asdict(run_training(spec, rank, world, device, tick, log, _requests(world, relay)))
    return {}


def _end_with_the_raylet() -> None:
    """Ends this process soon after its parent, which ends with the driver of a local session.

    Ray's workers continue to train if no init process reaps the dead raylet, as in a container. They would write
    checkpoints next to those of the next run, and occupy its GPUs.
    """
    raylet = os.getppid()

    def watch() -> None:
        while os.getppid() == raylet:
            time.sleep(0.5)
        os._exit(1)

    threading.Thread(target=watch, name="raylet-watch", daemon=True).start()


def _requests(world: int, relay: Any) -> ControlSignal:
    """Requests a stop when the driver does, and one checkpoint for every preemption notice.

    After a notice the training continues until the machine is lost: a return would end it, an error would count as a
    failure.

    Args:
        world: number of workers.
        relay: on rank 0, which asks for all ranks; None on the others.
    """
    known: Any = None
    ask: Callable[[], Any] | None = None if relay is None else relay.is_stopping.remote
    pending: Any = ask() if ask is not None else None

    def stop() -> bool:
        nonlocal pending
        requested: Any = False
        if ask is not None and ray.wait([pending], timeout=0)[0]:
            requested, pending = ray.get(pending), ask()
        return bool(requested if world == 1 else ray.train.collective.broadcast_from_rank_zero(requested))

    def control() -> Literal["", "save", "stop"]:
        nonlocal known
        if stop():
            return "stop"
        before, known = known, ray.train.get_preemption_info()  # also a barrier: every rank calls it after every step
        return "save" if known is not None and known != before else ""

    return control


@contextlib.contextmanager
def _sigterm() -> Iterator[ControlSignal | None]:
    """A control signal that returns "stop" after SIGTERM; None outside the main thread, the only one with handlers."""
    if threading.current_thread() is not threading.main_thread():
        yield None
        return
    received = threading.Event()
    before = signal.signal(signal.SIGTERM, lambda *_: received.set())
    try:
        yield lambda: "stop" if received.is_set() else ""
    finally:
        signal.signal(signal.SIGTERM, before or signal.SIG_DFL)


def _both(first: Tick, second: Tick | None) -> Tick:
    def tick(values: dict[str, Any]) -> None:
        first(values)
        if second is not None:
            second(values)

    return tick


class _RunLog:
    """Logs to a file and MLflow on rank 0: one run per training, also after a resume; listens to the checkpoints."""

    def __init__(self, spec: TrainSpec, tracking: TrackingSpec) -> None:
        self._ticks = TickFile(spec)
        self._spool = Spool(spec)
        self._tracking: Tracking | None = None
        if not tracking.uri:
            return
        tracking.access.apply()
        manifest_sha256 = read_manifest(spec.dataset)[1]
        self._spool.fetch()
        self._tracking = Tracking(
            tracking.uri,
            tracking.experiment,
            tracking.artifact_location or default_artifact_location(tracking.uri),
            self._spool.file,
        )
        params = {k: v for k, v in asdict(spec).items() if not isinstance(v, dict)}
        parent = {"trip.parent": spec.start.parent} if spec.start is not None else {}
        tags = {"trip.stage": "train"} | parent | tracking.tags
        self._tracking.start_run(tracking.run_name, None, tracking.key(spec), params, tags, wait_seconds=0)
        self._tracking.document("spec.json", asdict(spec))
        self._tracking.dataset_input("latents", manifest_sha256, spec.dataset)

    def __enter__(self) -> _RunLog:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        self._ticks.upload()
        if self._tracking is not None:
            stopped = isinstance(error, TrainingStopped | KeyboardInterrupt)
            self._tracking.finish("KILLED" if stopped else "FAILED" if error is not None else "FINISHED")
            self._spool.keep()

    def tick(self, values: dict[str, Any]) -> None:
        self._ticks.tick(values)
        if self._tracking is not None:
            numbers = {k: float(v) for k, v in values.items() if k not in ("step", "steps", "seconds_left")}
            self._tracking.metrics(numbers, values["step"])
            self._tracking.system_metrics(values["step"])

    def before_mark(self) -> None:
        if self._tracking is not None:
            self._tracking.flush(FLUSH_SECONDS)
            self._spool.keep()

    def after_mark(self, saved: SavedCheckpoint) -> None:
        self._ticks.upload()
        if self._tracking is not None:
            self._tracking.checkpoint(saved.step, saved.uri, saved.digest, saved.metrics)
            for step in saved.removed:
                self._tracking.checkpoint_removed(step)


@ray.remote
class _Relay:
    """Carries ticks and warnings from rank 0 to the driver, and the request to stop the other way."""

    def __init__(self) -> None:
        self._ticks: list[dict[str, Any]] = []
        self._warnings: list[str] = []
        self._starts = 0
        self._stopping = False

    def started(self, world: int, workers: int) -> None:
        self._starts += 1
        if self._starts > 1 or world < workers:
            reason = "the workers were restarted" if self._starts > 1 else "not all workers could be started"
            self._warnings.append(f"{reason}: training on {world} of {workers} from the newest checkpoint")

    def request_stop(self) -> bool:
        """Whether there are workers that can react."""
        self._stopping = True
        return self._starts > 0

    def is_stopping(self) -> bool:
        return self._stopping

    def tick(self, tick: dict[str, Any]) -> None:
        self._ticks.append(tick)

    def warning(self, sentence: str) -> None:
        self._warnings.append(sentence)

    def take(self) -> tuple[list[dict[str, Any]], list[str]]:
        batch = self._ticks, self._warnings
        self._ticks, self._warnings = [], []
        return batch


@contextlib.contextmanager
def _warnings_to(relay: Any) -> Iterator[None]:
    """Forwards rank 0's warnings, such as a damaged checkpoint, to the console of the driver."""
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: relay.warning.remote(record.getMessage())
    loggers = [logging.getLogger(room) for room in ("tasks", "infra")]
    for logger in loggers:
        logger.addHandler(handler)
    try:
        yield
    finally:
        for logger in loggers:
            logger.removeHandler(handler)
