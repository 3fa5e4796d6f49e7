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
from tasks.train.start import Parent, last_training, parent_at, start_from, training_of


def training(run: Run, data: Artifact, start: str, tracking_uri: str, name: str = MODEL_NAME) -> TrainSpec:
    """The spec of a training from `start`: base, last, the champion of `name`, or the address of a trained model.

    Raises:
        UserError: nothing to continue, or a model that the recipe cannot continue.
    """
    if start == BASE:
        return run.train(data)
    outputs = storage.join(run.root, "train")
    if start == LAST:
        parent = last_training(outputs)
    elif start == CHAMPION:
        parent = _champion(run, outputs, tracking_uri, name)
    else:
        parent = parent_at(start, outputs)
    spec = run.recipe.train
    taken, sentence = start_from(parent, spec, data.sha256, layout.base_hash(spec.base))
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
