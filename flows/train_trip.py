"""Flow: a data set of latents becomes a TRIP model."""

from __future__ import annotations

from dataclasses import replace
from typing import Annotated, Any

from prefect import flow, task

from flows import continuing, layout
from flows.console import log
from flows.events import TRAINED, emit
from flows.layout import EXPERIMENT
from flows.mlflow_store import tracking_address
from flows.parameters import BASE, RECIPE, From
from flows.prefect_artifacts import stage_artifact
from flows.recipe_values import Values
from flows.source import DEFAULT, SourceOptions
from flows.stage import STAGE_POLICY, run_tags
from flows.training_lines import tick_counts, tick_metrics, validation_table
from infra.metrics import record
from infra.output import outlive_reader
from infra.settings import DEFAULT_ROOT
from tasks.records import to_json
from tasks.train.spec import TrackingSpec, TrainReport, TrainSpec, finished_report, spool_file
from tasks.train.spool import Spool

OUTAGE_SECONDS = 180.0  # the end of a training waits this long for an MLflow that does not respond


@task(name="train", **STAGE_POLICY)
def train_stage(spec: TrainSpec, tracking_uri: str, run_name: str) -> TrainReport:
    """Ray Train runs the loop; it continues from the newest complete checkpoint."""
    tracking = TrackingSpec(tracking_uri, EXPERIMENT, run_name, tags=run_tags())
    report = finished_report(spec)
    if report is not None:
        if Spool(spec).exists():
            from tasks.train.job import train

            train(spec, None, tracking)  # delivers metrics that were spooled
        log(f"train       {report.step} steps are done already, smoothed loss {report.loss_last:.4f}")
        return report

    def tick(values: dict[str, Any]) -> None:
        for line in validation_table(values):
            log(line)
        log(tick_counts(values))
        spool = spool_file(spec)
        waiting = {"spool_bytes": spool.stat().st_size if spool.exists() else 0}
        record("train", tick_metrics(values) | waiting)

    from flows.planning.preflight import check_gpu_at_hand
    from infra.cluster import ray_session
    from infra.tracking import answers_within, page_of
    from tasks.train.detached_job import train_detached
    from tasks.train.job import train

    check_gpu_at_hand(spec)
    log(f"train       {spec.steps} steps of {spec.global_batch} clips on {spec.workers} worker(s)")
    with ray_session(None, spec.workers * spec.cpus_per_worker):
        report = (train_detached if spec.detached else train)(spec, tick, tracking)
    if Spool(spec).exists():
        log(f"train       MLflow has not accepted all metrics; waiting for it at most {OUTAGE_SECONDS:.0f} s")
        if answers_within(tracking_uri, OUTAGE_SECONDS):
            train(spec, None, tracking)  # delivers metrics that were spooled
        else:
            log("train       MLflow does not respond; the same command delivers the metrics later")
    losses = f"loss: first step {report.loss_first:.4f}, smoothed {report.loss_last:.4f}"
    log(f"train       {report.step} steps in {report.seconds:.0f} s, {losses}")
    log(f"model       {report.model}")
    numbers = {"steps": report.step, "samples": report.samples_seen, "seconds": f"{report.seconds:.0f}"}
    numbers |= {"smoothed loss": f"{report.loss_last:.4f}"}
    page = page_of(tracking_uri, EXPERIMENT, tracking.key(spec))
    stage_artifact("train-result", run_name, numbers, {"model": report.model, "MLflow": page})
    return report


@flow(name="train-trip", on_running=[outlive_reader])
def train_trip(
    recipe: Annotated[str, RECIPE] = "demo",
    source: str | None = None,
    root: str = DEFAULT_ROOT,
    base: str | None = None,
    dataset: str | None = None,
    tracking_uri: str | None = None,
    start: From = BASE,
    profile: int = 0,
    values: Values = None,
    *,
    options: SourceOptions = DEFAULT,
) -> dict[str, Any]:
    """Train TRIP on a prepared data set; continues from the newest checkpoint.

    Args:
        recipe: the configuration of the run, a name or a file .toml; see the command `recipes`.
        source: the table that the data set was prepared from.
        root: folder or address that everything is written below.
        base: folder (or hub name) of the text-to-video model to start from, instead of the recipe's.
        dataset: address of a prepared data set, instead of the one that belongs to recipe, source and root.
        tracking_uri: MLflow's tracking address; without it MLFLOW_TRACKING_URI or a SQLite file in root.
        start: base; last, the training below the root that finished last; champion, of the registry; or the address
            of a trained model. The recipe's steps are trained in addition.
        profile: number of steps in a trace of torch's profiler, in the folder `profile` of the training's output.
        values: FIELD=VALUE, a number of your own instead of the recipe's, as train.steps=200; once for each.
        options: how the source was read.
    """
    uri = tracking_address(tracking_uri, root)
    run = layout.resolve(recipe, source, root, base, options, values)
    parent = continuing.find_parent(run, start, uri)
    data = run.prepared() if dataset is None else layout.data_set(dataset)
    spec = replace(continuing.training(run, data, parent), profile=profile or run.recipe.train.profile)
    report = train_stage(spec, uri, f"train {run.recipe.name}")
    evaluation = {"recipe": recipe, "source": source, "root": root, "base": base, "dataset": data.uri}
    evaluation |= {"model": report.model, "tracking_uri": tracking_uri, "values": values, "options": to_json(options)}
    emit(TRAINED, report.model, evaluation)
    return to_json(report)
