"""The folder of a model that training exported."""

from __future__ import annotations

from pathlib import Path

from infra import storage
from tasks.records import UserError
from trip_model.folders import RECORD


def local_model(uri: str) -> Path:
    """The local folder of a model export, or of a copy of it. Raises UserError where there is none."""
    try:
        folder = storage.local_folder(uri)
    except FileNotFoundError as error:
        raise UserError(f"no model folder at {uri!r}; give the folder that training exported") from error
    for part in (RECORD, "model_index.json"):
        if not (folder / part).is_file():
            raise UserError(
                f"the model folder {uri!r} has no {part}; give the folder that training exported, not a base or"
                " checkpoint"
            )
    return folder
