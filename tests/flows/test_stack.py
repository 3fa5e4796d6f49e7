"""`up` starts every service; a scheduled run goes from a table to a registered model on them; `down` leaves nothing."""

from __future__ import annotations

import datetime
import json
import os
import shutil
import signal
import socket
import stat
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from flows.cli import stack as stacks
from infra.supervisor import Service, ServiceFailed, Supervisor
from tasks.ingest.demo import write_demo_corpus
from tasks.records import UserError

REPOSITORY = Path(__file__).resolve().parents[2]
FLOWS = [sys.executable, "-m", "flows"]
ENDED = ("COMPLETED", "FAILED", "CRASHED", "CANCELLED")


def sleeper(name: str, **more: Any) -> Service:
    """A service with a child, healthy at once."""
    script = "import subprocess, sys; subprocess.run([sys.executable, '-c', 'import time; time.sleep(600)'])"
    return Service(name, (sys.executable, "-c", script), is_healthy=lambda: True, **more)


def members(folder: Path) -> list[int]:
    """The processes that belong to a stack."""
    mark = f"TRIP_STACK={folder}".encode()
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdecimal():
            try:
                if mark in (entry / "environ").read_bytes().split(b"\0"):
                    found.append(int(entry.name))
            except OSError:
                continue
    return found


@pytest.fixture
def supervisor(tmp_path: Path) -> Iterator[Supervisor]:
    supervisor = Supervisor(tmp_path)
    yield supervisor
    supervisor.down([], lambda line: None)


def pid_of(folder: Path, name: str) -> int:
    return json.loads((folder / name / "process.json").read_text())["pid"]


def until(answer: Callable[[], Any], seconds: float, what: str) -> Any:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        found = answer()
        if found:
            return found
        time.sleep(0.1)
    raise AssertionError(f"{what} did not happen within {seconds:.0f} s")


def test_a_second_up_starts_only_the_service_that_was_killed_and_ends_its_children(supervisor: Supervisor) -> None:
    services, lines = [sleeper("a"), sleeper("b", after=("a",))], []
    supervisor.up(services, lines.append)
    folder = supervisor.folder
    first, second = pid_of(folder, "a"), pid_of(folder, "b")
    until(lambda: len(members(folder)) == 4, 10, "the start of the children")
    supervisor.up(services, lines.append)
    assert (pid_of(folder, "a"), pid_of(folder, "b")) == (first, second)
    os.kill(first, signal.SIGKILL)
    until(lambda: [s.status for s in supervisor.states(services)] == ["stopped", "healthy"], 10, "the end of a")
    supervisor.up(services, lines.append)
    assert pid_of(folder, "a") != first and pid_of(folder, "b") == second
    until(lambda: len(members(folder)) == 4, 10, "the end of the killed service's child")
    supervisor.down(services, lines.append)
    assert not members(folder)


def test_a_changed_command_or_variable_starts_a_service_again(supervisor: Supervisor) -> None:
    supervisor.up([sleeper("a")], print)
    before = pid_of(supervisor.folder, "a")
    supervisor.up([sleeper("a", environment={"ADDRESS": "another"})], print)
    assert pid_of(supervisor.folder, "a") != before


def test_the_children_of_an_adopting_service_go_on(supervisor: Supervisor) -> None:
    service = sleeper("worker", adopts=True)
    supervisor.up([service], print)
    child = until(lambda: set(members(supervisor.folder)) - {pid_of(supervisor.folder, "worker")}, 10, "the child")
    os.kill(pid_of(supervisor.folder, "worker"), signal.SIGKILL)
    supervisor.end_leftovers(["worker"])
    supervisor.up([service], print)
    assert child <= set(members(supervisor.folder))


def test_a_service_that_ends_is_named_with_its_log_and_a_waiting_one_holds_its_dependents(
    supervisor: Supervisor,
) -> None:
    lines: list[str] = []
    waits = sleeper("model", missing=lambda: "a champion")
    supervisor.up([waits, sleeper("page", after=("model",))], lines.append)
    assert lines == ["model        waits for a champion", "page         waits for model"]
    broken = Service("broken", (sys.executable, "-c", "exit('no such table')"), is_healthy=lambda: False)
    with pytest.raises(ServiceFailed, match=r"broken ended with code 1; its log is .*/broken/log\nno such table"):
        supervisor.up([broken], print)


def test_a_port_in_use_is_left_to_its_owner_and_the_chosen_one_stays(tmp_path: Path) -> None:
    settings = stacks.Settings("sqlite", "", "trip", 1)
    stack = stacks.Stack(tmp_path, settings)
    with socket.create_server(("127.0.0.1", 0)) as other:
        settings.ports["mlflow"] = taken = other.getsockname()[1]
        stacks.choose_ports(stack, set())
    ports = dict(settings.ports)
    assert ports["mlflow"] != taken and len(set(ports.values())) == len(stacks.PORTS)
    stacks.choose_ports(stacks.load(tmp_path), set())
    assert stacks.load(tmp_path).settings.ports == ports


def test_secrets_are_made_once_for_the_owner_only_and_are_in_no_command(tmp_path: Path) -> None:
    stack = stacks.Stack(tmp_path, stacks.Settings("postgresql", "moto", "trip", 1))
    stacks.choose_ports(stack, set())
    stack.write_files()
    values = {name: value for name, value in stack.secrets.items() if name not in ("AWS_DEFAULT_REGION",)}
    assert stacks.Stack(tmp_path, stack.settings).secrets == stack.secrets
    for path in tmp_path.iterdir():
        if any(value in path.read_text() for value in values.values() if value != "trip"):
            assert stat.S_IMODE(path.stat().st_mode) == 0o600, path
    commands = " ".join(word for service in stack.services for word in service.command)
    assert not [name for name, value in values.items() if value != "trip" and value in commands]


def test_a_stack_keeps_its_database_and_refuses_an_address_that_is_none(tmp_path: Path) -> None:
    pytest.importorskip("flask_wtf")
    stacks.choose_ports(stacks.prepare(tmp_path, "sqlite", None, "", None), set())
    with pytest.raises(UserError, match=r"uses sqlite; give another --folder for postgresql"):
        stacks.prepare(tmp_path, "postgresql", None, "", None)
    with pytest.raises(UserError, match=r"--s3 minio: expected the http address"):
        stacks.prepare(tmp_path, "auto", "minio", "", None)


class Stack:
    """The commands of a stack, and Prefect's API."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        names = ("PREFECT_", "MLFLOW_", "RAY_", "AWS_")
        self.environment = {k: v for k, v in os.environ.items() if not k.startswith(names)} | {"OMP_NUM_THREADS": "1"}

    def run(self, command: str, *flags: str) -> str:
        done = subprocess.run(
            [*FLOWS, command, "--folder", str(self.folder), *flags],
            env=self.environment,
            cwd=REPOSITORY,
            capture_output=True,
            text=True,
            timeout=600,
        )
        assert done.returncode == 0, f"{command}: {done.stdout[-3000:]} {done.stderr[-3000:]}"
        return done.stdout

    def client(self) -> dict[str, str]:
        lines = (self.folder / "client.env").read_text().splitlines()
        return {name: value.strip("'") for name, _, value in (x.removeprefix("export ").partition("=") for x in lines)}

    def api(self, method: str, path: str, body: Any = None) -> Any:
        client = self.client()
        user, _, password = client["PREFECT_API_AUTH_STRING"].partition(":")
        answer = httpx.request(
            method,
            client["PREFECT_API_URL"] + path,
            json=body,
            auth=(user, password),
            timeout=30,
            trust_env=False,
        )
        answer.raise_for_status()
        return answer.json() if answer.content else None

    def mlflow(self, path: str, body: dict[str, Any] | None = None) -> dict[str, Any]:
        client = self.client()
        auth = (client["MLFLOW_TRACKING_USERNAME"], client["MLFLOW_TRACKING_PASSWORD"])
        url = f"{client['MLFLOW_TRACKING_URI']}/api/2.0/mlflow/{path}"
        answer = httpx.request("POST" if body else "GET", url, json=body, auth=auth, timeout=30, trust_env=False)
        answer.raise_for_status()
        return answer.json()

    def scheduled_run(self, deployment: str, seconds: float) -> dict[str, Any]:
        """Gives a deployment a schedule whose first run is due; returns that run when it has ended."""
        known = {run["id"] for run in self.runs(deployment)}
        first = datetime.datetime.now(datetime.UTC) + datetime.timedelta(
            seconds=30
        )  # a busy server plans after some seconds
        interval = {"interval": 86400, "anchor_date": first.isoformat(), "timezone": "UTC"}
        self.api("POST", f"/deployments/{deployment}/schedules", [{"schedule": interval, "active": True}])
        # Prefect plans a changed deployment within seconds, and the others once a minute.
        self.api("PATCH", f"/deployments/{deployment}", {"paused": False})

        def ended() -> dict[str, Any] | None:
            runs = [r for r in self.runs(deployment) if r["id"] not in known and r["state_type"] in ENDED]
            return runs[0] if runs else None

        run = until(
            ended, seconds, f"the end of a scheduled run; {(self.folder / 'worker' / 'log').read_text()[-2000:]}"
        )
        for schedule in self.api("GET", f"/deployments/{deployment}")["schedules"]:
            self.api("DELETE", f"/deployments/{deployment}/schedules/{schedule['id']}")
        return run

    def runs(self, deployment: str) -> list[dict[str, Any]]:
        body = {"deployments": {"id": {"any_": [deployment]}}, "sort": "EXPECTED_START_TIME_ASC"}
        return self.api("POST", "/flow_runs/filter", body)


@pytest.fixture
def stack() -> Iterator[Stack]:
    """A stack that is not up yet, in a folder that PostgreSQL's account can reach."""
    pytest.importorskip("flask_wtf")
    pytest.importorskip("moto.server")
    folder = Path(tempfile.mkdtemp(prefix="trip-up-"))
    folder.chmod(0o755)
    stack = Stack(folder / "up")
    try:
        yield stack
    finally:
        if (stack.folder / "stack.json").exists():
            stack.run("down")
        shutil.rmtree(folder, ignore_errors=True)


@pytest.mark.slow
def test_a_scheduled_run_goes_from_a_table_to_a_served_model(stack: Stack, tiny_base: Path, tmp_path: Path) -> None:
    began = time.monotonic()
    stack.run("up", "--s3", "moto")
    assert time.monotonic() - began < 180 or os.getloadavg()[0] > 4, "up took more than three minutes"
    assert oct(stack.folder.stat().st_mode & 0o777) in ("0o700", "0o711")

    (deployment,) = [d["id"] for d in stack.api("POST", "/deployments/filter", {}) if d["name"] == "reproduce"]
    parameters = {
        "recipe": "tiny",
        "source": write_demo_corpus(tmp_path / "corpus", 12, 32),
        "root": "s3://trip/night",
        "base": str(tiny_base),
    }
    # The form's list of recipes does not have the one of the tests.
    stack.api("PATCH", f"/deployments/{deployment}", {"enforce_parameter_schema": False})
    changes = {"entrypoint": "tests/support/tiny_flow.py:reproduce", "parameters": parameters}
    stack.api("PATCH", f"/deployments/{deployment}", changes)

    run = stack.scheduled_run(deployment, 400)
    assert run["state_type"] == "COMPLETED" and run["auto_scheduled"], (stack.folder / "worker" / "log").read_text()
    versions = stack.mlflow("model-versions/search?filter=name%3D%27trip%27")["model_versions"]
    assert [v["version"] for v in versions] == ["1"]

    # Nothing changed: every stage finds its result, and no second version appears.
    again = stack.scheduled_run(deployment, 200)
    assert again["state_type"] == "COMPLETED" and again["total_run_time"] < run["total_run_time"]
    assert len(stack.mlflow("model-versions/search?filter=name%3D%27trip%27")["model_versions"]) == 1

    # The gate refuses so small a model; with a champion, `up` starts the model service and nothing else.
    assert "model        waits" in stack.run("status")
    stack.mlflow("registered-models/alias", {"name": "trip", "alias": "champion", "version": "1"})
    pids = {path.parent.name: path.read_text() for path in stack.folder.glob("*/process.json")}
    assert "model        healthy" in stack.run("up")
    now = {path.parent.name: path.read_text() for path in stack.folder.glob("*/process.json")}
    assert {name for name in now if now[name] != pids.get(name)} == {"model"}

    stack.run("down")
    assert not members(stack.folder)
