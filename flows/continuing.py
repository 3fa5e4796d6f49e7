"""What a training continues: the flag `--from` becomes the spec of a training."""

from __future__ import annotations

from flows import layout
from flows.console import log
from flows.layout import Run
from flows.parameters import BASE, CHAMPION, LAST
from infra import storage
from infra.settings import MODEL_NAME
from tasks.records import Artifact, UserError
from tasks.train.spec import TrainSpec
from tasks.train.start import Parent, check_network, last_training, parent_at, start_from, training_of


def find_parent(run: Run, start: str, tracking_uri: str, name: str = MODEL_NAME) -> Parent | None:
    """What a training from `start` continues: base (None), last, the champion of `name`, or a trained model's address.

    Raises:
        UserError: nothing to continue, or a model that the recipe cannot continue.
    """
    if start == BASE:
        return None
    outputs = storage.join(run.root, "train")
    if start == LAST:
        parent = last_training(outputs)
    elif start == CHAMPION:
        parent = _champion(run, outputs, tracking_uri, name)
    else:
        parent = parent_at(start, outputs)
    spec = run.recipe.train
    check_network(parent, spec, layout.base_hash(spec.base))
    return parent


def training(run: Run, data: Artifact, parent: Parent | None) -> TrainSpec:
    """The spec of a training on a data set from the base, or from `parent`.

    Raises:
        UserError: `parent` has not what the recipe's `take` asks for.
    """
    if parent is None:
        return run.train(data)
    spec = run.recipe.train
    taken, sentence = start_from(parent, spec, data.sha256)
    log(f"continue    {sentence}")
    return run.train(data, taken)


def _champion(run: Run, outputs: str, tracking_uri: str, name: str) -> Parent:
    """The champion of the registry: its training below the root, or the version's files, which are downloaded."""
    from flows.registry_files import fetched_model
    from tasks.register.champion import find_champion

    champion = find_champion(tracking_uri, name)
    if champion is None:
        raise UserError(f"{name} has no champion to continue; promote a version, or give --from base")
    parent = training_of(champion.model_sha256, outputs)
    return parent or parent_at(fetched_model(run.root, champion, tracking_uri), outputs)
