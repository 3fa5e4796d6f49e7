"""Flow: an evaluated model becomes a version in the MLflow registry."""

from __future__ import annotations

import datetime
from typing import TYPE_CHECKING, Annotated, Any

from prefect import flow, task

from flows import layout
from flows.console import log
from flows.events import PROMOTED, emit
from flows.layout import EXPERIMENT, Run
from flows.mlflow_store import tracking_address
from flows.parameters import RECIPE
from flows.prefect_artifacts import stage_artifact
from flows.recipe_values import Values
from flows.source import DEFAULT, SourceOptions
from flows.stage import STAGE_POLICY, run_tags
from infra import storage
from infra.metrics import record
from infra.output import outlive_reader
from infra.settings import DEFAULT_ROOT, MODEL_NAME, code_version
from tasks.records import Artifact, UserError, to_json

if TYPE_CHECKING:
    from tasks.register.registry import RegisterReport


@task(name="register", **STAGE_POLICY)
def register_stage(
    run: Run, data: Artifact, model: Artifact, report: str, tracking_uri: str, name: str
) -> RegisterReport:
    """Registers a model with its report once; the same pair is found again."""
    from tasks.register.registry import RegisterSpec, register

    spec = RegisterSpec(
        model=model.uri,
        report=report,
        tracking_uri=tracking_uri,
        name=name,
        experiment=EXPERIMENT,
        lineage=run.lineage(data, code_version()),
        tags=run_tags(),
    )
    registered = register(spec, log)
    numbers = {"version": registered.version, "aliases": ", ".join(registered.aliases) or "none"}
    numbers |= {"not promoted": "; ".join(registered.reasons)} if registered.reasons else {}
    stage_artifact("register-result", f"{name} version {registered.version}", numbers, {"MLflow": registered.run_page})
    _record_champion(tracking_uri, name)
    if registered.promoted:
        emit(PROMOTED, f"{name}.{registered.version}", {"name": name, "version": registered.version})
    return registered


def _record_champion(tracking_uri: str, name: str) -> None:
    """Writes the metrics of the champion: its version, and when it was promoted."""
    from infra.tracking import connect
    from tasks.register.promotion import CHAMPION

    client = connect(tracking_uri)
    version = client.get_registered_model(name).aliases.get(CHAMPION)
    if version is None:
        return
    values: dict[str, float] = {"version": int(version)}
    promoted = client.get_model_version(name, version).tags.get("trip.promoted_at")
    if promoted:
        values["promoted_timestamp_seconds"] = datetime.datetime.fromisoformat(promoted).timestamp()
    record("champion", values)


@flow(name="register-trip", on_running=[outlive_reader])
def register_trip(
    recipe: Annotated[str, RECIPE] = "demo",
    source: str | None = None,
    root: str = DEFAULT_ROOT,
    base: str | None = None,
    dataset: str | None = None,
    model: str | None = None,
    report: str | None = None,
    tracking_uri: str | None = None,
    name: str = MODEL_NAME,
    values: Values = None,
    *,
    options: SourceOptions = DEFAULT,
) -> dict[str, Any]:
    """Register a model with its evaluation, and promote it if the gate passed.

    Args:
        recipe: the configuration of the run, a name or a file .toml; see the command `recipes`.
        source: the table that the data set was prepared from.
        root: folder or address that everything is written below.
        base: folder (or hub name) of the text-to-video model to start from, instead of the recipe's.
        dataset: address of a prepared data set, instead of the one that belongs to recipe, source and root.
        model: address of a model folder, instead of the one that was trained with recipe and data set.
        report: address of an evaluation's folder, instead of the one that belongs to the model.
        tracking_uri: MLflow's tracking address; without it MLFLOW_TRACKING_URI or a SQLite file in root.
        name: the model's name in the registry.
        values: FIELD=VALUE, a number of your own instead of the recipe's, as train.steps=200; once for each.
        options: how the source was read.
    """
    uri = tracking_address(tracking_uri, root)
    run = layout.resolve(recipe, source, root, base, options, values)
    data = run.prepared() if dataset is None else layout.data_set(dataset)
    candidate = run.trained(data) if model is None else layout.model_folder(model)
    if report is None:
        report = run.evaluate(candidate, data).output
        from tasks.evaluation_record import REPORT_FILE

        if not storage.exists(storage.join(report, REPORT_FILE)):
            raise UserError(
                f"no finished evaluation of {candidate.uri} below {root}; run the command evaluate-trip first"
            )
    return to_json(register_stage(run, data, candidate, storage.absolute(report), uri, name))
