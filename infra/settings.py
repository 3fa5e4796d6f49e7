"""The environment that every process of ours starts from: telemetry off, quiet frameworks, generous start-up times."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import unquote, urlsplit

from infra.redaction import redact, without_userinfo

# The checkout: flows, tasks and infra run from it, and Ray's workers import them from it.
CHECKOUT = Path(__file__).resolve().parent.parent
# Where a command writes if it is given no --root.
DEFAULT_ROOT = "runs/demo"

TELEMETRY_OFF = {
    "DO_NOT_TRACK": "1",
    "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "RAY_USAGE_STATS_ENABLED": "0",
    "HF_HUB_DISABLE_TELEMETRY": "1",
}

RAY = {
    # Ray 2.59 and later start local clusters with a token that a second process may not have; a cluster sets `token`.
    "RAY_AUTH_MODE": "disabled",
    # Ray's progress helper replaces print on the driver once workers log, and log_prints of Prefect goes silent.
    "RAY_TQDM_PATCH_PRINT": "0",
    # The controller polls its workers at this interval; the default of 2 s costs a short training whole seconds.
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.25",
    # After a lost machine an elastic training is first placed as if it were there, and sized anew after this time.
    "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "30",
    "RAY_TRAIN_ENABLE_CONTROLLER_STRUCTURED_LOGGING": "0",
    "RAY_TRAIN_ENABLE_WORKER_STRUCTURED_LOGGING": "0",
    # Torch must see the accelerators of a zero-GPU task as it would outside Ray, and Ray warns unless this is said.
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "RAY_DEDUP_LOGS": "1",
    "RAY_COLOR_PREFIX": "0",
}

PREFECT = {
    # A server on a fresh home migrates its database first: up to 14 s on an idle two-core machine, the default is 20.
    "PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS": "120",
    "PREFECT_SERVER_REGISTER_BLOCKS_ON_START": "false",
    "PREFECT_SERVER_UI_SHOW_PROMOTIONAL_CONTENT": "false",
    "PREFECT_CLI_PROMPT": "false",
}

QUIET = {
    "TOKENIZERS_PARALLELISM": "false",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",  # a bar per loaded model and worker
    "GIT_PYTHON_REFRESH": "quiet",  # mlflow asks git for the commit and warns at length where git is missing
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",  # its own five hold one call for minutes; what matters is tried again by us
}


# Where MLflow's client finds its server and its credentials.
MLFLOW_ACCESS = ("MLFLOW_TRACKING_URI", "MLFLOW_TRACKING_USERNAME", "MLFLOW_TRACKING_PASSWORD", "MLFLOW_TRACKING_TOKEN")


def apply_environment_defaults(home: str | None = None) -> None:
    """Sets what is not set already; call it before ray, prefect or mlflow are imported, they read it at import.

    `home` is the folder of Prefect's own state (profiles, SQLite); without it Prefect writes to the user's home.
    """
    defaults = TELEMETRY_OFF | RAY | PREFECT | QUIET
    if home is not None:
        defaults["PREFECT_HOME"] = home
    for name, value in defaults.items():
        os.environ.setdefault(name, value)


def mlflow_access() -> dict[str, str]:
    """What MLFLOW_ACCESS names, as it is set in this process."""
    return {name: os.environ[name] for name in MLFLOW_ACCESS if name in os.environ}


@dataclass(frozen=True)
class MlflowAccess:
    """This process's access to MLflow, for a Ray worker on a machine that has another environment.

    It travels in the arguments of an actor: Ray writes the variables of a `runtime_env` to its log.
    """

    variables: dict[str, str] = field(default_factory=mlflow_access, repr=False)

    def apply(self) -> None:
        """Sets the variables in this process."""
        os.environ.update(self.variables)


def move_credentials(uri: str) -> str:
    """Moves the credentials of an address into this process's environment; returns the address without them.

    A user and password for HTTP go to MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD, where MLflow's client
    reads them. Of any other address with a secret (a database's password, a token) all of it goes to
    MLFLOW_TRACKING_URI, where `client_address` finds it again. Child processes and Ray workers inherit both.
    """
    if redact(uri) == uri:
        return uri
    try:
        parts = urlsplit(uri)
    except ValueError:  # not an address: MLflow's client says so
        parts = urlsplit("")
    if parts.scheme in ("http", "https") and parts.username and parts.password:
        os.environ["MLFLOW_TRACKING_USERNAME"] = unquote(parts.username)
        os.environ["MLFLOW_TRACKING_PASSWORD"] = unquote(parts.password)
        plain = without_userinfo(uri)
        if redact(plain) == plain:
            if os.environ.get("MLFLOW_TRACKING_URI") == uri:
                os.environ["MLFLOW_TRACKING_URI"] = plain
            return plain
    os.environ["MLFLOW_TRACKING_URI"] = uri
    return redact(uri)


def client_address(uri: str) -> str:
    """The address to give to MLflow's client: `uri`, or MLFLOW_TRACKING_URI where that is `uri` with its secret."""
    named = os.environ.get("MLFLOW_TRACKING_URI", "")
    return named if named and redact(named) == uri else uri
