"""The undelivered tracking records of a training: on this machine, and in a remote output for all other machines."""

from __future__ import annotations

import logging

from infra import storage
from tasks.train.spec import SPOOL, TrainSpec, spool_file

_log = logging.getLogger(__name__)


class Spool:
    """The file of `spool_file`, with a copy in a remote output, which outlasts the machine of rank 0.

    Args:
        spec: the training.
    """

    def __init__(self, spec: TrainSpec) -> None:
        self.file = spool_file(spec)
        self._copy = None if storage.local_path(spec.output) is not None else storage.join(spec.output, SPOOL)
        self._copied = False

    def exists(self) -> bool:
        """Whether there are undelivered records."""
        return self.file.exists() or (self._copy is not None and storage.exists(self._copy))

    def fetch(self) -> None:
        """Puts the records of the copy before those of this machine; MLflow ignores what it has already."""
        if self._copy is None:
            return
        try:
            lines = storage.read_bytes(self._copy).decode().splitlines()
        except FileNotFoundError:
            return
        own = self.file.read_text(encoding="utf-8").splitlines() if self.file.exists() else []
        self.file.parent.mkdir(parents=True, exist_ok=True)
        self.file.write_text("".join(f"{line}\n" for line in dict.fromkeys([*lines, *own])), encoding="utf-8")
        self._copied = True

    def keep(self) -> None:
        """Updates the copy, or removes it after a delivery. If the store fails, the next call repeats it."""
        if self._copy is None:
            return
        try:
            if self.file.exists():
                storage.upload_file(self.file, self._copy)
                self._copied = True
            elif self._copied:
                storage.delete(self._copy)
                self._copied = False
        except (OSError, storage.StorageError) as error:
            _log.warning("%s was not written: %s", self._copy, error)
