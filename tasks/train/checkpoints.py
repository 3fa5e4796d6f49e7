"""The checkpoint store: weights, optimiser state and step as safetensors and JSON, completeness marked last.

    step-00000200/weights.safetensors  average.safetensors  optimizer.safetensors  complete.json

`complete.json` names every file with its sha256. A folder without it is ignored. A checkpoint whose files do not match
is damaged: resuming logs a warning and goes back to the one before.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol

import torch
from safetensors.torch import load_file, save_file

from infra import storage
from tasks.records import UserError, digest
from tasks.train.sharding import shard_like

COMPLETE = "complete.json"
KEPT = 2  # newest complete checkpoints
Tensors = dict[str, torch.Tensor]
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Checkpoint:
    """A complete training state, its tensors on the CPU."""

    step: int
    uri: str
    parts: dict[str, Tensors]
    facts: dict[str, Any]


@dataclass(frozen=True)
class SavedCheckpoint:
    """A checkpoint that is complete, and the steps of the checkpoints removed after it."""

    step: int
    uri: str
    digest: str
    metrics: dict[str, float]
    removed: tuple[int, ...]


class CheckpointListener(Protocol):
    """Callbacks of a `CheckpointStore`, called in the thread that writes."""

    def before_mark(self) -> None:
        """Called when all files are written; the checkpoint is marked complete when this returns."""

    def after_mark(self, saved: SavedCheckpoint) -> None:
        """Called when the checkpoint is complete and older ones are removed."""


class CheckpointStore:
    """The checkpoints of one training below an address; one process writes at a time, any number read.

    `save` copies the tensors to host memory and returns; a thread writes them. There is at most one such copy: the next
    save waits for it and raises its error. The store keeps the `keep` newest complete checkpoints, and the one with the
    lowest metric `best` if any has that metric. Leaving a `with` block waits for the save in progress.
    """

    def __init__(self, uri: str, keep: int = KEPT, best: str = "", listener: CheckpointListener | None = None) -> None:
        if keep < 1:
            raise ValueError(f"keep {keep}, expected at least 1 checkpoint")
        self.uri = uri
        self._keep, self._best, self._listener = keep, best, listener
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="checkpoint")
        self._writing: Future[None] | None = None
        self._host: dict[str, Tensors] = {}

    def __enter__(self) -> CheckpointStore:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        try:
            self.wait()
        except Exception as lost:
            if error is None:
                raise
            log.warning("the last checkpoint below %s was not written: %s", self.uri, lost)  # `error` propagates
        finally:
            self._thread.shutdown()

    def save(
        self,
        step: int,
        parts: Mapping[str, Tensors],
        facts: Mapping[str, Any],
        metrics: Mapping[str, float] | None = None,
    ) -> None:
        """Saves a copy of the current state. The checkpoint is complete when `wait` returns, or earlier.

        Metrics that are not finite are left out. Raises the error of the previous save.
        """
        self.wait()
        self._copy_to_host(parts)
        finite = {name: float(value) for name, value in (metrics or {}).items() if math.isfinite(value)}
        self._writing = self._thread.submit(self._write, step, list(parts), dict(facts), finite)

    def wait(self) -> None:
        """Waits for the save in progress. Raises the error of the last save, once."""
        writing, self._writing = self._writing, None
        if writing is not None:
            writing.result()

    def steps(self) -> list[int]:
        """Steps of complete checkpoints, newest first."""
        return [step for step in self._folders() if storage.exists(storage.join(self.address(step), COMPLETE))]

    def newest(self) -> Checkpoint | None:
        """Loads the newest checkpoint whose files match their hashes; None if the store is empty.

        Raises:
            UserError: all checkpoints are damaged. OSError: the store cannot be read.
        """
        steps = self.steps()
        for step in steps:
            try:
                return self.load(step)
            except (ValueError, KeyError, FileNotFoundError) as error:
                log.warning("checkpoint %s is damaged (%s); going back to the one before", self.address(step), error)
        if steps:
            raise UserError(f"all {len(steps)} checkpoints in {self.uri} are damaged; delete that folder to restart")
        return None

    def address(self, step: int) -> str:
        """The folder of a step's checkpoint."""
        return storage.join(self.uri, f"step-{step:08d}")

    def _folders(self) -> list[int]:
        """Steps that have a folder, complete or not, newest first."""
        names = [name.removeprefix("step-") for name in storage.list_dir(self.uri) if name.startswith("step-")]
        return sorted((int(name) for name in names if name.isdigit()), reverse=True)

    def load(self, step: int) -> Checkpoint:
        """Loads one checkpoint. Raises ValueError, KeyError or FileNotFoundError if it is damaged or missing."""
        uri = self.address(step)
        mark = storage.read_json(storage.join(uri, COMPLETE))
        parts = {}
        for name, expected in mark["files"].items():
            with storage.local_copy(storage.join(uri, name)) as path:
                actual = storage.sha256_file(path)
                if actual != expected:
                    raise ValueError(f"{name} has sha256 {actual[:12]}, expected {expected[:12]}")
                parts[Path(name).stem] = load_file(path)
        return Checkpoint(mark["step"], uri, parts, mark["facts"])

    def _copy_to_host(self, parts: Mapping[str, Tensors]) -> None:
        """Copies into the buffers of the previous save, which is written."""
        before, self._host = self._host, {}
        for name, tensors in parts.items():
            host = self._host[name] = {}
            for key, tensor in tensors.items():
                buffer = before.get(name, {}).get(key)
                if buffer is None or (buffer.shape, buffer.dtype) != (tensor.shape, tensor.dtype):
                    buffer = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)
                host[key] = buffer.copy_(tensor.detach(), non_blocking=True)
        if torch.cuda.is_available():
            torch.cuda.synchronize()

    # The methods below run in the writing thread.

    def _write(self, step: int, parts: list[str], facts: dict[str, Any], metrics: dict[str, float]) -> None:
        uri = self.address(step)
        complete = set(self.steps())
        for existing in self._folders():
            if existing not in complete or existing == step:
                self._remove(existing)  # left incomplete by a killed run, or a damaged checkpoint of this step
        files = {}
        for part in parts:
            name = f"{part}.safetensors"
            with storage.local_draft(storage.join(uri, name)) as path:
                save_file(self._host[part], path)
                files[name] = storage.sha256_file(path)
        if self._listener is not None:
            self._listener.before_mark()
        mark = {"step": step, "files": files, "facts": facts, "metrics": metrics}
        storage.write_json(storage.join(uri, COMPLETE), mark)
        removed = self._retain(step)
        if self._listener is not None:
            self._listener.after_mark(SavedCheckpoint(step, uri, digest(files), metrics, removed))

    def _retain(self, newest: int) -> tuple[int, ...]:
        """Removes old checkpoints. Steps after `newest` are damaged: training has resumed before them."""
        steps = self.steps()
        complete = [step for step in steps if step <= newest]
        kept = {*complete[: self._keep], *self._best_of(complete)}
        removed = tuple(step for step in steps if step not in kept)
        for step in removed:
            self._remove(step)
        return removed

    def _best_of(self, steps: list[int]) -> list[int]:
        """The step with the lowest metric `best`, the newest of equal ones; empty if no checkpoint has the metric."""
        if not self._best:
            return []
        scored = []
        for step in steps:
            try:
                mark = storage.read_json(storage.join(self.address(step), COMPLETE))
                scored.append((mark["metrics"][self._best], -step))
            except (ValueError, KeyError, FileNotFoundError):
                continue  # no such metric, or a damaged mark
        return [-min(scored)[1]] if scored else []

    def _remove(self, step: int) -> None:
        storage.delete(storage.join(self.address(step), COMPLETE))  # first: a partly removed checkpoint is not complete
        storage.delete(self.address(step))


def optimizer_tensors(optimizer: torch.optim.Optimizer) -> Tensors:
    """Returns the optimiser's state as named tensors, `<parameter index>.<entry>`."""
    state = optimizer.state_dict()["state"]
    return {
        f"{index}.{name}": torch.as_tensor(value) for index, entry in state.items() for name, value in entry.items()
    }


def restore_optimizer(optimizer: torch.optim.Optimizer, tensors: Tensors) -> None:
    """Restores the state returned by `optimizer_tensors`; the parameter groups stay those of the recipe."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    state: dict[int, Tensors] = {}
    for key, value in tensors.items():
        index, name = key.split(".", 1)
        state.setdefault(int(index), {})[name] = shard_like(value, parameters[int(index)])
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
