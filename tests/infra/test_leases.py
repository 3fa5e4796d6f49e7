"""One writer for each output: on local disks, on S3 and on a store without conditional writes."""

from __future__ import annotations

import signal
import subprocess
import sys
import threading
import time
from dataclasses import asdict, replace
from pathlib import Path

import fsspec
import pytest
from fsspec.implementations.memory import MemoryFileSystem

from infra import leases, storage
from infra.leases import LeaseHeld, lease, newest

REPOSITORY = Path(__file__).resolve().parents[2]
HOLD = """
import sys, time
from infra.leases import lease
with lease(sys.argv[1]):
    print("held", flush=True)
    time.sleep(99)
"""


class Unconditional(MemoryFileSystem):
    """A store that ignores the condition of a write, as S3-like servers may do."""

    protocol = "unconditional"

    def pipe_file(self, path: str, value: bytes, mode: str = "overwrite", **options: object) -> None:
        super().pipe_file(path, value, mode="overwrite")


fsspec.register_implementation("unconditional", Unconditional, clobber=True)


@pytest.fixture(params=["local", "s3", "memory"])
def output(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """An address of a stage's output on each kind of store."""
    if request.param == "local":
        return str(tmp_path / "train" / "0ab1")
    folder = request.getfixturevalue("s3_folder") if request.param == "s3" else f"memory://{tmp_path.name}"
    return storage.join(folder, "train", "0ab1")


@pytest.fixture
def fast(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(leases, "RENEW_SECONDS", 0.05)
    monkeypatch.setattr(leases, "EXPIRE_SECONDS", 0.5)


def test_a_second_writer_is_refused_in_one_sentence_and_takes_turns_later(output: str) -> None:
    sentence = r"0ab1 is being written by .*process \d+; wait until"
    with lease(output), pytest.raises(LeaseHeld, match=sentence), lease(output):
        pass
    with lease(output), lease(storage.join(storage.parent(output), "0ab")):  # another output with a similar name
        assert leases.is_held(output)
    assert not leases.is_held(output)
    assert newest(output)[0] == 2 and len(storage.list_dir(storage.parent(output))) == 2  # one file for each output


def test_of_many_writers_at_once_one_succeeds(output: str) -> None:
    start, results = threading.Barrier(8), []

    def write() -> None:
        start.wait()
        try:
            with lease(output):
                time.sleep(1.0)
                results.append("wrote")
        except LeaseHeld:
            results.append("refused")

    threads = [threading.Thread(target=write) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(results) == ["refused"] * 7 + ["wrote"]


def test_a_killed_writer_is_replaced_at_once_on_its_machine(tmp_path: Path) -> None:
    output = str(tmp_path / "out")
    with subprocess.Popen([sys.executable, "-c", HOLD, output], cwd=REPOSITORY, stdout=subprocess.PIPE) as writer:
        assert writer.stdout is not None and writer.stdout.readline() == b"held\n"
        with pytest.raises(LeaseHeld, match=f"process {writer.pid}"), lease(output):
            pass
        writer.send_signal(signal.SIGKILL)
        time.sleep(0.2)  # its parent, this process, has not reaped it
        with lease(output):
            assert newest(output)[0] == 2


def test_a_writer_of_another_machine_is_replaced_after_its_lease_expired(fast: None, output: str) -> None:
    other = leases.Lease("t", "eve@far, process 7", '["far/boot/pid", 7, "1"]', time.time())
    storage.write_json(output + ".lease-000004", asdict(other))
    with pytest.raises(LeaseHeld, match="written by eve@far, process 7"), lease(output):
        pass
    storage.write_json(output + ".lease-000004", asdict(replace(other, renewed=time.time() - 1)))
    with lease(output):
        assert newest(output)[0] == 5


def test_a_lease_is_renewed_while_its_owner_works(fast: None, tmp_path: Path) -> None:
    output = str(tmp_path / "out")
    with lease(output):
        time.sleep(1.0)  # twice the time after which it expires
        assert leases.is_held(output)


def test_a_writer_that_was_suspended_too_long_stops(fast: None, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    # As a background job of a script does.
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    request.addfinalizer(lambda: signal.signal(signal.SIGINT, before))
    output = str(tmp_path / "out")
    heir = leases.Lease("t", "eve@far, process 7", "", time.time() + 99)

    def overslept() -> None:
        with lease(output):
            storage.write_json(output + ".lease-000002", asdict(heir))
            time.sleep(30)  # interrupted

    began = time.monotonic()
    with pytest.raises(LeaseHeld, match=r"written by eve@far, process 7.*did not answer"):
        overslept()
    assert newest(output) == (2, heir) and time.monotonic() - began < 10


def test_a_store_without_conditional_writes_is_reported(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    monkeypatch.setattr(leases, "SETTLE_SECONDS", 0.3)
    output = f"unconditional://{tmp_path.name}/train/0ab1"
    with lease(output), pytest.raises(LeaseHeld), lease(output):
        pass
    assert "has no conditional writes" in caplog.text
    # The last of two simultaneous writers succeeds.
    late = leases.Lease("t", "eve@far", "", time.time())
    threading.Timer(0.1, lambda: storage.write_json(output + ".lease-000002", asdict(late))).start()
    with pytest.raises(LeaseHeld, match="eve@far"), lease(output):
        pass
