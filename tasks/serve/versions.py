"""Looks up the version of a registry alias and downloads its model folder."""

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

PACKAGE = "version-{}-{}"  # folder of a download: number and creation time of the version


class RegistryTrouble(Exception):
    """The registry does not answer, or does not have the model or its alias; the message says which."""


@dataclass(frozen=True)
class VersionId:
    """Number and creation time of a version. A model that is deleted and registered again reuses its numbers."""

    number: str
    created: int


class AliasedModel:
    """The version of a registered model that an alias names, downloaded to `cache`.

    The processes of a machine share `cache`, a folder for this model only.
    """

    def __init__(self, name: str, alias: str, tracking_uri: str, cache: Path) -> None:
        self.name, self.alias, self.uri, self.cache = name, alias, tracking_uri, cache
        # Downloads look up a logged model at MLflow's module-wide addresses, not at those of a client.
        mlflow.set_tracking_uri(client_address(tracking_uri))
        mlflow.set_registry_uri(client_address(tracking_uri))
        self._client = tracking.connect(tracking_uri)
        self._refused: dict[VersionId, str] = {}

    def current(self) -> VersionId:
        """Returns the version that the alias names now. Raises `RegistryTrouble`."""
        try:
            version = self._client.get_model_version_by_alias(self.name, self.alias)
            return VersionId(str(version.version), int(version.creation_timestamp))
        except tracking.TROUBLE as error:
            if isinstance(error, MlflowException) and error.error_code in (
                "RESOURCE_DOES_NOT_EXIST",
                "INVALID_PARAMETER_VALUE",
            ):
                raise RegistryTrouble(
                    f"the registry at {redact(self.uri)} has no version {self.name}@{self.alias}; register a model,"
                    " or serve another alias"
                ) from error
            raise RegistryTrouble(self._unreachable(error)) from error

    def fetch(self, id: VersionId) -> Path:
        """Returns the folder of a version's weights and configuration, downloaded once.

        A download enters the cache only with the hash that the registry has; another one is removed, and this process
        does not download that version again. Raises `RegistryTrouble`.
        """
        version, package = id.number, self._package(id)
        if not package.is_dir():
            if id in self._refused:
                raise RegistryTrouble(self._refused[id])
            expected = self._model_hash(version)
            self.cache.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=self.cache) as scratch:
                download = Path(scratch) / "package"
                download.mkdir()
                try:
                    mlflow.artifacts.download_artifacts(f"models:/{self.name}/{version}", dst_path=str(download))
                except tracking.TROUBLE as error:
                    raise RegistryTrouble(self._unreachable(error)) from error
                actual = folder_hash(self._model_folder(download, version))
                if actual != expected:
                    self._refused[id] = (
                        f"the model of version {version} of {self.name} has the hash {actual[:12]}, expected"
                        f" {expected[:12]}; restore its files or register it again, then restart the service"
                    )
                    raise RegistryTrouble(self._refused[id])
                try:
                    download.rename(package)
                except OSError:
                    if not package.is_dir():  # otherwise another process was faster
                        raise
        os.utime(package)
        return self._model_folder(package, version)

    def last_fetched(self) -> VersionId | None:
        """Returns the version that was used last, for a process that starts while the registry is down."""
        packages = sorted(self.cache.glob(PACKAGE.format("*", "*")), key=lambda folder: folder.stat().st_mtime)
        if not packages:
            return None
        _, number, created = packages[-1].name.split("-")
        return VersionId(number, int(created))

    def remove_all_except(self, *versions: VersionId) -> None:
        """Removes the downloads of other versions."""
        kept = [self._package(version) for version in versions]
        for folder in self.cache.glob(PACKAGE.format("*", "*")):
            if folder not in kept:
                shutil.rmtree(folder, ignore_errors=True)

    def _tags(self, version: str) -> dict[str, str]:
        try:
            return self._client.get_model_version(self.name, version).tags
        except tracking.TROUBLE as error:
            raise RegistryTrouble(self._unreachable(error)) from error

    def _model_hash(self, version: str) -> str:
        tags = self._tags(version)
        if tracking.MODEL_HASH not in tags:
            raise RegistryTrouble(
                f"version {version} of {self.name} has no tag {tracking.MODEL_HASH} to check its weights against;"
                " register it again"
            )
        return tags[tracking.MODEL_HASH]

    def _model_folder(self, package: Path, version: str) -> Path:
        artifact = Model.load(str(package)).flavors["python_function"]["artifacts"]["model"]
        folder = (package / artifact["path"]).resolve()
        if not folder.is_relative_to(package.resolve()):
            raise RegistryTrouble(f"version {version} of {self.name} has files outside its package; register it again")
        return folder

    def _package(self, version: VersionId) -> Path:
        return self.cache / PACKAGE.format(version.number, version.created)

    def _unreachable(self, error: Exception) -> str:
        reason = redact(str(error)).splitlines()[0][:160] if str(error) else type(error).__name__
        return f"the registry at {redact(self.uri)} does not answer ({reason}); start it, the service tries again"
