"""The default address of the MLflow store; imports no framework, for a quick start."""

from __future__ import annotations

import os

from infra import storage
from infra.redaction import redact
from infra.settings import move_credentials
from tasks.records import UserError


def tracking_address(tracking_uri: str | None, root: str) -> str:
    """Returns `tracking_uri` if given, else MLFLOW_TRACKING_URI, else a SQLite file below a local root.

    The address never contains credentials. Those of MLFLOW_TRACKING_URI stay in the environment of the process, where
    `infra.tracking.connect` finds them. Raises UserError for an address with credentials, which Prefect stores
    with the parameters of the run, and for a remote root.
    """
    if tracking_uri is not None:
        if redact(tracking_uri) != tracking_uri:
            raise UserError(
                f"tracking_uri {tracking_uri} contains a password, which would be readable among the run's parameters;"
                " give the address without it, and set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD, or"
                " MLFLOW_TRACKING_URI, in the environment of the worker"
            )
        return tracking_uri
    from_environment = os.environ.get("MLFLOW_TRACKING_URI")
    if from_environment:
        return move_credentials(from_environment)
    folder = storage.absolute(root)
    if storage.local_path(folder) is None:
        raise UserError(f"MLflow cannot keep its database at {root}; name a server: --tracking-uri http://HOST:5000")
    return f"sqlite:///{folder}/mlflow.db"


def existing_store(tracking_uri: str | None, root: str) -> str:
    """The same for a command that reads: raises UserError also if the SQLite file does not exist."""
    uri = tracking_address(tracking_uri, root)
    file = uri.removeprefix("sqlite:///")
    if file != uri and not os.path.isfile(file):
        raise UserError(f"no MLflow store at {file}; run the command register-trip first, or give --tracking-uri")
    return uri
