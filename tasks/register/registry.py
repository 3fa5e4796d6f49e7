"""Registers a model with its evaluation report: MLflow run, package, version, consumer check and promotion."""

from __future__ import annotations

import hashlib
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from mlflow.entities import LoggedModelOutput, Metric
from mlflow.entities.model_registry import ModelVersion
from mlflow.exceptions import MlflowException
from mlflow.models import Model
from mlflow.tracking import MlflowClient

from infra import storage, tracking
from infra.settings import MODEL_NAME
from infra.tracking import EVALUATED_MODEL, LINEAGE, PACKAGE, REPORT_DIGEST
from tasks.model_folder import local_model
from tasks.records import UserError, digest
from tasks.register import packaging
from tasks.register.consumer import addresses, call_as_consumer
from tasks.register.model_card import write_model_card
from tasks.register.promotion import (
    CANDIDATE,
    CHAMPION,
    PromotionRefused,
    open_registry,
    promote,
    sync_aliases,
    version_ref,
)
from tasks.register.report_facts import ReportFacts, read_report
from trip_model.folders import RECORD, file_hashes, files_hash
from trip_model.images import load_image
from trip_model.request_limits import check_photo


@dataclass(frozen=True)
class RegisterSpec:
    """The model to register, and the registry.

    Args:
        model: address of an exported model folder.
        report: address of the evaluation's folder with report.json.
        lineage: the origin of the model (data_uri, data_digest, data_terms, recipe, recipe_hash, base, base_hash,
            base_terms, code_version, train_run...).
        photo: photo of the consumer check and the input example; by default a drawn one.
        prompt: prompt of the consumer check and the input example.
        check_steps: denoising steps of the consumer check.
        tags: of the MLflow run and of the version, such as the flow run.
    """

    model: str
    report: str
    tracking_uri: str
    name: str = MODEL_NAME
    experiment: str = "trip"
    artifact_location: str | None = None
    lineage: dict[str, str] = field(default_factory=dict)
    photo: str | None = None
    prompt: str = "a red circle moving right slowly"
    check_steps: int = 4
    tags: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class RegisterReport:
    """The registered version, new or existing, its aliases and the result of its consumer check."""

    name: str
    version: str
    aliases: tuple[str, ...]
    run_id: str
    run_page: str
    model_uri: str
    promoted: bool
    reasons: tuple[str, ...]
    consumer_check: str


def register(spec: RegisterSpec, progress: Callable[[str], None] = print) -> RegisterReport:
    """Registers one model with one report; repeated with both, it completes and returns the existing version.

    `candidate` points to the version in any case; `champion` only after its consumer check and if `promotion.promote`
    accepts it.

    Raises:
        UserError: a model folder, report or photo that is missing or malformed, a report of another model, or a
            tracking store out of reach.
    """
    report = read_report(spec.report)
    folder = local_model(spec.model).resolve()
    settings = packaging.read_model_json(folder, RECORD)
    hashes = file_hashes(folder)  # the check at the registry's door; nothing after it hashes the folder again
    model_sha256 = files_hash(hashes)
    if report.record.model_sha256 not in ("", model_sha256):
        raise UserError(f"the report at {spec.report!r} is of another model than {spec.model!r}; evaluate this model")
    photo = _photo(spec.photo, int(settings["config"]["size"]))
    client = open_registry(spec.tracking_uri)
    spec = replace(spec, lineage=spec.lineage | _parent(client, spec.name, settings))
    with addresses(spec.tracking_uri):
        experiment = tracking.experiment_id(client, spec.experiment, _artifact_location(spec))
        package_digest = _package_digest(model_sha256)
        key = f"register-{spec.name}-{package_digest}-{report.record.digest}"
        run_id = tracking.open_run(
            client, experiment, f"register {spec.name}", key, {"trip.stage": "register"} | spec.tags
        )
        status = "FAILED"
        try:
            result = _register(
                client, experiment, run_id, spec, report, folder, hashes, settings, photo, package_digest, progress
            )
            status = "FINISHED"
        finally:
            client.set_terminated(run_id, status)
    return result


def _register(
    client: MlflowClient,
    experiment: str,
    run_id: str,
    spec: RegisterSpec,
    report: ReportFacts,
    folder: Path,
    hashes: dict[str, bytes],
    settings: dict[str, Any],
    photo: bytes,
    package_digest: str,
    progress: Callable[[str], None],
) -> RegisterReport:
    version = _find_version(client, spec.name, package_digest, report.record.digest)
    if version is None:
        progress(f"register: logging scores, plots and clips to run {run_id}")
        card = _card(spec, folder, settings, report)
        _log_run(client, run_id, spec, settings, report, card)
        progress(f"register: logging the model ({_size_mb(folder):.1f} MB)")
        model_id = _log_model(client, experiment, run_id, spec, folder, hashes, settings, photo, package_digest)
        version = _create_version(client, spec, run_id, model_id, card, package_digest, report)
        progress(f"register: version {version.version} of {spec.name}")
    if version.tags.get("trip.done") != "yes":
        client.set_registered_model_alias(spec.name, CANDIDATE, version.version)
        # By number: another registration may move the alias meanwhile.
        progress(f"register: calling models:/{spec.name}/{version.version} as a consumer")
        check = call_as_consumer(f"models:/{spec.name}/{version.version}", photo, spec.prompt, spec.check_steps)
        for tag, value in {**report.origin(), "trip.consumer_check": check}.items():
            client.set_model_version_tag(spec.name, version.version, tag, value)
        progress(f"register: {check}")
        _promote_once(client, spec.name, version, progress)
        client.set_model_version_tag(spec.name, version.version, "trip.done", "yes")
    return _report(client, spec, experiment, version.version, report)


def _promote_once(client: MlflowClient, name: str, version: ModelVersion, progress: Callable[[str], None]) -> None:
    """Promotes a new version. One in the log was promoted before a kill, and others may have replaced it since."""
    if any(entry.promoted == version_ref(version) for entry in sync_aliases(client, name).entries):
        return
    try:
        promote(client, name, str(version.version))
    except PromotionRefused as error:
        progress(f"register: {error}")


def _artifact_location(spec: RegisterSpec) -> str | None:
    return spec.artifact_location or tracking.default_artifact_location(spec.tracking_uri)


def _photo(uri: str | None, size: int) -> bytes:
    if uri is None:
        return packaging.drawn_photo(size)
    try:
        data = storage.read_bytes(uri)
        check_photo(data)
        load_image(data, 8)
    except (OSError, ValueError) as error:
        raise UserError(f"photo {uri!r} cannot be read ({error}); give a JPEG, PNG or WebP photo") from error
    return data


def _package_digest(model_sha256: str) -> str:
    """The identity of a package: a digest of the exported weights and the code."""
    caller = hashlib.sha256(packaging.CODE_FILE.read_bytes()).hexdigest()
    return digest({"model": model_sha256, "wheel": packaging.package_code(), "caller": caller})


def _size_mb(folder: Path) -> float:
    return sum(p.stat().st_size for p in folder.rglob("*") if p.is_file()) / 1e6


def _find_version(client: MlflowClient, name: str, package_digest: str, report_digest: str) -> ModelVersion | None:
    for version in client.search_model_versions(f"name = '{name}'"):
        tags = version.tags
        if (tags.get(PACKAGE), tags.get(REPORT_DIGEST)) == (package_digest, report_digest):
            return version
    return None


def _parent(client: MlflowClient, name: str, settings: dict[str, Any]) -> dict[str, str]:
    """Of a model that continues another one: that model, its newest version, and steps and samples of both in all."""
    names = ("parent_sha256", "total_steps", "total_samples")
    lineage = {n: str(settings["provenance"][n]) for n in names if n in settings.get("provenance", {})}
    if lineage:
        versions = client.search_model_versions(f"name = '{name}'")
        of_parent = [int(v.version) for v in versions if v.tags.get(EVALUATED_MODEL) == lineage["parent_sha256"]]
        lineage["parent_version"] = str(max(of_parent)) if of_parent else "not registered"
    return lineage


def _card(spec: RegisterSpec, folder: Path, settings: dict[str, Any], report: ReportFacts) -> str:
    schedule = packaging.read_model_json(folder, "scheduler", "scheduler_config.json")
    return write_model_card(
        spec.name,
        spec.lineage,
        packaging.flatten(settings),
        schedule,
        report.scores,
        report.record.gate,
        report.record.notes,
        sampling_defaults(settings),
    )


def _log_run(
    client: MlflowClient, run_id: str, spec: RegisterSpec, settings: dict[str, Any], report: ReportFacts, card: str
) -> None:
    tracking.log_params(client, run_id, packaging.flatten({"model": settings, "lineage": spec.lineage}))
    if "data_digest" in spec.lineage:
        uri = spec.lineage.get("data_uri", "")
        tracking.log_dataset(client, run_id, "latents", spec.lineage["data_digest"], uri, "training")
    # Step and time are fixed, so that a repeated registration adds no points.
    points = [Metric(name, value, 0, 0) for name, value in report.metrics.items()]
    for start in range(0, len(points), 900):
        client.log_batch(run_id, metrics=points[start : start + 900])
    client.log_text(run_id, card, "model_card/README.md")
    with tempfile.TemporaryDirectory() as scratch:
        report.copy_files(Path(scratch))
        client.log_artifacts(run_id, scratch, "evaluation")


def _log_model(
    client: MlflowClient,
    experiment: str,
    run_id: str,
    spec: RegisterSpec,
    folder: Path,
    hashes: dict[str, bytes],
    settings: dict[str, Any],
    photo: bytes,
    package_digest: str,
) -> str:
    """Logs the package, unless an interrupted registration has logged it; returns the id of the logged model."""
    for existing in client.search_logged_models([experiment], f"tags.`{PACKAGE}` = '{package_digest}'"):
        if existing.status == "READY":
            return existing.model_id
    tags = {PACKAGE: package_digest}
    logged = client.create_logged_model(experiment, spec.name, run_id, tags, model_type="image-to-video")
    record = Model(run_id=run_id, model_uuid=logged.model_id, model_id=logged.model_id)
    with tempfile.TemporaryDirectory() as scratch:
        package = Path(scratch) / "model"
        defaults = sampling_defaults(settings)
        model_hash = packaging.save_package(folder, hashes, package, photo, spec.prompt, defaults, record)
        client.log_model_artifacts(logged.model_id, str(package))
    client.set_logged_model_tags(logged.model_id, {tracking.MODEL_HASH: model_hash})
    client.finalize_logged_model(logged.model_id, "READY")
    client.log_outputs(run_id, [LoggedModelOutput(logged.model_id, step=0)])
    return logged.model_id


def sampling_defaults(settings: dict[str, Any]) -> dict[str, Any]:
    """Returns num_frames, steps, guidance and fps of a model's trip.json."""
    config = settings["config"]
    steps = config["schedule"]["sampling_steps"]
    return {"num_frames": config["num_frames"], "steps": steps, "guidance": config["guidance"], "fps": config["fps"]}


def _create_version(
    client: MlflowClient,
    spec: RegisterSpec,
    run_id: str,
    model_id: str,
    card: str,
    package_digest: str,
    report: ReportFacts,
) -> ModelVersion:
    try:
        client.create_registered_model(
            spec.name, description="Image-to-video with TRIP: makes a clip from a photo and a prompt."
        )
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise
    tags = {
        PACKAGE: package_digest,
        tracking.MODEL_HASH: client.get_logged_model(model_id).tags[tracking.MODEL_HASH],
        REPORT_DIGEST: report.record.digest,
        "trip.gate": "passed" if report.record.gate.passed else "not passed",
        "trip.gate_reasons": "; ".join(report.record.gate.reasons)[:4900] or "none",
        **{f"{LINEAGE}{name}": str(value)[:4900] for name, value in spec.lineage.items()},
        **spec.tags,
    }
    text = card.partition("\n")[2].strip()[:4900]  # MLflow's list of versions shows the first line, which is the title
    return client.create_model_version(
        spec.name, f"models:/{model_id}", run_id=run_id, tags=tags, description=text, model_id=model_id
    )


def _report(
    client: MlflowClient, spec: RegisterSpec, experiment: str, number: str, report: ReportFacts
) -> RegisterReport:
    version = client.get_model_version(spec.name, number)
    aliases = tuple(sorted(version.aliases))
    refused = ()
    if "trip.promoted_at" not in version.tags and "trip.promotion_refused" in version.tags:
        refused = (version.tags["trip.promotion_refused"],)
    run_id = version.run_id or ""
    return RegisterReport(
        name=spec.name,
        version=str(version.version),
        aliases=aliases,
        run_id=run_id,
        run_page=tracking.run_page(spec.tracking_uri, experiment, run_id),
        model_uri=f"models:/{spec.name}@{CHAMPION if CHAMPION in aliases else CANDIDATE}"
        if aliases
        else f"models:/{spec.name}/{version.version}",
        promoted=CHAMPION in aliases,
        reasons=report.record.gate.reasons or refused,
        consumer_check=version.tags.get("trip.consumer_check", ""),
    )
