"""Reports a training run to MLflow from a thread of its own, so that a slow or absent server never stops training."""

from __future__ import annotations

import json
import logging
import re
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import requests
from mlflow.entities import Dataset, DatasetInput, InputTag, LoggedModel, Metric, Param, RunTag
from mlflow.exceptions import MlflowException
from mlflow.protos.databricks_pb2 import INVALID_PARAMETER_VALUE
from mlflow.tracking import MlflowClient
from sqlalchemy.exc import SQLAlchemyError

from infra.outbox import Outbox, Record
from infra.redaction import redact, without_userinfo
from infra.settings import client_address

KEY_TAG = "trip.key"
SOURCE_TYPE = "uri"
MODEL_HASH = "trip.model_sha256"  # tag of a version: `folder_hash` of its model, which the service checks a download by

# What a tracking store that is down, slow, locked or full raises; requests' errors are OSErrors.
TROUBLE = (MlflowException, SQLAlchemyError, OSError)

_log = logging.getLogger(__name__)
_METRIC_NAME = re.compile(r"[^\w./ :-]")
_METRICS_PER_BATCH = 900  # the server takes 1000 entities in one call
_SYSTEM_METRICS_SECONDS = 10.0
_ANSWERS_THAT_CHANGE = frozenset({401, 403, 407, 408, 425, 429})


def sqlite_file(uri: str) -> Path | None:
    """The database file of a `sqlite:///...` address; None for any other address."""
    return Path(uri.removeprefix("sqlite:///")) if uri.startswith("sqlite:///") else None


def default_artifact_location(uri: str) -> str | None:
    """Where artifacts of a new experiment go: a folder beside a SQLite file; None leaves it to the server."""
    file = sqlite_file(uri)
    return None if file is None else str(file.resolve().parent / "artifacts")


def connect(uri: str) -> MlflowClient:
    """A client of the tracking store and registry at `uri`; makes the folder of a SQLite file."""
    file = sqlite_file(uri)
    if file is not None:
        file.parent.mkdir(parents=True, exist_ok=True)
    for name in ("mlflow.store.db.utils", "alembic", "mlflow.pyfunc"):  # two dozen lines on every new database
        logging.getLogger(name).setLevel(logging.WARNING)
    full = client_address(uri)
    return MlflowClient(tracking_uri=full, registry_uri=full)


def experiment_id(client: MlflowClient, name: str, artifact_location: str | None) -> str:
    """The id of the experiment called `name`, made if there is none; safe when two processes start at once."""
    found = client.get_experiment_by_name(name)
    if found is None:
        try:
            return client.create_experiment(name, artifact_location=artifact_location)
        except MlflowException as error:
            if error.error_code != "RESOURCE_ALREADY_EXISTS":
                raise
            found = client.get_experiment_by_name(name)
            assert found is not None
    if found.lifecycle_stage == "deleted":
        client.restore_experiment(found.experiment_id)
    return found.experiment_id


def open_run(client: MlflowClient, experiment: str, name: str, key: str | None, tags: Mapping[str, str]) -> str:
    """The id of the run that carries `key`, set running again, or of a new run; `experiment` is an experiment's id."""
    if key:
        found = client.search_runs([experiment], f"tags.`{KEY_TAG}` = '{key}'", max_results=1)
        if found:
            run_id = found[0].info.run_id
            client.update_run(run_id, status="RUNNING")
            for tag, value in tags.items():
                client.set_tag(run_id, tag, value)
            return run_id
    own = {KEY_TAG: key} if key else {}
    return client.create_run(experiment, run_name=name, tags={**tags, **own}).info.run_id


def log_params(client: MlflowClient, run_id: str, params: Mapping[str, Any]) -> None:
    """Logs parameters once; MLflow forbids changing one, so a later, different value becomes a tag `changed.NAME`."""
    known = client.get_run(run_id).data.params
    values = {str(name): str(value)[:6000] for name, value in params.items()}
    new = [Param(name, value) for name, value in values.items() if name not in known]
    changed = [RunTag(f"changed.{n}", v) for n, v in values.items() if n in known and known[n] != v]
    for start in range(0, len(new), 100):  # the server takes 100 parameters in one call
        client.log_batch(run_id, params=new[start : start + 100])
    if changed:
        client.log_batch(run_id, tags=changed[:100])


def log_dataset(client: MlflowClient, run_id: str, name: str, digest: str, source_uri: str, context: str) -> None:
    """Links a data set, known by its address and digest, to the inputs of a run."""
    source = json.dumps({"uri": source_uri})
    dataset = Dataset(name=name, digest=digest[:36], source_type=SOURCE_TYPE, source=source)
    client.log_inputs(run_id, datasets=[DatasetInput(dataset, tags=[InputTag("mlflow.data.context", context)])])


def run_page(uri: str, experiment: str, run_id: str) -> str:
    """Where a person sees a run: its address, and for a SQLite file also the command that serves it."""
    path = f"/#/experiments/{experiment}/runs/{run_id}"
    if uri.startswith(("http://", "https://")):
        return without_userinfo(uri).rstrip("/") + path
    return f"http://127.0.0.1:5000{path} (after: mlflow server --port 5000 --backend-store-uri {redact(uri)})"


def system_monitors() -> list[Any]:
    """mlflow's own monitors of this machine's processors, disk, network and GPUs; none where psutil is missing."""
    try:
        from mlflow.system_metrics.metrics.cpu_monitor import CPUMonitor
        from mlflow.system_metrics.metrics.disk_monitor import DiskMonitor
        from mlflow.system_metrics.metrics.network_monitor import NetworkMonitor
    except ImportError:
        return []
    from mlflow.system_metrics.metrics.gpu_monitor import GPUMonitor

    monitors: list[Any] = [CPUMonitor(), DiskMonitor(), NetworkMonitor()]
    try:
        monitors.append(GPUMonitor())
    except (ImportError, RuntimeError):  # no NVML here, or no GPU
        pass
    monitors[0].collect_metrics()  # a processor's load is measured between two calls
    monitors[0].clear_metrics()
    return monitors


class Tracking:
    """One training run in MLflow, written in order by a background thread.

    No method raises for a tracking store in trouble, and none waits but `start_run`, `flush` and `finish`, which have
    a limit. What could not be delivered stays queued, is tried again with growing pauses, and is kept as JSON lines in
    `spool` if that path is given; the next `start_run` with the same spool sends it first (`infra/outbox.py`).
    """

    def __init__(
        self, uri: str, experiment: str, artifact_location: str | None = None, spool: str | Path | None = None
    ) -> None:
        self.uri = uri
        self.experiment = experiment
        self.artifact_location = artifact_location or default_artifact_location(uri)
        self.run_id = ""
        self._experiment_id = ""
        self._opening: Record = {}
        self._logged_step: dict[str, int] = {}
        self._client: MlflowClient | None = None
        self._monitors: list[Any] | None = None
        self._monitored = 0.0
        self._started = self._finished = False
        self._outbox = Outbox(f"tracking at {redact(uri)}", self._send, _batch_size, TROUBLE, _refused, spool)

    @property
    def failures(self) -> int:
        """How many attempts to reach the store have failed."""
        return self._outbox.failures

    @property
    def dropped(self) -> int:
        """How many records were given up: refused by the store, or the queue was full."""
        return self._outbox.dropped

    @property
    def last_error(self) -> str:
        """What the store, or the way to it, said last; "" while all went well."""
        return self._outbox.last_error

    @property
    def run_page(self) -> str:
        """Where a person sees the run; "" while it has none."""
        return run_page(self.uri, self._experiment_id, self.run_id) if self.run_id else ""

    def start_run(
        self,
        name: str,
        run_id: str | None = None,
        key: str | None = None,
        params: Mapping[str, Any] | None = None,
        tags: Mapping[str, str] | None = None,
        wait_seconds: float = 30.0,
    ) -> str:
        """Opens a run, or takes up the one named by `run_id` or tagged with `key`; returns its id.

        A run taken up again ignores metrics at steps it already has, so a training that was killed and repeats its
        last steps leaves one point per step. Returns "" when the store does not answer within `wait_seconds`; the
        run is then opened later, in the background.
        """
        if self._started:
            raise ValueError(f"run {name!r}: this Tracking already has a run, make a new one")
        self._started = True
        start = {"op": "start", "name": name, "run_id": run_id, "key": key}
        start.update(params=dict(params or {}), tags={k: str(v) for k, v in (tags or {}).items()})
        self._opening = self._put(start)
        self._outbox.start()
        if wait_seconds and not self._outbox.flush(wait_seconds, failures=3):
            _log.warning(
                "tracking at %s gave no run yet, going on: %s", redact(self.uri), self.last_error or "no answer"
            )
        return self.run_id

    def metrics(self, values: Mapping[str, float], step: int) -> None:
        """Queues numbers of one step; returns at once."""
        clean = {_METRIC_NAME.sub("_", name): float(value) for name, value in values.items()}
        self._put({"op": "metrics", "values": clean, "step": int(step), "time_ms": int(time.time() * 1000)})

    def system_metrics(self, step: int) -> None:
        """Queues the state of this machine as `system/...`, at most once in ten seconds; nothing without psutil.

        The training step is their step, so that a resumed run goes on where it was.
        """
        if self._monitors is None:
            self._monitors = system_monitors()
        if not self._monitors or time.monotonic() - self._monitored < _SYSTEM_METRICS_SECONDS:
            return
        self._monitored = time.monotonic()
        values: dict[str, float] = {}
        for monitor in self._monitors:
            try:
                monitor.collect_metrics()
                values |= {f"system/{name}": value for name, value in monitor.aggregate_metrics().items()}
            except Exception as error:  # noqa: BLE001 - counters that a machine does not have stop no training
                _log.debug("no system metrics of %s: %s", type(monitor).__name__, error)
            monitor.clear_metrics()
        self.metrics(values, step)

    def artifacts(self, local_path: str, artifact_path: str) -> None:
        """Queues the upload of a file, or of a folder's contents, into folder `artifact_path` of the run."""
        self._put({"op": "artifacts", "local_path": str(local_path), "artifact_path": artifact_path})

    def document(self, name: str, value: Mapping[str, Any]) -> None:
        """Queues a JSON file of the run; a second one of the same name takes its place."""
        self._put({"op": "document", "name": name, "value": dict(value)})

    def dataset_input(self, name: str, digest: str, source_uri: str, context: str = "training") -> None:
        """Queues the link from the run to the data set it read; MLflow keeps the first 36 characters of a digest."""
        self._put({"op": "dataset", "name": name, "digest": digest, "source_uri": source_uri, "context": context})

    def checkpoint(self, step: int, uri: str, digest: str, metrics: Mapping[str, float]) -> None:
        """Queues a LoggedModel of type "checkpoint" without artifacts, which points to `uri`; its metrics as
        `checkpoint/...`, so that MLflow's search finds the best one."""
        clean = {"checkpoint/" + _METRIC_NAME.sub("_", name): float(value) for name, value in metrics.items()}
        record = {"op": "checkpoint", "step": int(step), "uri": uri, "digest": digest, "values": clean}
        self._put(record | {"time_ms": int(time.time() * 1000)})

    def checkpoint_removed(self, step: int) -> None:
        """Queues a tag on the LoggedModel of a checkpoint: its files are gone."""
        self._put({"op": "checkpoint_removed", "step": int(step)})

    def flush(self, wait_seconds: float = 10.0) -> bool:
        """Waits until the queue is empty, at most `wait_seconds`; True when everything was delivered.

        What was not is in the spool from then on, and outlives a kill of this process.
        """
        return self._outbox.flush(wait_seconds)

    def finish(self, status: str = "FINISHED", wait_seconds: float = 30.0) -> bool:
        """Ends the run as FINISHED, FAILED or KILLED; True when everything was delivered in time."""
        if not self._started:
            return True
        if not self._finished:
            self._finished = True
            self._put({"op": "status", "status": status})
        return self._outbox.close(wait_seconds)

    def _put(self, record: Record) -> Record:
        """Queues a copy of a record, as a spool would give it back and without secrets, and returns that copy."""
        text = json.dumps(record, default=str)
        copy = json.loads(text if record["op"] == "artifacts" else redact(text))  # a file is read where it lies
        self._outbox.put(copy)
        return copy

    # What follows runs in the background thread.

    def _send(self, batch: list[Record]) -> None:
        if self._client is None:
            self._client = connect(self.uri)
        try:
            self._send_to(self._client, batch)
        except (KeyError, TypeError) as error:
            what = f"record {str(batch[0])[:80]} cannot be read ({type(error).__name__}: {error})"
            raise MlflowException(what, error_code=INVALID_PARAMETER_VALUE) from error

    def _send_to(self, client: MlflowClient, batch: list[Record]) -> None:
        record = batch[0]
        if not self.run_id and record["op"] != "start":
            # From the spool of a process whose own `start` was delivered before the outage that filled the spool.
            self._start(client, self._opening)
        match record["op"]:
            case "start":
                self._start(client, record)
            case "metrics":
                client.log_batch(self.run_id, metrics=self._new_points(batch))
            case "artifacts":
                path = Path(record["local_path"])
                send = client.log_artifacts if path.is_dir() else client.log_artifact
                send(self.run_id, str(path), record["artifact_path"])
            case "document":
                client.log_dict(self.run_id, record["value"], record["name"])
            case "dataset":
                log_dataset(client, self.run_id, *(record[k] for k in ("name", "digest", "source_uri", "context")))
            case "checkpoint":
                self._log_checkpoint(client, record)
            case "checkpoint_removed":
                for model in self._logged_models(client, record["step"]):
                    client.set_logged_model_tags(model.model_id, {"removed": "true"})
            case "status":
                client.set_terminated(self.run_id, status=record["status"])
            case _:
                raise KeyError(record["op"])

    def _start(self, client: MlflowClient, record: Record) -> None:
        self._experiment_id = experiment_id(client, self.experiment, self.artifact_location)
        if record["run_id"]:
            client.update_run(record["run_id"], status="RUNNING")
            run_id = record["run_id"]
        else:
            run_id = open_run(client, self._experiment_id, record["name"], record["key"], record["tags"])
            record["run_id"] = run_id  # a second attempt takes up this run
        log_params(client, run_id, record["params"])
        # The last point of every metric with its step, which the public dictionary of values leaves out.
        self._logged_step = {metric.key: metric.step for metric in client.get_run(run_id).data._metric_objs}
        self.run_id = run_id

    def _new_points(self, batch: list[Record]) -> list[Metric]:
        """The points of a batch at steps that the run did not have when it was opened."""
        return [
            Metric(name, value, record["time_ms"], record["step"])
            for record in batch
            for name, value in record["values"].items()
            if record["step"] > self._logged_step.get(name, -1)
        ]

    def _logged_models(self, client: MlflowClient, step: int) -> list[LoggedModel]:
        """The LoggedModels of this run's checkpoint at a step: none, or one."""
        own = f"name = '{_checkpoint_name(step)}' AND source_run_id = '{self.run_id}'"
        return list(client.search_logged_models([self._experiment_id], own, max_results=1))

    def _log_checkpoint(self, client: MlflowClient, record: Record) -> None:
        """One LoggedModel per step: a training that was killed and writes a step again points to the new files."""
        tags = {"uri": record["uri"], "step": str(record["step"]), "digest": record["digest"]}
        found = self._logged_models(client, record["step"])
        if found:
            model_id = found[0].model_id
            client.set_logged_model_tags(model_id, tags)
            if "removed" in found[0].tags:
                client.delete_logged_model_tag(model_id, "removed")
        else:
            name = _checkpoint_name(record["step"])
            model = client.create_logged_model(self._experiment_id, name, self.run_id, tags, model_type="checkpoint")
            model_id = model.model_id
        client.finalize_logged_model(model_id, "READY")
        points = [
            Metric(name, value, record["time_ms"], record["step"], model_id=model_id, run_id=self.run_id)
            for name, value in record["values"].items()
            if record["step"] > self._logged_step.get(name, -1)
        ]
        if points:
            client.log_batch(self.run_id, metrics=points)


def _checkpoint_name(step: int) -> str:
    return f"step-{step:08d}"


def _batch_size(pending: Iterable[Record]) -> int:
    """How many metrics records at the head of the queue fit one call; 1 for a record of another kind."""
    count = size = 0
    for record in pending:
        if record.get("op") != "metrics":
            break
        size += len(record.get("values", ()))
        if count and size > _METRICS_PER_BATCH:
            break
        count += 1
    return max(1, count)


def _refused(error: Exception) -> bool:
    """True for an answer that will not change by asking again: a request the store understood and would not take.

    Who may not log in, or is sent away by a proxy, is let in later: with credentials, or once the server is back.
    """
    status = 0
    if isinstance(error, MlflowException):
        status = error.get_http_status_code()
    elif isinstance(error, requests.HTTPError) and error.response is not None:  # of an artifact
        status = error.response.status_code
    if status:
        return 400 <= status < 500 and status not in _ANSWERS_THAT_CHANGE
    return isinstance(error, FileNotFoundError | IsADirectoryError)
