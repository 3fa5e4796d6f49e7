"""The command `deploy`: creates the work pool and the deployments of prefect.yaml on a Prefect server."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
from typing import Any

from flows.console import log
from infra.settings import CHECKOUT
from tasks.records import UserError

TEMPLATE = CHECKOUT / "infra" / "work_pool_process.json"


def deploy(pool: str = "trip-local") -> None:
    """Create or update the work pool and the deployments of prefect.yaml on the server of PREFECT_API_URL.

    A schedule that was paused by hand stays paused.

    Args:
        pool: the name of the work pool, as prefect.yaml names it.
    """
    if "PREFECT_API_URL" not in os.environ:
        raise UserError("PREFECT_API_URL is not set; set it to the address of the Prefect server, which ends in /api")
    asyncio.run(_deploy(pool))


async def _deploy(pool: str) -> None:
    from prefect.client.orchestration import get_client
    from prefect.client.schemas.actions import WorkPoolCreate, WorkPoolUpdate
    from prefect.exceptions import ObjectNotFound

    template: dict[str, Any] = json.loads(TEMPLATE.read_text())
    async with get_client() as client:
        try:
            await client.read_work_pool(pool)
            await client.update_work_pool(pool, WorkPoolUpdate(base_job_template=template))
        except ObjectNotFound:
            await client.create_work_pool(WorkPoolCreate(name=pool, type="process", base_job_template=template))
        paused = [
            (deployment.id, schedule.slug)
            for deployment in await client.read_deployments()
            for schedule in deployment.schedules
            if not schedule.active
        ]
        run = subprocess.run(
            [sys.executable, "-m", "prefect", "--no-prompt", "deploy", "--all"],
            env=os.environ | {"TRIP_CHECKOUT": str(CHECKOUT)},
            cwd=CHECKOUT,
            capture_output=True,
            text=True,
        )
        if run.returncode:
            raise UserError(f"prefect deploy failed: {(run.stdout + run.stderr).strip()[-1500:]}")
        deployments = await client.read_deployments()
        for deployment in deployments:
            for schedule in deployment.schedules:
                if (deployment.id, schedule.slug) in paused:
                    await client.update_deployment_schedule(deployment.id, schedule.id, active=False)
    log(f"deploy      {len(deployments)} deployments in work pool {pool}")
