"""Loads the service with good and bad requests while the alias moves and a replica is killed; the result is JSON.

    python -m benchmarks.serve_load runs/demo/train/.../model --requests 200 --clients 16

It registers the model twice (the second with another guidance), starts `python -m flows serve` on loopback, and
compares every clip, frame by frame, with what the pipeline makes of the same photo, sentence, seed and version here.
"""

from __future__ import annotations

import base64
import contextlib
import functools
import io
import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import zipfile
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import cyclopts
import httpx
import numpy as np
import psutil
from PIL import Image

from infra.settings import CHECKOUT
from infra.tracking import connect
from tasks.register.packaging import drawn_photo
from tasks.register.registry import CHAMPION, RegisterSpec, register
from trip_model.pipeline import TripPipeline

NAME = "trip"
PROMPT = "a red circle moving right slowly"
SEEDS = 6  # good requests repeat these, so that few clips have to be made to compare with
START_SECONDS = 300
BAD: list[tuple[dict[str, Any], int]] = [
    ({"steps": -1}, 422),
    ({"image": "bm8gaW1hZ2U="}, 400),
    ({"prompt": "word " * 10_000}, 422),
    ({"strength": 3}, 422),
    ({"image": "A" * (24 * 2**20)}, 413),
]


@dataclass
class Service:
    """A running `flows serve`: its process, its address, its registry, and the model folder of each version."""

    process: subprocess.Popen[bytes]
    url: str
    registry: str
    folders: dict[str, Path]

    def replicas(self) -> list[psutil.Process]:
        return [p for p in psutil.Process(self.process.pid).children(True) if "ServeReplica" in _title(p)]

    def memory_mb(self) -> dict[int, float]:
        """Resident memory of the door and of each replica."""
        found = [psutil.Process(self.process.pid), *self.replicas()]
        return {p.pid: round(p.memory_info().rss / 2**20, 1) for p in found}

    def point(self, version: str) -> None:
        connect(self.registry).set_registered_model_alias(NAME, CHAMPION, version)


def _title(process: psutil.Process) -> str:
    with contextlib.suppress(psutil.Error):
        return " ".join(process.cmdline())
    return ""


@contextlib.contextmanager
def service(model: Path, *flags: str) -> Iterator[Service]:
    """Registers a model and its twin in a registry of their own, and serves version 1."""
    with tempfile.TemporaryDirectory(prefix="trip-load-", ignore_cleanup_errors=True) as scratch:
        home = Path(scratch)
        twin = home / "twin"
        shutil.copytree(model, twin)
        about = json.loads((twin / "trip.json").read_text())
        about["config"]["guidance"] += 2.0
        (twin / "trip.json").write_text(json.dumps(about))
        (home / "report.json").write_text(json.dumps({"rows": {}, "gate": {"passed": True, "reasons": []}}))
        registry = f"sqlite:///{home}/mlflow.db"
        folders = {}
        for folder in (model, twin):
            spec = RegisterSpec(str(folder), str(home), registry, NAME, check_steps=1)
            folders[register(spec, lambda _: None).version] = folder
        connect(registry).set_registered_model_alias(NAME, CHAMPION, "1")
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        command = [sys.executable, "-m", "flows", "serve", "--name", NAME, "--tracking-uri", registry]
        # Threads decide the last bits of a clip: one here, and one in each replica.
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        process = subprocess.Popen([*command, "--port", str(port), *flags], cwd=CHECKOUT, env=environment)
        try:
            running = Service(process, f"http://127.0.0.1:{port}", registry, folders)
            _wait_until_ready(running)
            yield running
        finally:
            process.terminate()
            try:
                process.wait(60)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def _wait_until_ready(running: Service) -> None:
    end = time.monotonic() + START_SECONDS
    while time.monotonic() < end and running.process.poll() is None:
        with contextlib.suppress(httpx.TransportError):
            if httpx.get(f"{running.url}/readyz", timeout=10).status_code == 200:
                return
        time.sleep(0.2)
    raise RuntimeError(f"the service was not ready within {START_SECONDS} s (exit code {running.process.poll()})")


@dataclass
class Tally:
    """How the requests ended."""

    answers: Counter[str] = field(default_factory=Counter)
    seconds: list[float] = field(default_factory=list)
    versions: Counter[str] = field(default_factory=Counter)
    oddities: list[str] = field(default_factory=list)

    def odd(self, kind: str, what: str) -> None:
        self.answers[kind] += 1
        self.oddities.append(what[:300])


def load(running: Service, requests: int, clients: int, num_frames: int, steps: int) -> dict[str, Any]:
    """Sends the requests; after a third the alias moves, after a half a replica is killed with signal 9."""
    photo = drawn_photo(48)
    good = {
        "image": base64.b64encode(photo).decode(), "prompt": PROMPT, "format": "frames",
        "num_frames": num_frames, "steps": steps,
    }  # fmt: skip

    @functools.cache
    def expected(version: str, seed: int) -> np.ndarray:
        return _pipeline(running.folders[version])(photo, PROMPT, seed=seed, num_frames=num_frames, steps=steps)

    for version in running.folders:
        for seed in range(SEEDS):
            expected(version, seed)
    tally = Tally()
    events: dict[int, Callable[[], Any]] = {
        requests // 3: lambda: running.point("2"),
        requests // 2: lambda: running.replicas()[0].kill(),
    }
    memory = {"start": running.memory_mb()}
    draw = random.Random(0)
    plan = [
        (number, draw.choice(BAD) if draw.random() < 0.25 else None, draw.randrange(SEEDS))
        for number in range(requests)
    ]

    def send(item: tuple[int, tuple[dict[str, Any], int] | None, int]) -> None:
        number, bad, seed = item
        if number in events:
            events[number]()
        if number == requests // 4:
            memory["warm"] = running.memory_mb()
        start = time.monotonic()
        try:
            answer = client.post(f"{running.url}/v1/animate", json={**good, "seed": seed, **(bad[0] if bad else {})})
        except httpx.HTTPError as error:
            tally.odd("lost", f"request {number}: {error!r}")
            return
        if bad is not None:
            right = answer.status_code == bad[1] and answer.json()["error"]["message"]
            tally.answers.update(["bad, refused as due"]) if right else tally.odd("bad, wrong answer", answer.text)
        elif answer.status_code == 429:
            tally.answers["good, refused with 429"] += 1
            time.sleep(int(answer.headers["retry-after"]))  # before this client's next request, as it was told
        elif answer.status_code != 200:
            tally.odd("lost", f"request {number}: {answer.status_code} {answer.text}")
        else:
            version = answer.headers["x-model-version"]
            same = np.array_equal(_frames(answer.content), expected(version, int(answer.headers["x-seed"])))
            tally.seconds.append(time.monotonic() - start)
            tally.versions[version] += 1
            tally.answers.update(["good, right"]) if same else tally.odd("wrong", f"request {number}: other frames")

    with httpx.Client(timeout=300, limits=httpx.Limits(max_connections=clients)) as client:
        start = time.monotonic()
        with ThreadPoolExecutor(clients) as pool:
            list(pool.map(send, plan))
        wall = time.monotonic() - start
        retries = next(
            float(line.split()[1])
            for line in client.get(f"{running.url}/metrics").text.splitlines()
            if line.startswith("trip_request_retries_total ")
        )
    memory["end"] = running.memory_mb()
    return {
        "requests": requests,
        "clients": clients,
        "answers": dict(tally.answers),
        "versions": dict(tally.versions),
        "retries": retries,
        "oddities": tally.oddities,
        "wall_seconds": round(wall, 1),
        "median_seconds": round(float(np.median(tally.seconds)), 2),
        "longest_seconds": round(max(tally.seconds), 2),
        "memory_mb": memory,
        "drained": drained(running, good),
    }


def drained(running: Service, good: dict[str, Any]) -> bool:
    """Whether a request under way at SIGTERM is answered, and the service then ends well."""
    with ThreadPoolExecutor(1) as pool:
        asked = pool.submit(httpx.post, f"{running.url}/v1/animate", json={**good, "steps": 40}, timeout=120)
        time.sleep(0.5)
        running.process.send_signal(signal.SIGTERM)
        answered = asked.result().status_code == 200
    return answered and running.process.wait(60) == 0


@functools.cache
def _pipeline(folder: Path) -> TripPipeline:
    return TripPipeline.from_folder(folder)


def _frames(archive: bytes) -> np.ndarray:
    with zipfile.ZipFile(io.BytesIO(archive)) as packed:
        return np.stack([np.asarray(Image.open(io.BytesIO(packed.read(name)))) for name in sorted(packed.namelist())])


def main(
    model: Path,
    requests: int = 200,
    clients: int = 16,
    replicas: int = 2,
    max_queue: int = 8,
    num_frames: int = 4,
    steps: int = 4,
    output: Path | None = None,
) -> None:
    """Run the load and print the result as JSON.

    Args:
        model: an exported model folder.
        requests: how many in all; a quarter of them are bad.
        clients: how many send at the same time.
        replicas: processes that hold the model, a processor each.
        max_queue: requests that may wait at each.
        num_frames: frames of a clip.
        steps: DDIM steps of a clip.
        output: file for the result, besides the console.
    """
    import torch

    torch.set_num_threads(1)
    flags = ("--replicas", str(replicas), "--cpus", "1", "--max-queue", str(max_queue), "--no-page")
    with service(model.resolve(), *flags) as running:
        result = json.dumps(load(running, requests, clients, num_frames, steps), indent=2)
    print(result)
    if output is not None:
        output.write_text(result + "\n")


if __name__ == "__main__":
    cyclopts.run(main)
