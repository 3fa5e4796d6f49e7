"""Continues a trained TRIP: more steps of the same training, or a new training from its weights.

A finished training has a `training.json` next to its report: what it was trained for and on, and how many steps and
samples its model has seen in all. From it follows what a continuation can take (`start_from`).
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import Any

from infra import storage
from infra.leases import is_lease
from tasks.json_records import parse_record
from tasks.records import Artifact, UserError, digest
from tasks.train.spec import REPORT, Start, TrainSpec, identity
from trip_model.config import FusionConfig, values_before
from trip_model.folders import RECORD, folder_hash

FILE = "training.json"
# Another schedule is still the same training: its steps go on under other learning rates.
SCHEDULE = ("learning_rate_unet", "learning_rate_fusion", "weight_decay", "clip_norm", "warmup_steps", "cosine")
# No part of what a training is for: the length, and data and base, whose hashes the record has on their own.
_NOT_GOALS = ("steps", "dataset", "base", "dataset_sha256", "base_sha256", "start")


@dataclass(frozen=True)
class TrainingRecord:
    """A finished training, for those who continue it.

    Attributes:
        model_sha256: of the exported model folder.
        dataset_sha256: of the data set's manifest.
        base_sha256: of the untrained base that it, or its first parent, started from.
        goals: its spec without means, length and addresses.
        step: its last step, as its checkpoint counts.
        total_steps: of this training and its parents.
        total_samples: that these steps read.
        start: what it started from itself; None for the base.
        finished: time of its end, seconds since 1970.
    """

    model_sha256: str
    dataset_sha256: str
    base_sha256: str
    goals: dict[str, Any]
    step: int
    total_steps: int
    total_samples: int
    finished: float
    start: Start | None = None
    version: int = 1


@dataclass(frozen=True)
class Parent:
    """The trained model that a training continues, and its training if that is known."""

    model: Artifact
    output: str = ""  # the training's folder, with checkpoints
    record: TrainingRecord | None = None


def goals(spec: TrainSpec) -> dict[str, Any]:
    """What a training is for: equal for trainings that differ in length, addresses and means only."""
    return {name: value for name, value in identity(spec, means=False).items() if name not in _NOT_GOALS}


def totals(spec: TrainSpec) -> tuple[int, int]:
    """The steps that a model of this training has been trained for, its parents' included, and their samples."""
    start = spec.start or Start("")
    own = spec.steps - start.step
    return start.steps_before + own, start.samples_before + own * spec.global_batch


def write_training(spec: TrainSpec, model_sha256: str, dataset_sha256: str, base_sha256: str) -> None:
    """Writes the record of a finished training next to its model."""
    steps, samples = totals(spec)
    record = TrainingRecord(
        model_sha256=model_sha256,
        dataset_sha256=dataset_sha256,
        base_sha256=base_sha256,
        goals=goals(spec),
        step=spec.steps,
        total_steps=steps,
        total_samples=samples,
        finished=time.time(),
        start=spec.start,
    )
    storage.write_json(storage.join(spec.output, FILE), asdict(record))


def read_training(output: str) -> TrainingRecord | None:
    """The record of a finished training; None without one. Raises UserError for one of another version."""
    try:
        content = storage.read_bytes(storage.join(output, FILE))
    except FileNotFoundError:
        return None
    try:
        record = parse_record(TrainingRecord, content)
        if record.version != 1:
            raise ValueError(f"version {record.version}, expected 1")
    except ValueError as error:
        raise UserError(
            f"{storage.join(output, FILE)} cannot be read ({error}); give the model folder instead"
        ) from error
    return record


def start_from(parent: Parent, spec: TrainSpec, dataset_sha256: str) -> tuple[Start, str]:
    """What a training takes of its parent, which `check_network` has accepted, and one sentence about it.

    `spec.take` decides; under "auto", more steps of the same training take everything and go on counting.

    Raises:
        UserError: the parent has not the state that `take` asks for.
    """
    record = parent.record
    start = Start(
        parent.model.sha256,
        steps_before=record.total_steps if record else 0,
        samples_before=record.total_samples if record else 0,
    )
    own, theirs = goals(spec), record.goals if record else {}
    other = sorted(name for name in {*own, *theirs} if own.get(name) != theirs.get(name))
    reason = _why_not_the_same(record, [name for name in other if name not in SCHEDULE], dataset_sha256)
    same = spec.take == "auto" and not reason
    if record is not None and (same or spec.take == "optimizer"):
        parts = [name for name in other if name in ("trained", "lora_rank", "lora_alpha")]
        if parts:
            raise UserError(
                f"Adam's moments of {parent.output} are of other weights ({', '.join(parts)} differ);"
                " --set train.take=weights, or train the same parts"
            )
        state, state_digest = _last_checkpoint(parent.output, record.step)
        if state_digest:
            below = record.start or Start("")
            start = replace(start, model=below.model, model_sha256=below.model_sha256)
            start = replace(start, state=state, state_digest=state_digest, step=record.step if same else 0)
            if not same:
                return start, f"starts from weights, averages and Adam's moments of {parent.output}"
            changed = f", with other values of {', '.join(other)}" if other else ""
            return start, f"goes on with all of {parent.output} after step {record.step}{changed}"
        reason = "its last checkpoint is gone"
    if spec.take == "optimizer":
        raise UserError(
            f"the state of {parent.model.uri} cannot be taken ({reason}); --set train.take=weights, or give the output"
            " of its training"
        )
    because = "train.take is weights" if spec.take == "weights" else reason
    sentence = f"starts from the weights of {parent.model.uri}, fusion included, and counts from step 0: {because}"
    return replace(start, model=parent.model.uri, model_sha256=parent.model.sha256), sentence


def _why_not_the_same(record: TrainingRecord | None, other: list[str], dataset_sha256: str) -> str:
    if record is None:
        return "its training is not known"
    if record.dataset_sha256 != dataset_sha256:
        return "it was trained on other data"
    return f"other values of {', '.join(other)}" if other else ""


def check_network(parent: Parent, spec: TrainSpec, base_sha256: str) -> None:
    """Raises UserError for a parent of another base or another network than the training's."""
    try:
        described = storage.read_json(storage.join(parent.model.uri, RECORD))
    except FileNotFoundError:
        raise UserError(f"{parent.model.uri} has no trip.json; give the folder that training exported") from None
    trained_from = str(described["provenance"].get("base_sha256"))
    if trained_from != base_sha256:
        raise UserError(
            f"{parent.model.uri} was trained from another base (sha256 {trained_from[:12]}) than {spec.base}"
            f" ({base_sha256[:12]}); give that base with --base"
        )
    theirs = {"condition": described["config"]["condition"]}
    theirs |= {f"fusion.{n}": v for n, v in (values_before(FusionConfig) | described["config"]["fusion"]).items()}
    own = {"condition": spec.model.condition} | {f"fusion.{n}": v for n, v in asdict(spec.model.fusion).items()}
    for name, value in own.items():
        if theirs[name] != value:
            raise UserError(
                f"{parent.model.uri} has {name} {theirs[name]!r}, the recipe {value!r};"
                f" give the recipe that it was trained with, or --set train.model.{name}={theirs[name]}"
            )


def _last_checkpoint(output: str, step: int) -> tuple[str, str]:
    """Address and digest of the checkpoint at a step; empty if it is gone."""
    from tasks.train.checkpoints import COMPLETE, CheckpointStore  # imports torch

    address = CheckpointStore(storage.join(output, "checkpoints")).address(step)
    try:
        mark = storage.read_json(storage.join(address, COMPLETE))
    except (FileNotFoundError, ValueError):
        return "", ""
    return address, digest(mark["files"])


def parent_at(address: str, outputs: str) -> Parent:
    """The trained model at an address: a model folder, or a training's output with one in it.

    Args:
        address: of the folder.
        outputs: folder with the outputs of trainings, which may know the model.
    Raises:
        UserError: no trained model there.
    """
    address = storage.absolute(address)
    if not storage.exists(storage.join(address, RECORD)) and storage.exists(storage.join(address, REPORT)):
        address = storage.join(address, "model")
    try:
        model = Artifact(address, folder_hash(storage.local_folder(address)))
    except FileNotFoundError:
        raise UserError(f"no trained model at {address}; give a model folder or the output of a training") from None
    record = read_training(storage.parent(address))
    if record is not None and record.model_sha256 == model.sha256:
        return Parent(model, storage.parent(address), record)
    return training_of(model.sha256, outputs) or Parent(model)


def training_of(model_sha256: str, outputs: str) -> Parent | None:
    """The training below a folder that exported a model; None if there is none."""
    for output in trainings(outputs):
        record = read_training(output)
        if record is not None and record.model_sha256 == model_sha256:
            return Parent(Artifact(storage.join(output, "model"), model_sha256), output, record)
    return None


def trainings(outputs: str) -> list[str]:
    """The outputs of trainings below a folder, finished or not."""
    # A name with a dot is that of an output that `gc` is removing.
    names = [name for name in storage.list_dir(outputs) if not is_lease(name) and not name.startswith(".")]
    return [storage.join(outputs, name) for name in names]


def last_training(outputs: str) -> Parent:
    """The training below a folder that finished last. Raises UserError if none did."""
    parent = last_of(outputs, lambda record: True)
    if parent is None:
        raise UserError(f"no finished training below {outputs} to continue; train one first, or give --from ADDRESS")
    return parent


def last_of(outputs: str, fits: Callable[[TrainingRecord], bool]) -> Parent | None:
    """The training below a folder that finished last, of those whose record `fits`; None if there is none."""
    finished = []
    for output in trainings(outputs):
        record = read_training(output)
        if record is not None and fits(record) and storage.exists(storage.join(output, REPORT)):
            finished.append((record.finished, output, record))
    if not finished:
        return None
    _, output, record = max(finished, key=lambda entry: entry[:2])
    return Parent(Artifact(storage.join(output, "model"), record.model_sha256), output, record)
