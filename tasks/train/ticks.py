"""The log of a training as JSON lines: every tick with all its numbers, in `ticks.jsonl` of the output."""

from __future__ import annotations

import json
import logging
import math
from pathlib import Path
from typing import Any

from infra import storage
from tasks.records import digest
from tasks.train.spec import TrainSpec

FILE = "ticks.jsonl"
_log = logging.getLogger(__name__)


class TickFile:
    """Appends ticks; a training that resumes replaces the lines of the steps that it repeats.

    A local file is written line by line. For another store the lines are collected in the cache of this machine, and
    uploaded by `upload`.
    """

    def __init__(self, spec: TrainSpec) -> None:
        self._uri = storage.join(spec.output, FILE)
        local = storage.local_path(self._uri)
        cache = Path.home() / ".cache" / "trip-i2v" / "ticks" / f"{digest(spec.output)}.jsonl"
        self._path, self._remote = (local, False) if local is not None else (cache, True)
        self._opened = False

    def tick(self, values: dict[str, Any]) -> None:
        if not self._opened:
            self._open(values["step"])
        finite = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in values.items()}
        with self._path.open("a") as file:
            file.write(json.dumps(finite) + "\n")

    def upload(self) -> None:
        """Copies the lines to a remote output. If the store fails, training continues and the next call repeats it."""
        if not self._remote or not self._opened:
            return
        try:
            storage.upload_file(self._path, self._uri)
        except (OSError, storage.StorageError) as error:
            _log.warning("%s was not written: %s", self._uri, error)

    def _open(self, step: int) -> None:
        """Keeps the lines of earlier steps."""
        self._opened = True
        self._path.parent.mkdir(parents=True, exist_ok=True)
        try:
            lines = storage.read_bytes(self._uri).decode().splitlines()
        except FileNotFoundError:
            lines = []
        kept = []
        for line in lines:
            try:
                if json.loads(line)["step"] < step:
                    kept.append(line + "\n")
            except (ValueError, KeyError, TypeError):
                continue  # a line that a kill cut
        self._path.write_text("".join(kept))
