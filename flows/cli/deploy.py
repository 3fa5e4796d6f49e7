"""The command `deploy`: creates the work pool and the deployments of prefect.yaml from the files of one commit."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Iterator
from pathlib import Path
from uuid import UUID

from flows.console import log, results
from infra import storage
from infra.redaction import redact
from infra.settings import CHECKOUT, COMMIT_FILE, code_version
from tasks.records import UserError

POOL = "trip-local"
WEBHOOK_VARIABLE = "TRIP_WEBHOOK"
KEPT = "deployed"  # folder below `roots` with the files of each deployed commit


def deploy(roots: str = "runs", name: list[str] | None = None, in_place: bool = False) -> None:
    """Create or update the deployments of prefect.yaml on the server at PREFECT_API_URL.

    A schedule that was paused stays paused. Runs execute the files of the present commit, which are copied once, and
    not what the checkout contains later. Automations evaluate a finished training, test the service after a promotion,
    and send failures to the webhook whose address is in TRIP_WEBHOOK.

    Args:
        roots: folder or address that the roots of the deployments lie below.
        name: only the deployment of this name; repeat the flag for several.
        in_place: run from this checkout, with uncommitted changes and whatever it contains at the time of a run.
    """
    if "PREFECT_API_URL" not in os.environ:
        raise UserError("PREFECT_API_URL is not set; give the address of a server, such as http://127.0.0.1:4200/api")
    roots = storage.absolute(roots)
    version = code_version()
    checkout = CHECKOUT if in_place else _pinned(version, Path(storage.local_path(roots) or CHECKOUT / "runs") / KEPT)
    with _server_errors():
        _create_pool(checkout)
    environment = os.environ | {
        "TRIP_CHECKOUT": str(checkout),
        "TRIP_COMMIT": version,
        "TRIP_ROOTS": roots,
        "PYTHONPATH": str(checkout),
    }
    which = [word for given in name or [] for word in ("--name", given)] or ["--all"]
    command = [sys.executable, "-m", "prefect", "--no-prompt", "deploy", *which]
    done = subprocess.run(command, cwd=checkout, env=environment, capture_output=True, text=True)
    if done.returncode != 0:
        raise UserError(f"prefect deploy failed: {' '.join((done.stdout + done.stderr).split())[-1500:]}")
    from flows.cli.automations import create_automations

    with _server_errors():
        ids, addresses = _close_parameters(name)
        automations = create_automations(ids, os.environ.get(WEBHOOK_VARIABLE))
    addresses |= {"automations": ", ".join(automations) or "none"}
    results("Deployed", {"commit": version, "files": str(checkout), "roots": roots} | addresses)


@contextlib.contextmanager
def _server_errors() -> Iterator[None]:
    """Converts errors of Prefect's server into a `UserError`."""
    import httpx
    from prefect.exceptions import PrefectHTTPStatusError

    try:
        yield
    except httpx.HTTPError as error:
        address = redact(os.environ["PREFECT_API_URL"])
        if isinstance(error, PrefectHTTPStatusError) and error.response.status_code in (401, 403):
            raise UserError(f"the Prefect server at {address} asks for a login; set PREFECT_API_AUTH_STRING") from error
        reason = redact(" ".join(str(error).split()))[:300] or type(error).__name__
        raise UserError(
            f"the Prefect server at {address} does not answer ({reason}); start it, or correct PREFECT_API_URL"
        ) from error


def _pinned(version: str, folder: Path) -> Path:
    """A folder with the files of the present commit, copied from git once; this checkout if it is such a folder."""
    if (CHECKOUT / COMMIT_FILE).is_file():
        return CHECKOUT
    if version == "unknown":
        raise UserError(f"{CHECKOUT} is not under git, so no commit can be deployed; give --in-place")
    if version.endswith("-dirty"):
        raise UserError(
            f"{CHECKOUT} has uncommitted changes ({version}); commit them, or run from the checkout with --in-place"
        )
    target = folder / version
    if target.is_dir():
        return target
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        files = Path(scratch) / "files"
        archive = subprocess.Popen(["git", "-C", str(CHECKOUT), "archive", "HEAD"], stdout=subprocess.PIPE)
        assert archive.stdout is not None
        with tarfile.open(fileobj=archive.stdout, mode="r|") as tar:
            tar.extractall(files, filter="data")
        if archive.wait() != 0:
            raise UserError(f"git archive failed in {CHECKOUT}; see its message above")
        (files / COMMIT_FILE).write_text(version + "\n")
        try:
            files.rename(target)
        except OSError:
            if not target.is_dir():  # another process was faster
                raise
            shutil.rmtree(files)
    log(f"deploy      files of commit {version} in {target}")
    return target


def _create_pool(checkout: Path) -> None:
    """Creates the work pool with our template, or gives an existing one of the same type the template."""
    from prefect.client.orchestration import get_client
    from prefect.client.schemas.actions import WorkPoolCreate, WorkPoolUpdate
    from prefect.exceptions import ObjectNotFound

    template = json.loads((checkout / "infra" / "work_pool_process.json").read_text())
    with get_client(sync_client=True) as client:
        try:
            client.read_work_pool(POOL)
            client.update_work_pool(POOL, WorkPoolUpdate(base_job_template=template))
        except ObjectNotFound:
            client.create_work_pool(WorkPoolCreate(name=POOL, type="process", base_job_template=template))


def _close_parameters(names: list[str] | None) -> tuple[dict[str, UUID], dict[str, str]]:
    """Makes the server reject misspelt parameters; returns ids and addresses of the deployments by name."""
    from prefect.client.orchestration import get_client
    from prefect.client.schemas.actions import DeploymentUpdate

    from flows.parameters import form_schema

    ids: dict[str, UUID] = {}
    addresses: dict[str, str] = {}
    with get_client(sync_client=True) as client:
        ours = [d for d in client.read_deployments() if d.work_pool_name == POOL]
        for deployment in ours:
            if names and deployment.name not in names:
                continue
            schema = form_schema(deployment.parameter_openapi_schema)
            client.update_deployment(deployment.id, DeploymentUpdate(parameter_openapi_schema=schema))
            ids[deployment.name] = deployment.id
            addresses[deployment.name] = str(client.api_url).removesuffix("/api/").removesuffix("/api") + (
                f"/deployments/deployment/{deployment.id}"
            )
    return ids, addresses
