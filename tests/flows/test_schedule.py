"""A schedule in prefect.yaml comes to life: a real server creates the run, a real worker finishes it."""

from __future__ import annotations

import datetime
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from uuid import UUID

import pytest

from tasks.ingest.demo import write_demo_corpus

REPOSITORY = Path(__file__).resolve().parents[2]
PREFECT = [sys.executable, "-m", "prefect"]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def start(arguments: list[str], environment: dict[str, str], log: Path) -> subprocess.Popen[bytes]:
    """A process that answers SIGINT even where the tests run in the background, and so inherit an ignored one."""
    with open(log, "ab") as out:
        return subprocess.Popen(
            arguments,
            env=environment,
            cwd=REPOSITORY,
            stdout=out,
            stderr=out,
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler) and None,
        )


def stop(process: subprocess.Popen[bytes]) -> None:
    process.send_signal(signal.SIGINT)
    try:
        process.wait(timeout=30)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def wait_for(answer: Callable[[], Any], seconds: float, what: str, log: Path) -> Any:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        result = answer()
        if result:
            return result
        time.sleep(0.5)
    raise AssertionError(f"{what} did not happen within {seconds:.0f} s\n{log.read_text()[-3000:]}")


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """The environment of a fresh Prefect server with its own home."""
    home = tmp_path_factory.mktemp("prefect")
    port = free_port()
    environment = {k: v for k, v in os.environ.items() if not k.startswith("PREFECT_")} | {
        "PREFECT_HOME": str(home),
        "PREFECT_API_URL": f"http://127.0.0.1:{port}/api",
        "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
        "PREFECT_WORKER_QUERY_SECONDS": "2",
        "DO_NOT_TRACK": "1",
        "NO_PROXY": "127.0.0.1,localhost",
        "OMP_NUM_THREADS": "1",
    }
    log = home / "server.log"
    serve = [*PREFECT, "server", "start", "--host", "127.0.0.1", "--port", str(port), "--no-ui"]
    process = start(serve, environment, log)
    try:

        def healthy() -> bool:
            assert process.poll() is None, log.read_text()[-3000:]
            with socket.socket() as probe:
                return probe.connect_ex(("127.0.0.1", port)) == 0

        wait_for(healthy, 180, "the start of the server", log)
        yield environment | {"LOG": str(log)}
    finally:
        stop(process)


def deploy(environment: dict[str, str], *flags: str, checkout: Path = REPOSITORY, cwd: Path = REPOSITORY) -> str:
    """Runs the command `deploy` of a checkout in another folder."""
    command = [sys.executable, "-m", "flows", "deploy", *flags]
    variables = environment | {"PYTHONPATH": str(checkout)}
    done = subprocess.run(command, env=variables, cwd=cwd, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, f"{flags}: {done.stdout[-2000:]} {done.stderr[-2000:]}"
    return done.stdout


@pytest.mark.slow
def test_a_schedule_creates_a_run_and_a_worker_finishes_it(
    server: dict[str, str], tiny_base: Path, tmp_path: Path
) -> None:
    deploy(server, "--in-place", "--roots", str(tmp_path / "roots"))
    table = write_demo_corpus(tmp_path / "corpus", 2, 64)
    parameters = {"recipe": "demo", "source": table, "root": str(tmp_path / "run"), "base": str(tiny_base)}
    deployment, first = schedule(server, "prepare-latents/prepare-latents", parameters)

    log = tmp_path / "worker.log"
    worker = start([*PREFECT, "worker", "start", "--pool", "trip-local", "--type", "process"], server, log)
    try:
        server_log = Path(server["LOG"])
        run = wait_for(lambda: runs(server, deployment), 120, "the creation of a scheduled run", server_log)[0]
        assert run["auto_scheduled"] and run["expected_start_time"].startswith(first)

        def ended() -> str | None:
            kind = runs(server, deployment)[0]["state_type"]
            return kind if kind in ("COMPLETED", "FAILED", "CRASHED", "CANCELLED") else None

        assert wait_for(ended, 300, "the end of the run", log) == "COMPLETED", log.read_text()[-3000:]
    finally:
        stop(worker)
    assert list((tmp_path / "run" / "data").glob("*/manifest.json"))


@pytest.mark.slow
def test_a_paused_schedule_stays_paused_and_a_misspelt_parameter_is_refused(
    server: dict[str, str], tmp_path: Path
) -> None:
    import httpx

    deploy(server, "--in-place", "--name", "nightly", "--roots", str(tmp_path))
    nightly = found(server, "nightly")
    planned = wait_for(
        lambda: runs(server, UUID(nightly["id"])), 120, "the planning of the nightly run", Path(server["LOG"])
    )
    assert all(run["expected_start_time"][11:16] == "03:00" for run in planned)

    schedule_id = nightly["schedules"][0]["id"]
    post(server, f"/deployments/{nightly['id']}/schedules/{schedule_id}", {"active": False}, "PATCH")
    deploy(server, "--in-place", "--name", "nightly", "--roots", str(tmp_path / "elsewhere"), cwd=tmp_path)
    again = found(server, "nightly")
    assert again["id"] == nightly["id"] and [s["active"] for s in again["schedules"]] == [False]
    assert again["parameters"]["root"] == str(tmp_path / "elsewhere" / "nightly")

    choices = again["parameter_openapi_schema"]
    assert "demo" in choices["properties"]["recipe"]["anyOf"][0]["enum"]
    assert choices["definitions"]["SourceOptions"]["properties"]["limit"]["description"] == "the first rows only."
    for wrong in (
        {"sorce": "x.csv"},
        {"recipe": "dmo"},
        {"options": {"limits": 3}},
        {"options": {"limit": 0}},
        {"options": {"format": "xls"}},
        {"protocol": "webvid"},
    ):
        with pytest.raises(httpx.HTTPStatusError, match="409"):
            post(server, f"/deployments/{nightly['id']}/create_flow_run", {"parameters": wrong})
    right = {"recipe": "demo", "options": {"limit": 3, "captions": 7}, "protocol": "mine.toml"}
    post(server, f"/deployments/{nightly['id']}/create_flow_run", {"parameters": right})


@pytest.mark.slow
def test_a_deployment_runs_the_commit_that_was_deployed(server: dict[str, str], tmp_path: Path) -> None:
    def git(*arguments: str) -> str:
        identity = ["-c", "user.name=tester", "-c", "user.email=tester@example.com"]
        command = ["git", "-C", str(tmp_path / "checkout"), *identity, *arguments]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()

    # Of the files under test, committed or not, a checkout of its own.
    listed = ["git", "-C", str(REPOSITORY), "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    for name in subprocess.run(listed, check=True, capture_output=True, text=True).stdout.split("\0"):
        if (REPOSITORY / name).is_file():
            (tmp_path / "checkout" / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(REPOSITORY / name, tmp_path / "checkout" / name)
    subprocess.run(["git", "init", "-q", str(tmp_path / "checkout")], check=True)
    git("add", "-A")
    git("commit", "-qm", "files")

    deploy(server, "--name", "nightly", "--roots", str(tmp_path), checkout=tmp_path / "checkout", cwd=tmp_path)
    nightly = found(server, "nightly")
    (step,) = nightly["pull_steps"]
    folder = Path(step["prefect.deployments.steps.set_working_directory"]["directory"])
    commit = git("rev-parse", "--short=12", "HEAD")
    assert folder == tmp_path / "deployed" / commit and nightly["version"] == commit
    with (tmp_path / "checkout" / "flows" / "reproduce.py").open("a") as file:
        file.write("raise SystemExit('edited')\n")
    ask = "from infra.settings import code_version; import flows.reproduce; print(code_version())"
    run = subprocess.run(
        [sys.executable, "-c", ask],
        cwd=folder,
        env=server | nightly["job_variables"]["env"],
        capture_output=True,
        text=True,
    )
    assert run.stdout.strip().endswith(commit), run.stderr[-2000:]

    refused = subprocess.run(
        [sys.executable, "-m", "flows", "deploy"],
        cwd=tmp_path,
        env=server | {"PYTHONPATH": str(tmp_path / "checkout")},
        capture_output=True,
        text=True,
    )
    assert refused.returncode == 2 and "uncommitted changes" in refused.stderr and refused.stderr.count("\n") == 1


def found(environment: dict[str, str], name: str) -> dict[str, Any]:
    """The deployment of this name as the server has it."""
    (deployment,) = [d for d in post(environment, "/deployments/filter", {}) if d["name"] == name]
    return deployment


def post(environment: dict[str, str], path: str, body: Any, method: str = "POST") -> Any:
    import httpx

    for attempt in range(10):
        time.sleep(2 * (attempt > 0))
        answer = httpx.request(method, environment["PREFECT_API_URL"] + path, json=body, timeout=30, trust_env=False)
        if answer.status_code != 503:  # SQLite is locked; Prefect's own client waits and retries too
            answer.raise_for_status()
            return answer.json() if answer.content else None
    raise AssertionError(f"{path}: the database was locked ten times")


def schedule(environment: dict[str, str], name: str, parameters: dict[str, str]) -> tuple[UUID, str]:
    """Gives a deployment an hourly schedule whose first run is seconds away; returns its id and that time's minute."""
    deployment = name.split("/")[1]
    existing = found(environment, deployment)
    first = datetime.datetime.now(datetime.UTC) + datetime.timedelta(seconds=15)
    interval = {"interval": 3600, "anchor_date": first.isoformat(), "timezone": "UTC"}
    body = [{"schedule": interval, "active": True}]
    post(environment, f"/deployments/{existing['id']}", {"parameters": parameters}, "PATCH")
    post(environment, f"/deployments/{existing['id']}/schedules", body)
    return UUID(existing["id"]), first.strftime("%Y-%m-%dT%H:%M")


def runs(environment: dict[str, str], deployment: UUID) -> list[dict[str, Any]]:
    """Runs of a deployment, the earliest first."""
    body = {
        "flow_runs": {"deployment_id": {"any_": [str(deployment)]}},
        "deployments": {"id": {"any_": [str(deployment)]}},
        "sort": "EXPECTED_START_TIME_ASC",
    }
    return post(environment, "/flow_runs/filter", body)
