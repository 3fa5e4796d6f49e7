"""A training that outlives the process which started it: an actor of the cluster calls `train`.

The actor is found by the output's address, so the same command, on any machine of the cluster, follows the same
training. It is an actor and not a submitted job, whose specification Ray shows and logs: the credentials for MLflow
travel in the arguments of an actor only.
"""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections.abc import Iterator
from typing import Any

import ray
import ray.exceptions

from infra import storage
from infra.cluster import can_grow
from tasks.records import UserError, digest
from tasks.train.job import NO_TRACKING, SAVE_SECONDS, STOP_SECONDS, StopRequested, train
from tasks.train.loop import Tick, TrainingStopped
from tasks.train.spec import NO_CLUSTER, TrackingSpec, TrainReport, TrainSpec, finished_report

LINGER_SECONDS = 60.0  # an actor whose training has ended waits this long for a process to take its result
_logger = logging.getLogger(__name__)


def train_detached(spec: TrainSpec, progress: Tick | None = None, tracking: TrackingSpec = NO_TRACKING) -> TrainReport:
    """Like `train` under Ray, but the death of this process does not end the training; needs an open Ray session.

    If this training runs already, follows it: `progress` gets the ticks that no process has taken. A signal here ends
    the training with a checkpoint, as it does in `train`; an error here, such as one of `progress`, does not end it.

    Raises:
        UserError: an invalid spec, or a local session, which ends with this process. Also the exceptions of `train`.
    """
    if finished_report(spec) is not None:
        return train(spec, progress, tracking)  # delivers metrics that were spooled
    if not can_grow():
        raise UserError(NO_CLUSTER)
    name = f"train-{digest(storage.absolute(spec.output))}"
    options = {"name": name, "lifetime": "detached", "get_if_exists": True, "num_cpus": 0}
    trainer: Any = _Trainer.options(**options).remote(spec, tracking)
    with _stopped_by_signals(trainer):
        while True:
            ticks, warnings, ended, result = ray.get(trainer.take.remote())  # raises when its machine is lost
            for warning in warnings:
                _logger.warning(warning)
            if progress is not None:
                for tick in ticks:
                    progress(tick)
            if ended:
                break
            time.sleep(1.0)
    ray.kill(trainer)
    if isinstance(result, BaseException):
        raise result
    return result


@contextlib.contextmanager
def _stopped_by_signals(trainer: Any) -> Iterator[None]:
    """If a signal ends the block, the training writes a checkpoint, and the actor ends."""
    try:
        yield
    except BaseException as error:
        if not isinstance(error, Exception):
            with contextlib.suppress(ray.exceptions.RayError):  # the machine is lost, or too busy to answer
                ray.get(trainer.stop.remote(), timeout=STOP_SECONDS)
                deadline = time.monotonic() + STOP_SECONDS + SAVE_SECONDS
                while time.monotonic() < deadline and not ray.get(trainer.take.remote())[2]:
                    time.sleep(0.5)
            ray.kill(trainer)
        raise


@ray.remote
class _Trainer:
    """Calls `train` in a thread; keeps its ticks, warnings and result until a process takes them."""

    def __init__(self, spec: TrainSpec, tracking: TrackingSpec) -> None:
        self._ticks: list[dict[str, Any]] = []
        self._warnings: list[str] = []
        self._stop, self._ended = threading.Event(), threading.Event()
        self._result: TrainReport | BaseException | None = None
        handler = logging.Handler(logging.WARNING)
        handler.emit = lambda record: self._warnings.append(record.getMessage())
        for room in ("tasks", "infra"):
            logging.getLogger(room).addHandler(handler)
        threading.Thread(target=self._train, args=(spec, tracking), name="train", daemon=True).start()

    def _train(self, spec: TrainSpec, tracking: TrackingSpec) -> None:
        me = ray.get_runtime_context().current_actor
        tracking.access.apply()
        try:
            self._result = train(spec, lambda tick: self._ticks.append(tick), tracking, stop=self._stop)
        except StopRequested:
            self._result = TrainingStopped("the training was stopped; the same command continues it")
        except Exception as error:  # raised in the process that follows
            self._result = error
        self._ended.set()
        time.sleep(LINGER_SECONDS)  # the process that follows ends the actor earlier
        ray.kill(me)

    def take(self) -> tuple[list[dict[str, Any]], list[str], bool, TrainReport | BaseException | None]:
        """Ticks and warnings since the last call, whether the training has ended, and its report or exception."""
        ended = self._ended.is_set()
        batch = self._ticks, self._warnings
        self._ticks, self._warnings = [], []
        return *batch, ended, self._result

    def stop(self) -> None:
        """Requests the end of the training, with a checkpoint."""
        self._stop.set()
