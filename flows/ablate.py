"""Flow: Tables 5 and 6. Trains and evaluates every variant with the same seeds, and compares them clip by clip."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import Annotated, Any

from prefect import flow

from flows import layout
from flows.console import log, results
from flows.evaluate_trip import evaluate_stage, with_base_row, with_extractors
from flows.layout import Run
from flows.mlflow_store import tracking_address
from flows.parameters import RECIPE
from flows.recipe_values import Values
from flows.recipes import VARIANTS, Recipe
from flows.source import DEFAULT, SourceOptions
from flows.train_trip import train_stage
from infra import storage
from infra.cluster import kept_ray_session
from infra.output import outlive_reader
from infra.redaction import redact
from infra.settings import DEFAULT_ROOT
from tasks.evaluate.gate import CLIP_DISTANCE, ENERGY_SCORE
from tasks.evaluate.protocol.protocol import held_out_protocol
from tasks.evaluate.report import ablation
from tasks.metrics.extractors.files import NONE, ExtractorFiles
from tasks.records import Artifact, UserError, to_json
from tasks.shards import ShardDataset

# Pairs (lambda^1, lambda^N) of Equation 9: the recipe's first. The residual's target grows with lambda / (1 - lambda).
LAMBDAS = ((1.0, 0.5), (0.5, 0.0), (0.2, 0.0), (0.1, 0.0), (0.05, 0.0))
LEAST_VALIDATION_CLIPS = 8


@flow(name="ablate", on_running=[outlive_reader])
def ablate(
    recipe: Annotated[str, RECIPE] = "demo",
    source: str | None = None,
    root: str = DEFAULT_ROOT,
    base: str | None = None,
    dataset: str | None = None,
    tracking_uri: str | None = None,
    variants: str = "TRIP,TRIP_C,TRIP_TE,TRIP^-,TRIP^W",
    seeds: int = 5,
    steps: list[int] | None = None,
    rate: list[str] | None = None,
    tune: bool = True,
    values: Values = None,
    *,
    extractors: ExtractorFiles = NONE,
    options: SourceOptions = DEFAULT,
) -> dict[str, Any]:
    """Train and evaluate TRIP and its variants under common seeds, and report the paired differences. Resumes.

    Args:
        recipe: the configuration of the run, a name or a file .toml; see the command `recipes`.
        source: the table that the data set was prepared from.
        root: folder or address that everything is written below.
        base: folder (or hub name) of the text-to-video model to start from, instead of the recipe's.
        dataset: address of a prepared data set, instead of the one that belongs to recipe, source and root.
        tracking_uri: MLflow's tracking address; without it MLFLOW_TRACKING_URI or a SQLite file in root.
        variants: rows of Tables 5 and 6, with commas; TRIP is always included.
        seeds: number of trainings of each variant.
        steps: training steps of each, instead of the recipe's; given several times, one training for each number: a
            learning curve.
        rate: VARIANT=FACTOR, on the learning rates of that variant; once for each.
        tune: search the weights of Equation 9 for TRIP^W, on held-out clips that no table is of; else the recipe's.
        values: FIELD=VALUE, a number of your own instead of the recipe's, as train.steps=200; once for each.
        extractors: files of the feature extractors; without one, a fixed random network is used under another name.
        options: how the source was read.
    """
    run = layout.resolve(recipe, source, root, base, options, values)
    names = dict.fromkeys([ablation.REFERENCE, *(name.strip() for name in variants.split(",") if name.strip())])
    unknown = [name for name in names if name not in VARIANTS]
    if unknown:
        raise UserError(f"variant {unknown[0]!r} is unknown; the variants are {', '.join(VARIANTS)}")
    budgets = sorted(set(steps or [run.recipe.train.steps]))
    if seeds < 1 or budgets[0] < 1:
        raise UserError(f"seeds {seeds} and steps {steps}, expected numbers above 0")
    evaluated_by = run.recipe.evaluate
    if evaluated_by.samples < 2 and not (evaluated_by.deterministic_motion and run.source is None):
        raise UserError(
            f"evaluate.samples {evaluated_by.samples}, expected at least 2: the energy score decides between the arms"
            " where the first frame and the caption do not decide the motion"
        )
    rates = _rates(rate or [], names)
    uri = tracking_address(tracking_uri, root)
    data = run.prepared() if dataset is None else layout.data_set(dataset)
    arms: list[ablation.Arm] = []
    recipes = {name: _with_rate(VARIANTS[name](run.recipe), rates.get(name, 1.0)) for name in names}
    tuned = ""
    with kept_ray_session():
        if tune and "TRIP^W" in recipes:
            recipes["TRIP^W"], tuned = _tuned(run, recipes["TRIP^W"], data, budgets[-1], seeds, uri)
        for budget in budgets:
            for seed in range(seeds):  # seed by seed, so that a run stopped early has complete rows
                for name, recipe_of in recipes.items():
                    log(f"ablate      {name}, seed {seed}, {budget} steps")
                    arm = _arm(run, recipe_of, seed, budget)
                    trained = train_stage(arm.train(data), uri, f"ablate {name} {seed}")
                    spec = with_extractors(with_base_row(arm.evaluate(trained.exported, data), arm), extractors)
                    evaluated = evaluate_stage(replace(spec, references=False))
                    arms.append(ablation.Arm(name, seed, evaluated.uri, trained.loss_last, budget))
    comparisons = [ablation.compare([arm for arm in arms if arm.steps == budget]) for budget in budgets]
    about = {
        "recipe": run.recipe.name,
        "steps": budgets[0] if len(budgets) == 1 else budgets,
        "global_batch": run.recipe.train.global_batch,
        "base_sha256": layout.base_hash(run.recipe.train.base),
        "dataset": data.uri,
        **{f"rates of {name}": f"times {factor:g}" for name, factor in rates.items()},
        **{f"{arm.variant}, seed {arm.seed}{_budget(arm, budgets)}": arm.report for arm in arms},
    }
    files = ablation.write(
        layout.address(root, "ablate", about),
        comparisons,
        {name: redact(value) if isinstance(value, str) else value for name, value in about.items()},
        tuned,
        ablation.per_clip_arrays(arms),
    )
    results("Done.", {"table": files["html"], "markdown": files["md"]} | _lines(ablation.verdicts(comparisons[-1])))
    return {"comparison": to_json(comparisons[-1]), **files}


def _arm(run: Run, recipe: Recipe, seed: int, steps: int) -> Run:
    return replace(run, recipe=replace(recipe, train=replace(recipe.train, seed=seed, steps=steps)))


def _rates(given: list[str], names: Iterable[str]) -> dict[str, float]:
    """Factors of learning rates by variant, from VARIANT=FACTOR each."""
    rates = {}
    for text in given:
        name, _, factor = text.partition("=")
        try:
            rates[name] = float(factor)
        except ValueError:
            rates[name] = 0.0
        if name not in names or not 0 < rates[name] < float("inf"):
            raise UserError(f"rate {text!r}, expected VARIANT=FACTOR with one of {', '.join(names)}, such as TRIP^-=2")
    return rates


def _with_rate(recipe: Recipe, factor: float) -> Recipe:
    train = recipe.train
    rates = {name: factor * getattr(train, name) for name in ("learning_rate_unet", "learning_rate_fusion")}
    return replace(recipe, train=replace(train, **rates))


def _tuned(run: Run, recipe: Recipe, data: Artifact, steps: int, seed: int, uri: str) -> tuple[Recipe, str]:
    """TRIP^W with the weights of Equation 9 that score best on held-out clips which the evaluation does not take.

    Each pair of weights is one training, with a seed that no arm has.
    """
    protocol, clips = _validation_protocol(run, data)
    scores: dict[tuple[float, float], float] = {}
    tried: dict[tuple[float, float], Recipe] = {}
    for first, last in LAMBDAS:
        fusion = replace(recipe.train.model.fusion, lambda_first=first, lambda_last=last)
        model = replace(recipe.train.model, fusion=fusion)
        tried[first, last] = replace(recipe, train=replace(recipe.train, model=model))
        arm = _arm(run, tried[first, last], seed, steps)
        log(f"ablate      TRIP^W, weights {first:g} to {last:g}: tried on {clips} clips of no table")
        trained = train_stage(arm.train(data), uri, f"tune TRIP^W {first:g} {last:g}")
        spec = replace(arm.evaluate(trained.exported, data, protocol), references=False)
        evaluated = evaluate_stage(spec)
        score = CLIP_DISTANCE if spec.deterministic_motion else ENERGY_SCORE
        value = evaluated.metrics["trip"][score]["value"]
        assert value is not None, f"a mean over clips has a value: {score}"
        scores[first, last] = value
    first, last = min(scores, key=lambda pair: scores[pair])
    all_scores = ", ".join(f"{a:g} to {b:g}: {score:.4f}" for (a, b), score in scores.items())
    sentence = (
        f"TRIP^W: lambda falls from {first:g} to {last:g}, the best of {len(scores)} pairs by one training each (seed"
        f" {seed}) on {clips} held-out clips that no table is of ({all_scores})."
    )
    return tried[first, last], sentence


def _validation_protocol(run: Run, data: Artifact) -> tuple[str, int]:
    """The address of a manifest of held-out clips that the evaluation does not take, and how many there are.

    Raises:
        UserError: fewer than `LEAST_VALIDATION_CLIPS` are left.
    """
    dataset, numbers = ShardDataset(data.uri), run.recipe.evaluate
    fraction = run.recipe.train.held_out_fraction
    complete = held_out_protocol(dataset, fraction, len(dataset.keys), numbers.seed)
    taken = {item.clip for item in held_out_protocol(dataset, fraction, numbers.clips, numbers.seed).items}
    rest = replace(complete, items=tuple(item for item in complete.items if item.clip not in taken))
    if rest.clips < LEAST_VALIDATION_CLIPS:
        raise UserError(
            f"{rest.clips} held-out clips are left in addition to the {len(taken)} that are evaluated, at least"
            f" {LEAST_VALIDATION_CLIPS} are needed to choose the weights of TRIP^W; give more clips, or --no-tune"
        )
    manifest = rest.manifest()
    address = storage.join(run.root, "ablate", f"validation-{manifest['sha256'][:16]}.json")
    storage.write_json(address, manifest)
    return address, rest.clips


def _budget(arm: ablation.Arm, budgets: list[int]) -> str:
    return f", {arm.steps} steps" if len(budgets) > 1 else ""


def _lines(verdicts: list[str]) -> dict[str, str]:
    return {f"{number}.": verdict for number, verdict in enumerate(verdicts, 1)}
