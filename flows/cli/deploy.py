"""The command `deploy`: creates the work pool and the deployments of prefect.yaml from the files of one commit."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

from flows.console import log, results
from infra import storage
from infra.settings import CHECKOUT, COMMIT_FILE, code_version
from tasks.records import UserError

POOL = "trip-local"
KEPT = "deployed"  # folder below `roots` with the files of each deployed commit


def deploy(roots: str = "runs", name: list[str] | None = None, in_place: bool = False) -> None:
    """Create or update the deployments of prefect.yaml on the server at PREFECT_API_URL.

    A schedule that was paused stays paused. Runs execute the files of the present commit, which are copied once, and
    not what the checkout contains later.

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
    results("Deployed", {"commit": version, "files": str(checkout), "roots": roots} | _close_parameters(name))


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


def _close_parameters(names: list[str] | None) -> dict[str, str]:
    """Makes the server reject misspelt parameters; returns the addresses of the deployments by name."""
    from prefect.client.orchestration import get_client
    from prefect.client.schemas.actions import DeploymentUpdate

    from flows.parameters import form_schema

    addresses = {}
    with get_client(sync_client=True) as client:
        ours = [d for d in client.read_deployments() if d.work_pool_name == POOL]
        for deployment in ours:
            if names and deployment.name not in names:
                continue
            schema = form_schema(deployment.parameter_openapi_schema)
            client.update_deployment(deployment.id, DeploymentUpdate(parameter_openapi_schema=schema))
            addresses[deployment.name] = str(client.api_url).removesuffix("/api/").removesuffix("/api") + (
                f"/deployments/deployment/{deployment.id}"
            )
    return addresses
