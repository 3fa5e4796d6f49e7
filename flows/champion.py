"""Evaluates a model next to the champion of the registry, on the same items, so that the gate compares both."""

from __future__ import annotations

from dataclasses import replace

from flows.console import log
from flows.evaluate_trip import evaluate_stage, with_base_row
from flows.layout import Run
from flows.registry_files import fetched_model
from infra import storage
from tasks.evaluate.spec import EvaluateReport
from tasks.evaluation_record import REPORT_FILE, read_evaluation
from tasks.records import Artifact, UserError
from tasks.register.champion import find_champion
from tasks.train.start import training_of


def evaluate_beside_champion(
    run: Run, model: Artifact, data: Artifact, protocol: str | None, foreign: bool, tracking_uri: str, name: str
) -> EvaluateReport:
    """Evaluates a model next to the champion of the registry, which is evaluated on the same items first if needed.

    Args:
        run: the recipe and the root.
        model: the candidate.
        data: the data set to evaluate on.
        protocol: as of `Run.evaluate`.
        foreign: whether none of the data was trained on.
        tracking_uri: address of the registry.
        name: the model's name in the registry.
    Raises:
        UserError: the registry does not answer, or its files of the champion are damaged.
    """
    spec = with_base_row(run.evaluate(model, data, protocol, foreign=foreign), run)
    champion = find_champion(tracking_uri, name)
    if champion is None:
        log(f"evaluate    {name} has no champion yet, so there is none to compare with")
        return evaluate_stage(spec)
    label = f"version {champion.number} of {name}, the champion"
    if champion.model_sha256 == model.sha256:
        log(f"evaluate    the model is {label}, already")
        return evaluate_stage(replace(spec, champion=_compared_before(spec.output)))
    known = run.evaluate(Artifact("", champion.model_sha256), data, protocol, foreign=foreign)
    if not storage.exists(storage.join(known.output, REPORT_FILE)):
        log(f"evaluate    {label}, on the same items first")
        trained = training_of(champion.model_sha256, storage.join(run.root, "train"))
        here = trained is not None and storage.exists(trained.model.uri)
        folder = trained.model.uri if trained is not None and here else fetched_model(run.root, champion, tracking_uri)
        evaluate_stage(replace(known, model=folder))
    log(f"evaluate    next to {label}")
    return evaluate_stage(replace(spec, champion=known.output))


def _compared_before(output: str) -> str | None:
    """The report that an existing evaluation compared with: the champion stays compared with the one before it."""
    try:
        return read_evaluation(output).champion
    except UserError:
        return None
