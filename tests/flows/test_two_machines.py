"""Two machines without a common folder share a run: all that they exchange goes through an object store."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from infra import storage
from tasks.ingest.demo import write_demo_corpus
from tests.conftest import free_port
from tests.support.stacks import LIST_NODES, living_nodes, until

REPOSITORY = Path(__file__).resolve().parents[2]
TINY = [sys.executable, str(REPOSITORY / "tests" / "support" / "tiny_cli.py")]
# A machine's own home, temporary folder and Ray session, on a file system that no other machine sees.
MACHINE = 'mount -t tmpfs tmpfs "$0" && mkdir "$0/home" "$0/tmp" && exec "$@"'


class Machines:
    """Ray nodes of one processor, each in a mount namespace of its own; the first is the head."""

    def __init__(self, private: Path, environment: dict[str, str]) -> None:
        self.private, self.port, self.nodes = private, free_port(), list[subprocess.Popen[bytes]]()
        self.environment = environment | {"HOME": f"{private}/home", "TMPDIR": f"{private}/tmp"}

    def start(self) -> None:
        """Adds a machine; on a busy one Ray's own limit of 30 s may end its start, which is then repeated."""
        number = len(self.nodes) + 1
        for _ in range(3):
            node = self._spawn(number)
            self.nodes.append(node)
            until(lambda node=node: node.poll() is not None or self.alive() == number, 300, f"machine {number}")
            if node.poll() is None:
                return
            self.nodes.pop()
        raise AssertionError(
            f"Ray did not start on machine {number}: {Path(f'{self.private}.{number}.log').read_text()}"
        )

    def _spawn(self, number: int) -> subprocess.Popen[bytes]:
        ray = [sys.executable, "-m", "ray.scripts.scripts", "start", "--block", "--disable-usage-stats", "--num-cpus=1"]
        ray += [f"--node-ip-address=127.0.0.{number}", f"--object-store-memory={200 * 1024 * 1024}"]
        ray += [f"--dashboard-agent-listen-port={free_port()}", f"--dashboard-agent-grpc-port={free_port()}"]
        if number == 1:
            ray += ["--head", f"--port={self.port}", "--include-dashboard=false", f"--temp-dir={self.private}/ray"]
            ray += [f"--ray-client-server-port={free_port()}"]
        else:
            ray += [f"--address=127.0.0.1:{self.port}"]
        command = ["unshare", "--mount", "--propagation", "private", "sh", "-c", MACHINE, str(self.private), *ray]
        with open(f"{self.private}.{number}.log", "wb") as log:
            return subprocess.Popen(command, stdout=log, stderr=log, env=self.environment, start_new_session=True)

    def run(self, number: int, command: list[str]) -> subprocess.CompletedProcess[str]:
        """Runs a command on a machine."""
        inside = ["nsenter", "--target", str(self.nodes[number - 1].pid), "--mount", f"--wd={REPOSITORY}", *command]
        environment = self.environment | {"RAY_ADDRESS": f"127.0.0.1:{self.port}"}
        return subprocess.run(inside, capture_output=True, text=True, env=environment, timeout=900)

    def alive(self) -> int:
        return len(living_nodes(self.run(1, LIST_NODES)))

    def end(self) -> None:
        for node in self.nodes:
            node.terminate()  # `ray start --block` ends its processes
            try:
                node.wait(20)
            except subprocess.TimeoutExpired:
                node.kill()
                node.wait()


@pytest.fixture
def machines(s3_folder: str) -> Iterator[Machines]:
    if os.geteuid() != 0 or shutil.which("nsenter") is None:
        pytest.skip("only root may give a process a file system of its own")
    if subprocess.run(["unshare", "--mount", "sh", "-c", "mount -t tmpfs tmpfs /mnt"], capture_output=True).returncode:
        pytest.skip("this container permits no mounts")
    left_out = ("PREFECT_", "RAY_", "MLFLOW_")
    environment = {k: v for k, v in os.environ.items() if not k.startswith(left_out)}
    environment |= {"RAY_AUTH_MODE": "disabled", "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"}
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="two-")))
        (folder / "own").mkdir()
        machines = Machines(folder / "own", environment)
        stack.callback(machines.end)
        yield machines


@pytest.mark.slow
def test_two_machines_train_one_model_and_share_nothing_but_the_object_store(
    machines: Machines,
    s3_folder: str,
    tiny_base: Path,
    tmp_path: Path,
    mlflow_server: Callable[[str], str],
) -> None:
    table = Path(write_demo_corpus(str(tmp_path / "corpus"), 16, 32))
    for file in filter(Path.is_file, table.parent.rglob("*")):
        storage.write_bytes(f"{s3_folder}/corpus/{file.relative_to(table.parent)}", file.read_bytes())
    uri = mlflow_server(f"{s3_folder}/mlflow".replace("/data/", "/"))
    values = ["prepare.workers=2", "train.workers=2", "train.checkpoint_every=3"]
    flags = [word for value in values for word in ("--set", value)]
    source = ["--source", f"{s3_folder}/corpus/{table.name}", "--tracking-uri", uri]

    def command(name: str, root: str, *more: str) -> list[str]:
        return [
            *TINY,
            str(tiny_base),
            name,
            "--recipe",
            "tiny",
            "--root",
            f"{s3_folder}/{root}",
            *source,
            *flags,
            *more,
        ]

    machines.start()
    machines.start()
    done = machines.run(1, command("reproduce", "two"))
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert "of 2 from the newest checkpoint" not in done.stdout, "a machine did not take part"

    machines.end()
    (data,) = [name for name in storage.list_dir(f"{s3_folder}/two/data") if re.fullmatch("[0-9a-f]{16}", name)]
    (machines.private / "tmp").mkdir()
    alone = subprocess.run(
        command("train-trip", "alone", "--dataset", f"{s3_folder}/two/data/{data}"),
        capture_output=True,
        text=True,
        cwd=REPOSITORY,
        env=machines.environment,
    )
    assert alone.returncode == 0, alone.stdout[-3000:] + alone.stderr[-3000:]
    assert results(f"{s3_folder}/two") == results(f"{s3_folder}/alone")


def results(root: str) -> dict[str, Any]:
    """The identity of a root's training, and the hash of its model."""
    (training,) = [name for name in storage.list_dir(f"{root}/train") if ".lease" not in name]
    report = json.loads(storage.read_bytes(f"{root}/train/{training}/report.json"))
    return {"training": training, "model": report["model_digest"], "steps": report["step"]}
