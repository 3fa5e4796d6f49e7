"""The files of a registered version, for flows: downloaded once, into a cache."""

from __future__ import annotations

from pathlib import Path

from infra import storage
from tasks.records import UserError
from tasks.register.champion import Champion


def fetched_model(root: str, champion: Champion, tracking_uri: str) -> str:
    """The folder of the champion's model, downloaded once, with its hash checked.

    Args:
        root: the files go below a local root, else below the user's cache.
        champion: the version.
        tracking_uri: address of the registry.
    Raises:
        UserError: the registry does not answer, or its files are damaged.
    """
    from tasks.register.consumer import addresses
    from tasks.register.promotion import CHAMPION
    from tasks.serve.versions import AliasedModel, RegistryTrouble, VersionId

    folder = storage.local_path(root)
    cache = (folder if folder is not None else Path.home() / ".cache" / "trip-i2v") / "registry" / champion.name
    with addresses(tracking_uri):
        try:
            model = AliasedModel(champion.name, CHAMPION, tracking_uri, cache)
            downloaded = model.fetch(VersionId(champion.number, champion.created))
        except RegistryTrouble as error:
            raise UserError(str(error)) from error
    return str(downloaded)
