"""Batch inference on Ray: a registered model generates one video for each row of a table of photos and prompts.

python examples/batch.py photos.csv videos --tracking sqlite:///runs/demo/mlflow.db --workers 2

The table is CSV, Parquet or JSON lines with the columns `photo` (a path or fsspec address, relative to the table),
`prompt` and optionally `seed`. The name of a video contains a hash of its inputs, and the file appears complete or not
at all: after a kill at any moment, the same command generates the missing videos and retries the failed rows.
`results.jsonl` gets a line for each row when a run ends. Exit status: 0 success, 3 some rows failed, 1 stopped by an
error, 130 by Ctrl-C. Requires mlflow, pandas, ray and fsspec, and on the workers the requirements of the model.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import re
import sys
import time
import uuid
from collections import Counter, deque
from collections.abc import Iterator
from typing import Any

import fsspec
import mlflow
import pandas as pd
import ray
from fsspec.core import url_to_fs
from mlflow.exceptions import MlflowException

RECORD, RESULTS = "batch.json", "results.jsonl"
MAX_DEATHS = 3  # workers that may die on one row
PATIENCE_SECONDS = 600  # time without a restarted worker after which the batch stops
MAX_PHOTO_BYTES = 64 * 2**20  # maximum bytes to read; the model's own limit is lower


@ray.remote(max_restarts=-1)
class Animator:
    """A worker: loads the model once, then animates one row per call."""

    def __init__(self, model: str, tracking: str, registry: str) -> None:
        mlflow.set_tracking_uri(tracking)
        mlflow.set_registry_uri(registry)
        self.model = mlflow.pyfunc.load_model(model)

    def ready(self) -> str:
        """Returns the id of the worker's node once the model is loaded."""
        return ray.get_runtime_context().get_node_id()

    def animate(self, row: dict[str, Any], params: dict[str, Any]) -> str:
        """Writes the video of a row and returns "", or returns the reason of the failure."""
        try:
            if not row["seed"].isdecimal():
                raise ValueError(f"seed of row 0 is {row['seed']!r}; give an integer from 0")
            with fsspec.open(row["photo"], "rb") as file:
                photo = file.read(MAX_PHOTO_BYTES)
            rows = pd.DataFrame({"image": [photo], "prompt": [row["prompt"]]})
            answer = self.model.predict(rows, params={**params, "seed": int(row["seed"])})
        except Exception as error:  # a failed row does not stop the batch
            return (str(error) or type(error).__name__).splitlines()[0].replace("row 0", f"row {row['row']}")
        write(row["video"], answer["video"][0])
        return ""


def write(address: str, data: bytes) -> None:
    """Writes a file under a temporary name, then renames it, so that it appears complete."""
    files, path = url_to_fs(address)
    files.pipe_file(scratch := f"{path}.{uuid.uuid4().hex}.tmp", data)
    files.mv(scratch, path)


def resolve(model_uri: str) -> tuple[str, str]:
    """Returns the version of `models:/NAME@ALIAS` or `models:/NAME/VERSION` and the id of its MLflow run."""
    match = re.fullmatch(r"models:/([^/@]+)(?:@([^/@]+)|/(\d+))", model_uri)
    if not match:
        raise ValueError(f"--model is {model_uri!r}; give models:/NAME@ALIAS or models:/NAME/VERSION")
    name, alias, version = match.groups()
    client = mlflow.MlflowClient()
    version_info = client.get_model_version_by_alias(name, alias) if alias else client.get_model_version(name, version)
    return f"models:/{name}/{version_info.version}", str(version_info.run_id)


def settle_model(model_uri: str, out: str) -> str:
    """Returns the model version of all videos in `out`; the first run records it there.

    Raises:
        ValueError: the folder has another version, for example because the alias has moved.
    """
    model, run = resolve(model_uri)
    files, path = url_to_fs(f"{out}/{RECORD}")
    if not files.exists(path):
        write(f"{out}/{RECORD}", json.dumps({"model": model, "run": run, "asked": model_uri}).encode())
        return model
    recorded = json.loads(files.cat_file(path))
    if (recorded["model"], recorded["run"]) != (model, run):
        raise ValueError(
            f"{out} holds videos of {recorded['model']}, run {recorded['run']},"
            f" but {model_uri} is now {model}, run {run};"
            f" continue with --model {recorded['model']}, or write to another folder"
        )
    return model


def read_table(address: str) -> pd.DataFrame:
    """Reads the table with its cells as text; an empty cell is ""."""
    suffix = os.path.splitext(address)[1].lower()
    if suffix == ".csv":
        table = pd.read_csv(address, dtype=str, keep_default_na=False)
    elif suffix == ".parquet":
        table = pd.read_parquet(address)
    elif suffix in (".jsonl", ".ndjson"):
        with fsspec.open(address, "rt") as file:
            table = pd.DataFrame([json.loads(line) for line in file if line.strip()], dtype=object)
    else:
        raise ValueError(f"{address} has the suffix {suffix!r}, expected .csv, .parquet or .jsonl")
    for column in ("photo", "prompt"):
        if column not in table.columns:
            raise ValueError(f"{address} has no column {column!r}, only {', '.join(map(str, table.columns))}")
    return table.astype(object).where(table.notna(), "")


def plan(table: pd.DataFrame, address: str, out: str, made_from: dict[str, Any], seed: int) -> Iterator[dict[str, Any]]:
    """Yields the photo's address, the seed and the video's address of each row; the last one hashes the inputs.

    `made_from` is the model and its parameters. The hash covers the photo's address in the table, not its bytes.
    """
    for number, cells in enumerate(table.to_dict("records")):
        photo, prompt = str(cells["photo"]), str(cells["prompt"])
        drawn = cells.get("seed", "")
        if isinstance(drawn, float) and drawn.is_integer():  # pandas, if other rows have no seed
            drawn = int(drawn)
        drawn = str(seed) if drawn == "" else str(drawn)
        key = json.dumps([made_from, photo, prompt, drawn], sort_keys=True)
        stem = re.sub(r"\W+", "_", os.path.splitext(os.path.basename(photo))[0])[:40] or "photo"
        name = f"{stem}-{hashlib.sha256(key.encode()).hexdigest()[:16]}.{made_from['params'].get('format', 'mp4')}"
        photo_address = photo if "://" in photo or os.path.isabs(photo) else f"{os.path.dirname(address)}/{photo}"
        yield {"row": number, "photo": photo_address, "prompt": prompt, "seed": drawn, "video": f"{out}/{name}"}


def animate_all(rows: list[dict[str, Any]], model: str, params: dict[str, Any], args: argparse.Namespace) -> Iterator:
    """Animates rows on Ray, one at a time per worker; yields each row with the reason of its failure, or ""."""
    dashboard = False if args.ray == "local" else None  # a cluster has its own dashboard, or none
    ray.init(args.ray, include_dashboard=dashboard, log_to_driver=False, logging_level="warning")
    available = ray.cluster_resources()
    if available.get("CPU", 0) < args.cpus or available.get("GPU", 0) < args.gpus:
        raise ValueError(
            f"a worker needs {args.cpus} processors and {args.gpus} GPUs, Ray has {available}; request less"
        )
    worker_arguments = (model, mlflow.get_tracking_uri(), mlflow.get_registry_uri())
    worker = Animator.options(num_cpus=args.cpus, num_gpus=args.gpus)
    animators = [worker.remote(*worker_arguments) for _ in range(min(args.workers, len(rows)))]
    pending_calls = {animator.ready.remote(): (number, None) for number, animator in enumerate(animators)}
    machines, silent_since, lost = {}, {}, {}  # by animator
    deaths, waiting, idle, remaining = Counter(), deque(rows), [], len(rows)
    while remaining:
        while waiting and idle:
            row, number = waiting.popleft(), idle.pop()
            pending_calls[animators[number].animate.remote(row, params)] = number, row
        [answer], _ = ray.wait(list(pending_calls))
        number, row = pending_calls.pop(answer)
        try:
            reply = ray.get(answer)
        except (ray.exceptions.RayActorError, ray.exceptions.OutOfMemoryError) as error:
            began = silent_since.setdefault(number, time.monotonic())
            if getattr(error, "actor_init_failed", False) or time.monotonic() - began > PATIENCE_SECONDS:
                raise  # the model does not load
            if row is not None:
                lost[number] = row
                waiting.appendleft(row)
            time.sleep(1)  # Ray restarts the animator, but may not have noticed yet that its node is lost
            pending_calls[animators[number].ready.remote()] = number, None
            continue
        silent_since.pop(number, None)
        idle.append(number)
        if row is not None:
            remaining -= 1
            yield row, reply
            continue
        before, machines[number] = machines.get(number), reply
        if (row := lost.pop(number, None)) is None:
            continue
        # A row counts as the cause only if its process died on a node that is still alive.
        deaths[row["row"]] += any(node["Alive"] and node["NodeID"] == before for node in ray.nodes())
        if deaths[row["row"]] >= MAX_DEATHS and row in waiting:
            waiting.remove(row)
            remaining -= 1
            yield row, "the worker died on this row three times; it may need more memory than available"


def run(args: argparse.Namespace) -> int:
    if args.tracking:
        mlflow.set_tracking_uri(args.tracking)
    table_address, out = (a if "://" in a else os.path.abspath(a) for a in (args.table, args.out.rstrip("/")))
    table = read_table(table_address)
    files, folder = url_to_fs(out)
    files.makedirs(folder, exist_ok=True)
    model = settle_model(args.model, out)
    params = dict(args.param)
    known = [param.name for param in mlflow.models.get_model_info(model).signature.params]
    if unknown := [name for name in params if name not in known or name == "seed"]:
        raise ValueError(f"parameter {unknown[0]!r} is unknown, expected one of {', '.join(known)}; seed is a column")

    rows = list(plan(table, table_address, out, {"model": model, "params": params}, args.seed))
    existing = {os.path.basename(path): path for path in files.ls(folder, detail=False)}
    for name in existing:
        if name.endswith(".tmp"):  # of a killed run
            files.rm(existing[name])
    state = {row["video"]: None for row in rows}  # "" complete, None not yet, else the reason; equal rows share a video
    state |= {video: "" for video in state if os.path.basename(video) in existing}
    missing = list({row["video"]: row for row in rows if state[row["video"]] is None}.values())
    print(f"{model}: {len(rows)} rows, {len(missing)} videos to generate", flush=True)
    try:
        for count, (row, error) in enumerate(animate_all(missing, model, params, args) if missing else (), 1):
            state[row["video"]] = error
            print(f"{count} of {len(missing)}: {'FAILED, ' + error if error else row['video']}", flush=True)
    finally:
        words = {None: "not yet", "": "made"}
        lines = [{**r, "state": words.get(state[r["video"]], "failed"), "error": state[r["video"]]} for r in rows]
        write(f"{out}/{RESULTS}", "".join(json.dumps(line) + "\n" for line in lines).encode())
    failed = sum(line["state"] == "failed" for line in lines)
    print(f"{len(rows) - failed} rows have a video, {failed} failed, see {out}/{RESULTS}")
    return 3 if failed else 0


def parameter(text: str) -> tuple[str, Any]:
    """Parses NAME=VALUE of the command line; JSON values such as numbers are converted."""
    name, sign, value = text.partition("=")
    if not sign:
        raise argparse.ArgumentTypeError(f"{text!r} is not NAME=VALUE, such as steps=20")
    try:
        return name, json.loads(value)
    except ValueError:
        return name, value


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Animate a table of photos with a registered model.")
    parser.add_argument("table", help="a .csv, .parquet or .jsonl with photo, prompt and optionally seed")
    parser.add_argument("out", help="folder or fsspec address for the videos")
    parser.add_argument("--model", default="models:/trip@champion", help="an alias is resolved once, at the start")
    parser.add_argument("--tracking", help="address of MLflow; default: MLFLOW_TRACKING_URI")
    parser.add_argument("--param", action="append", default=[], type=parameter, help="for example steps=20")
    parser.add_argument("--seed", type=int, default=0, help="seed of rows without one")
    parser.add_argument("--workers", type=int, default=1, help="worker processes, each with the model in memory")
    parser.add_argument("--cpus", type=int, default=1, help="CPUs and threads of each worker")
    parser.add_argument("--gpus", type=float, default=0, help="GPUs of each worker; fractions are allowed")
    parser.add_argument("--ray", default=os.environ.get("RAY_ADDRESS", "local"), help="address of a Ray cluster")
    args = parser.parse_args(arguments)
    try:
        return run(args)
    except KeyboardInterrupt:
        print("stopped; the same command continues", file=sys.stderr)
        return 130
    except ray.exceptions.RayError as error:  # the last line of a worker's traceback is the reason
        print(f"error: {str(error).strip().splitlines()[-1]}", file=sys.stderr)
    except (MlflowException, OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main())
