"""Ray actors that process tasks, one at a time; the task of a lost worker goes to another worker.

Ray's restarts (`max_restarts`, `max_task_retries`) count every failed send to an actor, and are used up before Ray
detects the loss of a machine. Here only the death of a process on an alive machine counts.
"""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, TypeVar

import ray
import ray.exceptions

from infra.cluster import can_grow, living_machines

MAX_DEATHS = 3  # of processes with the same task, on alive machines
WAIT_SECONDS = 900.0  # without a worker, before a run ends: an autoscaler needs minutes to start a machine
SLOW_START_SECONDS = 30.0  # until a worker that has not started is reported
UNREACHABLE_SECONDS = 120.0  # until a worker that Ray cannot reach, and has not declared dead, is replaced
CHECK_SECONDS = 10.0  # between two checks of the machines, and between two ticks

T = TypeVar("T")
_logger = logging.getLogger(__name__)


class NoRoom(ValueError):
    """No worker fits the Ray session; the text has the required and the available resources."""


class WorkerDied(Exception):
    """The same task lost its worker's process `MAX_DEATHS` times; `task` is None where workers cannot even start."""

    def __init__(self, task: Any, error: ray.exceptions.RayError) -> None:
        what = "workers do not start" if task is None else f"the same task lost its worker {MAX_DEATHS} times"
        super().__init__(f"{what}: {str(error).strip().splitlines()[-1].strip()}")
        self.task = task


@dataclass(eq=False)
class _Task:
    value: Any
    deaths: list[str] = field(default_factory=list)  # ids of the machines on which its worker died


@dataclass(eq=False)
class _Worker:
    actor: Any  # a handle; Ray types it by a plugin
    machines: frozenset[str]  # alive when it was created
    since: float  # when it was created, or became unreachable
    machine: str = ""  # id of its machine, "" until it answers for the first time
    task: _Task | None = None


class WorkerPool:
    """Actors of one class in the open Ray session.

    They are created when there are tasks, and killed at the end of the `with` block. In a session that can grow, all
    `workers` are created; pending ones make an autoscaler add machines.

    Args:
        kind: the class; its constructor must be fast and raise nothing, since Ray reports its errors as a dead actor.
        arguments: of the constructor.
        workers: the largest number; None or 0: as many as fit now.
    Raises:
        NoRoom: no worker fits a session that cannot grow.
    """

    def __init__(self, kind: type, arguments: tuple[Any, ...], workers: int | None, cpus: int, gpus: float) -> None:
        self._each = f"{cpus} CPUs and {gpus:g} GPUs"
        resources = ray.cluster_resources()
        fit = int(resources.get("CPU", 0) // cpus)
        if gpus > 0:
            fit = min(fit, int(resources.get("GPU", 0) // gpus))
        if fit < 1 and not can_grow():
            raise NoRoom(f"a worker of {self._each} does not fit the Ray session ({_present()}); ask for less")
        self._size = (workers or max(fit, 1)) if can_grow() else min(workers or fit, fit)
        self._class: Any = ray.remote(num_cpus=cpus, num_gpus=gpus, max_restarts=0, max_task_retries=0)(kind)
        self._arguments = arguments
        self._queue: deque[_Task] = deque()
        self._idle: list[_Worker] = []
        self._asked: dict[ray.ObjectRef, _Worker] = {}  # asked for their machine: starting, or unreachable
        self._busy: dict[ray.ObjectRef, _Worker] = {}
        self._failed_starts = 0  # since one succeeded
        self._last_worker = self._last_check = time.monotonic()
        self._had_one = False
        self._reported = 0

    def __enter__(self) -> WorkerPool:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        for worker in self._workers():
            _kill(worker)

    def run(
        self, tasks: Iterable[T], call: Callable[[Any, T], Any], tick: Callable[[], None] = lambda: None
    ) -> Iterator[tuple[T, Any]]:
        """Yields tasks with their results as they finish; takes no more tasks than there are workers.

        Args:
            tasks: what the workers take, one at a time; read lazily.
            call: calls a method of an actor with a task, and returns Ray's reference to the result.
            tick: called after each task, and about every `CHECK_SECONDS` between.
        Raises:
            RayTaskError: a task raised an error; the others are cancelled.
            WorkerDied: a task lost its worker's process `MAX_DEATHS` times, or workers do not start.
            NoRoom: no machine took a worker for `WAIT_SECONDS`.
            NodeDiedError: all machines with workers are lost, and no other took one for `WAIT_SECONDS`.
        """
        source = iter(tasks)
        drawn = False
        while True:
            room = self._size - len(self._queue) - sum(worker.task is not None for worker in self._workers())
            if room > 0 and not drawn:
                try:
                    self._queue.append(_Task(next(source)))
                except StopIteration:
                    drawn = True
            self._hand_out(call)
            if room > 1 and not drawn:
                continue
            if not self._queue and all(worker.task is None for worker in self._workers()):
                return
            ready, _ = ray.wait([*self._busy, *self._asked], num_returns=1, timeout=CHECK_SECONDS)
            tick()
            for reference in ready:
                if reference in self._asked:
                    self._answered(reference)
                else:
                    yield from self._finished(reference)
            self._check_machines()

    def idle_actor(self) -> Any | None:
        """An idle actor that has loaded its libraries, or None."""
        machines = living_machines()
        return next((worker.actor for worker in self._idle if worker.machine in machines), None)

    def _workers(self) -> list[_Worker]:
        return [*self._idle, *self._asked.values(), *self._busy.values()]

    def _hand_out(self, call: Callable[[Any, Any], Any]) -> None:
        while self._queue and self._idle:
            worker = self._idle.pop()
            worker.task = self._queue.popleft()
            self._busy[call(worker.actor, worker.task.value)] = worker
        starting = sum(worker.task is None for worker in self._asked.values())
        while starting < len(self._queue) and len(self._workers()) < self._size:
            self._ask(_Worker(self._class.remote(*self._arguments), living_machines(), time.monotonic()))
            starting += 1

    def _ask(self, worker: _Worker) -> None:
        self._asked[worker.actor.__ray_call__.remote(_machine)] = worker

    def _answered(self, reference: ray.ObjectRef) -> None:
        worker = self._asked.pop(reference)
        try:
            worker.machine = ray.get(reference)
        except ray.exceptions.RayError as error:
            self._lost(worker, error)
            return
        self._failed_starts = 0
        self._put_back(worker)
        self._idle.append(worker)

    def _finished(self, reference: ray.ObjectRef) -> Iterator[tuple[Any, Any]]:
        worker = self._busy.pop(reference)
        task = worker.task
        assert task is not None
        try:
            result = ray.get(reference)
        except ray.exceptions.RayTaskError:
            self._idle.append(worker)
            raise
        except ray.exceptions.RayError as error:
            worker.since = time.monotonic()
            self._lost(worker, error)
            return
        worker.task = None
        self._idle.append(worker)
        yield task.value, result

    def _lost(self, worker: _Worker, error: ray.exceptions.RayError) -> None:
        """Handles a failed call: requeues the task, asks the worker again, or raises."""
        machines = living_machines()
        if not machines:
            raise ray.exceptions.NodeDiedError("Ray's session lost its machine; the same command continues") from error
        # It may be alive. It keeps its task until that is known, so that no two workers have the same task.
        if isinstance(error, ray.exceptions.ActorUnavailableError | ray.exceptions.ObjectLostError):
            if time.monotonic() - worker.since < UNREACHABLE_SECONDS:
                self._ask(worker)
            else:
                self._replace(worker, "cannot be reached")
            return
        # A worker that never answered was on one of the machines that were alive when it was created.
        gone = worker.machine not in machines if worker.machine else not worker.machines <= machines
        if gone or getattr(error, "preempted", False):
            self._replace(worker, "is lost with its machine")
            return
        task = worker.task
        self._replace(worker, "died")
        if task is None:
            self._failed_starts += 1
            if self._failed_starts >= MAX_DEATHS or getattr(error, "actor_init_failed", False):
                raise WorkerDied(None, error) from error
        else:
            task.deaths.append(worker.machine)
            # At an earlier death Ray may have listed a lost machine as alive.
            if sum(machine in machines for machine in task.deaths) >= MAX_DEATHS:
                raise WorkerDied(task.value, error) from error

    def _replace(self, worker: _Worker, what: str) -> None:
        _logger.warning("a worker %s%s", what, "; another worker gets its task" if worker.task is not None else "")
        _kill(worker)
        self._put_back(worker)

    def _put_back(self, worker: _Worker) -> None:
        if worker.task is not None:
            self._queue.appendleft(worker.task)
            worker.task = None

    def _check_machines(self) -> None:
        """Requeues tasks of lost machines, whose calls may stay open for minutes; reports and limits the waiting."""
        now = time.monotonic()
        if self._busy or self._idle:
            self._last_worker, self._had_one = now, True
        elif now - self._last_worker > WAIT_SECONDS:
            waited = (
                f"no machine takes a worker of {self._each}: waited {WAIT_SECONDS:g} s, the Ray session has"
                f" {_present()}; start machines and repeat the command, it continues"
            )
            raise ray.exceptions.NodeDiedError(waited) if self._had_one else NoRoom(f"{waited}; or ask for less")
        if now - self._last_check < CHECK_SECONDS:
            return
        self._last_check = now
        machines = living_machines()
        for calls in (self._busy, self._asked):
            for reference, worker in list(calls.items()):
                if worker.machine and worker.machine not in machines:
                    del calls[reference]
                    self._replace(worker, "is lost with its machine")
        slow = sum(now - worker.since > SLOW_START_SECONDS for worker in self._asked.values())
        if slow and slow != self._reported:
            _logger.warning(
                "waiting for %d of %d workers of %s each; the Ray session has %s",
                *(slow, self._size, self._each, _present()),
            )
        self._reported = slow


def _machine(_: Any) -> str:
    """Id of the machine of the actor that runs this."""
    return ray.get_runtime_context().get_node_id()


def _present() -> str:
    resources = ray.cluster_resources()
    return f"{resources.get('CPU', 0):g} CPUs, {resources.get('GPU', 0):g} GPUs"


def _kill(worker: _Worker) -> None:
    with suppress(ray.exceptions.RayError):
        ray.kill(worker.actor)
