"""Flow: Tables 5 and 6 at home, every variant trained and judged under the same seeds, then compared clip by clip."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from prefect import flow

from flows.console import results, tell
from flows.evaluate_trip import NONE, evaluate_stage, judged_with, planned_evaluation
from flows.mlflow_store import tracking_address
from flows.recipes import VARIANTS, find_recipe
from flows.source import PLAIN, Reading, named_source
from flows.stage import address
from flows.train_trip import EXPERIMENT, planned_training, prepared_dataset, train_stage
from infra.cluster import kept_ray_session
from infra.redaction import redact
from infra.tracking import default_artifact_location
from tasks.evaluate import ablation
from tasks.judges.judge import JudgeFiles
from tasks.records import UserError, to_json
from tasks.train.job import TrackingSpec


@flow(name="ablate")
def ablate(
    recipe: str = "demo",
    source: str | None = None,
    root: str = "runs/demo",
    base: str | None = None,
    dataset: str | None = None,
    tracking_uri: str | None = None,
    variants: str = "TRIP,TRIP_C,TRIP_TE,TRIP^-,TRIP^W",
    seeds: int = 3,
    steps: int | None = None,
    *,
    judges: JudgeFiles = NONE,
    reading: Reading = PLAIN,
) -> dict[str, Any]:
    """Train and judge TRIP and its variants under common seeds, and report the paired differences. Resumes.

    Args:
        recipe: which numbers to use; see the command `recipes`.
        source: the table that the data set was prepared from.
        root: folder or address that everything is written below.
        base: folder (or hub name) of the text-to-video model to start from, instead of the recipe's.
        dataset: address of a prepared data set, instead of the one that belongs to recipe, source and root.
        tracking_uri: where MLflow keeps runs; without it MLFLOW_TRACKING_URI or a SQLite file in root.
        variants: rows of Tables 5 and 6, with commas; TRIP itself is always among them.
        seeds: how many trainings of each variant.
        steps: training steps of each, instead of the recipe's.
        judges: files of the judges; without them fixed random nets stand in under names of their own.
        reading: how the source was read.
    """
    chosen = find_recipe(recipe, base)
    names = dict.fromkeys([ablation.REFERENCE, *(name.strip() for name in variants.split(",") if name.strip())])
    unknown = [name for name in names if name not in VARIANTS]
    if unknown:
        raise UserError(f"variant {unknown[0]!r} is unknown; the variants are {', '.join(VARIANTS)}")
    if seeds < 1 or (steps is not None and steps < 1):
        raise UserError(f"seeds {seeds} and steps {steps}, expected numbers above 0")
    uri = tracking_address(tracking_uri, root)
    data = dataset or prepared_dataset(chosen, named_source(source, reading), root)
    arms = []
    with kept_ray_session():
        for seed in range(seeds):  # seed by seed, so that a run that is stopped early has whole rows
            for name in names:
                variant = VARIANTS[name](chosen)
                train = replace(variant.train, seed=seed, steps=steps or variant.train.steps)
                variant = replace(variant, train=train)
                tell(f"ablate      {name}, seed {seed}: {len(arms) + 1} of {seeds * len(names)}")
                tracking = TrackingSpec(uri, EXPERIMENT, f"ablate {name} {seed}", default_artifact_location(uri))
                trained = train_stage(planned_training(variant, data, root), tracking)
                judged = evaluate_stage(judged_with(planned_evaluation(variant, trained.model, data, root), judges))
                arms.append(ablation.Arm(name, seed, judged.uri, trained.loss_last))
    comparison = ablation.compare(arms)
    about = {
        "recipe": recipe,
        "steps": steps or chosen.train.steps,
        "global_batch": chosen.train.global_batch,
        "dataset": data,
        **{f"{arm.variant}, seed {arm.seed}": arm.report for arm in arms},
    }
    places = ablation.write(
        address(root, "ablate", about),
        comparison,
        {name: redact(of) if isinstance(of, str) else of for name, of in about.items()},
    )
    results("Done.", {"table": places["html"], "markdown": places["md"]} | _lines(ablation.verdicts(comparison)))
    return {"comparison": to_json(comparison), **places}


def _lines(verdicts: list[str]) -> dict[str, str]:
    return {f"{number}.": verdict for number, verdict in enumerate(verdicts, 1)}
