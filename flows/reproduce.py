"""Flow: the complete path, from a table of links to a registered model and one animated photo."""

from __future__ import annotations

import io
import os
from typing import Annotated, Any

from cyclopts import Group, Parameter
from prefect import flow, task
from prefect.cache_policies import NO_CACHE

from flows import continuing, layout
from flows.champion import evaluate_beside_champion
from flows.console import log, results
from flows.mlflow_store import tracking_address
from flows.parameters import BASE, PROTOCOL, RECIPE, From
from flows.prepare_latents import prepare_held_out, prepare_stage
from flows.recipe_values import Values
from flows.register_trip import register_stage
from flows.source import DEFAULT, SourceOptions
from flows.train_trip import train_stage
from infra import storage
from infra.cluster import kept_ray_session
from infra.output import outlive_reader
from infra.settings import DEFAULT_ROOT, MODEL_NAME
from tasks.evaluate.protocol.protocol import held_out_protocol
from tasks.records import Artifact
from tasks.shards import ShardDataset

# Modules that the stages import when they run; the command imports them while its server starts.
STAGES = ("tasks.encode.job", "tasks.evaluate.job", "tasks.register.registry")


@task(name="animate", cache_policy=NO_CACHE)
def animate_photo(model: Artifact, data: Artifact, held_out_fraction: float, seed: int, root: str) -> dict[str, str]:
    """Animates the first frame of a held-out clip with its caption: photo.png, animation.mp4 and animation.gif."""
    clips = ShardDataset(data.uri)
    item = held_out_protocol(clips, held_out_fraction, 1, seed).items[0]
    identity = {"model": model.sha256, "dataset": data.sha256, "key": item.key, "seed": item.seed}
    files = {name: storage.join(root, name) for name in ("photo.png", "animation.mp4", "animation.gif")}
    mark = storage.join(root, "animation.json")
    if not _is_current(mark, identity, list(files.values())):
        from PIL import Image

        from trip_model.images import video_bytes
        from trip_model.pipeline import TripPipeline

        photo = clips.read(item.index, ("first",))["first"]
        pipeline = TripPipeline.from_pretrained(storage.local_folder(model.uri))
        log(f"animate     {item.key}: {item.caption}")
        (pixels,) = pipeline.generate([photo], [item.caption], [item.seed])
        png = io.BytesIO()
        Image.fromarray(photo).save(png, "PNG")
        storage.write_bytes(files["photo.png"], png.getvalue())
        storage.write_bytes(files["animation.mp4"], video_bytes(pixels, pipeline.fps, "mp4"))
        storage.write_bytes(files["animation.gif"], video_bytes(pixels, pipeline.fps, "gif"))
        storage.write_json(mark, identity)
    return {"prompt": item.caption, **files}


def link_model(model: str, root: str) -> str:
    """A short name for the model below a local root, where `python -m trip_model` looks; elsewhere its address."""
    folder = storage.local_path(storage.absolute(root))
    if folder is None:
        return model
    fresh = folder / f".model-{os.getpid()}"
    fresh.symlink_to(os.path.relpath(model, folder))
    os.replace(fresh, folder / "model")
    return str(folder / "model")


def _is_current(mark: str, identity: dict[str, Any], files: list[str]) -> bool:
    try:
        return storage.read_json(mark) == identity and all(storage.exists(file) for file in files)
    except (FileNotFoundError, ValueError):
        return False


@flow(name="reproduce", on_running=[outlive_reader])
def reproduce(
    recipe: Annotated[str, RECIPE] = "demo",
    source: str | None = None,
    root: str = DEFAULT_ROOT,
    base: str | None = None,
    held_out_source: str | None = None,
    tracking_uri: str | None = None,
    protocol: Annotated[str | None, PROTOCOL] = None,
    start: From = BASE,
    values: Values = None,
    *,
    options: SourceOptions = DEFAULT,
    held_out_options: Annotated[
        SourceOptions, Parameter(name="--held-out-source", group=Group("Held-out source options", sort_key=2))
    ] = DEFAULT,
) -> dict[str, Any]:
    """Run every stage: prepare, train, evaluate, register, and animate a held-out photo. The same command resumes.

    Args:
        recipe: the configuration of the run, a name or a file .toml; see the command `recipes`.
        source: a table of links (CSV, Parquet, JSON lines), a folder of videos, MSR-VTT's annotation or a sample;
            without it the demo draws its own clips.
        root: folder or address that everything is written below.
        base: folder (or hub name) of the text-to-video model to start from, instead of the recipe's.
        held_out_source: a second source to evaluate on; needed if the recipe keeps no frames of the first.
        tracking_uri: MLflow's tracking address; without it MLFLOW_TRACKING_URI or a SQLite file in root.
        protocol: the evaluation's protocol, as of evaluate-trip; without it the recipe's if there is a second source.
        start: base, last, champion, or the address of a trained model: what the training continues, as of train-trip.
        values: FIELD=VALUE, a number of your own instead of the recipe's, as train.steps=200; once for each.
        options: how the source is read.
        held_out_options: how the second source is read.
    """
    run = layout.resolve(recipe, source, root, base, options, values)
    layout.check_cluster(run)
    numbers = run.recipe
    uri = tracking_address(tracking_uri, root)
    parent = continuing.find_parent(run, start, uri)
    second = layout.held_out_run(run, held_out_source, held_out_options)
    with kept_ray_session():
        data = prepare_stage(run).data
        held_out = data if second is None else prepare_held_out(second, protocol)
        spec = continuing.training(run, data, parent)
        model = train_stage(spec, uri, f"train {numbers.name}").exported
        report = evaluate_beside_champion(run, model, held_out, protocol, second is not None, uri, MODEL_NAME)
    version = register_stage(run, data, model, report.uri, uri, MODEL_NAME)
    fraction = numbers.train.held_out_fraction if second is None else 1.0
    animation = animate_photo(model, held_out, fraction, numbers.evaluate.seed, run.root)
    results(
        "Done.",
        {
            "video": animation["animation.mp4"],
            "prompt": animation["prompt"],
            "model": link_model(model.uri, root),
            "report": storage.join(report.uri, "report.html"),
            "gate": "passed" if report.passed else "; ".join(report.gate.reasons),
            "registry": f"{version.name} version {version.version} ({', '.join(version.aliases)})",
            "MLflow": version.run_page,
        },
    )
    return {"dataset": data.uri, "model": model.uri, "report": report.uri, "version": version.version, **animation}
