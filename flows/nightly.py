"""Flow: every night, what is new in a source becomes a model, which replaces the champion only if it is not worse."""

from __future__ import annotations

from dataclasses import asdict
from typing import Annotated, Any

from cyclopts import Group, Parameter
from prefect import flow

from flows import continuing, layout, nights
from flows.console import log, results
from flows.mlflow_store import tracking_address
from flows.nights import Night
from flows.parameters import BASE, POSITIVE, PROTOCOL, RECIPE, From
from flows.recipe_values import Values
from flows.source import DEFAULT, SourceOptions
from infra import storage
from infra.output import outlive_reader
from infra.settings import DEFAULT_ROOT, MODEL_NAME
from tasks.evaluation_record import PAGE_FILE

# Modules that the stages import when they run; the command imports them while its server starts.
STAGES = ("tasks.encode.job", "tasks.evaluate.job", "tasks.register.registry")


@flow(name="nightly", on_running=[outlive_reader])
def nightly(
    recipe: Annotated[str, RECIPE] = "demo",
    source: str | None = None,
    root: str = DEFAULT_ROOT,
    base: str | None = None,
    held_out_source: str | None = None,
    tracking_uri: str | None = None,
    protocol: Annotated[str | None, PROTOCOL] = None,
    name: str = MODEL_NAME,
    least_new: Annotated[int, POSITIVE] = 1,
    start: From = BASE,
    values: Values = None,
    *,
    options: SourceOptions = DEFAULT,
    held_out_options: Annotated[
        SourceOptions, Parameter(name="--held-out-source", group=Group("Held-out source options", sort_key=2))
    ] = DEFAULT,
) -> dict[str, Any]:
    """Prepare what is new, train, evaluate next to the champion, and promote if the gate passes.

    A night whose source, recipe and base are those of the night before ends within seconds.

    Args:
        recipe: the configuration of the run, a name or a file .toml; see the command `recipes`.
        source: a table of links (CSV, Parquet, JSON lines), a folder of videos, MSR-VTT's annotation or a sample;
            without it the demo draws its own clips.
        root: folder or address that everything is written below.
        base: folder (or hub name) of the text-to-video model to start from, instead of the recipe's.
        held_out_source: a second source to evaluate on; needed if the recipe keeps no frames of the first.
        tracking_uri: MLflow's tracking address; without it MLFLOW_TRACKING_URI or a SQLite file in root.
        protocol: the evaluation's protocol, as of evaluate-trip; without it the recipe's if there is a second source.
        name: the model's name in the registry.
        least_new: new clips that a training needs; with fewer, the night ends after prepare.
        start: base, last, champion, or the address of a trained model: what the training continues, as of train-trip.
        values: FIELD=VALUE, a number of your own instead of the recipe's, as train.steps=200; once for each.
        options: how the source is read.
        held_out_options: how the second source is read.
    """
    run = layout.resolve(recipe, source, root, base, options, values)
    second = layout.held_out_run(run, held_out_source, held_out_options)
    uri = tracking_address(tracking_uri, root)
    question = nights.question_of(run, second, [protocol, name, least_new, start])
    sentence = nights.nothing_new(run, question)
    if sentence is not None:
        log(f"nightly     {sentence}")
        return {"outcome": sentence}

    layout.check_cluster(run)
    # Imported here: a night with nothing new needs none of it.
    from flows.champion import evaluate_beside_champion
    from flows.prepare_latents import prepare_held_out, prepare_stage
    from flows.register_trip import register_stage
    from flows.train_trip import train_stage
    from infra.cluster import kept_ray_session

    parent = continuing.find_parent(run, start, uri, name)
    before = nights.read_nights(run.root)
    trained_on = before[-1].trained_on if before else ""
    with kept_ray_session():
        data = prepare_stage(run).data
        new_clips = nights.count_new_clips(data, trained_on)
        if new_clips < least_new:
            outcome = f"{new_clips} new clips, fewer than {least_new}: nothing to train"
            log(f"nightly     {outcome}")
            night = Night(nights.now(), question, data, outcome, new_clips, trained_on)
            nights.write_night(run.root, night)
            return asdict(night)
        log(f"nightly     {new_clips} new clips")
        held_out = data if second is None else prepare_held_out(second, protocol)
        spec = continuing.training(run, data, parent)
        model = train_stage(spec, uri, f"train {run.recipe.name}").exported
        report = evaluate_beside_champion(run, model, held_out, protocol, second is not None, uri, name)
    version = register_stage(run, data, model, report.uri, uri, name)
    reasons = "; ".join(report.gate.reasons or version.reasons)
    outcome = f"version {version.version} is champion" if version.promoted else f"not promoted: {reasons}"
    night = Night(
        time=nights.now(),
        question=question,
        data=data,
        outcome=outcome,
        new_clips=new_clips,
        trained_on=data.uri,
        model=model.uri,
        report=report.uri,
        version=version.version,
        champion=version.promoted,
    )
    nights.write_night(run.root, night)
    results(
        "Done.",
        {
            "outcome": outcome,
            "new clips": str(new_clips),
            "model": model.uri,
            "report": storage.join(report.uri, PAGE_FILE),
            "registry": f"{version.name} version {version.version} ({', '.join(version.aliases)})",
            "MLflow": version.run_page,
        },
    )
    return asdict(night)
