"""What a training continues: the flag `--from` becomes the spec of a training."""

from __future__ import annotations

from flows import layout
from flows.console import log
from flows.layout import Run
from flows.parameters import BASE, CHAMPION, LAST
from infra import storage
from tasks.records import Artifact, UserError
from tasks.train.spec import TrainSpec
from tasks.train.start import Parent, last_training, parent_at, start_from, training_of

NAME = "trip"  # of the registered model


def training(run: Run, data: Artifact, start: str, tracking_uri: str) -> TrainSpec:
    """The spec of a training from `start`: base, last, champion, or the address of a trained model.

    Raises:
        UserError: nothing to continue, or a model that the recipe cannot continue.
    """
    if start == BASE:
        return run.train(data)
    outputs = storage.join(run.root, "train")
    if start == LAST:
        parent = last_training(outputs)
    elif start == CHAMPION:
        parent = _champion(run, outputs, tracking_uri)
    else:
        parent = parent_at(start, outputs)
    spec = run.recipe.train
    taken, sentence = start_from(parent, spec, data.sha256, layout.base_hash(spec.base))
    log(f"continue    {sentence}")
    return run.train(data, taken)


def _champion(run: Run, outputs: str, tracking_uri: str) -> Parent:
    """The champion of the registry: its training below the root, or the version's files, which are downloaded."""
    from tasks.serve.versions import AliasedModel, RegistryTrouble

    folder = storage.local_path(run.root)
    if folder is None:
        raise UserError(
            f"the champion cannot be downloaded below {run.root}; give the address of its model: --from ADDRESS"
        )
    champion = AliasedModel(NAME, CHAMPION, tracking_uri, folder / "registry" / NAME)
    try:
        version = champion.current()
        parent = training_of(champion.trained_sha256(version), outputs)
        return parent or parent_at(str(champion.fetch(version)), outputs)
    except RegistryTrouble as error:
        raise UserError(f"{error}") from error
