"""Kills from outside: the driver, a worker and the raylet of a small run, and what the same command makes of it."""

from __future__ import annotations

import inspect
import json
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import ray
from ray._private import node

from infra.cluster import SessionNotStarted, kept_ray_session, lost_a_machine, machines_left, ray_session
from tests.conftest import REPOSITORY


def test_ray_that_is_twice_too_slow_to_start_is_worth_another_try_of_the_stage(monkeypatch: pytest.MonkeyPatch) -> None:
    sentence = "The current node timed out during startup. This "
    assert sentence in inspect.getsource(node), "Ray says it in other words now"
    tries: list[str] = []

    def too_slow(**how: object) -> None:
        tries.append(sentence)
        raise Exception(sentence)

    monkeypatch.setattr(ray, "init", too_slow)  # its limit of 30 s cannot be set
    with pytest.raises(SessionNotStarted, match="twice: The current node") as caught, ray_session(None, 1):
        pass
    assert len(tries) == 2 and lost_a_machine(caught.value)


@pytest.mark.slow
def test_a_run_whose_driver_worker_or_raylet_is_killed_ends_in_the_bytes_of_an_undisturbed_one(tiny_base: Path) -> None:
    # In a separate process, as it kills all of its descendants.
    command = [sys.executable, "-m", "tests.chaos.kills", "--moments", "3", "--rows", "12", "--size", "32"]
    done = subprocess.run([*command, "--base", str(tiny_base)], cwd=REPOSITORY, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    moments = json.loads(done.stdout)["moments"]
    assert [moment["victim"] for moment in moments] == ["driver", "worker", "raylet"]
    for moment in moments:
        assert moment["identical"] and moment["report_is_of_it"], moment
        assert moment["problems"] == moment["orphans"] == [], moment
        assert moment["first"]["status"] is not None, f"hung: {moment}"


@pytest.mark.slow
def test_a_kept_session_whose_raylet_was_killed_makes_way_for_a_new_one() -> None:
    with kept_ray_session():
        with ray_session(None, 1):
            assert machines_left()
            [raylet] = [process for process in psutil.Process().children() if process.name() == "raylet"]
            raylet.kill()
            deadline = time.monotonic() + 60
            while machines_left() and time.monotonic() < deadline:
                time.sleep(0.5)
            assert not machines_left()
        with ray_session(None, 1):
            assert ray.get(ray.remote(lambda: "there").remote()) == "there"
