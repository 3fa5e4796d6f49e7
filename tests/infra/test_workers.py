"""Workers on a cluster whose machines are lost and join: no task is lost, and none is blamed for its machine."""

from __future__ import annotations

import logging
import os
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import ray
import ray.exceptions
from ray.cluster_utils import Cluster

from infra import workers
from infra.cluster import OBJECT_STORE_BYTES, can_grow, living_machines
from infra.settings import apply_environment_defaults
from infra.workers import NoRoom, WorkerDied, WorkerPool
from tasks.encode.job import prepare
from tasks.encode.spec import PrepareSpec
from tasks.ingest.demo import write_demo_corpus
from tasks.ingest.spec import SourceSpec
from tests.conftest import REPOSITORY

pytestmark = pytest.mark.slow  # machines that start and are killed

STORE: dict[str, Any] = {"object_store_memory": OBJECT_STORE_BYTES}


class Machines(list[Any]):
    """The nodes of one processor each that a test added to the cluster."""

    def __init__(self, cluster: Cluster) -> None:
        super().__init__()
        self.cluster = cluster

    def add(self) -> None:  # in the main thread only
        self.append(self.cluster.add_node(num_cpus=1, **STORE))

    def raylet(self, index: int) -> psutil.Process:
        return psutil.Process(self[index].all_processes["raylet"][0].process.pid)


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    """A cluster that has no machine for workers yet; it takes a lost one for dead after about five seconds."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(REPOSITORY))  # the raylets hand it to the workers
        for name, value in {"period_ms": 1000, "timeout_ms": 5000, "failure_threshold": 4}.items():
            patch.setenv(f"RAY_health_check_{name}", str(value))
        apply_environment_defaults()
        cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False, **STORE})
        try:
            ray.init(address=cluster.address, namespace="trip", log_to_driver=False, logging_level=logging.WARNING)
            yield cluster
        finally:
            ray.shutdown()
            cluster.shutdown()


@pytest.fixture
def machines(cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> Iterator[Machines]:
    assert can_grow()
    monkeypatch.setattr(workers, "CHECK_SECONDS", 1.0)
    machines = Machines(cluster)
    yield machines
    for node in machines:
        cluster.remove_node(node, allow_graceful=False)
    while len(living_machines()) > 1:
        time.sleep(0.1)


def run(tasks: list[tuple[str, str]], count: int = 1, tick: Any = lambda: None) -> list[tuple[tuple[str, str], int]]:
    """The tasks, each of what to do and where to keep how often it began, with the number of their beginnings."""

    class Worker:  # defined here, so that it travels to the workers by value
        def run(self, task: tuple[str, str]) -> int:
            what, record = task
            with open(record, "a") as file:
                file.write(what)
            times = os.path.getsize(record) // len(what)
            if what == "die":
                os._exit(1)
            if what == "take the machine along" and times <= 4:
                os.kill(os.getppid(), signal.SIGKILL)
                time.sleep(600)
            if what == "sleep" and times == 1:
                time.sleep(600)
            return times

    with WorkerPool(Worker, (), count, cpus=1, gpus=0) as pool:
        return sorted(pool.run(tasks, lambda actor, task: actor.run.remote(task), tick))


@pytest.mark.parametrize("moment", ["loading", "encoding"])
def test_with_a_machine_lost_the_other_prepares_all_rows(
    machines: Machines, tiny_base: Path, tmp_path: Path, moment: str
) -> None:
    corpus = write_demo_corpus(tmp_path / "corpus", clips=8, size=32)
    calm, lost = (
        PrepareSpec(SourceSpec(corpus), str(tmp_path / name), str(tiny_base), size=32, clips_per_shard=1, workers=count)
        for name, count in (("calm", 0), ("lost", 2))
    )
    expected = prepare(calm)
    machines.add()
    machines.add()
    victim = machines.raylet(0)
    killed: list[str] = []

    def kill(when: str) -> None:
        killed.append(when)
        victim.kill()

    def kill_while_it_loads() -> None:
        while not any("EncodeWorker" in " ".join(process.cmdline()) for process in victim.children()):
            time.sleep(0.02)
        kill("loading")

    def kill_while_it_encodes(tick: dict[str, Any]) -> None:
        if moment == "encoding" and tick["done"] and not killed:
            kill("encoding")

    if moment == "loading":
        threading.Thread(target=kill_while_it_loads, daemon=True).start()
    report = prepare(lost, kill_while_it_encodes)
    assert killed == [moment]
    assert (report.rows, report.encoded, report.failed) == (8, 8, {})
    assert report.manifest_sha == expected.manifest_sha
    files, others = ({p.name: p.read_bytes() for p in (tmp_path / name).iterdir()} for name in ("calm", "lost"))
    assert files == others


def test_a_machine_that_joins_later_takes_the_worker_that_waits(
    machines: Machines, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(workers, "SLOW_START_SECONDS", 0.5)
    ticks: list[int] = []

    def add_one_at_the_second_tick() -> None:
        ticks.append(len(machines))
        if len(ticks) == 2:
            machines.add()

    tasks = [("say", str(tmp_path / str(number))) for number in range(3)]
    assert run(tasks, count=2, tick=add_one_at_the_second_tick) == [(task, 1) for task in tasks]
    assert "waiting for 2 of 2 workers of 1 CPUs and 0 GPUs each; the Ray session has 0 CPUs, 0 GPUs" in caplog.text


def test_without_a_machine_the_run_ends_with_what_to_do(
    machines: Machines, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(workers, "WAIT_SECONDS", 3.0)
    with pytest.raises(NoRoom, match=r"no machine takes a worker of 1 CPUs .* 0 CPUs, 0 GPUs; start machines"):
        run([("say", str(tmp_path / "never"))])
    machines.add()
    monkeypatch.setattr(workers, "WAIT_SECONDS", 20.0)
    with pytest.raises(ray.exceptions.NodeDiedError, match="start machines and repeat the command, it continues"):
        run([("take the machine along", str(tmp_path / "lost"))])


def test_a_task_whose_processes_die_on_a_living_machine_ends_the_run(machines: Machines, tmp_path: Path) -> None:
    machines.add()
    with pytest.raises(WorkerDied) as caught:
        run([("say", str(tmp_path / "said")), ("die", str(tmp_path / "died"))])
    assert caught.value.task is not None and caught.value.task[0] == "die"
    assert (tmp_path / "died").read_text() == "die" * workers.MAX_DEATHS


def test_a_task_that_loses_four_machines_is_done_on_the_fifth(machines: Machines, tmp_path: Path) -> None:
    def replace_a_lost_machine() -> None:
        if machines[-1].all_processes["raylet"][0].process.poll() is not None:
            machines.add()

    machines.add()
    task = ("take the machine along", str(tmp_path / "lost"))
    assert run([task], tick=replace_a_lost_machine) == [(task, 5)]


def test_workers_that_cannot_start_say_why(machines: Machines) -> None:
    class Broken:
        def __init__(self) -> None:
            raise OSError("no such library")

    machines.add()
    with (
        pytest.raises(WorkerDied, match="workers do not start: OSError: no such library"),
        WorkerPool(Broken, (), 1, cpus=1, gpus=0) as pool,
    ):
        list(pool.run([1], lambda actor, task: actor.run.remote(task)))


def test_a_machine_that_stops_answering_is_lost_though_its_calls_stay_open(machines: Machines, tmp_path: Path) -> None:
    machines.add()
    stopped: list[psutil.Process] = []
    record = tmp_path / "slept"

    def stop_the_machine() -> None:
        if not stopped and record.exists():
            raylet = machines.raylet(0)
            stopped.extend([*raylet.children(recursive=True), raylet])
            for process in stopped:
                process.suspend()
            machines.add()

    task = ("sleep", str(record))
    try:
        assert run([task], tick=stop_the_machine) == [(task, 2)]
    finally:
        for process in stopped:
            process.kill()
