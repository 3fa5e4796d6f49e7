"""What follows an event on a real Prefect server: a webhook that names a failure, and runs of deployments."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import httpx
import pytest

from flows.events import NOT_NAMED, parts_of
from flows.smoke_test import smoke_test
from tasks.records import UserError
from tests.conftest import free_port, wait_for_port
from tests.support.service import QuickBackend, running_service
from tests.support.stacks import until

REPOSITORY = Path(__file__).resolve().parents[2]
DEPLOY = [sys.executable, "-m", "flows", "deploy", "--in-place"]
# A run of a stage that fails, a training that has finished, and a version that became champion.
EVENTS = """
from prefect import flow, task
from flows.events import PROMOTED, TRAINED, emit
from flows.stage import STAGE_POLICY
from tasks.records import UserError

@task(name="prepare", **STAGE_POLICY)
def prepare():
    raise UserError("clip 17 of shard-00003-ab12 cannot be written (No space left on device); free some space")

@flow(name="prepare-latents")
def failing():
    training = {"recipe": "demo", "source": None, "root": "/r", "base": None, "dataset": "/r/data/1"}
    training |= {"model": "/r/train/1/model", "tracking_uri": None, "values": ["evaluate.clips=3"], "options": {}}
    emit(TRAINED, "/r/train/1/model", training)
    emit(PROMOTED, "trip.4", {"name": "trip", "version": "4"})
    prepare()

failing(return_state=True)
"""


def test_the_parts_of_an_errors_sentence_are_what_failed_and_what_to_do() -> None:
    parts = parts_of("rows 4 to 7 lost their worker 3 times; give the machine more memory, or use fewer workers")
    assert parts == {
        "error": "rows 4 to 7 lost their worker 3 times",
        "remedy": "give the machine more memory, or use fewer workers",
        "shard": NOT_NAMED,
        "clip": "rows 4 to 7",
    }
    assert parts_of("shard-000001-0a.tar is damaged")["shard"] == "shard-000001-0a.tar"
    assert "the same command continues" in parts_of("[Errno 5] Input/output error")["remedy"]


def test_deploy_without_a_server_is_one_sentence(tmp_path: Path) -> None:
    environment = os.environ | {"PREFECT_API_URL": "http://127.0.0.1:9/api", "PREFECT_CLIENT_MAX_RETRIES": "0"}
    environment |= {"PREFECT_HOME": str(tmp_path)}
    done = subprocess.run(DEPLOY, cwd=REPOSITORY, env=environment, capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.count("\n") == 1, done.stderr
    assert "the Prefect server at http://127.0.0.1:9/api does not answer" in done.stderr


@pytest.fixture
def webhook() -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """The address of an HTTP server, and what was posted to it."""
    received: list[dict[str, Any]] = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            received.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
            self.send_response(204)
            self.end_headers()

        def log_message(self, *_: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_address[1]}/hook", received
    server.shutdown()
    server.server_close()


@pytest.mark.slow
def test_a_failure_reaches_the_webhook_and_a_training_and_a_promotion_start_runs(
    tmp_path: Path, webhook: tuple[str, list[dict[str, Any]]]
) -> None:
    address, received = webhook
    left_out = {k: v for k, v in os.environ.items() if not k.startswith("PREFECT_")}
    port = free_port()
    environment = left_out | {
        "PREFECT_HOME": str(tmp_path / "home"),
        "PREFECT_API_URL": f"http://127.0.0.1:{port}/api",
        "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
        "PYTHONPATH": str(REPOSITORY),
        "NO_PROXY": "127.0.0.1",
        "TRIP_WEBHOOK": address,
    }
    serve = [sys.executable, "-m", "prefect", "server", "start", "--host", "127.0.0.1", "--port", str(port), "--no-ui"]
    with (tmp_path / "log").open("wb") as log:
        server = subprocess.Popen(serve, env=environment, stdout=log, stderr=log, start_new_session=True)
    try:
        wait_for_port(port, server)
        for _ in range(2):  # the second one updates
            names = ["--name", "evaluate-trip", "--name", "smoke-test"]
            done = subprocess.run([*DEPLOY, *names], cwd=REPOSITORY, env=environment, capture_output=True, text=True)
            assert done.returncode == 0, done.stdout + done.stderr

        def ask(path: str, body: Any) -> Any:
            answer = httpx.post(environment["PREFECT_API_URL"] + path, json=body, timeout=30, trust_env=False)
            answer.raise_for_status()
            return answer.json()

        names = [automation["name"] for automation in ask("/automations/filter", {})]
        assert sorted(names) == [
            "trip: evaluate a finished training",
            "trip: report a failed stage",
            "trip: report a lost run",
            "trip: test the service after a promotion",
        ]
        done = subprocess.run([sys.executable, "-c", EVENTS], env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-3000:]
        (failure,) = until(lambda: received, 60, "the call of the webhook")
        assert failure["stage"] == "prepare" and failure["remedy"] == "free some space"
        assert (failure["shard"], failure["clip"]) == ("shard-00003-ab12", "clip 17")
        assert "No space left on device" in failure["error"] and failure["run"].startswith("http")

        def started() -> dict[str, Any] | None:
            ids = {d["id"]: d["name"] for d in ask("/deployments/filter", {})}
            runs = ask("/flow_runs/filter", {"flow_runs": {"state": {"type": {"any_": ["SCHEDULED"]}}}})
            mine = [run for run in runs if run["deployment_id"] and not run["auto_scheduled"]]
            found = {ids[run["deployment_id"]]: run["parameters"] for run in mine}
            return found if len(found) == 2 else None

        runs = until(started, 60, "the runs of the automations")
        assert runs["smoke-test"] == {"version": "4"}
        evaluation = runs["evaluate-trip"]
        assert (evaluation["model"], evaluation["source"]) == ("/r/train/1/model", None)
        assert evaluation["values"] == ["evaluate.clips=3"]
    finally:
        server.terminate()
        server.wait(30)


def test_the_smoke_test_animates_a_photo_with_the_version_of_the_promotion() -> None:
    with running_service(QuickBackend()) as service:
        assert smoke_test.fn(service.url, "1", 5)["version"] == "1"
        with pytest.raises(UserError, match="has version 1 after 1 s, expected version 2"):
            smoke_test.fn(service.url, "2", 1)
    with pytest.raises(UserError, match=r"ConnectError.* expected a version"):
        smoke_test.fn(service.url, None, 1)
