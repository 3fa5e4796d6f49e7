"""A driver, a worker and a raylet that are killed for good: the same command ends in the bytes of a quiet run."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from benchmarks.kills import VICTIMS, calm_run, killed_run, make_spec
from tasks.curate.verify import problems


@pytest.mark.slow
def test_after_a_kill_the_same_command_ends_in_the_same_bytes(tiny_base: Path, tmp_path: Path) -> None:
    spec = make_spec(tmp_path, str(tiny_base), clips=12, size=32)
    lives = calm_run(spec)
    assert list(problems(spec.output)) == []
    rng = random.Random(5)
    for victim in VICTIMS:
        told = killed_run(spec, victim, rng.uniform(0, 0.8 * lives[victim]))
        assert told["identical"], told
        assert victim != "worker" or told["reruns"] == 0, told
