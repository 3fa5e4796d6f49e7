"""The model at a training's first step: on the untrained base, or a trained TRIP; and the state that goes with it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from infra import storage
from tasks.records import UserError, digest
from tasks.train.checkpoints import COMPLETE, Checkpoint, CheckpointStore
from tasks.train.spec import Start, TrainSpec
from trip_model.checkpoint import config_from_json, load_model, read_record
from trip_model.config import TripConfig
from trip_model.folders import folder_hash
from trip_model.model import Trip


def initial_model(spec: TrainSpec, base: Path, config: TripConfig) -> Trip:
    """A model with the weights of the base, or all weights of the trained model that is continued.

    Raises:
        UserError: the trained model is gone, or its files have changed.
    """
    if spec.start is None or not spec.start.model:
        return Trip.from_base(base, config)
    trained = load_model(_model_folder(spec.start))
    return Trip(trained.unet, config, trained.fusion)


def initial_state(start: Start | None) -> Checkpoint | None:
    """The state of the training that is continued, its step the first one of this training; None without one.

    Raises:
        UserError: the checkpoint is gone, or its files have changed.
    """
    if start is None or not start.state:
        return None
    try:
        mark = storage.read_json(storage.join(start.state, COMPLETE))
        if digest(mark["files"]) != start.state_digest:
            raise ValueError(f"its digest is {digest(mark['files'])}, expected {start.state_digest}")
        checkpoint = CheckpointStore(storage.parent(start.state)).load(mark["step"])
    except (ValueError, KeyError, FileNotFoundError) as error:
        raise UserError(
            f"the checkpoint {start.state} that is continued cannot be read ({error}); restore it, or continue with"
            " train.take=weights"
        ) from error
    facts: dict[str, Any] = dict(checkpoint.facts)
    if not start.step:
        del facts["losses"]
    return replace(checkpoint, step=start.step, facts=facts)


def parent_config(start: Start | None, state: Checkpoint | None) -> TripConfig | None:
    """The configuration of the model that is continued; None for the untrained base."""
    if state is not None:
        return config_from_json(state.facts["config"])
    if start is None or not start.model:
        return None
    return config_from_json(read_record(_model_folder(start))["config"])


def _model_folder(start: Start) -> Path:
    try:
        folder = storage.local_folder(start.model)
    except FileNotFoundError as error:
        raise UserError(f"the model {start.model} that is continued is gone; restore it") from error
    found = folder_hash(folder)
    if found != start.model_sha256:
        raise UserError(f"{start.model} has sha256 {found[:12]}, expected {start.model_sha256[:12]}; restore it")
    return folder
