"""The service on Ray Serve: no clip lost or wrong after an alias move and a kill; frames of `mlflow models serve`."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import os
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import numpy as np
import pytest
import ray
import torch
from ray import serve

from benchmarks.serve_load import PROMPT, load, service
from benchmarks.slow_callers import attack
from infra.cluster import ray_session
from infra.settings import CHECKOUT
from tasks.register.packaging import drawn_photo
from tasks.video.decode import read_clip

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def running(tiny_model):
    """Two replicas and two versions. Threads as in a replica, because they change the last bits of a clip."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    flags = ("--replicas", "2", "--cpus", "1", "--max-queue", "16", "--no-page", "--max-step-frames", "64000",
             "--requests-per-minute", "100000")  # fmt: skip
    with service(tiny_model, *flags) as running:
        yield running
    torch.set_num_threads(before)


@contextlib.contextmanager
def mlflow_server(registry: str, version: str):
    """The address of `mlflow models serve`."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "mlflow", "models", "serve", "-m", f"models:/trip/{version}", "-p", str(port)]
    environment = os.environ | {
        "MLFLOW_TRACKING_URI": registry,
        "MLFLOW_REGISTRY_URI": registry,
        "OMP_NUM_THREADS": "1",
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",  # it starts `uvicorn` by its name
    }
    process = subprocess.Popen([*command, "--env-manager", "local"], env=environment, start_new_session=True)
    try:
        for _ in range(600):
            with contextlib.suppress(httpx.TransportError):
                if httpx.get(f"http://127.0.0.1:{port}/ping").status_code == 200:
                    break
            time.sleep(0.2)
        yield f"http://127.0.0.1:{port}"
    finally:
        os.killpg(process.pid, 15)
        process.wait(30)


# Serves under the given name until its input ends; prints the status for each line, or why it does not serve.
DRIVER = """
import asyncio, sys
from tasks.records import UserError
from tasks.serve.messages import EngineSpec
from tasks.serve.job import serving

address, folder, service = sys.argv[1:]
spec = EngineSpec("trip", "champion", f"sqlite:///{folder}/mlflow.db", folder)
try:
    with serving(spec, 1, 0.5, address=address, service=service) as replicas:
        print("serves", flush=True)
        for _ in sys.stdin:
            print(asyncio.run(replicas.status()).trouble, flush=True)
except UserError as error:
    print(f"refused: {error}")
"""


class Driver:
    """A process that serves on a cluster."""

    def __init__(self, address: str, folder: Path, service: str = "") -> None:
        command = [sys.executable, "-c", DRIVER, address, str(folder), service]
        environment = os.environ | {"PYTHONPATH": str(CHECKOUT)}
        self.process = subprocess.Popen(
            command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def line(self) -> str:
        """The next line that it prints."""
        assert self.process.stdout
        return self.process.stdout.readline().strip()

    def answers(self) -> bool:
        """Whether a replica responds; the replicas have no model."""
        assert self.process.stdin
        self.process.stdin.write("\n")
        self.process.stdin.flush()
        return "has no version trip@champion" in self.line()

    def end(self) -> None:
        self.process.communicate(timeout=120)


def test_services_on_one_cluster_have_unique_names_and_do_not_delete_each_other(tmp_path):
    with ray_session(num_cpus=4):
        address = ray.get_runtime_context().gcs_address
        first = Driver(address, tmp_path)
        assert first.line() == "serves" and first.answers()
        same = Driver(address, tmp_path)
        assert "a service called 'trip-trip-champion' runs on this Ray cluster; give another --service" in same.line()
        same.end()
        second = Driver(address, tmp_path, "second")
        assert second.line() == "serves" and second.answers() and first.answers()
        first.end()
        assert second.answers()
        second.process.kill()  # the next service of its name replaces what it leaves
        second.process.communicate()
        third = Driver(address, tmp_path, "second")
        assert third.line() == "serves" and third.answers()
        third.end()
        assert serve.status().applications == {}


def test_the_frames_equal_those_of_mlflow_models_serve(running):
    photo = base64.b64encode(drawn_photo(48)).decode()
    numbers = {"seed": 11, "steps": 5, "num_frames": 6, "guidance": 2.0, "fps": 8.0, "format": "mp4"}
    ours = httpx.post(f"{running.url}/v1/animate", json={"image": photo, "prompt": PROMPT, **numbers}, timeout=120)
    rows = {"columns": ["image", "prompt"], "data": [[photo, PROMPT]]}
    with mlflow_server(running.registry, "1") as server:
        theirs = httpx.post(f"{server}/invocations", json={"dataframe_split": rows, "params": numbers}, timeout=120)
    video = base64.b64decode(theirs.json()["predictions"][0]["video"])
    assert ours.headers["x-model-version"] == "1"
    frames = [read_clip(source, 6, 8, 32).pixels for source in (ours.content, video)]
    np.testing.assert_array_equal(*frames)


def test_clients_that_disconnect_leave_the_queues_of_the_replicas(running):
    long = {"image": base64.b64encode(drawn_photo(48)).decode(), "prompt": PROMPT, "num_frames": 64, "steps": 1000}

    def waiting() -> int:
        """The largest number of requests that wait at a replica; each response is of one of the two."""
        return max(httpx.get(f"{running.url}/readyz", timeout=20).json()["waiting"] for _ in range(6))

    def hang_up(_: int) -> None:
        with contextlib.suppress(httpx.ReadTimeout):
            httpx.post(f"{running.url}/v1/animate", json=long, timeout=httpx.Timeout(60, read=10))

    with ThreadPoolExecutor(10) as pool:
        calls = [pool.submit(hang_up, number) for number in range(10)]
        until = time.monotonic() + 9
        while time.monotonic() < until and not waiting():
            time.sleep(0.1)
        assert waiting() >= 2
        for call in calls:
            call.result()
    until = time.monotonic() + 5  # one second on an idle machine
    while time.monotonic() < until and waiting():
        time.sleep(0.1)
    status = httpx.get(f"{running.url}/readyz").json()
    assert waiting() == 0 and status["in_flight"] == 0, status


def test_good_callers_are_answered_next_to_slow_hostile_and_vanishing_ones(running):
    result = asyncio.run(attack(running.url, slow=40, gone=60, good=16, hostile=1))
    assert sum(result["good"].values()) == 16 and set(result["good"]) <= {"200", "429"}, result
    assert result["slow_cut_off"] == 40 and result["hostile"] == {"400": 1}, result
    metrics = httpx.get(f"{running.url}/metrics").text
    assert 'status="408"} 20' in metrics and 'status="500"' not in metrics


def test_an_alias_move_and_a_killed_replica_lose_nothing_and_sigterm_completes_accepted_requests(running):
    result = load(running, requests=60, clients=8, num_frames=4, steps=4)
    assert result["problems"] == []
    assert set(result["answers"]) <= {"valid, right", "valid, refused with 429", "invalid, refused"}
    assert set(result["versions"]) == {"1", "2"}
    assert result["drained"]
