"""Credentials of the tracking server: from the environment, never among what flows are given."""

from __future__ import annotations

import base64
import http.server
import json
import os
import pickle
import threading
from collections.abc import Iterator
from typing import ClassVar

import pytest

from flows.cli.app import main
from flows.mlflow_store import existing_store, tracking_address
from infra.redaction import redact
from infra.settings import MLFLOW_ACCESS, client_address, move_credentials
from infra.telemetry import Tracking
from infra.tracking import TROUBLE, connect, run_page
from tasks.records import UserError
from tasks.register.consumer import addresses
from tasks.register.promotion import open_registry
from tasks.serve.messages import EngineSpec
from tasks.serve.versions import AliasedModel, RegistryTrouble
from tasks.train.spec import TrackingSpec


@pytest.fixture(autouse=True)
def no_access(monkeypatch: pytest.MonkeyPatch) -> None:
    """No variable of MLflow's before the test, and none left after it."""
    for name in (*MLFLOW_ACCESS, "MLFLOW_REGISTRY_URI"):
        monkeypatch.setenv(name, "")  # so that it is restored whatever the test sets
        monkeypatch.delenv(name)
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")


class Locked(http.server.BaseHTTPRequestHandler):
    """An MLflow server that only records the credentials of requests."""

    asked: ClassVar[list[str | None]] = []

    def do_GET(self) -> None:
        if not self.path.startswith("/health"):
            self.asked.append(self.headers.get("Authorization"))
        self.send_response(200)
        self.end_headers()
        self.wfile.write(json.dumps({"registered_models": []}).encode())

    do_POST = do_GET

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture
def locked() -> Iterator[str]:
    Locked.asked.clear()
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Locked) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"127.0.0.1:{server.server_port}"
        server.shutdown()


@pytest.mark.parametrize(
    ("userinfo", "sent"),
    [("ops:hunter2", "ops:hunter2"), ("ops:hu%40n%3Ater2", "ops:hu@n:ter2"), (":hunter2", ":hunter2")],
)
def test_moved_credentials_reach_the_server(locked: str, userinfo: str, sent: str) -> None:
    moved = move_credentials(f"http://{userinfo}@{locked}")
    assert "hunter2" not in moved and "ter2" not in moved and moved.endswith(locked)
    assert tracking_address(moved, "runs/x") == moved
    open_registry(moved)
    assert Locked.asked == ["Basic " + base64.b64encode(sent.encode()).decode()]


def test_the_tracking_address_of_the_environment_is_the_default(locked: str, tmp_path) -> None:
    os.environ["MLFLOW_TRACKING_URI"] = f"http://ops:hunter2@{locked}"
    assert tracking_address(None, str(tmp_path)) == existing_store(None, str(tmp_path)) == f"http://{locked}"
    assert [os.environ[f"MLFLOW_TRACKING_{name}"] for name in ("URI", "USERNAME", "PASSWORD")] == [
        f"http://{locked}",
        "ops",
        "hunter2",
    ]
    assert tracking_address("sqlite:///other.db", str(tmp_path)) == "sqlite:///other.db"


def test_a_databases_password_stays_in_the_environment() -> None:
    full = "postgresql+psycopg2://u:hunter2@127.0.0.1:9/db"
    moved = move_credentials(full)
    assert moved == redact(full) == move_credentials(moved)
    assert client_address(moved) == full and client_address("sqlite:///x.db") == "sqlite:///x.db"
    assert "hunter2" not in run_page(full, "1", "2") and "hunter2" not in run_page("http://u:hunter2@h", "1", "2")


def test_a_parameter_with_a_password_is_refused_in_one_sentence() -> None:
    for function in (tracking_address, existing_store):
        with pytest.raises(
            UserError, match=r"http://\*\*\*@host contains a password.*MLFLOW_TRACKING_PASSWORD"
        ) as raised:
            function("http://ops:hunter2@host", "runs/x")
        assert "hunter2" not in str(raised.value)


@pytest.mark.parametrize("form", ["--tracking-uri={}", "--tracking-uri {}"])
def test_a_command_names_no_password_when_the_server_is_away(form: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["live", *form.format("http://ops:hunter2@127.0.0.1:9").split()]) == 2
    output = capsys.readouterr()
    assert "http://127.0.0.1:9" in output.err and "hunter2" not in output.err + output.out
    assert os.environ["MLFLOW_TRACKING_PASSWORD"] == "hunter2"


def test_a_flow_is_not_given_the_password(monkeypatch: pytest.MonkeyPatch, tmp_path) -> None:
    from flows.register_trip import register_trip

    given = {}
    monkeypatch.setenv("PREFECT_API_URL", "http://127.0.0.1:9/api")
    monkeypatch.setattr(type(register_trip), "__call__", lambda self, **parameters: given.update(parameters))
    assert main(["register-trip", "--tracking-uri", "http://ops:hunter2@host:5000", "--root", str(tmp_path)]) == 0
    assert given["tracking_uri"] == "http://host:5000"


def test_no_message_of_tracking_or_of_the_service_names_the_password(caplog, tmp_path) -> None:
    uri = "http://ops:hunter2@127.0.0.1:9"
    tracking = Tracking(uri, "exp", spool=tmp_path / "spool.jsonl")
    tracking.start_run("n", key="k", params={"dataset": "sftp://u:hunter2@h/d"}, wait_seconds=1)
    tracking.dataset_input("latents", "0" * 64, "sftp://u:hunter2@h/d")
    assert not tracking.finish(wait_seconds=5)
    assert "hunter2" not in caplog.text + tracking.last_error + (tmp_path / "spool.jsonl").read_text()
    with pytest.raises(UserError) as refused:
        open_registry(uri)
    with pytest.raises(RegistryTrouble) as trouble:
        AliasedModel("trip", "champion", uri, tmp_path).current()
    with pytest.raises(TROUBLE) as plain:
        connect(uri).search_experiments()
    assert "hunter2" not in str(refused.value) + str(trouble.value)
    assert "hunter2" not in redact(str(plain.value))


@pytest.mark.parametrize(
    ("make", "enter"),
    [
        (lambda: EngineSpec("trip", "champion", "http://host", "cache"), lambda spec: spec.access.apply()),
        (lambda: TrackingSpec("http://host"), lambda spec: spec.access.apply()),
    ],
    ids=["service", "training"],
)
def test_a_worker_with_another_environment_gets_the_credentials(make, enter) -> None:
    move_credentials("http://ops:hunter2@host")
    sent = pickle.dumps(make())
    assert "hunter2" not in repr(make())
    for name in MLFLOW_ACCESS:
        os.environ.pop(name, None)
    enter(pickle.loads(sent))
    assert (os.environ["MLFLOW_TRACKING_USERNAME"], os.environ["MLFLOW_TRACKING_PASSWORD"]) == ("ops", "hunter2")


def test_the_registration_leaves_no_address_of_mlflow_in_the_environment(tmp_path) -> None:
    with addresses(f"sqlite:///{tmp_path}/mlflow.db"):
        assert os.environ["MLFLOW_TRACKING_URI"].startswith("sqlite:///")
    assert not {"MLFLOW_TRACKING_URI", "MLFLOW_REGISTRY_URI"} & os.environ.keys()
