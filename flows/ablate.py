"""Flow: Tables 5 and 6. Trains and evaluates every variant with the same seeds, and compares them clip by clip."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from prefect import flow

from flows import layout
from flows.console import log, results
from flows.evaluate_trip import evaluate_stage, with_base_row, with_extractors
from flows.mlflow_store import tracking_address
from flows.recipes import VARIANTS
from flows.source import DEFAULT, SourceOptions
from flows.train_trip import train_stage
from infra.cluster import kept_ray_session
from infra.redaction import redact
from infra.settings import DEFAULT_ROOT
from tasks.evaluate.report import ablation
from tasks.metrics.extractors.files import NONE, ExtractorFiles
from tasks.records import UserError, to_json


@flow(name="ablate")
def ablate(
    recipe: str = "demo",
    source: str | None = None,
    root: str = DEFAULT_ROOT,
    base: str | None = None,
    dataset: str | None = None,
    tracking_uri: str | None = None,
    variants: str = "TRIP,TRIP_C,TRIP_TE,TRIP^-,TRIP^W",
    seeds: int = 5,
    steps: int | None = None,
    *,
    extractors: ExtractorFiles = NONE,
    options: SourceOptions = DEFAULT,
) -> dict[str, Any]:
    """Train and evaluate TRIP and its variants under common seeds, and report the paired differences. Resumes.

    Args:
        recipe: the configuration of the run; see the command `recipes`.
        source: the table that the data set was prepared from.
        root: folder or address that everything is written below.
        base: folder (or hub name) of the text-to-video model to start from, instead of the recipe's.
        dataset: address of a prepared data set, instead of the one that belongs to recipe, source and root.
        tracking_uri: MLflow's tracking address; without it MLFLOW_TRACKING_URI or a SQLite file in root.
        variants: rows of Tables 5 and 6, with commas; TRIP is always included.
        seeds: number of trainings of each variant.
        steps: training steps of each, instead of the recipe's.
        extractors: files of the feature extractors; without one, a fixed random network is used under another name.
        options: how the source was read.
    """
    run = layout.resolve(recipe, source, root, base, options)
    names = dict.fromkeys([ablation.REFERENCE, *(name.strip() for name in variants.split(",") if name.strip())])
    unknown = [name for name in names if name not in VARIANTS]
    if unknown:
        raise UserError(f"variant {unknown[0]!r} is unknown; the variants are {', '.join(VARIANTS)}")
    if seeds < 1 or (steps is not None and steps < 1):
        raise UserError(f"seeds {seeds} and steps {steps}, expected numbers above 0")
    uri = tracking_address(tracking_uri, root)
    data = run.prepared() if dataset is None else layout.data_set(dataset)
    arms = []
    with kept_ray_session():
        for seed in range(seeds):  # seed by seed, so that a run stopped early has complete rows
            for name in names:
                variant = VARIANTS[name](run.recipe)
                train = replace(variant.train, seed=seed, steps=steps or variant.train.steps)
                arm = replace(run, recipe=replace(variant, train=train))
                log(f"ablate      {name}, seed {seed}: {len(arms) + 1} of {seeds * len(names)}")
                trained = train_stage(arm.train(data), uri, f"ablate {name} {seed}")
                spec = with_extractors(with_base_row(arm.evaluate(trained.exported, data), arm), extractors)
                judged = evaluate_stage(spec)
                arms.append(ablation.Arm(name, seed, judged.uri, trained.loss_last))
    comparison = ablation.compare(arms)
    about = {
        "recipe": recipe,
        "steps": steps or run.recipe.train.steps,
        "global_batch": run.recipe.train.global_batch,
        "base_sha256": layout.base_hash(run.recipe.train.base),
        "dataset": data.uri,
        **{f"{arm.variant}, seed {arm.seed}": arm.report for arm in arms},
    }
    files = ablation.write(
        layout.address(root, "ablate", about),
        comparison,
        {name: redact(value) if isinstance(value, str) else value for name, value in about.items()},
    )
    results("Done.", {"table": files["html"], "markdown": files["md"]} | _lines(ablation.verdicts(comparison)))
    return {"comparison": to_json(comparison), **files}


def _lines(verdicts: list[str]) -> dict[str, str]:
    return {f"{number}.": verdict for number, verdict in enumerate(verdicts, 1)}
