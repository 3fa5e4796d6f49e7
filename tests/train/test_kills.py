"""Kills from outside while a model trains: what the same command, or what is left of a cluster, makes of it."""

from __future__ import annotations

import json
import logging
import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import ray
from ray.cluster_utils import Cluster

from infra import storage
from infra.cluster import OBJECT_STORE_BYTES
from infra.settings import apply_environment_defaults
from tasks.records import to_json
from tasks.train.checkpoints import CheckpointStore
from tasks.train.job import train
from tasks.train.loop import run_training
from tasks.train.spec import TrainSpec
from tests.conftest import REPOSITORY
from tests.train.test_train import assert_same_weights, dataset, spec  # noqa: F401 - fixtures

TRAIN = """
import sys
from tasks.json_records import parse_record
from tasks.train.job import train
from tasks.train.spec import TrainSpec
spec = parse_record(TrainSpec, sys.stdin.read())
train(spec, lambda tick: print(tick["step"], flush=True), in_process=True)
"""


@pytest.mark.slow
def test_a_training_killed_between_ticks_and_its_newest_checkpoint_cut_short_ends_with_the_same_curve(
    spec: TrainSpec,  # noqa: F811
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    # Ticks are means over two steps and checkpoints lie in the middle of some.
    whole = replace(spec, output=str(tmp_path / "whole"), steps=18, checkpoint_every=3, tick_every=2)
    expected: list[dict[str, Any]] = []
    report = run_training(whole, on_tick=expected.append)

    broken = replace(whole, output=str(tmp_path / "broken"))
    command = [sys.executable, "-c", TRAIN]
    with subprocess.Popen(command, cwd=REPOSITORY, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdin is not None and process.stdout is not None
        json.dump(to_json(broken), process.stdin)
        process.stdin.close()
        while int(process.stdout.readline()) < 10:
            pass
        process.kill()
    assert process.returncode == -signal.SIGKILL
    store = CheckpointStore(storage.join(broken.output, "checkpoints"))
    newest, before = store.steps()[:2]
    file = Path(store.address(newest)) / "weights.safetensors"
    file.write_bytes(file.read_bytes()[:-10])

    found: list[dict[str, Any]] = []
    with caplog.at_level(logging.WARNING):
        again = train(broken, found.append, in_process=True)
    assert f"step-{newest:08d} is damaged" in caplog.text
    assert found[0]["step"] == before + 2 - before % 2
    for name in ("step", "loss", "frame_1", "frame_last", "grad_norm", "lr_unet", "lr_fusion"):
        assert [tick[name] for tick in found] == [tick[name] for tick in expected[-len(found) :]]
    assert (again.loss_first, again.loss_last) == (report.loss_first, report.loss_last)
    assert_same_weights(whole, broken)


@pytest.mark.slow
def test_a_training_on_ray_ends_in_the_bits_of_an_undisturbed_one_whatever_is_killed(tiny_base: Path) -> None:
    # In a process of its own, for it ends whatever runs below it.
    command = [sys.executable, "-m", "tests.chaos.train_kills", "--moments", "5", "--size", "32", "--base"]
    done = subprocess.run([*command, str(tiny_base)], cwd=REPOSITORY, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    moments = {moment["kind"]: moment for moment in json.loads(done.stdout)["moments"]}
    assert list(moments) == ["worker", "write", "driver", "truncated", "raylet"]
    for moment in moments.values():
        assert moment["identical"] and moment["orphans"] == [], moment
        assert moment["first"]["status"] is not None, f"hung: {moment}"
    assert moments["worker"]["reruns"] == moments["write"]["reruns"] == 0  # Ray Train starts the workers again
    assert moments["truncated"]["walked_back_and_said_so"]


@pytest.mark.slow
def test_with_a_machine_lost_the_other_goes_on_with_the_same_global_batches(
    spec: TrainSpec,  # noqa: F811
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    calm = replace(spec.model, unet_dropout=0.0)  # its masks go by rank, all else by place in the global batch
    alone = replace(
        spec,
        output=str(tmp_path / "alone"),
        model=calm,
        steps=120,
        global_batch=3,  # two workers have one sample and two
        learning_rate_unet=1e-4,
        learning_rate_fusion=1e-4,
        checkpoint_every=5,
        cpus_per_worker=1,
    )
    expected: dict[int, float] = {}
    run_training(alone, on_tick=lambda tick: expected.update({tick["step"]: tick["loss"]}))

    monkeypatch.setenv("PYTHONPATH", str(REPOSITORY))  # the raylets hand it to the workers
    apply_environment_defaults()
    size = {"object_store_memory": OBJECT_STORE_BYTES}
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False, **size})
    try:
        machines = [cluster.add_node(num_cpus=1, **size) for _ in range(2)]
        ray.init(address=cluster.address, namespace="trip", log_to_driver=False, logging_level=logging.WARNING)
        found: list[tuple[int, float]] = []

        def tick(values: dict[str, Any]) -> None:
            found.append((values["step"], values["loss"]))
            if values["step"] >= 6 and len(machines) == 2:
                cluster.remove_node(machines.pop(), allow_graceful=False)

        two = replace(alone, output=str(tmp_path / "two"), workers=2, least_workers=1)
        with caplog.at_level(logging.WARNING):
            train(two, tick)
    finally:
        ray.shutdown()
        cluster.shutdown()
    assert "the workers were restarted: training on 1 of 2" in caplog.text
    steps = [step for step, _ in found]
    assert sorted(set(steps)) == list(range(1, 121))
    assert [loss for _, loss in found] == pytest.approx([expected[step] for step in steps], rel=1e-3)


ON_RAY = """
import signal, sys
from infra.cluster import ray_session
from tasks.json_records import parse_record
from tasks.train import job
from tasks.train.spec import TrainSpec
job.SAVE_SECONDS = 600  # on a busy machine
spec = parse_record(TrainSpec, sys.stdin.read())
signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
with ray_session(None, spec.workers):
    job.train(spec, lambda tick: print(tick["step"], flush=True))
"""


@pytest.mark.slow
@pytest.mark.parametrize("workers", [1, 2])
def test_sigterm_saves_the_step_under_way_on_ray_too(spec: TrainSpec, tmp_path: Path, workers: int) -> None:  # noqa: F811
    stopped = replace(spec, steps=100_000, checkpoint_every=100_000, workers=workers, cpus_per_worker=1)
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    with subprocess.Popen(
        [sys.executable, "-c", ON_RAY],
        cwd=REPOSITORY,
        env=environment,
        text=True,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    ) as process:
        assert process.stdin is not None and process.stdout is not None
        json.dump(to_json(stopped), process.stdin)
        process.stdin.close()
        seen = int(process.stdout.readline())
        process.terminate()
    assert process.returncode == 143
    (saved,) = CheckpointStore(storage.join(stopped.output, "checkpoints")).steps()
    assert seen <= saved < 100_000
