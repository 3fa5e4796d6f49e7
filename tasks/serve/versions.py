"""Which version an alias of the registry names at the moment, and that version's model folder on this machine."""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path

import mlflow
from mlflow.exceptions import MlflowException
from mlflow.models import Model

from infra import tracking
from infra.redaction import redact
from infra.settings import client_address
from trip_model.encoders import folder_hash


class RegistryTrouble(Exception):
    """The registry cannot be asked, or does not know the model or its alias; one sentence says which."""


class AliasedModel:
    """The registered model `name` as its `alias` names it. What was downloaded lies below `cache`,
    a folder for this model alone, which the processes of a machine share."""

    def __init__(self, name: str, alias: str, tracking_uri: str, cache: Path) -> None:
        self.name, self.alias, self.uri, self.cache = name, alias, tracking_uri, cache
        # Downloads look a logged model up at the module-wide addresses, whatever client asked.
        mlflow.set_tracking_uri(client_address(tracking_uri))
        mlflow.set_registry_uri(client_address(tracking_uri))
        self._client = tracking.connect(tracking_uri)
        self._refused: dict[str, str] = {}

    def current(self) -> str:
        """The version that the alias names now. Raises `RegistryTrouble`."""
        try:
            return str(self._client.get_model_version_by_alias(self.name, self.alias).version)
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

    def fetch(self, version: str) -> Path:
        """The folder of a version's weights and descriptions, downloaded once.

        What was downloaded gets its name in the cache only if it has the hash that the registry knows; a download that
        has not is removed, and the version is not asked for again by this process. Raises `RegistryTrouble`.
        """
        package = self._package(version)
        if not package.is_dir():
            if version in self._refused:
                raise RegistryTrouble(self._refused[version])
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
                    self._refused[version] = (
                        f"the model of version {version} of {self.name} has the hash {found[:12]}, registered was"
                        f" {expected[:12]}; restore its files or register it anew, then restart the service"
                    )
                    raise RegistryTrouble(self._refused[version])
                try:
                    whole.rename(package)
                except OSError:
                    if not package.is_dir():  # another process was first
                        raise
        os.utime(package)
        return self._model_folder(package, version)

    def last_fetched(self) -> str | None:
        """The version that was in use last, for a process that starts while the registry is down."""
        packages = sorted(self.cache.glob(self._package("*").name), key=lambda folder: folder.stat().st_mtime)
        return packages[-1].name.removeprefix(self._package("").name) if packages else None

    def forget_all_but(self, *versions: str) -> None:
        """Removes what was downloaded of other versions."""
        kept = [self._package(version) for version in versions]
        for folder in self.cache.glob(self._package("*").name):
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

    def _package(self, version: str) -> Path:
        return self.cache / f"version-{version}"

    def _unreachable(self, error: Exception) -> str:
        reason = redact(str(error)).splitlines()[0][:160] if str(error) else type(error).__name__
        return f"the registry at {redact(self.uri)} does not answer ({reason}); start it, it is asked again"
