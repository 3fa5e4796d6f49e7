"""Disturbs a complete stack while a run prepares a table and trains a model, and compares the results.

    python -m tests.chaos.stack_faults [--only second-raylet,disk] [--flow reproduce] [--workers 1]

One stack of `flows up` with a second raylet, and with PostgreSQL where it is installed; data, checkpoints and MLflow's
artifacts are on an S3 server (moto). An undisturbed run comes first. Each case has a root of its own. After a fault an
operator calls `flows up`, and starts the same run again until it completes. Compared with the undisturbed run: the hash
of the data set, the hash of the weights, and the curve of the loss in MLflow, which must have every step with the same
value, once. Processes of a run that are alive a minute after it are orphans. Prints a table in Markdown.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import psutil

from flows import layout, recipes
from flows.source import DEFAULT
from infra import storage
from infra.supervisor import SERVICE_VARIABLE, STACK_VARIABLE
from tasks.ingest.demo import write_demo_corpus
from tasks.records import UserError
from tasks.train.checkpoints import COMPLETE
from tasks.train.spec import TrainSpec, finished_report
from tests.conftest import free_port, make_tiny_base
from tests.support.stacks import ENDED, RAYLET, REPOSITORY, Stack, until
from tests.support.tiny_cli import tiny

RUN_VARIABLE = "PREFECT__FLOW_RUN_ID"
GRACE_SECONDS = 60.0
MOST_RERUNS = 5
MOMENTS, MOST_SECONDS = 5, 70.0  # of a case with random moments: how many, and the longest time between two
# Gets the root and the id of a flow run, and returns the id of the run that goes on.
Disturb = Callable[[str, str], str]
OUTAGE_SECONDS, LONG_OUTAGE_SECONDS = 60.0, 120.0
STAGE_PROCESSES = tuple(
    f"ray::{kind}" for kind in ("EncodeWorker", "RayTrainWorker", "TrainController", "_Relay", "PlacementGroupCleaner")
)


@dataclass
class Result:
    """What a run left: the hashes of its results, its loss by step, and what it cost."""

    name: str
    ends: list[str] = field(default_factory=list)  # of each flow run, the last one completed
    seconds: float = 0.0
    moments: int = 0  # random ones at which it was disturbed
    data: str = ""
    model: str = ""
    loss: list[tuple[int, float]] = field(default_factory=list)
    orphans: list[str] = field(default_factory=list)
    running_in_mlflow: int = 0


class Bench:
    """The stack, its S3 server, and the runs on them."""

    def __init__(self, folder: Path, flow: str, steps: int, workers: int) -> None:
        self.folder, self.flow = folder, flow
        self.values = [f"train.steps={steps}", "train.checkpoint_every=10", f"train.workers={workers}"]
        self.values += ["prepare.workers=2"]
        self.fault = folder / "s3-is-down"
        port = free_port()
        self._s3 = subprocess.Popen(
            [sys.executable, "-m", "tests.support.s3_server", str(port), str(self.fault)],
            cwd=REPOSITORY,
            stdout=subprocess.DEVNULL,
            stderr=(folder / "s3.log").open("wb"),
        )
        access = {"AWS_ACCESS_KEY_ID": "trip", "AWS_SECRET_ACCESS_KEY": "tripsecret", "AWS_DEFAULT_REGION": "us-east-1"}
        self.endpoint = f"http://127.0.0.1:{port}"
        os.environ |= access | {"AWS_ENDPOINT_URL": self.endpoint}
        self.stack = Stack(folder / "up", **access)
        self.base = str(make_tiny_base(folder / "base"))
        self.table = write_demo_corpus(folder / "corpus", 24, 32)
        self.deployment = ""
        self.ends: list[str] = []  # of the runs of this case
        self.moments = 0  # at which this case disturbed a run
        self.started: list[str] = []
        recipes.RECIPES["tiny"] = lambda: tiny(self.base)

    def up(self) -> None:
        import s3fs

        until(lambda: _answers(self.endpoint), 60, "the start of the S3 server")
        s3fs.S3FileSystem().mkdir("trip")
        self.stack.run("up", "--s3", self.endpoint, "--cpus", "1")
        self.second = self.stack.add_raylet()
        self.deployment = self.stack.use_tiny_flow("reproduce", self.flow)

    def up_again(self) -> None:
        """What an operator does after a fault: `up`, and the second machine's raylet."""
        self.stack.run("up")
        if self.second.poll() is not None:
            self.second = self.stack.add_raylet()

    def down(self) -> None:
        if (self.stack.folder / "stack.json").exists():
            self.stack.run("down")
        self._s3.kill()
        self._s3.wait()

    def parameters(self, root: str) -> dict[str, Any]:
        return {"recipe": "tiny", "source": self.table, "root": root, "base": self.base, "values": self.values}

    def start(self, root: str) -> str:
        run = self.stack.start(self.deployment, self.parameters(root))
        self.started.append(run)
        return run

    def training(self, root: str) -> TrainSpec | None:
        """The training of a run, once its data set is there."""
        run = layout.resolve("tiny", self.table, root, self.base, DEFAULT, self.values)
        try:
            return run.train(run.prepared())
        except (UserError, OSError, storage.StorageError):  # not prepared yet, or the store does not answer now
            return None

    def processes(self, service: str = "", run: str = "") -> list[psutil.Process]:
        """The living processes of the stack: of a service, or of a flow run."""
        wanted = {STACK_VARIABLE: str(self.stack.folder)} | ({SERVICE_VARIABLE: service} if service else {})
        wanted |= {RUN_VARIABLE: run} if run else {}
        found: dict[int, psutil.Process] = {}
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error):
                mine = process.environ()
                if all(mine.get(name) == value for name, value in wanted.items()):
                    # A process that renamed itself may have lost its environment.
                    found |= {one.pid: one for one in (process, *process.children(recursive=True))}
        return list(found.values())

    def named(self, part: str) -> list[psutil.Process]:
        """Ray's processes by a part of their name or command."""
        found = []
        for process in (*self.processes("ray"), *self.processes(RAYLET)):
            with contextlib.suppress(psutil.Error):
                if part in process.name() or part in " ".join(process.cmdline()[:1]):
                    found.append(process)
        return found

    def kill_raylet_of(self, part: str) -> None:
        """SIGKILL to the raylet under which one of Ray's processes runs."""
        for process in self.named(part):
            for parent in process.parents():
                if parent.name() == "raylet":
                    return _kill(parent)
        raise AssertionError(f"no raylet with {part}")

    def kill_service(self, name: str) -> None:
        """SIGKILL to a service's process only."""
        record = json.loads((self.stack.folder / name / "process.json").read_text())
        os.kill(record["pid"], signal.SIGKILL)

    def kill_service_with_children(self, name: str) -> None:
        for process in self.processes(name):
            _kill(process)

    def kill_flow(self, run: str) -> None:
        """SIGKILL to the process of a flow run, whatever it does."""
        for process in self.processes(run=run):
            _kill(process)

    # Moments.

    def in_prepare(self, root: str, run: str) -> None:
        """Waits until workers of prepare have written a shard."""
        until(lambda: self.named("EncodeWorker") and storage_names(root, ".tar"), 300, "a shard")

    def in_training(self, root: str, run: str, step: int = 30) -> None:
        """Waits for the checkpoint of a step."""
        until(lambda: self._checkpoint(root) >= step, 400, f"the checkpoint of step {step}")

    def _checkpoint(self, root: str) -> int:
        names = storage_names(root, COMPLETE)
        steps = [int(part[5:]) for name in names for part in name.split("/") if part.startswith("step-")]
        return max(steps, default=0)

    # Runs.

    def until_over(self, run: str, seconds: float) -> str:
        """Waits for the end of a flow run; its state, or `lost` if its process is gone and nobody ended it."""
        gone_since = 0.0
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            kind, message = self.stack.state(run)
            if kind in ENDED:
                return f"{kind} {message}".strip()
            alive = kind in ("SCHEDULED", "PENDING", "") or self.processes(run=run)
            gone_since = 0.0 if alive else gone_since or time.monotonic()
            if gone_since and time.monotonic() - gone_since > 30:
                return "lost: its process is gone and its state is RUNNING"
            time.sleep(1)
        return f"not ended within {seconds:.0f} s"

    def orphans(self, run_ids: list[str]) -> list[str]:
        """Processes of ended runs, and of services whose own process is gone, after at most a minute."""

        def left() -> list[str]:
            names = []
            for process in self.processes():
                with contextlib.suppress(psutil.Error):
                    words, mine = " ".join(process.cmdline()), process.environ()
                    if mine.get(RUN_VARIABLE) in run_ids or words.startswith(STAGE_PROCESSES):
                        names.append(words[:60])
            return names

        deadline = time.monotonic() + GRACE_SECONDS
        while left() and time.monotonic() < deadline:
            time.sleep(1)
        return left()

    def is_over(self, run: str) -> bool:
        return self.stack.state(run)[0] in ENDED

    def again(self, root: str, run: str, patient: bool = True) -> str:
        """Starts a run again as an operator does, when it has ended; an impatient one does not wait for that."""
        self.ends.append(self.until_over(run, 400) if patient else self.stack.state(run)[0] or "killed")
        self.up_again()
        return self.start(root)

    def run(self, name: str, root: str, disturb: Disturb | None) -> Result:
        """One case: a run with its disturbances, repeated until it completes."""
        began, result = time.monotonic(), Result(name)
        self.ends, self.started, self.moments = result.ends, [], 0
        run = self.start(root)
        if disturb is not None:
            run = disturb(root, run)
        for attempt in range(MOST_RERUNS + 1):
            if attempt:
                run = self.again(root, run)
            end = self.until_over(run, 400)
            print(f"  {name}: {end[:300]}", file=sys.stderr, flush=True)
            if end.startswith("COMPLETED"):
                result.ends.append(end)
                break
        result.seconds, result.moments = round(time.monotonic() - began, 1), self.moments
        spec = self.training(root)
        report = finished_report(spec) if spec is not None else None
        if spec is not None and report is not None:
            result.data, result.model = spec.dataset_sha256 or "", weights_hash(report.model)
        result.loss, result.running_in_mlflow = self.take_curve()
        result.orphans = self.orphans(self.started)
        return result

    def take_curve(self) -> tuple[list[tuple[int, float]], int]:
        """The loss in MLflow, and how many runs are RUNNING; removes them, as the next case has the same training."""
        query = {"experiment_ids": [self._experiment()], "filter": "tags.`trip.stage` = 'train'"}
        runs = self.stack.mlflow("runs/search", query).get("runs", [])
        points = []
        for run in runs:
            address = f"metrics/get-history?run_id={run['info']['run_id']}&metric_key=loss&max_results=10000"
            points += [(int(m["step"]), m["value"]) for m in self.stack.mlflow(address).get("metrics", [])]
            self.stack.mlflow("runs/delete", {"run_id": run["info"]["run_id"]})
        return sorted(points), sum(run["info"]["status"] == "RUNNING" for run in runs)

    def _experiment(self) -> str:
        return self.stack.mlflow("experiments/get-by-name?experiment_name=trip")["experiment"]["experiment_id"]

    def s3_down(self, seconds: float) -> None:
        """The S3 server responds with 503 for a time."""
        self.fault.touch()
        time.sleep(seconds)
        self.fault.unlink()


def _kill(process: psutil.Process) -> None:
    with contextlib.suppress(psutil.Error):
        process.kill()


def _answers(url: str) -> bool:
    import httpx

    with contextlib.suppress(httpx.HTTPError):
        return httpx.get(url, trust_env=False).status_code < 500
    return False


def storage_names(root: str, part: str) -> list[str]:
    """The files below a root with `part` in their name."""
    local = storage.local_path(root)
    if local is not None:
        return [str(path) for path in local.rglob("*") if part in path.name]
    import s3fs

    files = s3fs.S3FileSystem()
    files.invalidate_cache()
    return [name for name in files.find(root) if part in name.rsplit("/", 1)[-1]]


def weights_hash(model: str) -> str:
    """The hash of a model's weights; its record also has the address of the data, which differs between the cases."""
    digest = hashlib.sha256()
    for name in sorted(storage_names(model, ".safetensors")):
        uri = name if Path(name).is_absolute() else f"s3://{name}"
        digest.update(Path(name).parent.name.encode() + storage.read_bytes(uri))
    return digest.hexdigest()


def cases(bench: Bench, seed: int) -> dict[str, tuple[str, Disturb]]:
    """Each case with the store of its root and its disturbances, which follow each other."""

    def kill(part: str) -> None:
        for process in bench.named(part):
            _kill(process)

    def ray_workers(root: str, run: str) -> str:
        bench.in_prepare(root, run)
        kill("EncodeWorker")
        bench.in_training(root, run)
        kill("RayTrainWorker")
        return run

    def second_raylet(root: str, run: str) -> str:
        bench.in_prepare(root, run)
        os.killpg(bench.second.pid, signal.SIGKILL)
        time.sleep(20)
        bench.up_again()
        bench.in_training(root, run)
        bench.kill_raylet_of("RayTrainWorker")
        return run

    def all_raylets(root: str, run: str) -> str:
        bench.in_prepare(root, run)
        kill("raylet")
        run = bench.again(root, run)
        bench.in_training(root, run)
        kill("raylet")
        return run

    def services(root: str, run: str) -> str:
        bench.in_training(root, run)
        for name, away in (("worker", 5), ("prefect", 20), ("postgres", 10)):
            bench.kill_service(name)
            time.sleep(away)
            bench.up_again()
        return run

    def without_mlflow(root: str, run: str) -> str:
        bench.in_training(root, run)
        bench.kill_service_with_children("mlflow")
        began = time.monotonic()
        bench.in_training(root, run, step=60)
        bench.kill_flow(run)
        run = bench.start(root)  # by the operator, before MLflow is back
        time.sleep(max(0.0, LONG_OUTAGE_SECONDS - (time.monotonic() - began)))
        bench.up_again()
        return run

    def without_s3(root: str, run: str) -> str:
        bench.in_prepare(root, run)
        bench.s3_down(OUTAGE_SECONDS)
        bench.in_training(root, run)
        bench.s3_down(OUTAGE_SECONDS)
        return run

    def full_disk(root: str, run: str) -> str:
        filler = Path(root).parent / "filler"
        for moment in (bench.in_prepare, bench.in_training):
            moment(root, run)
            with contextlib.suppress(OSError), filler.open("wb", buffering=0) as file:
                while True:
                    file.write(b"0" * 4096)
            end = bench.until_over(run, 300)
            bench.ends.append(end)
            filler.unlink()
            run = bench.start(root)
        return run

    def moments(number: int) -> Disturb:
        def any_moments(root: str, run: str) -> str:
            rng = np.random.default_rng([seed, number])
            victims = [
                lambda: bench.kill_flow(run),
                lambda: [kill(part) for part in ("EncodeWorker", "RayTrainWorker")],
                lambda: os.killpg(bench.second.pid, signal.SIGKILL),
            ]
            for _ in range(MOMENTS):
                until(lambda run=run: bench.processes(run=run) or bench.is_over(run), 120, "the start of the flow")
                end = time.monotonic() + float(rng.random()) * MOST_SECONDS
                while time.monotonic() < end and not bench.is_over(run):
                    time.sleep(0.5)
                if bench.stack.state(run)[0] == "COMPLETED":
                    return run
                if not bench.is_over(run):
                    victims[int(rng.integers(len(victims)))]()
                    bench.moments += 1
                if bench.second.poll() is not None:
                    bench.second = bench.stack.add_raylet()
                if not bench.processes(run=run):  # killed, or ended by its failure
                    run = bench.again(root, run, patient=False)
            return run

        return any_moments

    store = "s3://trip"
    return {
        "ray-workers": (store, ray_workers),
        "second-raylet": (store, second_raylet),
        "all-raylets": (store, all_raylets),
        "services": (store, services),
        "mlflow": (store, without_mlflow),
        "s3": (store, without_s3),
        "disk": (str(bench.folder / "disk"), full_disk),
    } | {f"moments-{number}": (store, moments(number)) for number in range(4)}


@contextlib.contextmanager
def small_disk(folder: Path) -> Iterator[bool]:
    """A file system of its own in memory; False where this process may not mount one."""
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=64m", "tmpfs", str(folder)]
    mounted = subprocess.run(command, capture_output=True).returncode == 0
    try:
        yield mounted
    finally:
        if mounted:
            subprocess.run(["umount", str(folder)], check=False)


def verdict(result: Result, calm: Result) -> dict[str, Any]:
    """The comparison with the undisturbed run."""
    steps, expected = [step for step, _ in result.loss], dict(calm.loss)
    return {
        "case": result.name,
        "runs": len(result.ends),
        "ends": ", ".join(end.split(" ")[0].rstrip(":") for end in result.ends),
        "seconds": result.seconds,
        "random moments": result.moments,
        "same data": result.data == calm.data != "",
        "same weights": result.model == calm.model != "",
        "steps missing": len(expected.keys() - set(steps)),
        "steps twice": len(steps) - len(set(steps)),
        "same loss": all(expected.get(step) == value for step, value in result.loss),
        "orphans": len(result.orphans),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="names of cases, with commas")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--flow", default="prepare_and_train", choices=["prepare_and_train", "reproduce"])
    parser.add_argument("--steps", type=int, default=120)
    parser.add_argument("--workers", type=int, default=1, help="of the training")
    arguments = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    folder = Path(tempfile.mkdtemp(prefix="trip-faults-"))
    folder.chmod(0o755)
    bench = Bench(folder, arguments.flow, arguments.steps, arguments.workers)
    rows: list[dict[str, Any]] = []
    try:
        with small_disk(folder / "disk") as mounted:
            bench.up()
            calm = bench.run("undisturbed", "s3://trip/undisturbed", None)
            print(json.dumps(asdict(calm) | {"loss": len(calm.loss)}), file=sys.stderr, flush=True)
            rows.append(verdict(calm, calm))
            for name, (store, disturb) in cases(bench, arguments.seed).items():
                wanted = not arguments.only or name in arguments.only.split(",")
                if not wanted or not (mounted or "://" in store):
                    continue
                result = bench.run(name, storage.join(store, name), disturb)
                rows.append(verdict(result, calm))
                told = rows[-1] | {"ends": result.ends, "orphans": result.orphans}
                print(json.dumps(told), file=sys.stderr, flush=True)
    finally:
        bench.down()
        shutil.rmtree(folder, ignore_errors=True)
    print("| " + " | ".join(rows[0]) + " |\n|" + "---|" * len(rows[0]))
    for row in rows:
        print("| " + " | ".join(str(value) for value in row.values()) + " |")


if __name__ == "__main__":
    main()
