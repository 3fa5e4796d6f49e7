"""A stack of `flows up` as its user sees it: the commands, Prefect's and MLflow's API, and its processes."""

from __future__ import annotations

import datetime
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx

from infra.supervisor import SERVICE_VARIABLE, STACK_VARIABLE
from tests.conftest import free_port

REPOSITORY = Path(__file__).resolve().parents[2]
FLOWS = [sys.executable, "-m", "flows"]
RAYLET = "raylet"  # the service of a node that `add_raylet` starts
ENDED = ("COMPLETED", "FAILED", "CRASHED", "CANCELLED")
_LIST = "import ray; ray.init(log_to_driver=False); print(*('node:' + n['NodeID'] for n in ray.nodes() if n['Alive']))"
LIST_NODES = [sys.executable, "-c", _LIST]


def members(folder: Path) -> list[int]:
    """The processes that belong to a stack."""
    mark = f"{STACK_VARIABLE}={folder}".encode()
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdecimal():
            try:
                if mark in (entry / "environ").read_bytes().split(b"\0"):
                    found.append(int(entry.name))
            except OSError:
                continue
    return found


def until(answer: Callable[[], Any], seconds: float, what: str) -> Any:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        found = answer()
        if found:
            return found
        time.sleep(0.1)
    raise AssertionError(f"{what} did not happen within {seconds:.0f} s")


def living_nodes(listed: subprocess.CompletedProcess[str]) -> set[str]:
    """The ids in the output of `LIST_NODES`, between whatever Ray prints; none if the cluster did not answer."""
    return set(re.findall(r"node:(\w+)", listed.stdout)) if listed.returncode == 0 else set()


class Stack:
    """The commands of a stack, and Prefect's API."""

    def __init__(self, folder: Path, **variables: str) -> None:
        self.folder = folder
        names = ("PREFECT_", "MLFLOW_", "RAY_", "AWS_")
        self.environment = {k: v for k, v in os.environ.items() if not k.startswith(names)} | {"OMP_NUM_THREADS": "1"}
        self.environment |= variables

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

    def add_raylet(self, number: int = 2) -> subprocess.Popen[bytes]:
        """Starts one more Ray node with one processor, at an address of its own; `down` ends it.

        On a busy machine Ray's own limit of 30 s may end its start, which is then repeated.
        """
        environment = self.environment | self.client() | {STACK_VARIABLE: str(self.folder), SERVICE_VARIABLE: RAYLET}
        environment |= {"PYTHONPATH": str(REPOSITORY)}
        flags = {
            "address": environment["RAY_ADDRESS"],
            "node-ip-address": f"127.0.0.{number}",
            "num-cpus": 1,
            "object-store-memory": 200 * 1024 * 1024,
            "dashboard-agent-listen-port": free_port(),
            "dashboard-agent-grpc-port": free_port(),
        }
        command = [sys.executable, "-m", "ray.scripts.scripts", "start", "--block", "--disable-usage-stats"]
        command += [f"--{name}={value}" for name, value in flags.items()]
        log = self.folder / f"raylet-{number}.log"
        before = self.living_nodes()
        for _ in range(3):
            with log.open("wb") as file:
                node = subprocess.Popen(command, stdout=file, stderr=file, env=environment, start_new_session=True)
            # Another id, not another number: for half a minute a killed raylet counts as alive.
            until(lambda node=node: node.poll() is not None or self.living_nodes() - before, 120, "the second raylet")
            if node.poll() is None:
                return node
        raise AssertionError(f"Ray did not start: {log.read_text()[-3000:]}")

    def living_nodes(self) -> set[str]:
        """The ids of the nodes of the Ray cluster that are alive."""
        environment = self.environment | self.client()
        return living_nodes(subprocess.run(LIST_NODES, capture_output=True, text=True, env=environment))

    def shards(self, root: str) -> dict[str, str]:
        """The shards below a root of the stack's object store, each with its hash."""
        import s3fs

        client = self.client()
        files = s3fs.S3FileSystem(
            key=client["AWS_ACCESS_KEY_ID"],
            secret=client["AWS_SECRET_ACCESS_KEY"],
            endpoint_url=client["AWS_ENDPOINT_URL"],
            skip_instance_cache=True,
        )
        return {name: files.info(name)["ETag"] for name in files.find(root) if str(name).endswith(".tar")}

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

    def use_tiny_flow(self, deployment: str, flow: str) -> str:
        """Makes a deployment run a flow of the tests with their recipe `tiny`; returns its id."""
        (found,) = [d["id"] for d in self.api("POST", "/deployments/filter", {}) if d["name"] == deployment]
        # The form's list of recipes does not have the one of the tests.
        self.api("PATCH", f"/deployments/{found}", {"enforce_parameter_schema": False})
        self.api("PATCH", f"/deployments/{found}", {"entrypoint": f"tests/support/tiny_flow.py:{flow}"})
        return found

    def start(self, deployment: str, parameters: dict[str, Any]) -> str:
        """Starts a run of a deployment; returns its id."""
        return self.api("POST", f"/deployments/{deployment}/create_flow_run", {"parameters": parameters})["id"]

    def state(self, run: str) -> tuple[str, str]:
        """Type and message of a run's state; ("", "") while the server does not answer."""
        try:
            state = self.api("GET", f"/flow_runs/{run}")["state"]
        except httpx.HTTPError:
            return "", ""
        return state["type"], state["message"] or ""

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
