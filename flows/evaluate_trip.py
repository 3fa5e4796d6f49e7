"""Flow: a model is evaluated on a protocol's clips, next to other methods."""

from __future__ import annotations

import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

from prefect import flow, task

from flows import layout
from flows.console import log
from flows.layout import EXPERIMENT, Run
from flows.mlflow_store import tracking_address
from flows.parameters import PROTOCOL, RECIPE
from flows.prefect_artifacts import stage_artifact
from flows.recipe_values import Values
from flows.source import DEFAULT, SourceOptions
from flows.stage import STAGE_POLICY, run_tags
from infra import storage
from infra.metrics import record
from infra.output import outlive_reader
from infra.settings import DEFAULT_ROOT, code_version
from tasks.evaluate.spec import EvaluateReport, EvaluateSpec
from tasks.evaluation_record import PAGE_FILE
from tasks.metrics.extractors.files import NONE, ExtractorFiles
from tasks.records import Artifact, to_json


def with_extractors(spec: EvaluateSpec, extractors: ExtractorFiles) -> EvaluateSpec:
    """The spec with these files, or with its own if there are none; made absolute for workers in other folders."""
    return replace(spec, judges=(spec.judges if extractors == NONE else extractors).absolute())


def with_base_row(spec: EvaluateSpec, run: Run) -> EvaluateSpec:
    """The spec with the recipe's untrained base as a row; evaluations below one root share the base's clips.

    Leaves the row out, with a log line, if the model was trained from another base.
    """
    from tasks.evaluate.animators import base_sha256

    base = Artifact(run.recipe.train.base, layout.base_hash(run.recipe.train.base))
    if base.sha256 != base_sha256(spec.model):
        log(f"evaluate   no row of the untrained base: {spec.model} was not trained from {base.uri}; give its --base")
        return spec
    return replace(spec, base=base, base_clips=storage.join(run.root, "base_clips"))


@task(name="evaluate", **STAGE_POLICY)
def evaluate_stage(spec: EvaluateSpec) -> EvaluateReport:
    """Ray actors generate clips and extract features; finished clips are kept."""
    from tasks.evaluate.job import evaluate

    began = time.time()
    report = evaluate(spec, log)
    result = {"stage_seconds": time.time() - began, "complete_timestamp_seconds": time.time()}
    record("evaluate", result | {"gate_passed": int(report.passed)})
    numbers = {"clips": report.clips, "gate": "passed" if report.passed else "; ".join(report.gate.reasons)}
    numbers |= {rule.rule: "passed" if rule.passed else rule.reason for rule in report.gate.rules}
    stage_artifact(
        "evaluate-result", f"protocol {spec.protocol}", numbers, {"report": storage.join(report.uri, PAGE_FILE)}
    )
    return report


@task(name="track-evaluation", **STAGE_POLICY)
def track_evaluation(report: EvaluateReport, dataset: str, tracking_uri: str) -> str:
    """Logs metrics and files of a report to an MLflow run, linked to model, data and code; returns the run's address.

    The same report is the same run. If the store fails, it logs the reason and returns "".
    """
    from infra.telemetry import Tracking
    from tasks.register.report_facts import read_report

    facts = read_report(report.uri)
    origin = facts.record.provenance
    names = ("model_sha256", "dataset_manifest_sha256", "protocol_sha", "protocol", "model", "dataset")
    tags = {f"evaluation.{name}": str(origin[name]) for name in names}
    tags |= run_tags() | {
        "evaluation.code_version": code_version(),
        "evaluation.gate": "passed" if report.passed else "not passed",
    }
    tracking = Tracking(tracking_uri, EXPERIMENT)
    tracking.start_run(f"evaluate {origin['protocol']}", key=f"evaluate-{facts.record.digest}", tags=tags)
    tracking.dataset_input("latents", origin["dataset_manifest_sha256"], dataset, "evaluation")
    tracking.metrics(facts.metrics, 0)
    with tempfile.TemporaryDirectory() as scratch:
        facts.copy_files(Path(scratch))
        tracking.artifacts(scratch, "evaluation")
        delivered = tracking.finish(wait_seconds=120)
    if not delivered:
        reason = tracking.last_error or "no answer"
        log(f"evaluate   tracking at {tracking_uri} did not accept the report ({reason}); repeat the command to log it")
        return ""
    log(f"evaluate   logged to {tracking.run_page}")
    return tracking.run_page


@flow(name="evaluate-trip", on_running=[outlive_reader])
def evaluate_trip(
    recipe: Annotated[str, RECIPE] = "demo",
    source: str | None = None,
    root: str = DEFAULT_ROOT,
    base: str | None = None,
    dataset: str | None = None,
    model: str | None = None,
    held_out: str | None = None,
    protocol: Annotated[str | None, PROTOCOL] = None,
    method: list[str] | None = None,
    champion: str | None = None,
    tracking_uri: str | None = None,
    base_row: bool = True,
    values: Values = None,
    *,
    extractors: ExtractorFiles = NONE,
    options: SourceOptions = DEFAULT,
) -> dict[str, Any]:
    """Evaluate a model on a protocol's clips, next to other methods; continues an earlier call.

    Args:
        recipe: the configuration of the run, a name or a file .toml; see the command `recipes`.
        source: the table that the data set was prepared from.
        root: folder or address that everything is written below.
        base: folder (or hub name) of the text-to-video model to start from, instead of the recipe's.
        dataset: address of a prepared data set, instead of the one that belongs to recipe, source and root.
        model: address of a model folder, instead of the one that was trained with recipe and data set.
        held_out: address of another prepared data set, none of which was trained on, to evaluate on.
        protocol: a preset (held-out, folder, webvid-2048, dtdb-clean, cinn-exact, ...), a preset's file .toml
            of your own, or the protocol.json of a report.
        method: NAME=FOLDER, another method's videos by the protocol's keys: KEY.mp4, KEY.gif, KEY.npz or KEY/ with
            numbered frames (png, jpg, ..); once for each method.
        champion: folder of an earlier report of the same items; the gate asks whether the model is not worse.
        tracking_uri: where MLflow keeps this evaluation too; a registration logs it in any case.
        base_row: also animate with the untrained base, as a row of the table. It costs as much as animating with the
            model, once for all models of this base below the root.
        values: FIELD=VALUE, a number of your own instead of the recipe's, as train.steps=200; once for each.
        extractors: files of the feature extractors; without one, a fixed random network is used under another name.
        options: how the source was read.
    """
    from tasks.evaluate.protocol.baselines import parse_methods

    uri = tracking_uri and tracking_address(tracking_uri, root)
    methods = parse_methods(method or [])
    run = layout.resolve(recipe, source, root, base, options, values)
    data = layout.data_set(held_out) if held_out is not None else None
    if model is None or data is None:
        trained_on = layout.data_set(dataset) if dataset is not None else run.prepared()
        data = data or trained_on
        candidate = run.trained(trained_on) if model is None else layout.model_folder(model)
    else:
        candidate = layout.model_folder(model)
    spec = run.evaluate(candidate, data, protocol, foreign=held_out is not None)
    if base_row:
        spec = with_base_row(spec, run)
    champion = champion and storage.absolute(champion)
    report = evaluate_stage(replace(with_extractors(spec, extractors), methods=methods, champion=champion))
    if uri is not None:
        track_evaluation(report, spec.dataset, uri)
    return to_json(report)
