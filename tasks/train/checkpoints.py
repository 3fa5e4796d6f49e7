"""The checkpoint store: weights, optimiser state and step as safetensors and JSON, completeness marked last.

    step-00000200/weights.safetensors  average.safetensors  optimizer.safetensors  complete.json

`complete.json` names every file with its sha256. A folder without it never existed; one whose files do not match is
damaged, and resuming walks back past it and says so.
"""

from __future__ import annotations

import logging
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from infra import storage

COMPLETE = "complete.json"
Tensors = dict[str, torch.Tensor]
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Checkpoint:
    """One complete state of training."""

    step: int
    uri: str
    parts: dict[str, Tensors]
    facts: dict[str, Any]


def save_checkpoint(store: str, step: int, parts: dict[str, Tensors], facts: dict[str, Any], keep: int = 2) -> str:
    """Writes a checkpoint and removes older ones beyond `keep`; never the newest complete one. Returns its address."""
    uri = storage.join(store, f"step-{step:08d}")
    storage.delete(uri)  # what a killed run may have left half-written under this name
    files = {}
    with tempfile.TemporaryDirectory(prefix="trip-checkpoint-") as spool:
        for name, tensors in parts.items():
            path = Path(spool) / f"{name}.safetensors"
            save_file({k: v.detach().cpu().contiguous() for k, v in tensors.items()}, path)
            files[path.name] = storage.sha256_file(path)
            storage.upload_file(path, storage.join(uri, path.name))
    storage.write_json(storage.join(uri, COMPLETE), {"step": step, "files": files, "facts": facts})
    for old in complete_steps(store)[keep:]:
        storage.delete(storage.join(store, f"step-{old:08d}"))
    return uri


def complete_steps(store: str) -> list[int]:
    """Steps with a completeness mark, newest first."""
    names = [name for name in storage.list_dir(store) if name.startswith("step-")]
    steps = [int(name.removeprefix("step-")) for name in names if name.removeprefix("step-").isdigit()]
    return [s for s in sorted(steps, reverse=True) if storage.exists(storage.join(store, f"step-{s:08d}", COMPLETE))]


def newest_checkpoint(store: str) -> Checkpoint | None:
    """The newest checkpoint whose files are all as its mark says; None when there is none."""
    for step in complete_steps(store):
        uri = storage.join(store, f"step-{step:08d}")
        try:
            return _load(uri)
        except (ValueError, KeyError, OSError) as error:
            log.warning("checkpoint %s is damaged (%s); going back to the one before it", uri, error)
    return None


def _load(uri: str) -> Checkpoint:
    mark = storage.read_json(storage.join(uri, COMPLETE))
    folder = storage.local_folder(uri)
    parts = {}
    for name, expected in mark["files"].items():
        found = storage.sha256_file(folder / name)
        if found != expected:
            raise ValueError(f"{name} has sha256 {found[:12]}, expected {expected[:12]}")
        parts[name.removesuffix(".safetensors")] = load_file(folder / name)
    return Checkpoint(mark["step"], uri, parts, mark["facts"])


def optimizer_tensors(optimizer: torch.optim.Optimizer) -> Tensors:
    """The optimiser's state as named tensors, `<parameter index>.<entry>`."""
    state = optimizer.state_dict()["state"]
    return {
        f"{index}.{name}": torch.as_tensor(value) for index, entry in state.items() for name, value in entry.items()
    }


def restore_optimizer(optimizer: torch.optim.Optimizer, tensors: Tensors) -> None:
    """Puts back what `optimizer_tensors` took out; the parameter groups stay as the recipe made them."""
    state: dict[int, Tensors] = {}
    for key, value in tensors.items():
        index, name = key.split(".", 1)
        state.setdefault(int(index), {})[name] = value
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
