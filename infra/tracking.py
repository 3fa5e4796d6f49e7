"""Reports a training run to MLflow from a thread of its own, so that a slow or absent server never stops training."""

from __future__ import annotations

import json
import logging
import re
import threading
import time
from collections import deque
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mlflow.entities import Dataset, DatasetInput, InputTag, Metric, Param, RunTag
from mlflow.exceptions import MlflowException
from mlflow.tracking import MlflowClient
from sqlalchemy.exc import SQLAlchemyError

KEY_TAG = "trip.key"
SOURCE_TYPE = "uri"

# What a tracking store that is down, slow, locked or full raises; requests' errors are OSErrors.
TROUBLE = (MlflowException, SQLAlchemyError, OSError)

_log = logging.getLogger(__name__)
_METRIC_NAME = re.compile(r"[^\w./ :-]")
_METRICS_PER_BATCH = 900  # the server takes 1000 entities in one call
_MAX_PENDING = 50_000
_LONGEST_PAUSE_SECONDS = 30.0

Record = dict[str, Any]


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
    return MlflowClient(tracking_uri=uri, registry_uri=uri)


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
        return uri.rstrip("/") + path
    return f"http://127.0.0.1:5000{path} (after: mlflow server --port 5000 --backend-store-uri {uri})"


class Tracking:
    """One training run in MLflow, written in order by a background thread.

    No method raises for a tracking store in trouble and none but `start_run` and `finish` waits. What could not be
    delivered stays queued, is tried again with growing pauses, and is kept as JSON lines in `spool` if that path is
    given; the next `start_run` with the same spool sends it first. `failures` counts failed attempts, `dropped` the
    records given up (refused by the store, or the queue was full), and `last_error` says why.
    """

    def __init__(self, uri: str, experiment: str, artifact_location: str | None = None, spool: str | None = None):
        self.uri = uri
        self.experiment = experiment
        self.artifact_location = artifact_location or default_artifact_location(uri)
        self.run_id = ""
        self.failures = 0
        self.dropped = 0
        self.last_error = ""
        self._spool = Path(spool) if spool else None
        self._spooled = 0  # how many records at the head of the queue the spool file already holds
        self._experiment_id = ""
        self._logged_step: dict[str, int] = {}
        self._pending: deque[Record] = deque()
        self._changed = threading.Condition()
        self._closing = False
        self._client: MlflowClient | None = None
        self._thread: threading.Thread | None = None

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
        if self._thread is not None:
            raise ValueError(f"run {name!r}: this Tracking already has a run, make a new one")
        for record in self._read_spool():
            self._pending.append(record)
        self._spooled = len(self._pending)
        start = {"op": "start", "name": name, "run_id": run_id, "key": key}
        start.update(params=dict(params or {}), tags={k: str(v) for k, v in (tags or {}).items()})
        self._put(json.loads(json.dumps(start, default=str)))
        self._thread = threading.Thread(target=self._deliver, name="tracking", daemon=True)
        self._thread.start()
        began = time.monotonic()
        with self._changed:
            self._changed.wait_for(lambda: not self._pending or self.failures > 2, timeout=wait_seconds)
        if not self.run_id:
            waited = time.monotonic() - began
            _log.warning("tracking at %s gave no run in %.0f s, going on: %s", self.uri, waited, self.last_error)
        return self.run_id

    @property
    def run_page(self) -> str:
        """Where a person sees the run; "" while it has none."""
        return run_page(self.uri, self._experiment_id, self.run_id) if self.run_id else ""

    def metrics(self, values: Mapping[str, float], step: int) -> None:
        """Queues numbers of one step; returns at once."""
        clean = {_METRIC_NAME.sub("_", name): float(value) for name, value in values.items()}
        self._put({"op": "metrics", "values": clean, "step": int(step), "time_ms": int(time.time() * 1000)})

    def artifacts(self, local_path: str, artifact_path: str) -> None:
        """Queues the upload of a file, or of a folder's contents, into folder `artifact_path` of the run."""
        self._put({"op": "artifacts", "local_path": str(local_path), "artifact_path": artifact_path})

    def dataset_input(self, name: str, digest: str, source_uri: str, context: str = "training") -> None:
        """Queues the link from the run to the data set it read."""
        self._put({"op": "dataset", "name": name, "digest": digest, "source_uri": source_uri, "context": context})

    def flush(self, wait_seconds: float = 10.0) -> bool:
        """Waits until the queue is empty, at most `wait_seconds`; True when everything was delivered."""
        with self._changed:
            return self._changed.wait_for(lambda: not self._pending, timeout=wait_seconds)

    def finish(self, status: str = "FINISHED", wait_seconds: float = 30.0) -> bool:
        """Ends the run as FINISHED, FAILED or KILLED; True when everything was delivered in time."""
        if self._thread is None:
            return True
        with self._changed:
            already_closed = self._closing
        if not already_closed:
            self._put({"op": "status", "status": status})
        with self._changed:
            self._closing = True  # one last attempt, no more pauses
            self._changed.notify_all()
        self._thread.join(timeout=wait_seconds)
        left = len(self._pending)
        if left:
            self._write_spool()
            where = f"kept in {self._spool}" if self._spool else "lost"
            _log.warning("tracking at %s: %d records not delivered, %s: %s", self.uri, left, where, self.last_error)
        return left == 0

    # What follows runs in the background thread, apart from _put and _read_spool.

    def _put(self, record: Record) -> None:
        with self._changed:
            if len(self._pending) >= _MAX_PENDING:
                self.dropped += 1
                return
            self._pending.append(record)
            self._changed.notify_all()

    def _read_spool(self) -> list[Record]:
        if self._spool is None or not self._spool.exists():
            return []
        records = []
        for line in self._spool.read_text(encoding="utf-8").splitlines():
            try:
                records.append(json.loads(line))
            except ValueError:  # the line a killed process was writing
                self.dropped += 1
        return records

    def _deliver(self) -> None:
        pause = 0.5
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._pending or self._closing)
                if not self._pending:
                    return
                batch = self._next_batch()
            try:
                self._send(batch)
            except TROUBLE as error:
                self._note(error)
                if not _refused(error):
                    self._write_spool()
                    with self._changed:
                        self._changed.notify_all()
                        if self._closing:
                            return
                        self._changed.wait_for(lambda: self._closing, timeout=pause)
                    pause = min(2 * pause, _LONGEST_PAUSE_SECONDS)
                    continue
                self.dropped += len(batch)
            pause = 0.5
            self._delivered(len(batch))

    def _next_batch(self) -> list[Record]:
        """The run of metrics records at the head of the queue that fits one call, or the one record of another kind."""
        batch: list[Record] = []
        size = 0
        for record in self._pending:
            if record["op"] != "metrics":
                break
            size += len(record["values"])
            if batch and size > _METRICS_PER_BATCH:
                break
            batch.append(record)
        return batch or [self._pending[0]]

    def _delivered(self, count: int) -> None:
        with self._changed:
            for _ in range(count):
                self._pending.popleft()
            self._spooled = max(0, self._spooled - count)
            if self._spool is not None and not self._pending:
                self._spooled = 0
                try:
                    self._spool.unlink(missing_ok=True)
                except OSError as error:
                    self._note(error)
            self._changed.notify_all()

    def _write_spool(self) -> None:
        """Appends what the file does not hold yet. A replay may send a record again, which changes nothing."""
        if self._spool is None:
            return
        with self._changed:
            fresh = list(self._pending)[self._spooled :]
            try:
                self._spool.parent.mkdir(parents=True, exist_ok=True)
                with self._spool.open("a", encoding="utf-8") as file:
                    file.writelines(json.dumps(record) + "\n" for record in fresh)
            except OSError as error:
                self._note(error)
            else:
                self._spooled += len(fresh)

    def _note(self, error: Exception) -> None:
        self.failures += 1
        message = " ".join(str(error).split())[:300]
        self.last_error = f"{type(error).__name__}: {message}"
        log = _log.warning if self.failures == 1 else _log.debug
        log("tracking at %s: %s", self.uri, self.last_error)

    def _send(self, batch: list[Record]) -> None:
        if self._client is None:
            self._client = connect(self.uri)
        client, record = self._client, batch[0]
        match record["op"]:
            case "start":
                self._start(client, record)
            case "metrics":
                client.log_batch(self.run_id, metrics=self._new_points(batch))
            case "artifacts":
                path = Path(record["local_path"])
                send = client.log_artifacts if path.is_dir() else client.log_artifact
                send(self.run_id, str(path), record["artifact_path"])
            case "dataset":
                log_dataset(client, self.run_id, *(record[k] for k in ("name", "digest", "source_uri", "context")))
            case "status":
                client.set_terminated(self.run_id, status=record["status"])

    def _start(self, client: MlflowClient, record: Record) -> None:
        self._experiment_id = experiment_id(client, self.experiment, self.artifact_location)
        if record["run_id"]:
            client.update_run(record["run_id"], status="RUNNING")
            run_id = record["run_id"]
        else:
            run_id = open_run(client, self._experiment_id, record["name"], record["key"], record["tags"])
            record["run_id"] = run_id  # a second attempt takes up this run
        log_params(client, run_id, record["params"])
        logged = client.get_run(run_id).data.metrics
        self._logged_step = {name: max(m.step for m in client.get_metric_history(run_id, name)) for name in logged}
        self.run_id = run_id

    def _new_points(self, batch: list[Record]) -> list[Metric]:
        """The points of a batch at steps that the run did not have when it was opened."""
        return [
            Metric(name, value, record["time_ms"], record["step"])
            for record in batch
            for name, value in record["values"].items()
            if record["step"] > self._logged_step.get(name, -1)
        ]


def _refused(error: Exception) -> bool:
    """True for an answer that will not change by asking again: a request the store understood and would not take."""
    if isinstance(error, MlflowException):
        return error.get_http_status_code() < 500 and error.get_http_status_code() != 429
    return isinstance(error, FileNotFoundError | IsADirectoryError)
