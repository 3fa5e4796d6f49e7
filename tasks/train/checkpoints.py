"""The checkpoint store: weights, optimiser state and step as safetensors and JSON, completeness marked last.

    step-00000200/weights.safetensors  average.safetensors  optimizer.safetensors  complete.json

`complete.json` names every file with its sha256. A folder without it never existed; one whose files do not match is
damaged, and resuming walks back past it and says so.
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
from tasks.train.sharding import like

COMPLETE = "complete.json"
KEPT = 2  # newest complete checkpoints
Tensors = dict[str, torch.Tensor]
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Checkpoint:
    """One complete state of training, its tensors on the CPU."""

    step: int
    uri: str
    parts: dict[str, Tensors]
    facts: dict[str, Any]


@dataclass(frozen=True)
class Saved:
    """What a save has put into the store, and the steps whose checkpoints had to go for it."""

    step: int
    uri: str
    digest: str
    metrics: dict[str, float]
    removed: tuple[int, ...]


class Watcher(Protocol):
    """Who follows the saves, in the thread that writes them."""

    def before_mark(self) -> None:
        """All files are there; the checkpoint counts as soon as this returns."""

    def after_mark(self, saved: Saved) -> None:
        """The checkpoint is complete and older ones are removed."""


class CheckpointStore:
    """The checkpoints of one training below an address; one process at a time writes, any number read.

    A save copies the tensors to host memory and returns; a thread writes them. There is at most one such copy: the
    next save waits for it, and raises what went wrong. Kept are the `keep` newest complete checkpoints, and the one
    with the lowest metric `best` if any has that metric. Leaving a `with` block waits for the save under way.
    """

    def __init__(self, uri: str, keep: int = KEPT, best: str = "", watcher: Watcher | None = None) -> None:
        if keep < 1:
            raise ValueError(f"keep is {keep}; at least the newest checkpoint must be kept")
        self.uri = uri
        self._keep, self._best, self._watcher = keep, best, watcher
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
            log.warning("the last checkpoint below %s was not written: %s", self.uri, lost)  # `error` is on its way
        finally:
            self._thread.shutdown()

    def save(
        self,
        step: int,
        parts: Mapping[str, Tensors],
        facts: Mapping[str, Any],
        metrics: Mapping[str, float] | None = None,
    ) -> None:
        """Takes the state as it is now; it is a complete checkpoint some time later, at the latest after `wait`.

        Metrics that are not finite are left out. Raises what the save before this one failed with.
        """
        self.wait()
        self._copy_to_host(parts)
        finite = {name: float(value) for name, value in (metrics or {}).items() if math.isfinite(value)}
        self._writing = self._thread.submit(self._write, step, list(parts), dict(facts), finite)

    def wait(self) -> None:
        """Returns when no save is under way. Raises what the last one failed with, once."""
        writing, self._writing = self._writing, None
        if writing is not None:
            writing.result()

    def steps(self) -> list[int]:
        """Steps with a completeness mark, newest first."""
        return [step for step in self._folders() if storage.exists(storage.join(self.address(step), COMPLETE))]

    def newest(self) -> Checkpoint | None:
        """The newest checkpoint whose files are all as its mark says; None when the store holds none at all.

        Raises:
            UserError: there are checkpoints and every one is damaged. OSError: the store cannot be read.
        """
        steps = self.steps()
        for step in steps:
            try:
                return self._load(step)
            except (ValueError, KeyError, FileNotFoundError) as error:
                log.warning("checkpoint %s is damaged (%s); going back to the one before", self.address(step), error)
        if steps:
            raise UserError(f"all {len(steps)} checkpoints in {self.uri} are damaged; delete that folder to start anew")
        return None

    def address(self, step: int) -> str:
        """The folder of a step's checkpoint."""
        return storage.join(self.uri, f"step-{step:08d}")

    def _folders(self) -> list[int]:
        """Steps that have a folder, complete or not, newest first."""
        names = [name.removeprefix("step-") for name in storage.list_dir(self.uri) if name.startswith("step-")]
        return sorted((int(name) for name in names if name.isdigit()), reverse=True)

    def _load(self, step: int) -> Checkpoint:
        uri = self.address(step)
        mark = storage.read_json(storage.join(uri, COMPLETE))
        parts = {}
        for name, expected in mark["files"].items():
            with storage.local_copy(storage.join(uri, name)) as path:
                found = storage.sha256_file(path)
                if found != expected:
                    raise ValueError(f"{name} has sha256 {found[:12]}, expected {expected[:12]}")
                parts[Path(name).stem] = load_file(path)
        return Checkpoint(mark["step"], uri, parts, mark["facts"])

    def _copy_to_host(self, parts: Mapping[str, Tensors]) -> None:
        """Copies into the buffers of the save before, which is written by now."""
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

    # What follows runs in the writing thread.

    def _write(self, step: int, parts: list[str], facts: dict[str, Any], metrics: dict[str, float]) -> None:
        uri = self.address(step)
        complete = set(self.steps())
        for left in self._folders():
            if left not in complete or left == step:
                self._remove(left)  # what a killed run has left half-written, and this step if it was damaged
        files = {}
        for part in parts:
            name = f"{part}.safetensors"
            with storage.local_draft(storage.join(uri, name)) as path:
                save_file(self._host[part], path)
                files[name] = storage.sha256_file(path)
        if self._watcher is not None:
            self._watcher.before_mark()
        mark = {"step": step, "files": files, "facts": facts, "metrics": metrics}
        storage.write_json(storage.join(uri, COMPLETE), mark)
        removed = self._retain(step)
        if self._watcher is not None:
            self._watcher.after_mark(Saved(step, uri, digest(files), metrics, removed))

    def _retain(self, newest: int) -> tuple[int, ...]:
        """Removes what need not be kept. Steps beyond the newest were damaged, for training has gone back past them."""
        steps = self.steps()
        complete = [step for step in steps if step <= newest]
        kept = {*complete[: self._keep], *self._best_of(complete)}
        removed = tuple(step for step in steps if step not in kept)
        for step in removed:
            self._remove(step)
        return removed

    def _best_of(self, steps: list[int]) -> list[int]:
        """The step with the lowest metric `best`, of equal ones the newest; empty when no checkpoint has it."""
        if not self._best:
            return []
        scored = []
        for step in steps:
            try:
                mark = storage.read_json(storage.join(self.address(step), COMPLETE))
                scored.append((mark["metrics"][self._best], -step))
            except (ValueError, KeyError, FileNotFoundError):
                continue  # it has no such metric, or its mark is damaged
        return [-min(scored)[1]] if scored else []

    def _remove(self, step: int) -> None:
        storage.delete(storage.join(self.address(step), COMPLETE))  # first: a half-removed checkpoint is none
        storage.delete(self.address(step))


def optimizer_tensors(optimizer: torch.optim.Optimizer) -> Tensors:
    """The optimiser's state as named tensors, `<parameter index>.<entry>`."""
    state = optimizer.state_dict()["state"]
    return {
        f"{index}.{name}": torch.as_tensor(value) for index, entry in state.items() for name, value in entry.items()
    }


def restore_optimizer(optimizer: torch.optim.Optimizer, tensors: Tensors) -> None:
    """Puts back what `optimizer_tensors` took out; the parameter groups stay as the recipe made them."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    state: dict[int, Tensors] = {}
    for key, value in tensors.items():
        index, name = key.split(".", 1)
        state.setdefault(int(index), {})[name] = like(value, parameters[int(index)])
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
