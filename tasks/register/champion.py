"""Finds the champion of a registered model, to evaluate other models next to it."""

from __future__ import annotations

from dataclasses import dataclass

from mlflow.exceptions import MlflowException

from infra.tracking import EVALUATED_MODEL, sqlite_file
from tasks.records import UserError
from tasks.register.promotion import CHAMPION, open_registry, version_ref


@dataclass(frozen=True)
class Champion:
    """The version in use: number, creation time in milliseconds, and the sha256 of the evaluated model folder."""

    name: str
    number: str
    created: int
    model_sha256: str


def find_champion(tracking_uri: str, name: str) -> Champion | None:
    """Returns the version that the alias `champion` names; None without a registry, a model or the alias.

    Raises:
        UserError: the registry does not answer, or the version does not name the model of its evaluation.
    """
    file = sqlite_file(tracking_uri)
    if file is not None and not file.is_file():
        return None
    client = open_registry(tracking_uri)
    try:
        version = client.get_model_version_by_alias(name, CHAMPION)
    except MlflowException as error:
        if error.error_code in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):
            return None
        raise
    model_sha256 = version.tags.get(EVALUATED_MODEL, "")
    if not model_sha256:
        raise UserError(
            f"version {version.version} of {name}, the champion, does not name the model of its evaluation, so no model"
            " can be compared with it; register it again, or promote another version"
        )
    ref = version_ref(version)
    return Champion(name, ref.number, ref.created, model_sha256)
