"""Reports a training run to MLflow from a background thread, so a slow or unreachable server never stops training."""

from __future__ import annotations

import contextlib
import json
import logging
import re
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import requests
from mlflow.entities import LoggedModel, Metric
from mlflow.exceptions import MlflowException
from mlflow.protos.databricks_pb2 import INVALID_PARAMETER_VALUE
from mlflow.tracking import MlflowClient

from infra.outbox import Outbox, Record
from infra.redaction import redact
from infra.tracking import (
    TROUBLE,
    connect,
    default_artifact_location,
    experiment_id,
    log_dataset,
    log_params,
    open_run,
    run_page,
)

_log = logging.getLogger(__name__)
_METRIC_NAME = re.compile(r"[^\w./ :-]")
_METRICS_PER_BATCH = 900  # the server takes 1000 entities in one call
_SYSTEM_METRICS_SECONDS = 10.0
_RETRIED_STATUSES = frozenset({401, 403, 407, 408, 425, 429})


def system_monitors() -> list[Any]:
    """MLflow's monitors of this machine's processors, disk, network and GPUs; empty without psutil."""
    try:
        from mlflow.system_metrics.metrics.cpu_monitor import CPUMonitor
        from mlflow.system_metrics.metrics.disk_monitor import DiskMonitor
        from mlflow.system_metrics.metrics.network_monitor import NetworkMonitor
    except ImportError:
        return []
    from mlflow.system_metrics.metrics.gpu_monitor import GPUMonitor

    monitors: list[Any] = [CPUMonitor(), DiskMonitor(), NetworkMonitor()]
    with contextlib.suppress(ImportError, RuntimeError):  # no NVML here, or no GPU
        monitors.append(GPUMonitor())
    monitors[0].collect_metrics()  # processor load is measured between two calls
    monitors[0].clear_metrics()
    return monitors


class Tracking:
    """One training run in MLflow, written in order by a background thread.

    No method raises an error of the tracking store. Only `start_run`, `flush` and `finish` wait, with a time limit.
    Undelivered records stay in the queue, are retried with growing pauses, and are written as JSON lines to `spool` if
    it is given; the next `start_run` with the same spool sends them first (`infra/outbox.py`).
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
        self._outbox = Outbox(f"tracking at {redact(uri)}", self._send, _batch_size, TROUBLE, _is_rejected, spool)

    @property
    def failures(self) -> int:
        """Number of failed attempts to reach the store."""
        return self._outbox.failures

    @property
    def dropped(self) -> int:
        """Number of dropped records: rejected by the store, or the queue was full."""
        return self._outbox.dropped

    @property
    def last_error(self) -> str:
        """The last error of the store or of the connection; "" if there was none."""
        return self._outbox.last_error

    @property
    def run_page(self) -> str:
        """The web address of the run; "" before it is open."""
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
        """Opens a run, or resumes the one with `run_id` or tagged with `key`; returns its id.

        A resumed run ignores metrics at steps that it already has, so a training that was killed and repeats its last
        steps logs one point per step. Returns "" if the store does not answer within `wait_seconds`; the run is then
        opened later, in the background.
        """
        if self._started:
            raise ValueError(f"run {name!r}: this Tracking already has a run; create another Tracking")
        self._started = True
        start = {"op": "start", "name": name, "run_id": run_id, "key": key}
        start.update(params=dict(params or {}), tags={k: str(v) for k, v in (tags or {}).items()})
        self._opening = self._put(start)
        self._outbox.start()
        if wait_seconds and not self._outbox.flush(wait_seconds, failures=3):
            _log.warning(
                "tracking at %s has no run yet, continuing: %s",
                redact(self.uri),
                self.last_error or "no answer",
            )
        return self.run_id

    def metrics(self, values: Mapping[str, float], step: int) -> None:
        """Queues the metrics of one step; returns at once."""
        clean = {_METRIC_NAME.sub("_", name): float(value) for name, value in values.items()}
        self._put({"op": "metrics", "values": clean, "step": int(step), "time_ms": int(time.time() * 1000)})

    def system_metrics(self, step: int) -> None:
        """Queues metrics of this machine as `system/...`, at most once in ten seconds; none without psutil.

        Their step is the training step, so a resumed run continues them.
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
            except Exception as error:  # a missing counter must not stop the training
                _log.debug("no system metrics of %s: %s", type(monitor).__name__, error)
            monitor.clear_metrics()
        self.metrics(values, step)

    def artifacts(self, local_path: str, artifact_path: str) -> None:
        """Queues the upload of a file, or of a folder's contents, into folder `artifact_path` of the run."""
        self._put({"op": "artifacts", "local_path": str(local_path), "artifact_path": artifact_path})

    def document(self, name: str, value: Mapping[str, Any]) -> None:
        """Queues a JSON file of the run; a second one of the same name replaces it."""
        self._put({"op": "document", "name": name, "value": dict(value)})

    def dataset_input(self, name: str, digest: str, source_uri: str, context: str = "training") -> None:
        """Queues a data set as an input of the run; MLflow keeps the first 36 characters of a digest."""
        self._put({"op": "dataset", "name": name, "digest": digest, "source_uri": source_uri, "context": context})

    def checkpoint(self, step: int, uri: str, digest: str, metrics: Mapping[str, float]) -> None:
        """Queues a LoggedModel of type "checkpoint" without artifacts, which points to `uri`. Its metrics are
        named `checkpoint/...`, so that MLflow's search finds the best one."""
        clean = {"checkpoint/" + _METRIC_NAME.sub("_", name): float(value) for name, value in metrics.items()}
        record = {"op": "checkpoint", "step": int(step), "uri": uri, "digest": digest, "values": clean}
        self._put(record | {"time_ms": int(time.time() * 1000)})

    def checkpoint_removed(self, step: int) -> None:
        """Queues a tag on the LoggedModel of a checkpoint: its files are removed."""
        self._put({"op": "checkpoint_removed", "step": int(step)})

    def flush(self, wait_seconds: float = 10.0) -> bool:
        """Waits until the queue is empty, at most `wait_seconds`; True if everything was delivered.

        Undelivered records are then in the spool, and survive a kill of this process.
        """
        return self._outbox.flush(wait_seconds)

    def finish(self, status: str = "FINISHED", wait_seconds: float = 30.0) -> bool:
        """Ends the run as FINISHED, FAILED or KILLED; True if everything was delivered in time."""
        if not self._started:
            return True
        if not self._finished:
            self._finished = True
            self._put({"op": "status", "status": status})
        return self._outbox.close(wait_seconds)

    def _put(self, record: Record) -> Record:
        """Queues a copy of a record, as JSON and without secrets, and returns the copy."""
        text = json.dumps(record, default=str)
        copy = json.loads(text if record["op"] == "artifacts" else redact(text))  # the path of a file stays as it is
        self._outbox.put(copy)
        return copy

    # The methods below run in the background thread.

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
            # The spool is of a process whose `start` was delivered before the outage.
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
            record["run_id"] = run_id  # a second attempt resumes this run
        log_params(client, run_id, record["params"])
        # The last point of every metric with its step; the public dictionary has values only.
        self._logged_step = {metric.key: metric.step for metric in client.get_run(run_id).data._metric_objs}
        self.run_id = run_id

    def _new_points(self, batch: list[Record]) -> list[Metric]:
        """The points of a batch at steps after those that the run had when it was opened."""
        return [
            Metric(name, value, record["time_ms"], record["step"])
            for record in batch
            for name, value in record["values"].items()
            if record["step"] > self._logged_step.get(name, -1)
        ]

    def _logged_models(self, client: MlflowClient, step: int) -> list[LoggedModel]:
        """The LoggedModels of this run's checkpoint at a step: none, or one."""
        condition = f"name = '{_checkpoint_name(step)}' AND source_run_id = '{self.run_id}'"
        return list(client.search_logged_models([self._experiment_id], condition, max_results=1))

    def _log_checkpoint(self, client: MlflowClient, record: Record) -> None:
        """Creates one LoggedModel per step, or updates it if a resumed training wrote the step again."""
        tags = {"uri": record["uri"], "step": str(record["step"]), "digest": record["digest"]}
        existing = self._logged_models(client, record["step"])
        if existing:
            model_id = existing[0].model_id
            client.set_logged_model_tags(model_id, tags)
            if "removed" in existing[0].tags:
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
    """Number of metrics records at the head of the queue that fit one call; 1 for a record of another kind."""
    count = size = 0
    for record in pending:
        if record.get("op") != "metrics":
            break
        size += len(record.get("values", ()))
        if count and size > _METRICS_PER_BATCH:
            break
        count += 1
    return max(1, count)


def _is_rejected(error: Exception) -> bool:
    """Whether the store rejected the request for good, so that a retry cannot succeed.

    An authentication or proxy error may pass: with credentials, or once the server is back.
    """
    status = 0
    if isinstance(error, MlflowException):
        status = error.get_http_status_code()
    elif isinstance(error, requests.HTTPError) and error.response is not None:  # of an artifact
        status = error.response.status_code
    if status:
        return 400 <= status < 500 and status not in _RETRIED_STATUSES
    return isinstance(error, FileNotFoundError | IsADirectoryError)
