"""Flow: the whole road, from a table of links to a registered model and one photo that moves."""

from __future__ import annotations

import io
import os
from typing import Annotated, Any

from cyclopts import Group, Parameter
from PIL import Image
from prefect import flow, task
from prefect.cache_policies import NO_CACHE

from flows.console import results, tell
from flows.evaluate_trip import evaluate_trip
from flows.mlflow_store import tracking_address
from flows.prepare_latents import prepare_latents
from flows.recipes import find_recipe
from flows.register_trip import register_trip
from flows.source import PLAIN, Reading
from flows.train_trip import train_trip
from infra import storage
from infra.cluster import kept_ray_session
from tasks.evaluate.protocols import held_out_protocol, load_protocol
from tasks.records import UserError
from tasks.shards import ShardDataset
from trip_model.encoders import folder_hash
from trip_model.pipeline import TripPipeline
from trip_model.video import video_bytes


@task(name="animate", cache_policy=NO_CACHE)
def animate_photo(model: str, dataset: str, held_out_fraction: float, seed: int, root: str) -> dict[str, str]:
    """The first frame of a held-out clip and its caption, animated: photo.png, animation.mp4 and animation.gif."""
    clips = ShardDataset(dataset)
    item = held_out_protocol(clips, held_out_fraction, 1, seed).items[0]
    folder = storage.local_folder(model)
    identity = {"model": folder_hash(folder), "dataset": clips.manifest_sha256, "key": item.key, "seed": item.seed}
    folder_of = storage.absolute(root)
    places = {name: storage.join(folder_of, name) for name in ("photo.png", "animation.mp4", "animation.gif")}
    mark = storage.join(folder_of, "animation.json")
    if not _holds(mark, identity, list(places.values())):
        photo = clips.read(item.index, ("first",))["first"]
        pipeline = TripPipeline.from_folder(folder)
        tell(f"animate     {item.key}: {item.caption}")
        pixels = pipeline(photo, item.caption, seed=item.seed)
        png = io.BytesIO()
        Image.fromarray(photo).save(png, "PNG")
        storage.write_bytes(places["photo.png"], png.getvalue())
        storage.write_bytes(places["animation.mp4"], video_bytes(pixels, pipeline.fps, "mp4"))
        storage.write_bytes(places["animation.gif"], video_bytes(pixels, pipeline.fps, "gif"))
        storage.write_json(mark, identity)
    return {"prompt": item.caption, **places}


def link_model(model: str, root: str) -> str:
    """A short name for the model below a local root, where `python -m trip_model` looks; elsewhere its address."""
    folder = storage.local_path(storage.absolute(root))
    if folder is None:
        return model
    fresh = folder / f".model-{os.getpid()}"
    fresh.symlink_to(os.path.relpath(model, folder))
    os.replace(fresh, folder / "model")
    return str(folder / "model")


def _holds(mark: str, identity: dict[str, Any], files: list[str]) -> bool:
    try:
        return storage.read_json(mark) == identity and all(storage.exists(file) for file in files)
    except (FileNotFoundError, ValueError):
        return False


@flow(name="reproduce")
def reproduce(
    recipe: str = "demo",
    source: str | None = None,
    root: str = "runs/demo",
    base: str | None = None,
    held_out_source: str | None = None,
    tracking_uri: str | None = None,
    protocol: str | None = None,
    *,
    reading: Reading = PLAIN,
    held_out_reading: Annotated[
        Reading, Parameter(name="--held-out-source", group=Group("How the held-out source is read", sort_key=2))
    ] = PLAIN,
) -> dict[str, Any]:
    """Run every stage: prepare, train, evaluate, register, and animate a held-out photo. The same command resumes.

    Args:
        recipe: which numbers to use; see the command `recipes`.
        source: a table of links (CSV, Parquet, JSON lines), a folder of videos, MSR-VTT's annotation or a sample;
            without it the demo draws its own clips.
        root: folder or address that everything is written below.
        base: folder (or hub name) of the text-to-video model to start from, instead of the recipe's.
        held_out_source: a second source to judge by; needed where the recipe keeps no frames of the first.
        tracking_uri: where MLflow keeps runs and models; without it MLFLOW_TRACKING_URI or a SQLite file in root.
        protocol: what to judge by, as of evaluate-trip; without it the recipe's where there is a second source.
        reading: how the source is read.
        held_out_reading: how the second source is read.
    """
    chosen = find_recipe(recipe, base)
    tracking = tracking_address(tracking_uri, root)
    if not chosen.prepare.keep_pixels and held_out_source is None:
        raise UserError(
            f"recipe {recipe!r} keeps no frames to judge by; name a table for that: --held-out-source TABLE.csv"
        )
    with kept_ray_session():
        dataset = prepare_latents(recipe, source, root, base, reading=reading)["dataset"]
        held_out = None
        if held_out_source is not None:
            rules = protocol or chosen.evaluate.protocol
            held_out = prepare_latents(
                recipe,
                held_out_source,
                root,
                base,
                True,
                None if rules.endswith(".json") else rules,
                reading=held_out_reading,
            )["dataset"]
            # Whether it holds what the protocol asks for is known before days of training.
            load_protocol(rules, ShardDataset(held_out), 1.0, chosen.evaluate.clips, chosen.evaluate.seed)
        model = train_trip(recipe, source, root, base, dataset, tracking, reading=reading)["model"]
        report = evaluate_trip(recipe, source, root, base, dataset, model, held_out, protocol, reading=reading)
    version = register_trip(recipe, source, root, base, dataset, model, report["uri"], tracking, reading=reading)
    fraction = 1.0 if held_out else chosen.train.held_out_fraction
    shown = animate_photo(model, held_out or dataset, fraction, chosen.evaluate.seed, root)
    gate = report["gate"]
    results(
        "Done.",
        {
            "video": shown["animation.mp4"],
            "prompt": shown["prompt"],
            "model": link_model(model, root),
            "report": storage.join(report["uri"], "report.html"),
            "gate": "passed" if gate["passed"] else "; ".join(gate["reasons"]),
            "registry": f"{version['name']} version {version['version']} ({', '.join(version['aliases'])})",
            "MLflow": version["run_page"],
        },
    )
    return {"dataset": dataset, "model": model, "report": report["uri"], "version": version["version"], **shown}
