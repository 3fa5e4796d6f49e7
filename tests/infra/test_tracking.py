"""A training run in MLflow: written in order, resumed by its key, and never in the way of the training."""

from __future__ import annotations

import http.server
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from mlflow.tracking import MlflowClient

from infra import telemetry
from infra.telemetry import Tracking
from infra.tracking import answers, answers_within, connect, experiment_id


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    """A SQLite store whose tables exist already, so that each test pays for its own run only."""
    uri = f"sqlite:///{tmp_path_factory.mktemp('tracking')}/mlflow.db"
    experiment_id(connect(uri), "warm", None)
    return uri


class _Store(http.server.BaseHTTPRequestHandler):
    """Answers the search of experiments with `status`."""

    status = 200

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["Content-Length"]))
        self.send_response(self.status)
        self.send_header("Content-Type", "application/json")
        self.end_headers()
        self.wfile.write(b"{}" if self.status == 200 else b"no")

    def log_message(self, format: str, *args: object) -> None:
        pass


def test_a_store_that_comes_back_is_waited_for_and_one_that_rejects_is_not(monkeypatch):
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    monkeypatch.setattr("infra.tracking._PAUSE_SECONDS", 0.1)
    server = http.server.HTTPServer(("127.0.0.1", 0), _Store, bind_and_activate=False)
    server.server_bind()
    uri = f"http://127.0.0.1:{server.server_port}"
    assert not answers_within(uri, 0.3)
    timer = threading.Timer(1.0, server.server_activate)
    timer.start()
    threading.Thread(target=server.serve_forever, daemon=True).start()
    began = time.monotonic()
    assert answers_within(uri, 60) and time.monotonic() - began > 0.9
    for status, expected in ((401, True), (503, False)):
        monkeypatch.setattr(_Store, "status", status)
        assert answers(uri) is expected
    server.shutdown()
    server.server_close()


def points(uri: str, run_id: str, name: str) -> list[tuple[int, float]]:
    return [(m.step, m.value) for m in MlflowClient(uri).get_metric_history(run_id, name)]


def test_a_run_carries_params_metrics_artifacts_and_its_data_set(store, tmp_path):
    picture = tmp_path / "curve.txt"
    picture.write_text("a curve")
    tracking = Tracking(store, "exp")
    run_id = tracking.start_run("first", key="k-all", params={"lr": 2e-6, "variant": "trip"}, tags={"code": "abc"})
    assert run_id
    for step in range(1, 4):
        tracking.metrics({"train/loss": 1 / step, "odd name!": step}, step)
    tracking.artifacts(str(picture), "plots")
    tracking.dataset_input("demo", "0123456789abcdef", "file:///data/latents")
    assert tracking.finish()

    run = MlflowClient(store).get_run(run_id)
    assert run.info.status == "FINISHED"
    assert run.data.params == {"lr": "2e-06", "variant": "trip"}
    assert run.data.tags["code"] == "abc"
    assert points(store, run_id, "train/loss") == [(1, 1.0), (2, 0.5), (3, 1 / 3)]
    assert "odd name_" in run.data.metrics
    assert [f.path for f in MlflowClient(store).list_artifacts(run_id, "plots")] == ["plots/curve.txt"]
    dataset = run.inputs.dataset_inputs[0].dataset
    assert (dataset.name, dataset.digest) == ("demo", "0123456789abcdef")
    assert json.loads(dataset.source) == {"uri": "file:///data/latents"}
    assert run_id in tracking.run_page and tracking.failures == 0


def test_the_same_key_takes_up_the_same_run_and_leaves_one_point_per_step(store):
    first = Tracking(store, "exp")
    run_id = first.start_run("one", key="k-resume", params={"steps": 10})
    for step in (1, 2, 3):
        first.metrics({"loss": step / 10}, step)
    assert first.flush()  # then the process is killed: no finish

    second = Tracking(store, "exp")
    assert second.start_run("one", key="k-resume", params={"steps": 12}) == run_id
    for step in (2, 3, 4):  # back to the last checkpoint
        second.metrics({"loss": step / 10}, step)
    second.finish()
    assert points(store, run_id, "loss") == [(1, 0.1), (2, 0.2), (3, 0.3), (4, 0.4)]
    data = MlflowClient(store).get_run(run_id).data
    assert data.params["steps"] == "10" and data.tags["changed.steps"] == "12"


def test_another_key_is_another_run(store):
    ids = set()
    for key in ("k-a", "k-b"):
        tracking = Tracking(store, "exp")
        ids.add(tracking.start_run("n", key=key))
        tracking.finish("FAILED")
    assert len(ids) == 2
    assert {MlflowClient(store).get_run(i).info.status for i in ids} == {"FAILED"}


def test_a_store_that_cannot_be_opened_delays_nothing_and_is_replayed_later(tmp_path):
    wall = tmp_path / "store"
    wall.write_text("a file where the folder should be")
    uri, spool = f"sqlite:///{wall}/mlflow.db", tmp_path / "spool.jsonl"
    tracking = Tracking(uri, "exp", spool=str(spool))
    began = time.monotonic()
    assert tracking.start_run("n", key="k-spool", wait_seconds=0.5) == ""
    tracking.metrics({"loss": 0.5}, 7)
    assert not tracking.finish(wait_seconds=5)
    assert time.monotonic() - began < 20
    assert tracking.failures and tracking.last_error
    assert [json.loads(line)["op"] for line in spool.read_text().splitlines()] == ["start", "metrics", "status"]

    wall.unlink()
    later = Tracking(uri, "exp", spool=str(spool))
    run_id = later.start_run("n", key="k-spool", wait_seconds=60)
    later.metrics({"loss": 0.25}, 8)
    assert later.finish(wait_seconds=60)
    assert points(uri, run_id, "loss") == [(7, 0.5), (8, 0.25)]
    assert not spool.exists()


def test_a_server_that_accepts_and_never_answers_holds_up_nobody():
    with socket.create_server(("127.0.0.1", 0)) as silent:
        tracking = Tracking(f"http://127.0.0.1:{silent.getsockname()[1]}", "exp")
        began = time.monotonic()
        assert tracking.start_run("n", wait_seconds=0.3) == ""
        for step in range(1000):
            tracking.metrics({"loss": 0.1}, step)
        assert not tracking.finish(wait_seconds=0.3)
        assert time.monotonic() - began < 10


def test_a_refused_record_does_not_hold_up_the_next(store, tmp_path):
    tracking = Tracking(store, "exp")
    run_id = tracking.start_run("n", key="k-refused")
    tracking.artifacts(str(tmp_path / "absent.png"), "plots")
    tracking.metrics({"loss": 1.0}, 1)
    assert tracking.finish()
    assert tracking.dropped == 1
    assert points(store, run_id, "loss") == [(1, 1.0)]


def test_one_tracking_holds_one_run(store):
    tracking = Tracking(store, "exp")
    tracking.start_run("n")
    with pytest.raises(ValueError, match="already has a run"):
        tracking.start_run("n")
    tracking.finish()


def test_checkpoints_are_models_without_artifacts_one_per_step_and_the_best_is_found(store):
    loss = {1: 0.4, 2: 0.2, 3: 0.3}
    for attempt in ("first", "again"):  # killed after step 3, back to step 2, which is written again
        tracking = Tracking(store, "checkpoints")
        run_id = tracking.start_run("n", key="k-checkpoints")
        for step in (1, 2, 3) if attempt == "first" else (2, 3):
            tracking.checkpoint(step, f"s3://models/step-{step}", f"{attempt}-{step}", {"validation_loss": loss[step]})
        if attempt == "again":
            tracking.checkpoint_removed(1)
            tracking.finish()
        assert tracking.flush() and tracking.dropped == 0, tracking.last_error

    client = MlflowClient(store)
    experiment = client.get_experiment_by_name("checkpoints").experiment_id
    order = [{"field_name": "metrics.checkpoint/validation_loss", "ascending": True}]
    models = client.search_logged_models([experiment], "model_type = 'checkpoint'", order_by=order)
    assert [model.tags["step"] for model in models] == ["2", "3", "1"]
    assert [model.tags["digest"] for model in models] == ["again-2", "again-3", "first-1"]
    assert [model.tags.get("removed") for model in models] == [None, None, "true"]
    for model in models:
        assert model.status.name == "READY" and model.source_run_id == run_id
        assert [m.value for m in model.metrics] == [loss[int(model.tags["step"])]]
    assert points(store, run_id, "checkpoint/validation_loss") == [(1, 0.4), (2, 0.2), (3, 0.3)]


def test_a_document_is_a_json_file_of_the_run(store, tmp_path):
    tracking = Tracking(store, "exp")
    run_id = tracking.start_run("n")
    tracking.document("spec.json", {"steps": 9})
    tracking.document("spec.json", {"steps": 10})
    assert tracking.finish()
    file = Path(MlflowClient(store).download_artifacts(run_id, "spec.json", str(tmp_path)))
    assert json.loads(file.read_text()) == {"steps": 10}


def test_the_machine_is_watched_at_the_step_of_the_training(store, monkeypatch):
    monkeypatch.setattr(telemetry, "_SYSTEM_METRICS_SECONDS", 0.2)
    tracking = Tracking(store, "exp")
    run_id = tracking.start_run("n")
    for step in (1, 2):
        tracking.system_metrics(step)  # the second comes too soon
    time.sleep(0.3)
    tracking.system_metrics(3)
    assert tracking.finish()
    assert [step for step, _ in points(store, run_id, "system/cpu_utilization_percentage")] == [1, 3]


def test_without_psutil_the_machine_is_not_watched_and_nothing_fails(store, monkeypatch):
    for name in [name for name in sys.modules if name.startswith("mlflow.system_metrics.metrics")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "psutil", None)
    tracking = Tracking(store, "exp")
    run_id = tracking.start_run("n")
    tracking.system_metrics(1)
    assert tracking.finish()
    assert MlflowClient(store).get_run(run_id).data.metrics == {}


def test_what_was_flushed_outlives_a_kill_while_the_store_is_down(tmp_path):
    wall = tmp_path / "store"
    wall.write_text("a file where the folder should be")
    spool = tmp_path / "spool.jsonl"
    killed = Tracking(f"sqlite:///{wall}/mlflow.db", "exp", spool=str(spool))
    killed.start_run("n", key="k", wait_seconds=0)
    killed.metrics({"loss": 0.5}, 7)
    assert not killed.flush(0.1)
    with spool.open("a") as file:
        file.write('{"op": "metr')  # the kill came in the middle of a line
    wall.unlink()
    again = Tracking(f"sqlite:///{wall}/mlflow.db", "exp", spool=str(spool))
    again.start_run("n", key="k", wait_seconds=0)
    again.metrics({"loss": 0.25}, 8)
    assert again.finish(wait_seconds=60) and again.dropped == 1
    assert points(again.uri, again.run_id, "loss") == [(7, 0.5), (8, 0.25)]


# MLflow's server application, forked for every line read, so that a start after a kill pays for no imports.
SERVER = """
import os, sys
from werkzeug.serving import run_simple
from mlflow.server import app
for line in sys.stdin:
    child = os.fork()
    if not child:
        run_simple("127.0.0.1", int(sys.argv[1]), app, threaded=True)
    print(child, flush=True)
"""


class Server:
    """An MLflow server on a SQLite store, which can be killed and started again."""

    def __init__(self, store, artifacts):
        with socket.create_server(("127.0.0.1", 0)) as free:
            port = free.getsockname()[1]
        self.uri = f"http://127.0.0.1:{port}"
        self.parent = subprocess.Popen(
            [sys.executable, "-c", SERVER, str(port)],
            env=os.environ | {"_MLFLOW_SERVER_FILE_STORE": store, "_MLFLOW_SERVER_ARTIFACT_ROOT": str(artifacts)},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )

    def start(self):
        assert self.parent.stdin and self.parent.stdout
        self.parent.stdin.write("start\n")
        self.parent.stdin.flush()
        self.child = int(self.parent.stdout.readline())

    def kill(self):
        os.kill(self.child, signal.SIGKILL)

    def end(self):
        self.kill()
        end(self.parent)


def end(process):
    """Kills a process, waits for its end, and closes its pipes."""
    with process:
        process.kill()


@pytest.mark.slow
def test_a_server_killed_and_started_again_gets_every_point_once(store, tmp_path, monkeypatch):
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")  # the outbox tries again, and sooner
    server, spool = Server(store, tmp_path), tmp_path / "spool.jsonl"
    server.start()
    try:
        tracking = Tracking(server.uri, "exp", spool=str(spool))
        run_id = tracking.start_run("n", key="k-server")
        tracking.metrics({"loss": 0.1}, 1)
        assert tracking.flush()
        server.kill()
        began = time.monotonic()
        for step in (2, 3):
            tracking.metrics({"loss": step / 10}, step)
        tracking.checkpoint(3, "s3://models/step-3", "digest", {"loss": 0.3})
        assert not tracking.flush(0.5) and time.monotonic() - began < 3
        assert len(spool.read_text().splitlines()) == 3
        server.start()
        assert tracking.flush(60) and not spool.exists()
        assert tracking.finish() and tracking.dropped == 0
    finally:
        server.end()
    assert points(store, run_id, "loss") == [(1, 0.1), (2, 0.2), (3, 0.3)]
    assert points(store, run_id, "checkpoint/loss") == [(3, 0.3)]
    assert MlflowClient(store).get_run(run_id).info.status == "FINISHED"


# A training of a few steps: `tracking_process.py URI SPOOL STEP...` reports the steps after each line read.
PROCESS = """
import sys, time
from infra.telemetry import Tracking
uri, spool, first, *rest = sys.argv[1:]
tracking = Tracking(uri, "exp", spool=spool)
tracking.start_run("n", key="k-outage", wait_seconds=0)
for part in (first, *rest):
    for step in part.split(","):
        tracking.metrics({"loss": int(step) / 10}, int(step))
    print(tracking.flush(20 if part == first and rest else 0.5), flush=True)
    sys.stdin.readline()
time.sleep(600)
"""


def training(uri, spool, *parts):
    return subprocess.Popen(
        [sys.executable, "-c", PROCESS, uri, str(spool), *parts],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )


@pytest.mark.slow
def test_an_outage_that_outlives_two_killed_processes_loses_no_point(store, tmp_path, monkeypatch):
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    server, spool = Server(store, tmp_path), tmp_path / "spool.jsonl"
    server.start()
    try:
        first = training(server.uri, spool, "1", "2,3")
        assert first.stdout.readline() == "True\n"
        server.kill()
        first.stdin.write("\n")
        first.stdin.flush()
        assert first.stdout.readline() == "False\n"
        end(first)
        assert [json.loads(line)["op"] for line in spool.read_text().splitlines()] == ["metrics", "metrics"]
        second = training(server.uri, spool, "3,4")  # back to its checkpoint, and MLflow is still away
        assert second.stdout.readline() == "False\n"
        end(second)
        server.start()
        third = Tracking(server.uri, "exp", spool=spool)
        run_id = third.start_run("n", key="k-outage", wait_seconds=60)
        third.metrics({"loss": 0.5}, 5)
        assert third.finish(wait_seconds=60) and third.dropped == 0
    finally:
        server.end()
    assert points(store, run_id, "loss") == [(step, step / 10) for step in (1, 2, 3, 4, 5)]
    assert not spool.exists()


def metrics_record(step):
    return {"op": "metrics", "values": {"loss": step / 10}, "step": step, "time_ms": step}


@pytest.mark.parametrize(
    ("head", "dropped"),
    [
        ([{"op": "checkpoint", "step": 2, "uri": "/c", "digest": "d", "values": {"loss": 0.2}, "time_ms": 2}], 0),
        ([{"op": "checkpoint_removed", "step": 1}], 0),
        ([{"op": "document", "name": "spec.json", "value": {"steps": 9}}], 0),
        ([{"op": "dataset", "name": "l", "digest": "d", "source_uri": "/d", "context": "training"}], 0),
        ([{"op": "artifacts", "local_path": __file__, "artifact_path": "plots"}], 0),
        ([{"op": "status", "status": "FAILED"}], 0),
        ([{"op": "start", "name": "n", "run_id": "0" * 32, "key": "k", "params": {}, "tags": {}}], 1),  # run is gone
        ([{"op": "artifacts", "local_path": "/nowhere", "artifact_path": "plots"}], 1),
        ([{"op": "dataset", "name": "x" * 9999, "digest": "d", "source_uri": "/d", "context": "t"}], 1),  # a true 400
        ([{"op": "metrics", "numbers": {}}, {"op": "hologram"}, {}, [], "metrics"], 5),  # not of this format
    ],
    ids=lambda value: value[0]["op"] if isinstance(value, list) else "",
)
def test_a_spool_may_begin_with_any_record(store, tmp_path, request, head, dropped):
    key, spool = f"k-{request.node.name}", tmp_path / "spool.jsonl"
    first = Tracking(store, "exp")
    run_id = first.start_run("n", key=key)
    first.metrics({"loss": 0.1}, 1)
    assert first.flush()
    records = [json.dumps(record) for record in [*head, metrics_record(2), metrics_record(3)]]
    spool.write_text("\n".join(records) + '\n{"op": "metr')  # the kill came in the middle of a line

    again = Tracking(store, "exp", spool=spool)
    again.start_run("n", key=key, wait_seconds=0)
    again.metrics({"loss": 0.4}, 4)
    assert again.finish(wait_seconds=60) and again.dropped == dropped + 1
    assert again.run_id == run_id
    assert sorted(points(store, run_id, "loss")) == [(1, 0.1), (2, 0.2), (3, 0.3), (4, 0.4)]
    assert MlflowClient(store).get_run(run_id).info.status == "FINISHED"


def test_points_go_to_a_new_run_where_the_old_one_was_deleted(store, tmp_path):
    first = Tracking(store, "exp")
    deleted = first.start_run("n", key="k-deleted")
    first.metrics({"loss": 0.1}, 1)
    assert first.flush()
    MlflowClient(store).delete_run(deleted)
    spool = tmp_path / "spool.jsonl"
    spool.write_text(json.dumps(metrics_record(2)) + "\n")
    again = Tracking(store, "exp", spool=spool)
    again.start_run("n", key="k-deleted", wait_seconds=0)
    assert again.finish(wait_seconds=60) and again.dropped == 0
    assert again.run_id != deleted and points(store, again.run_id, "loss") == [(2, 0.2)]


class Door(http.server.BaseHTTPRequestHandler):
    """A proxy before MLflow that lets nobody in."""

    status = 401

    def do_GET(self):
        self.send_response(self.status)
        self.end_headers()

    do_POST = do_GET

    def log_message(self, format, *args):
        pass


@pytest.mark.parametrize(("status", "kept"), [(401, True), (403, True), (400, False), (429, True), (503, True)])
def test_points_wait_for_who_may_not_log_in_and_not_for_a_malformed_request(status, kept, tmp_path, monkeypatch):
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    monkeypatch.setattr(Door, "status", status)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Door) as door:
        threading.Thread(target=door.serve_forever, daemon=True).start()
        spool = tmp_path / "spool.jsonl"
        tracking = Tracking(f"http://127.0.0.1:{door.server_port}", "exp", spool=spool)
        tracking.start_run("n", key="k", wait_seconds=0)
        tracking.metrics({"loss": 0.1}, 1)
        assert tracking.finish(wait_seconds=30) is not kept
        assert tracking.dropped == (0 if kept else 3) and spool.exists() is kept
        door.shutdown()
