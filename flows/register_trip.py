"""Flow: a judged model becomes a version in the MLflow registry."""

from __future__ import annotations

from typing import Any

from prefect import flow, task

from flows.console import tell
from flows.evaluate_trip import planned_evaluation, trained_model
from flows.mlflow_store import tracking_address
from flows.recipes import Recipe, find_recipe
from flows.source import PLAIN, Reading, named_source
from flows.stage import STAGE_POLICY, code_version
from flows.train_trip import EXPERIMENT, prepared_dataset
from infra import storage
from infra.redaction import redact
from infra.settings import CHECKOUT
from infra.tracking import default_artifact_location
from tasks.records import UserError, digest, to_json
from tasks.register.registry import RegisterReport, RegisterSpec, register
from tasks.shards import ShardDataset
from trip_model.encoders import folder_hash, resolve_base


def lineage(chosen: Recipe, dataset: str) -> dict[str, str]:
    """Where a model comes from, in words and hashes."""
    held = ShardDataset(dataset)
    base = resolve_base(chosen.train.base)
    inside = base.is_relative_to(CHECKOUT)
    return {
        "recipe": chosen.name,
        "recipe_hash": digest(chosen.identity()),
        "data_uri": redact(held.uri),
        "data_digest": held.manifest_sha256,
        "base": str(base.relative_to(CHECKOUT)) if inside else redact(chosen.train.base),
        "base_hash": folder_hash(base),
        "code_version": code_version(),
    }


@task(name="register", **STAGE_POLICY)
def register_stage(spec: RegisterSpec) -> RegisterReport:
    """Registered once: the same model with the same report is found again."""
    return register(spec, tell)


@flow(name="register-trip")
def register_trip(
    recipe: str = "demo",
    source: str | None = None,
    root: str = "runs/demo",
    base: str | None = None,
    dataset: str | None = None,
    model: str | None = None,
    report: str | None = None,
    tracking_uri: str | None = None,
    name: str = "trip",
    *,
    reading: Reading = PLAIN,
) -> dict[str, Any]:
    """Register a model with its evaluation, and promote it when the gate passed.

    Args:
        recipe: which numbers to use; see the command `recipes`.
        source: the table that the data set was prepared from.
        root: folder or address that everything is written below.
        base: folder (or hub name) of the text-to-video model to start from, instead of the recipe's.
        dataset: address of a prepared data set, instead of the one that belongs to recipe, source and root.
        model: address of a model folder, instead of the one that was trained with recipe and data set.
        report: address of an evaluation's folder, instead of the one that belongs to the model.
        tracking_uri: where MLflow keeps runs and models; without it MLFLOW_TRACKING_URI or a SQLite file in root.
        name: the model's name in the registry.
        reading: how the source was read.
    """
    uri = tracking_address(tracking_uri, root)
    chosen = find_recipe(recipe, base)
    dataset = dataset or prepared_dataset(chosen, named_source(source, reading), root)
    model = model or trained_model(chosen, dataset, root)
    if report is None:
        report = planned_evaluation(chosen, model, dataset, root).output
        if not storage.exists(storage.join(report, "report.json")):
            raise UserError(f"no finished evaluation of {model} below {root}; run the command evaluate-trip first")
    spec = RegisterSpec(
        model=storage.absolute(model),
        report=storage.absolute(report),
        tracking_uri=uri,
        name=name,
        experiment=EXPERIMENT,
        artifact_location=default_artifact_location(uri),
        lineage=lineage(chosen, dataset),
    )
    return to_json(register_stage(spec))
