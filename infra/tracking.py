"""The client of MLflow's tracking store: addresses, experiments, runs, parameters and data sets."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from alembic.util.exc import CommandError
from mlflow.entities import Dataset, DatasetInput, InputTag, Param, RunTag
from mlflow.exceptions import MlflowException
from mlflow.tracking import MlflowClient
from sqlalchemy.exc import SQLAlchemyError

from infra.redaction import redact, without_userinfo
from infra.settings import client_address

KEY_TAG = "trip.key"
SOURCE_TYPE = "uri"
MODEL_HASH = (
    "trip.model_sha256"  # tag of a version: `folder_hash` of its model, checked by the service after a download
)
# Other tags of a version: the hash of the model that was evaluated, the digest of the report, and where it comes from.
EVALUATED_MODEL, REPORT_DIGEST, LINEAGE = "trip.judged_model", "trip.report", "lineage."
PACKAGE = "trip.package"  # tag of a version and of its logged model: the digest of weights and code

_PAUSE_SECONDS = 2.0  # between two questions to a store that does not respond
# Errors of a tracking store that is down, slow, locked, full or just being created; requests' errors are OSErrors.
TROUBLE = (MlflowException, SQLAlchemyError, CommandError, OSError)


def sqlite_file(uri: str) -> Path | None:
    """The database file of a `sqlite:///...` address; None for any other address."""
    return Path(uri.removeprefix("sqlite:///")) if uri.startswith("sqlite:///") else None


def default_artifact_location(uri: str) -> str | None:
    """Address of the artifacts of a new experiment: a folder next to a SQLite file; None lets the server choose."""
    file = sqlite_file(uri)
    return None if file is None else str(file.resolve().parent / "artifacts")


def connect(uri: str) -> MlflowClient:
    """Returns a client of the tracking store and registry at `uri`; creates the folder of a SQLite file."""
    file = sqlite_file(uri)
    if file is not None:
        file.parent.mkdir(parents=True, exist_ok=True)
    for name in ("mlflow.store.db.utils", "alembic", "mlflow.pyfunc"):  # two dozen lines on every new database
        logging.getLogger(name).setLevel(logging.WARNING)
    full = client_address(uri)
    return MlflowClient(tracking_uri=full, registry_uri=full)


def answers(uri: str) -> bool:
    """Whether the tracking store responds; a server that rejects the request does."""
    try:
        connect(uri).search_experiments(max_results=1)
    except MlflowException as error:
        return 400 <= error.get_http_status_code() < 500
    except TROUBLE:
        return False
    return True


def answers_within(uri: str, seconds: float) -> bool:
    """Waits until the tracking store responds, at most `seconds`; whether it does."""
    deadline = time.monotonic() + seconds
    while not (responding := answers(uri)) and time.monotonic() < deadline:
        time.sleep(_PAUSE_SECONDS)
    return responding


def experiment_id(client: MlflowClient, name: str, artifact_location: str | None) -> str:
    """Returns the id of the experiment `name`, and creates it if needed; two processes may do so at once."""
    existing = client.get_experiment_by_name(name)
    if existing is None:
        try:
            return client.create_experiment(name, artifact_location=artifact_location)
        except MlflowException as error:
            if error.error_code != "RESOURCE_ALREADY_EXISTS":
                raise
            existing = client.get_experiment_by_name(name)
            assert existing is not None
    if existing.lifecycle_stage == "deleted":
        client.restore_experiment(existing.experiment_id)
    return existing.experiment_id


def open_run(client: MlflowClient, experiment: str, name: str, key: str | None, tags: Mapping[str, str]) -> str:
    """Returns the id of the run tagged with `key`, set to running, or of a new run; `experiment` is an id."""
    if key:
        runs = client.search_runs([experiment], f"tags.`{KEY_TAG}` = '{key}'", max_results=1)
        if runs:
            run_id = runs[0].info.run_id
            client.update_run(run_id, status="RUNNING")
            for tag, value in tags.items():
                client.set_tag(run_id, tag, value)
            return run_id
    key_tag = {KEY_TAG: key} if key else {}
    return client.create_run(experiment, run_name=name, tags={**tags, **key_tag}).info.run_id


def page_of(uri: str, experiment: str, key: str) -> str:
    """The web address of the run tagged with `key` in the experiment of this name; "" if the store has none."""
    try:
        client = connect(uri)
        existing = client.get_experiment_by_name(experiment)
        ids = [existing.experiment_id] if existing else []
        runs = client.search_runs(ids, f"tags.`{KEY_TAG}` = '{key}'", max_results=1) if ids else []
        return run_page(uri, ids[0], runs[0].info.run_id) if runs else ""
    except TROUBLE:
        return ""


def log_params(client: MlflowClient, run_id: str, params: Mapping[str, Any]) -> None:
    """Logs parameters once. MLflow forbids a changed parameter, so a different value becomes a tag `changed.NAME`."""
    known = client.get_run(run_id).data.params
    values = {str(name): str(value)[:6000] for name, value in params.items()}
    new = [Param(name, value) for name, value in values.items() if name not in known]
    changed = [RunTag(f"changed.{n}", v) for n, v in values.items() if n in known and known[n] != v]
    for start in range(0, len(new), 100):  # the server takes 100 parameters in one call
        client.log_batch(run_id, params=new[start : start + 100])
    if changed:
        client.log_batch(run_id, tags=changed[:100])


def log_dataset(client: MlflowClient, run_id: str, name: str, digest: str, source_uri: str, context: str) -> None:
    """Adds a data set, given by address and digest, to the inputs of a run."""
    source = json.dumps({"uri": source_uri})
    dataset = Dataset(name=name, digest=digest[:36], source_type=SOURCE_TYPE, source=source)
    client.log_inputs(run_id, datasets=[DatasetInput(dataset, tags=[InputTag("mlflow.data.context", context)])])


def run_page(uri: str, experiment: str, run_id: str) -> str:
    """The web address of a run; for a SQLite file also the command that serves it."""
    # MLflow's pages show prompts and traces, and no curves, until another mode is chosen.
    path = f"/#/experiments/{experiment}/runs/{run_id}?workflowType=machine_learning"
    if uri.startswith(("http://", "https://")):
        return without_userinfo(uri).rstrip("/") + path
    return f"http://127.0.0.1:5000{path} (after: mlflow server --port 5000 --backend-store-uri {redact(uri)})"
