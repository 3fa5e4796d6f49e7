"""A local Ray session is marked, counts as running until its last process has ended, and is then removed."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from infra import ray_sessions
from tests.support.stacks import REPOSITORY, until

SESSION = """
from infra.cluster import ray_session
with ray_session(None, 1):
    print("open", flush=True)
    input()
"""


@pytest.fixture
def temporary(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder for Ray's sessions with a path that is short enough for its sockets."""
    with tempfile.TemporaryDirectory(prefix="trip-", ignore_cleanup_errors=True) as folder:
        monkeypatch.setenv("RAY_TMPDIR", folder)
        yield Path(folder)


@pytest.mark.slow
@pytest.mark.parametrize("killed", [False, True])
def test_only_a_session_whose_processes_have_ended_can_be_removed(temporary: Path, killed: bool) -> None:
    other = temporary / "ray" / "session_of_another_program"
    other.mkdir(parents=True)
    environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    command, pipe = [sys.executable, "-c", SESSION], subprocess.PIPE
    with subprocess.Popen(
        command, cwd=REPOSITORY, env=environment, stdin=pipe, stdout=pipe, stderr=subprocess.DEVNULL
    ) as process:
        assert process.stdout is not None and process.stdout.readline() == b"open\n"
        assert ray_sessions.ended_folders(0) == []
        if killed:
            process.send_signal(signal.SIGKILL)
        else:
            process.communicate(b"\n")
    (ended,) = until(lambda: ray_sessions.ended_folders(0), 60, "the end of Ray's processes")
    assert ended.name.startswith("session_2") and ray_sessions.ended_folders(1) == []
    ray_sessions.remove_folder(ended)
    assert not ended.exists() and other.exists()
