"""The service on Ray Serve: no request is lost or wrong through an alias move and a killed replica, and it drains."""

from __future__ import annotations

import pytest
import torch

from benchmarks.serve_load import load, service

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """As many threads as a replica has: their number decides the last bits of a clip."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def test_an_alias_move_and_a_killed_replica_lose_nothing_and_sigterm_finishes_what_is_under_way(tiny_model):
    with service(tiny_model, "--replicas", "2", "--cpus", "1", "--max-queue", "16", "--no-page") as running:
        result = load(running, requests=60, clients=8, num_frames=4, steps=4)
    assert result["oddities"] == []
    assert set(result["answers"]) <= {"good, right", "good, refused with 429", "bad, refused as due"}
    assert set(result["versions"]) == {"1", "2"}
    assert result["drained"]
