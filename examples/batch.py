"""A batch consumer on Ray: one video for each row of a table of photos and prompts, from a registered model.

python examples/batch.py photos.csv videos --tracking sqlite:///runs/demo/mlflow.db --workers 2

The table is CSV, Parquet or JSON lines with the columns `photo` (a path or fsspec address, relative to the table),
`prompt` and, where wished, `seed`. A video is named after all that it was made from, and appears whole or not at all:
kill the batch at any moment, and the same command makes what is missing and tries again what had failed.
`results.jsonl` gets a line for each row when a run ends. Exit status: 0 all made, 3 some rows failed, 1 stopped by an
error, 130 by Ctrl-C. Needs mlflow, pandas, ray and fsspec, and on the workers what the model asks for.
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
MAX_DEATHS = 3  # of workers on one row
PATIENCE_SECONDS = 600  # until a worker that does not come back ends the batch
MAX_PHOTO_BYTES = 64 * 2**20  # read no further; the model refuses less than that


@ray.remote(max_restarts=-1)
class Animator:
    """One worker: loads the model once, then animates row after row."""

    def __init__(self, model: str, tracking: str, registry: str) -> None:
        mlflow.set_tracking_uri(tracking)
        mlflow.set_registry_uri(registry)
        self.model = mlflow.pyfunc.load_model(model)

    def ready(self) -> str:
        """Returns the machine that it is on, once the model is loaded."""
        return ray.get_runtime_context().get_node_id()

    def animate(self, row: dict[str, Any], params: dict[str, Any]) -> str:
        """Writes the video of a row; returns why there is none, or "" when it is there."""
        try:
            if not row["seed"].isdecimal():
                raise ValueError(f"seed of row 0 is {row['seed']!r}; give a whole number from 0")
            with fsspec.open(row["photo"], "rb") as file:
                photo = file.read(MAX_PHOTO_BYTES)
            rows = pd.DataFrame({"image": [photo], "prompt": [row["prompt"]]})
            answer = self.model.predict(rows, params={**params, "seed": int(row["seed"])})
        except Exception as error:  # whatever is wrong with a row, the next one has its turn
            return (str(error) or type(error).__name__).splitlines()[0].replace("row 0", f"row {row['row']}")
        write(row["video"], answer["video"][0])
        return ""


def write(address: str, data: bytes) -> None:
    """Writes a file that appears whole: under another name first."""
    files, path = url_to_fs(address)
    files.pipe_file(scratch := f"{path}.{uuid.uuid4().hex}.tmp", data)
    files.mv(scratch, path)


def resolve(asked: str) -> tuple[str, str]:
    """The version that `models:/NAME@ALIAS` or `models:/NAME/VERSION` means now, and the run that made it."""
    match = re.fullmatch(r"models:/([^/@]+)(?:@([^/@]+)|/(\d+))", asked)
    if not match:
        raise ValueError(f"--model is {asked!r}; give models:/NAME@ALIAS or models:/NAME/VERSION")
    name, alias, version = match.groups()
    client = mlflow.MlflowClient()
    found = client.get_model_version_by_alias(name, alias) if alias else client.get_model_version(name, version)
    return f"models:/{name}/{found.version}", str(found.run_id)


def settle_model(asked: str, out: str) -> str:
    """The one version that everything in `out` is made with; recorded there by the first run.

    Raises:
        ValueError: the folder was begun with another version, for example because the alias has moved since.
    """
    model, run = resolve(asked)
    files, path = url_to_fs(f"{out}/{RECORD}")
    if not files.exists(path):
        write(f"{out}/{RECORD}", json.dumps({"model": model, "run": run, "asked": asked}).encode())
        return model
    begun = json.loads(files.cat_file(path))
    if (begun["model"], begun["run"]) != (model, run):
        raise ValueError(
            f"{out} was begun with {begun['model']} of run {begun['run']}, and {asked} is {model} of run {run} now;"
            f" go on with --model {begun['model']}, or write to another place"
        )
    return model


def read_table(address: str) -> pd.DataFrame:
    """The table, its cells as they are written; an empty cell is ""."""
    suffix = os.path.splitext(address)[1].lower()
    if suffix == ".csv":
        table = pd.read_csv(address, dtype=str, keep_default_na=False)
    elif suffix == ".parquet":
        table = pd.read_parquet(address)
    elif suffix in (".jsonl", ".ndjson"):
        with fsspec.open(address, "rt") as file:
            table = pd.DataFrame([json.loads(line) for line in file if line.strip()], dtype=object)
    else:
        raise ValueError(f"{address} is none of .csv, .parquet, .jsonl; name the table after its format")
    for column in ("photo", "prompt"):
        if column not in table.columns:
            raise ValueError(f"{address} has no column {column!r}, only {', '.join(map(str, table.columns))}")
    return table.astype(object).where(table.notna(), "")


def plan(table: pd.DataFrame, address: str, out: str, made_from: dict[str, Any], seed: int) -> Iterator[dict[str, Any]]:
    """For each row its photo's address, its seed, and its video's address, which hashes all that the video depends on.

    `made_from` is the model and its parameters. The photo counts by its address as the table has it.
    """
    for number, cells in enumerate(table.to_dict("records")):
        photo, prompt = str(cells["photo"]), str(cells["prompt"])
        drawn = cells.get("seed", "")
        if isinstance(drawn, float) and drawn.is_integer():  # pandas, where other rows have none
            drawn = int(drawn)
        drawn = str(seed) if drawn == "" else str(drawn)
        key = json.dumps([made_from, photo, prompt, drawn], sort_keys=True)
        stem = re.sub(r"\W+", "_", os.path.splitext(os.path.basename(photo))[0])[:40] or "photo"
        name = f"{stem}-{hashlib.sha256(key.encode()).hexdigest()[:16]}.{made_from['params'].get('format', 'mp4')}"
        place = photo if "://" in photo or os.path.isabs(photo) else f"{os.path.dirname(address)}/{photo}"
        yield {"row": number, "photo": place, "prompt": prompt, "seed": drawn, "video": f"{out}/{name}"}


def animate_all(rows: list[dict[str, Any]], model: str, params: dict[str, Any], args: argparse.Namespace) -> Iterator:
    """Animates rows on Ray, one at a time on each worker; yields each with the reason of its failure, or ""."""
    dashboard = False if args.ray == "local" else None  # a cluster has its own, or none
    ray.init(args.ray, include_dashboard=dashboard, log_to_driver=False, logging_level="warning")
    there = ray.cluster_resources()
    if there.get("CPU", 0) < args.cpus or there.get("GPU", 0) < args.gpus:
        raise ValueError(f"a worker needs {args.cpus} processors and {args.gpus} GPUs, Ray has {there}; ask for less")
    place = (model, mlflow.get_tracking_uri(), mlflow.get_registry_uri())
    worker = Animator.options(num_cpus=args.cpus, num_gpus=args.gpus)
    animators = [worker.remote(*place) for _ in range(min(args.workers, len(rows)))]
    under_way = {animator.ready.remote(): (number, None) for number, animator in enumerate(animators)}
    machines, silent, lost = {}, {}, {}  # by number of the animator
    deaths, waiting, idle, left = Counter(), deque(rows), [], len(rows)
    while left:
        while waiting and idle:
            row, number = waiting.popleft(), idle.pop()
            under_way[animators[number].animate.remote(row, params)] = number, row
        [answer], _ = ray.wait(list(under_way))
        number, row = under_way.pop(answer)
        try:
            reply = ray.get(answer)
        except (ray.exceptions.RayActorError, ray.exceptions.OutOfMemoryError) as error:
            began = silent.setdefault(number, time.monotonic())
            if getattr(error, "actor_init_failed", False) or time.monotonic() - began > PATIENCE_SECONDS:
                raise  # the model does not load, for no row
            if row is not None:
                lost[number] = row
                waiting.appendleft(row)
            time.sleep(1)  # Ray starts the animator again, but may not even know yet that its machine is gone
            under_way[animators[number].ready.remote()] = number, None
            continue
        silent.pop(number, None)
        idle.append(number)
        if row is not None:
            left -= 1
            yield row, reply
            continue
        before, machines[number] = machines.get(number), reply
        if (row := lost.pop(number, None)) is None:
            continue
        # A row is not to blame for a machine that is lost, only for a process that died on a living one.
        deaths[row["row"]] += any(node["Alive"] and node["NodeID"] == before for node in ray.nodes())
        if deaths[row["row"]] >= MAX_DEATHS and row in waiting:
            waiting.remove(row)
            left -= 1
            yield row, "the worker was lost on this row three times; it may need more memory than there is"


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
        raise ValueError(f"parameter {unknown[0]!r} is unknown; there are {', '.join(known)}, seed as a column")

    rows = list(plan(table, table_address, out, {"model": model, "params": params}, args.seed))
    there = {os.path.basename(path): path for path in files.ls(folder, detail=False)}
    for name in there:
        if name.endswith(".tmp"):  # of a run that was killed
            files.rm(there[name])
    state = {row["video"]: None for row in rows}  # "" made, None not yet, else why not; equal rows share a video
    state |= {video: "" for video in state if os.path.basename(video) in there}
    missing = list({row["video"]: row for row in rows if state[row["video"]] is None}.values())
    print(f"{model}: {len(rows)} rows, {len(missing)} videos to make", flush=True)
    try:
        for count, (row, error) in enumerate(animate_all(missing, model, params, args) if missing else (), 1):
            state[row["video"]] = error
            print(f"{count} of {len(missing)}: {'FAILED, ' + error if error else row['video']}", flush=True)
    finally:
        words = {None: "not yet", "": "made"}
        lines = [{**r, "state": words.get(state[r["video"]], "failed"), "error": state[r["video"]]} for r in rows]
        write(f"{out}/{RESULTS}", "".join(json.dumps(line) + "\n" for line in lines).encode())
    failed = sum(line["state"] == "failed" for line in lines)
    print(f"{len(rows) - failed} rows have their video, {failed} failed; see {out}/{RESULTS}")
    return 3 if failed else 0


def parameter(text: str) -> tuple[str, Any]:
    """NAME=VALUE of the command line, a number as a number."""
    name, sign, value = text.partition("=")
    if not sign:
        raise argparse.ArgumentTypeError(f"{text!r} is no NAME=VALUE; give for example steps=20")
    try:
        return name, json.loads(value)
    except ValueError:
        return name, value


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Animate a table of photos with a registered model.")
    parser.add_argument("table", help="a .csv, .parquet or .jsonl with photo, prompt and, where wished, seed")
    parser.add_argument("out", help="folder or fsspec address for the videos")
    parser.add_argument("--model", default="models:/trip@champion", help="an alias is looked up once, at the start")
    parser.add_argument("--tracking", help="address of MLflow; without it MLFLOW_TRACKING_URI")
    parser.add_argument("--param", action="append", default=[], type=parameter, help="for example steps=20")
    parser.add_argument("--seed", type=int, default=0, help="of rows without one")
    parser.add_argument("--workers", type=int, default=1, help="processes, each with the model in its memory")
    parser.add_argument("--cpus", type=int, default=1, help="processors, and threads, of each")
    parser.add_argument("--gpus", type=float, default=0, help="GPUs of each, also a part of one")
    parser.add_argument("--ray", default=os.environ.get("RAY_ADDRESS", "local"), help="address of a Ray cluster")
    args = parser.parse_args(arguments)
    try:
        return run(args)
    except KeyboardInterrupt:
        print("stopped; the same command goes on from here", file=sys.stderr)
        return 130
    except ray.exceptions.RayError as error:  # the traceback of a worker, which ends in the reason
        print(f"error: {str(error).strip().splitlines()[-1]}", file=sys.stderr)
    except (MlflowException, OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main())
