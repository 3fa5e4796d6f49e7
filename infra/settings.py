"""Environment defaults of every process: telemetry off, quiet frameworks, long start-up limits."""

from __future__ import annotations

import functools
import os
import subprocess
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import unquote, urlsplit

from infra.redaction import redact, without_userinfo

# The checkout: flows, tasks and infra run from it, and Ray's workers import them from it.
CHECKOUT = Path(__file__).resolve().parent.parent
COMMIT_FILE = ".commit"  # in a checkout without git: a deployed one, an image
# The default of --root.
DEFAULT_ROOT = "runs/demo"
MODEL_NAME = "trip"  # of the registered model, where none is given
# Variables of a caller of the model service: its address, and the key that the service also reads.
SERVICE_ADDRESS, SERVICE_KEY = "TRIP_SERVICE", "TRIP_API_KEY"

TELEMETRY_OFF = {
    "DO_NOT_TRACK": "1",
    "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "RAY_USAGE_STATS_ENABLED": "0",
    "HF_HUB_DISABLE_TELEMETRY": "1",
}

RAY = {
    # Ray 2.59 and later start local clusters with a token that other processes may not have; a cluster sets `token`.
    "RAY_AUTH_MODE": "disabled",
    # Ray's progress helper replaces print on the driver once workers log, and log_prints of Prefect goes silent.
    "RAY_TQDM_PATCH_PRINT": "0",
    # The controller polls its workers at this interval; the default of 2 s costs a short training several seconds.
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.25",
    "RAY_TRAIN_ENABLE_CONTROLLER_STRUCTURED_LOGGING": "0",
    "RAY_TRAIN_ENABLE_WORKER_STRUCTURED_LOGGING": "0",
    # In a task without GPUs torch must see the accelerators as outside Ray; Ray warns unless this is set.
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
    "GIT_PYTHON_REFRESH": "quiet",  # mlflow asks git for the commit, with long warnings if git is missing
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",  # five, the default, can block a call for minutes; our outbox retries
}


# Variables of MLflow's client: its server and its credentials.
MLFLOW_ACCESS = ("MLFLOW_TRACKING_URI", "MLFLOW_TRACKING_USERNAME", "MLFLOW_TRACKING_PASSWORD", "MLFLOW_TRACKING_TOKEN")


def apply_environment_defaults(home: str | None = None) -> None:
    """Sets the variables that are not set. Call it before importing ray, prefect or mlflow, which read them at import.

    Args:
        home: folder of Prefect's state (profiles, SQLite); None: Prefect writes to the user's home.
    """
    defaults = TELEMETRY_OFF | RAY | PREFECT | QUIET
    if home is not None:
        defaults["PREFECT_HOME"] = home
    for name, value in defaults.items():
        os.environ.setdefault(name, value)


def mlflow_access() -> dict[str, str]:
    """The variables of MLFLOW_ACCESS that are set in this process."""
    return {name: os.environ[name] for name in MLFLOW_ACCESS if name in os.environ}


@dataclass(frozen=True)
class MlflowAccess:
    """This process's access to MLflow, for a Ray worker on a machine with another environment.

    It travels in the arguments of an actor: Ray writes the variables of a `runtime_env` to its log.
    """

    variables: dict[str, str] = field(default_factory=mlflow_access, repr=False)

    def apply(self) -> None:
        """Sets the variables in this process."""
        os.environ.update(self.variables)


def move_credentials(uri: str) -> str:
    """Moves the credentials of an address into this process's environment; returns the address without them.

    A user and password for HTTP go to MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD, where MLflow's client
    reads them. Any other address with a secret (a database's password, a token) goes to
    MLFLOW_TRACKING_URI, where `client_address` reads it. Child processes and Ray workers inherit both.
    """
    if redact(uri) == uri:
        return uri
    try:
        parts = urlsplit(uri)
    except ValueError:  # not an address: MLflow's client rejects it
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
    """The address for MLflow's client: `uri`, or MLFLOW_TRACKING_URI if that is `uri` with its secret."""
    full = os.environ.get("MLFLOW_TRACKING_URI", "")
    return full if full and redact(full) == uri else uri


@functools.cache
def code_version() -> str:
    """The commit of the checkout: of its `COMMIT_FILE`, or from git, with a mark if files differ; else `unknown`."""
    file = CHECKOUT / COMMIT_FILE
    if file.is_file():
        return file.read_text().strip() or "unknown"
    command = ["git", "-C", str(CHECKOUT), "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return "unknown"
