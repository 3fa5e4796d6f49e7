"""Flow: a model is judged on a protocol's clips, beside other methods."""

from __future__ import annotations

import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

from prefect import flow, task

from flows.console import tell
from flows.recipes import Recipe, find_recipe
from flows.source import PLAIN, Reading, named_source
from flows.stage import STAGE_POLICY, address, code_version
from flows.train_trip import EXPERIMENT, planned_training, prepared_dataset
from infra import storage
from infra.tracking import Tracking
from tasks.evaluate.job import evaluate
from tasks.evaluate.methods import parse_methods
from tasks.evaluate.spec import EvaluateReport, EvaluateSpec
from tasks.judges.judge import JudgeFiles
from tasks.records import UserError, to_json
from tasks.register.report_facts import read_report
from tasks.shards import ShardDataset
from tasks.train.spec import finished_report
from trip_model.encoders import folder_hash

NONE = JudgeFiles()
_FILES = ("clip_model", "i3d", "inception", "videomae", "raft")


def trained_model(recipe: Recipe, dataset: str, root: str) -> str:
    """The address of the model of this recipe, data set and root. Raises UserError when it is not trained yet."""
    report = finished_report(planned_training(recipe, dataset, root))
    if report is None:
        raise UserError(
            f"no finished training of recipe {recipe.name!r} below {root}; run the command train-trip first"
        )
    return report.model


def planned_evaluation(
    recipe: Recipe, model: str, dataset: str, root: str, protocol: str | None = None, foreign: bool = False
) -> EvaluateSpec:
    """The spec of the stage, its addresses filled in. `foreign` data were never trained on: all of it is held out.

    The recipe's protocol is for such data; of the data that was trained on, what was held out is judged unless named.
    The address goes by what decides TRIP's own clips: other judges and methods are further rows and columns of the same
    report, and find the clips that are there.
    """
    fraction = 1.0 if foreign else recipe.train.held_out_fraction
    addresses = {"model": storage.absolute(model), "dataset": storage.absolute(dataset)}
    spec = replace(recipe.evaluate, held_out_fraction=fraction, **addresses)
    spec = replace(spec, protocol=protocol or (spec.protocol if foreign else "held-out"))
    try:
        model_hash = folder_hash(storage.local_folder(spec.model))
    except FileNotFoundError as error:
        raise UserError(f"no model folder at {model!r}; give the folder that training exported") from error
    identity = {
        "model": model_hash,
        "dataset": ShardDataset(spec.dataset).manifest_sha256,
        "numbers": [spec.clips, fraction, spec.steps, spec.guidance, spec.seed, spec.batch],
        "protocol": spec.protocol,
    }
    return replace(spec, output=address(root, "evaluate", identity))


def judged_with(spec: EvaluateSpec, judges: JudgeFiles) -> EvaluateSpec:
    """The spec with these files of judges, or where there are none with its own."""
    given = spec.judges if judges == NONE else judges
    places = {name: getattr(given, name) for name in _FILES}  # made absolute: workers have another working directory
    return replace(spec, judges=replace(given, **{k: storage.absolute(place) for k, place in places.items() if place}))


@task(name="evaluate", **STAGE_POLICY)
def evaluate_stage(spec: EvaluateSpec) -> EvaluateReport:
    """Ray actors generate and judge; clips that are done are kept."""
    return evaluate(spec, tell)


@task(name="track-evaluation", **STAGE_POLICY)
def track_evaluation(report: EvaluateReport, dataset: str, tracking_uri: str) -> str:
    """Logs numbers and files of a report to an MLflow run, linked to model, data and code; returns the run's page.

    The same report is the same run. A store in trouble is told of and stops nothing: the page is "" then.
    """
    facts = read_report(report.uri)
    origin = storage.read_json(storage.join(report.uri, "report.json"))["provenance"]
    names = ("model_sha256", "dataset_manifest_sha256", "protocol_sha", "protocol", "model", "dataset")
    tags = {f"evaluation.{name}": str(origin[name]) for name in names}
    tags |= {"evaluation.code_version": code_version(), "evaluation.gate": "passed" if report.passed else "not passed"}
    tracking = Tracking(tracking_uri, EXPERIMENT)
    tracking.start_run(f"evaluate {origin['protocol']}", key=f"evaluate-{facts.digest}", tags=tags)
    tracking.dataset_input("latents", origin["dataset_manifest_sha256"], dataset, "evaluation")
    tracking.metrics(facts.metrics, 0)
    with tempfile.TemporaryDirectory() as scratch:
        facts.copy_files(Path(scratch))
        tracking.artifacts(scratch, "evaluation")
        delivered = tracking.finish(wait_seconds=120)
    if not delivered:
        reason = tracking.last_error or "no answer"
        tell(f"evaluate   tracking at {tracking_uri} did not take the report ({reason}); repeat the command to log it")
        return ""
    tell(f"evaluate   logged to {tracking.run_page}")
    return tracking.run_page


@flow(name="evaluate-trip")
def evaluate_trip(
    recipe: str = "demo",
    source: str | None = None,
    root: str = "runs/demo",
    base: str | None = None,
    dataset: str | None = None,
    model: str | None = None,
    held_out: str | None = None,
    protocol: str | None = None,
    method: list[str] | None = None,
    champion: str | None = None,
    tracking_uri: str | None = None,
    *,
    judges: JudgeFiles = NONE,
    reading: Reading = PLAIN,
) -> dict[str, Any]:
    """Judge a model on a protocol's clips, beside other methods; continues what an earlier call began.

    Args:
        recipe: which numbers to use; see the command `recipes`.
        source: the table that the data set was prepared from.
        root: folder or address that everything is written below.
        base: folder (or hub name) of the text-to-video model to start from, instead of the recipe's.
        dataset: address of a prepared data set, instead of the one that belongs to recipe, source and root.
        model: address of a model folder, instead of the one that was trained with recipe and data set.
        held_out: address of another prepared data set, none of which was trained on, to judge by.
        protocol: a preset (held-out, folder, webvid-2048, dtdb-clean, cinn-exact, ...), a preset's file .toml
            of your own, or the protocol.json of a report.
        method: NAME=FOLDER, another method's videos by the protocol's keys: KEY.mp4, KEY.gif, KEY.npz or KEY/ with
            numbered frames (png, jpg, ..); once for each method.
        champion: folder of an earlier report of the same items; the gate asks whether the model is not worse.
        tracking_uri: where MLflow keeps this evaluation too; a registration logs it in any case.
        judges: files of the judges; without them fixed random nets stand in under names of their own.
        reading: how the source was read.
    """
    chosen = find_recipe(recipe, base)
    methods = parse_methods(method or [])
    if model is None or held_out is None:
        dataset = dataset or prepared_dataset(chosen, named_source(source, reading), root)
    if model is None:
        assert dataset is not None
        model = trained_model(chosen, dataset, root)
    judged_by = held_out or dataset
    assert judged_by is not None
    spec = planned_evaluation(chosen, model, judged_by, root, protocol, foreign=held_out is not None)
    champion = champion and storage.absolute(champion)
    report = evaluate_stage(replace(judged_with(spec, judges), methods=methods, champion=champion))
    if tracking_uri is not None:
        track_evaluation(report, spec.dataset, tracking_uri)
    return to_json(report)
