"""A training that outlives its process: killed, followed again, stopped, and refused without a cluster."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from ray.cluster_utils import Cluster

from infra import storage
from infra.cluster import OBJECT_STORE_BYTES, ray_session
from infra.settings import apply_environment_defaults
from tasks.records import UserError, to_json
from tasks.train.checkpoints import CheckpointStore
from tasks.train.detached_job import train_detached
from tasks.train.loop import run_training
from tasks.train.spec import TrainSpec
from tests.conftest import REPOSITORY
from tests.support.stacks import until
from tests.train.test_train import assert_same_weights, dataset, spec  # noqa: F401 - fixtures

# Ray's `Cluster` leaves a socket open.
pytestmark = [
    pytest.mark.filterwarnings("ignore:unclosed <socket:ResourceWarning"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]

FOLLOW = """
import signal, sys
from infra.cluster import ray_session
from tasks.json_records import parse_record
from tasks.train import detached_job as detached
from tasks.train.spec import TrainSpec
detached.SAVE_SECONDS = 600  # on a busy machine
spec = parse_record(TrainSpec, sys.stdin.read())
signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
with ray_session():
    report = detached.train_detached(spec, lambda tick: print(tick["step"], flush=True))
    print("report", report.step)
"""


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch) -> Iterator[Cluster]:
    monkeypatch.setenv("PYTHONPATH", str(REPOSITORY))  # the raylet hands it to the workers
    apply_environment_defaults()
    cluster = Cluster(
        initialize_head=True,
        head_node_args={"num_cpus": 1, "include_dashboard": False, "object_store_memory": OBJECT_STORE_BYTES},
    )
    yield cluster
    cluster.shutdown()


def follow(cluster: Cluster, training: TrainSpec, program: str = FOLLOW) -> subprocess.Popen[str]:
    environment = os.environ | {"RAY_ADDRESS": cluster.address}
    command = [sys.executable, "-c", program]
    process = subprocess.Popen(
        command, cwd=REPOSITORY, env=environment, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert process.stdin is not None
    json.dump(to_json(training), process.stdin)
    process.stdin.close()
    return process


def trainers(cluster: Cluster) -> int:
    """The living actors that train."""
    program = (
        "import ray; ray.init(log_to_driver=False, namespace='trip');"
        "print('trainers', len(ray.util.list_named_actors()))"
    )
    environment = os.environ | {"RAY_ADDRESS": cluster.address}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True)
    return int(done.stdout.split("trainers")[1].split()[0])


@pytest.mark.slow
def test_a_training_goes_on_without_its_process_and_the_same_command_follows_it(
    cluster: Cluster,
    spec: TrainSpec,  # noqa: F811
    tmp_path: Path,
) -> None:
    alone = replace(spec, output=str(tmp_path / "alone"), steps=400, checkpoint_every=5, cpus_per_worker=1)
    run_training(alone)
    training = replace(alone, output=str(tmp_path / "detached"), detached=True)
    store = CheckpointStore(storage.join(training.output, "checkpoints"))
    with follow(cluster, training) as first:
        assert first.stdout is not None
        while int(first.stdout.readline()) < 10:
            pass
        first.kill()
    left = max(store.steps())
    until(lambda: max(store.steps()) >= left + 10, 120, "a checkpoint without a process that follows")
    with follow(cluster, training) as second:
        assert second.stdout is not None
        lines = second.stdout.read().split()
    assert second.returncode == 0
    assert lines[-2:] == ["report", "400"]
    steps = [int(line) for line in lines[:-2]]
    assert steps == list(range(steps[0], 401)) and steps[0] <= left + 1, "every tick that no process had taken, once"
    assert_same_weights(alone, training)
    assert trainers(cluster) == 0


@pytest.mark.slow
def test_sigterm_to_the_process_that_follows_ends_the_training_with_a_checkpoint(
    cluster: Cluster,
    spec: TrainSpec,  # noqa: F811
) -> None:
    training = replace(spec, steps=100_000, checkpoint_every=100_000, cpus_per_worker=1, detached=True)
    with follow(cluster, training) as process:
        assert process.stdout is not None
        seen = int(process.stdout.readline())
        process.send_signal(signal.SIGTERM)
    assert process.returncode == 143
    (saved,) = CheckpointStore(storage.join(training.output, "checkpoints")).steps()
    assert seen <= saved < 100_000
    assert trainers(cluster) == 0


@pytest.mark.slow
def test_an_error_of_the_process_that_follows_does_not_end_the_training(
    cluster: Cluster,
    spec: TrainSpec,  # noqa: F811
) -> None:
    training = replace(spec, steps=200, checkpoint_every=50, cpus_per_worker=1, detached=True)
    with follow(cluster, training, FOLLOW.replace('print(tick["step"], flush=True)', "1 / 0")) as failing:
        pass
    assert failing.returncode == 1
    assert trainers(cluster) == 1
    with follow(cluster, training) as second:
        assert second.stdout is not None
        assert second.stdout.read().split()[-2:] == ["report", "200"]


def test_a_detached_training_needs_a_cluster(spec: TrainSpec) -> None:  # noqa: F811
    with ray_session(None, 1), pytest.raises(UserError, match="set RAY_ADDRESS"):
        train_detached(replace(spec, detached=True))
