"""Which versions of registered models can be removed, and their removal with the packages that only they have."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from typing import Any

from mlflow.entities import LoggedModel
from mlflow.entities.model_registry import ModelVersion
from mlflow.store.artifact.artifact_repository_registry import get_artifact_repository
from mlflow.tracking import MlflowClient

from infra.tracking import LINEAGE, PACKAGE
from tasks.register.consumer import addresses
from tasks.register.promotion import read_state

_REMOVING = "trip.removing"  # tag of a logged model whose removal has begun


@dataclass(frozen=True)
class RegisteredVersion:
    """One version of a registered model.

    Attributes:
        name: of the model.
        number: of the version.
        age_hours: since it was registered.
        kept_by: what is in use and refers to it; "" if it can be removed.
    """

    name: str
    number: str
    age_hours: float
    kept_by: str = ""

    @property
    def address(self) -> str:
        return f"models:/{self.name}/{self.number}"


def registered_versions(
    client: MlflowClient, root: str, last: int, hours: float, nights: Collection[str]
) -> list[RegisteredVersion]:
    """The versions whose data set is below a root, oldest first, each with what keeps it.

    Versions of other roots and of other programs are not listed, and the log of promotions is none of them.

    Args:
        client: of the registry.
        root: absolute address; several roots can share one registry.
        last: how many of a model's last versions are kept, and how many of its last champions, which a rollback returns
            to.
        hours: versions that were registered later than this before now are kept.
        nights: numbers of the versions that the kept nights name.
    """
    found = []
    for model in _pages(client.search_registered_models):
        versions = sorted(_versions(client, model.name), key=lambda version: int(version.version))
        ours = [version for version in versions if PACKAGE in version.tags]
        if not ours:
            continue
        state = read_state(client, model.name)
        champions = {ref.number for ref in state.champions[-last:]}
        newest = {str(version.version) for version in ours[-last:]}
        for version in ours:
            if not version.tags.get(f"{LINEAGE}data_uri", "").startswith(f"{root.rstrip('/')}/"):
                continue
            number, age = str(version.version), time.time() / 3600 - int(version.creation_timestamp) / 3.6e6
            named = [alias for alias, of in state.aliases.items() if of == number]
            reasons = {
                f"the alias {', '.join(named)}": bool(named),
                "a night": number in nights,
                f"one of the last {last} champions": number in champions,
                f"one of the last {last} versions": number in newest,
                f"registered {age:.1f} hours ago": age < hours,
            }
            kept_by = next((reason for reason, holds in reasons.items() if holds), "")
            found.append(RegisteredVersion(model.name, number, age, kept_by))
    return found


def remove_version(client: MlflowClient, tracking_uri: str, version: RegisteredVersion) -> bool:
    """Deletes a version, and its package if no other version has it; False if an alias names the version by now.

    The run of the registration stays, with its scores and its report. A kill at any moment leaves either the complete
    version, or a package that `remove_unfinished` deletes.
    """
    with addresses(tracking_uri):
        current = client.get_model_version(version.name, version.number)
        if current.aliases:
            return False
        package = _package_of(current)
        only = bool(package) and sum(_package_of(other) == package for other in _versions(client)) == 1
        if only:
            # Without its tag, no registration of the same weights finds this package; it makes one of its own.
            client.set_logged_model_tags(package, {_REMOVING: "yes"})
            if PACKAGE in client.get_logged_model(package).tags:
                client.delete_logged_model_tag(package, PACKAGE)
        client.delete_model_version(version.name, version.number)
        if only:
            _remove_package(client, client.get_logged_model(package))
    return True


def remove_unfinished(client: MlflowClient, tracking_uri: str) -> int:
    """Completes removals that a kill has interrupted after the version was deleted; returns their number."""
    experiments = [experiment.experiment_id for experiment in _pages(client.search_experiments)]
    begun = [
        model
        for model in _pages(lambda **page: client.search_logged_models(experiments, **page))
        if _REMOVING in model.tags
    ]
    used = {_package_of(version) for version in _versions(client)} if begun else set()
    left = [model for model in begun if model.model_id not in used]
    with addresses(tracking_uri):
        for model in left:
            _remove_package(client, model)
    return len(left)


def _remove_package(client: MlflowClient, model: LoggedModel) -> None:
    """Deletes the files of a logged model, and then the model: MLflow does not list a deleted one."""
    get_artifact_repository(model.artifact_location, tracking_uri=client.tracking_uri).delete_artifacts()
    client.delete_logged_model(model.model_id)


def _package_of(version: ModelVersion) -> str:
    """The id of a version's logged model; "" without one."""
    source = version.source or ""
    return version.model_id or (source.removeprefix("models:/") if source.startswith("models:/m-") else "")


def _versions(client: MlflowClient, name: str | None = None) -> Iterator[ModelVersion]:
    query = f"name = '{name}'" if name is not None else None
    return _pages(lambda **page: client.search_model_versions(query, **page))


def _pages(search: Callable[..., Any]) -> Iterator[Any]:
    """The items of all pages of one of MLflow's searches."""
    token = None
    while True:
        page = search(page_token=token)
        yield from page
        token = page.token
        if not token:
            return
