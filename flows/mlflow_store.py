"""Where MLflow keeps runs and models where a command names no place; imports no framework, for a quick start."""

from __future__ import annotations

import os

from infra import storage
from tasks.records import UserError


def tracking_address(tracking_uri: str | None, root: str) -> str:
    """The MLflow store that is named, else a SQLite file below a local root. Raises UserError where root is remote."""
    if tracking_uri is not None:
        return tracking_uri
    folder = storage.absolute(root)
    if storage.local_path(folder) is None:
        raise UserError(f"MLflow cannot keep its database at {root}; name a server: --tracking-uri http://HOST:5000")
    return f"sqlite:///{folder}/mlflow.db"


def existing_store(tracking_uri: str | None, root: str) -> str:
    """The same for a command that reads: raises UserError also where the SQLite file is not there yet."""
    uri = tracking_address(tracking_uri, root)
    file = uri.removeprefix("sqlite:///")
    if file != uri and not os.path.isfile(file):
        raise UserError(f"no MLflow store at {file}; run the command register-trip first, or give --tracking-uri")
    return uri
