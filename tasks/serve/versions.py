"""Which version an alias of the registry names at the moment, and that version's model folder on this machine."""

from __future__ import annotations

import os
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path

import mlflow
from mlflow.exceptions import MlflowException
from mlflow.models import Model

from infra import tracking
from infra.redaction import redact
from infra.settings import client_address
from trip_model.folders import folder_hash

PACKAGE = "version-{}-{}"  # folder of a download: number and time of the version


class RegistryTrouble(Exception):
    """The registry cannot be asked, or does not know the model or its alias; one sentence says which."""


@dataclass(frozen=True)
class Aliased:
    """A version by its number and the time when the registry made it: a deleted model's numbers come again."""

    number: str
    created: int


class AliasedModel:
    """The registered model `name` as its `alias` names it. What was downloaded lies below `cache`,
    a folder for this model alone, which the processes of a machine share."""

    def __init__(self, name: str, alias: str, tracking_uri: str, cache: Path) -> None:
        self.name, self.alias, self.uri, self.cache = name, alias, tracking_uri, cache
        # Downloads look a logged model up at the module-wide addresses, whatever client asked.
        mlflow.set_tracking_uri(client_address(tracking_uri))
        mlflow.set_registry_uri(client_address(tracking_uri))
        self._client = tracking.connect(tracking_uri)
        self._refused: dict[Aliased, str] = {}

    def current(self) -> Aliased:
        """The version that the alias names now. Raises `RegistryTrouble`."""
        try:
            version = self._client.get_model_version_by_alias(self.name, self.alias)
            return Aliased(str(version.version), int(version.creation_timestamp))
        except tracking.TROUBLE as error:
            if isinstance(error, MlflowException) and error.error_code in (
                "RESOURCE_DOES_NOT_EXIST",
                "INVALID_PARAMETER_VALUE",
            ):
                raise RegistryTrouble(
                    f"the registry at {redact(self.uri)} has no version {self.name}@{self.alias}; register a model,"
                    " or serve an alias that is set"
                ) from error
            raise RegistryTrouble(self._unreachable(error)) from error

    def fetch(self, aliased: Aliased) -> Path:
        """The folder of a version's weights and descriptions, downloaded once.

        What was downloaded gets its name in the cache only if it has the hash that the registry knows; a download that
        has not is removed, and the version is not asked for again by this process. Raises `RegistryTrouble`.
        """
        version, package = aliased.number, self._package(aliased)
        if not package.is_dir():
            if aliased in self._refused:
                raise RegistryTrouble(self._refused[aliased])
            expected = self._model_hash(version)
            self.cache.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=self.cache) as scratch:
                whole = Path(scratch) / "package"
                whole.mkdir()
                try:
                    mlflow.artifacts.download_artifacts(f"models:/{self.name}/{version}", dst_path=str(whole))
                except tracking.TROUBLE as error:
                    raise RegistryTrouble(self._unreachable(error)) from error
                found = folder_hash(self._model_folder(whole, version))
                if found != expected:
                    self._refused[aliased] = (
                        f"the model of version {version} of {self.name} has the hash {found[:12]}, registered was"
                        f" {expected[:12]}; restore its files or register it anew, then restart the service"
                    )
                    raise RegistryTrouble(self._refused[aliased])
                try:
                    whole.rename(package)
                except OSError:
                    if not package.is_dir():  # another process was first
                        raise
        os.utime(package)
        return self._model_folder(package, version)

    def last_fetched(self) -> Aliased | None:
        """The version that was in use last, for a process that starts while the registry is down."""
        packages = sorted(self.cache.glob(PACKAGE.format("*", "*")), key=lambda folder: folder.stat().st_mtime)
        if not packages:
            return None
        _, number, created = packages[-1].name.split("-")
        return Aliased(number, int(created))

    def forget_all_but(self, *versions: Aliased) -> None:
        """Removes what was downloaded of other versions."""
        kept = [self._package(version) for version in versions]
        for folder in self.cache.glob(PACKAGE.format("*", "*")):
            if folder not in kept:
                shutil.rmtree(folder, ignore_errors=True)

    def _model_hash(self, version: str) -> str:
        try:
            tags = self._client.get_model_version(self.name, version).tags
        except tracking.TROUBLE as error:
            raise RegistryTrouble(self._unreachable(error)) from error
        if tracking.MODEL_HASH not in tags:
            raise RegistryTrouble(
                f"version {version} of {self.name} has no tag {tracking.MODEL_HASH} to check its weights against;"
                " register it anew"
            )
        return tags[tracking.MODEL_HASH]

    def _model_folder(self, package: Path, version: str) -> Path:
        artifact = Model.load(str(package)).flavors["python_function"]["artifacts"]["model"]
        folder = (package / artifact["path"]).resolve()
        if not folder.is_relative_to(package.resolve()):
            raise RegistryTrouble(f"version {version} of {self.name} names files outside its package; register it anew")
        return folder

    def _package(self, version: Aliased) -> Path:
        return self.cache / PACKAGE.format(version.number, version.created)

    def _unreachable(self, error: Exception) -> str:
        reason = redact(str(error)).splitlines()[0][:160] if str(error) else type(error).__name__
        return f"the registry at {redact(self.uri)} does not answer ({reason}); start it, it is asked again"
