"""Flow: a data set of latents becomes a TRIP model."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from prefect import flow, task

from flows.console import tell
from flows.mlflow_store import tracking_address
from flows.planning import check_gpu_at_hand
from flows.prepare_latents import planned_prepare
from flows.recipes import Recipe, find_recipe
from flows.source import PLAIN, Reading, named_source
from flows.stage import STAGE_POLICY, address
from infra import storage
from infra.cluster import ray_session
from infra.tracking import default_artifact_location
from tasks.ingest.sources import SourceSpec
from tasks.records import to_json
from tasks.shards import ShardDataset
from tasks.train.job import TrackingSpec, train
from tasks.train.spec import TrainReport, TrainSpec, finished_report, spec_digest
from trip_model.encoders import folder_hash, resolve_base

EXPERIMENT = "trip"


def prepared_dataset(recipe: Recipe, source: SourceSpec | None, root: str) -> str:
    """The address where the data set of this recipe and source lies. Raises UserError when it is not finished."""
    with planned_prepare(recipe, source, root) as spec:
        return ShardDataset(spec.output).uri


def planned_training(recipe: Recipe, dataset: str, root: str) -> TrainSpec:
    """The spec of the stage, its addresses filled in."""
    spec = replace(recipe.train, dataset=storage.absolute(dataset))
    identity = {
        "spec": spec_digest(spec),
        "dataset": ShardDataset(spec.dataset).manifest_sha256,
        "base": folder_hash(resolve_base(spec.base)),
    }
    return replace(spec, output=address(root, "train", identity))


@task(name="train", **STAGE_POLICY)
def train_stage(spec: TrainSpec, tracking: TrackingSpec) -> TrainReport:
    """Ray Train runs the loop; it continues from the newest complete checkpoint."""
    if finished_report(spec) is not None:
        report = train(spec, None, tracking)  # delivers what tracking could not take while it was down
        tell(f"train       {report.step} steps are done already, loss {report.loss_last:.4f}")
        return report

    def tick(values: dict[str, Any]) -> None:
        news = {
            "stage": "train",
            "done": values["step"],
            "total": values["steps"],
            "eta_seconds": values["seconds_left"],
        }
        tell(news | {name: value for name, value in values.items() if name not in ("step", "steps", "seconds_left")})

    check_gpu_at_hand(spec)
    tell(f"train       {spec.steps} steps of {spec.global_batch} clips on {spec.workers} worker(s)")
    with ray_session(None, spec.workers * spec.cpus_per_worker):
        report = train(spec, tick, tracking)
    losses = f"loss {report.loss_first:.4f} -> {report.loss_last:.4f}"
    tell(f"train       {report.step} steps in {report.seconds:.0f} s, {losses}")
    return report


@flow(name="train-trip")
def train_trip(
    recipe: str = "demo",
    source: str | None = None,
    root: str = "runs/demo",
    base: str | None = None,
    dataset: str | None = None,
    tracking_uri: str | None = None,
    *,
    reading: Reading = PLAIN,
) -> dict[str, Any]:
    """Train TRIP on a prepared data set; continues from the newest checkpoint.

    Args:
        recipe: which numbers to use; see the command `recipes`.
        source: the table that the data set was prepared from.
        root: folder or address that everything is written below.
        base: folder (or hub name) of the text-to-video model to start from, instead of the recipe's.
        dataset: address of a prepared data set, instead of the one that belongs to recipe, source and root.
        tracking_uri: where MLflow keeps runs; without it MLFLOW_TRACKING_URI or a SQLite file in root.
        reading: how the source was read.
    """
    uri = tracking_address(tracking_uri, root)
    chosen = find_recipe(recipe, base)
    spec = planned_training(chosen, dataset or prepared_dataset(chosen, named_source(source, reading), root), root)
    tracking = TrackingSpec(uri, EXPERIMENT, f"train {recipe}", default_artifact_location(uri))
    return to_json(train_stage(spec, tracking))
