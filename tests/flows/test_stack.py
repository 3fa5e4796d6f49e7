"""`up` starts every service; a scheduled run goes from a table to a registered model on them; `down` leaves nothing."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import stat
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from flows.cli import stack as stacks
from infra.supervisor import Service, ServiceFailed, Supervisor
from tasks.ingest.demo import write_demo_corpus
from tasks.records import UserError
from tests.support.stacks import ENDED, Stack, members, until


def sleeper(name: str, **more: Any) -> Service:
    """A service with a child, healthy at once."""
    script = "import subprocess, sys; subprocess.run([sys.executable, '-c', 'import time; time.sleep(600)'])"
    return Service(name, (sys.executable, "-c", script), is_healthy=lambda: True, **more)


@pytest.fixture
def supervisor(tmp_path: Path) -> Iterator[Supervisor]:
    supervisor = Supervisor(tmp_path)
    yield supervisor
    supervisor.down([], lambda line: None)


def pid_of(folder: Path, name: str) -> int:
    return json.loads((folder / name / "process.json").read_text())["pid"]


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


def test_a_service_with_several_tries_is_started_again_when_it_ends_at_its_start(supervisor: Supervisor) -> None:
    mark = supervisor.folder / "tried"
    script = "import pathlib, sys, time; p = pathlib.Path(sys.argv[1]); again = p.exists()"
    script += "; p.touch(); time.sleep(600 * again)"
    lines: list[str] = []
    service = Service("slow", (sys.executable, "-c", script, str(mark)), is_healthy=lambda: _age(mark) > 2, tries=2)
    supervisor.up([service], lines.append)
    assert lines[0] == "slow         ended with code 0, starting it again" and "healthy in" in lines[1]


def _age(file: Path) -> float:
    """Seconds since the last change of a file; 0 without one."""
    return time.time() - file.stat().st_mtime if file.exists() else 0.0


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


def test_old_sessions_of_ray_are_removed_before_the_next_one(tmp_path: Path) -> None:
    names = [f"session_2026-11-0{day}_10-00-00_000001_7" for day in range(1, 6)]
    for name in names:
        (tmp_path / name / "logs").mkdir(parents=True)
    (tmp_path / "session_latest").symlink_to(names[-1])
    stacks.remove_old_sessions(tmp_path)
    left = sorted(path.name for path in tmp_path.iterdir())
    assert left == [*names[-(stacks.KEPT_SESSIONS - 1) :], "session_latest"]


def test_rays_processes_know_the_address_of_their_session(tmp_path: Path) -> None:
    stack = stacks.Stack(tmp_path, stacks.Settings("sqlite", "", "trip", 1))
    stacks.choose_ports(stack, set())
    (ray,) = [service for service in stack.services if service.name == "ray"]
    assert ray.environment["RAY_ADDRESS"] == stack.client_environment["RAY_ADDRESS"]


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
    stack.run("up", "--s3", "moto", "--cpus", "1")
    assert time.monotonic() - began < 180 or os.getloadavg()[0] > 4, "up took more than three minutes"
    assert oct(stack.folder.stat().st_mode & 0o777) in ("0o700", "0o711")

    stack.add_raylet()
    deployment = stack.use_tiny_flow("reproduce", "reproduce")
    parameters = {
        "recipe": "tiny",
        "source": write_demo_corpus(tmp_path / "corpus", 12, 32),
        "root": "s3://trip/night",
        "base": str(tiny_base),
        "values": ["prepare.workers=2", "train.workers=2"],  # one on each raylet
    }
    stack.api("PATCH", f"/deployments/{deployment}", {"parameters": parameters})

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

    # A night with five more rows, and a model that is planted worse: steps a thousand times too large. With four clips
    # the gate already refuses the model by itself; tests/evaluate and tests/flows/test_nightly.py compare champions.
    nightly = stack.use_tiny_flow("nightly", "nightly")
    worse = [*parameters["values"], *(f"train.learning_rate_{part}=3" for part in ("unet", "fusion"))]
    shards = stack.shards(parameters["root"])
    assert shards
    write_demo_corpus(tmp_path / "corpus", 17, 32)
    night = stack.start(nightly, parameters | {"values": worse})
    until(lambda: stack.state(night)[0] in ENDED, 400, "the end of the night")
    assert stack.state(night)[0] == "COMPLETED", stack.state(night)
    after = stack.shards(parameters["root"])
    assert shards.items() <= after.items() and len(after) <= len(shards) + 2, (shards, after)
    second = stack.mlflow("model-versions/get?name=trip&version=2")["model_version"]
    refused = {tag["key"]: tag["value"] for tag in second["tags"]}["trip.promotion_refused"]
    assert "is not promoted: the gate of its report did not pass" in refused, refused
    alias = stack.mlflow("registered-models/alias?name=trip&alias=champion")["model_version"]
    assert alias["version"] == "1"

    stack.run("down")
    assert not members(stack.folder)
