"""Flow: the model service animates one photo with the champion."""

from __future__ import annotations

import io
import os
import time
from typing import Annotated

from prefect import flow

from flows.console import log
from flows.parameters import POSITIVE
from infra.output import outlive_reader
from infra.redaction import redact
from infra.settings import SERVICE_ADDRESS, SERVICE_KEY
from tasks.records import UserError

ANSWER_SECONDS = 10  # of a service that is alive, to say whether it is ready
STEPS = 2  # enough to run every part of the model


@flow(name="smoke-test", on_running=[outlive_reader])
def smoke_test(
    service: str | None = None, version: str | None = None, seconds: Annotated[int, POSITIVE] = 600
) -> dict[str, str]:
    """Wait until the service has the version of a promotion, then animate a photo.

    Args:
        service: address of the model service; by default TRIP_SERVICE. A key is read from TRIP_API_KEY.
        version: number of the version that the service must have; by default any.
        seconds: limit of the whole test.

    Raises:
        UserError: the service does not respond, has another version, or does not return a video.
    """
    import httpx
    from PIL import Image

    service = (service or os.environ.get(SERVICE_ADDRESS, "")).rstrip("/")
    if not service:
        raise UserError(f"no address of a model service; give service, or set {SERVICE_ADDRESS} for the worker")
    key = os.environ.get(SERVICE_KEY)
    deadline, found = time.monotonic() + seconds, "no response"
    headers = {"X-API-Key": key} if key else {}
    # Without the proxy of the environment, which does not reach a service of the same machine or cluster.
    with httpx.Client(base_url=service, headers=headers, timeout=seconds, trust_env=False) as client:
        while True:
            try:
                answer = client.get("/readyz", timeout=ANSWER_SECONDS)
                state = answer.json()
                found = f"version {state['version']}" if state.get("version") else str(state.get("trouble", answer))
                if answer.status_code == 200 and version in (None, str(state["version"])):
                    break
            except (httpx.HTTPError, ValueError) as error:
                found = f"{type(error).__name__}: {redact(str(error))}"
            if time.monotonic() > deadline:
                wanted = f"version {version}" if version else "a version"
                raise UserError(
                    f"the service at {redact(service)} has {found} after {seconds} s, expected {wanted}; read its log,"
                    " and start it if it does not run"
                )
            time.sleep(2)
        photo = io.BytesIO()
        Image.new("RGB", (64, 64), (90, 120, 160)).save(photo, "PNG")
        files = {"image": ("photo.png", photo.getvalue(), "image/png")}
        began = time.monotonic()
        clip = client.post("/v1/animate", files=files, data={"prompt": "a test", "steps": str(STEPS), "seed": "0"})
    if clip.status_code != 200 or not clip.content:
        raise UserError(
            f"the service at {redact(service)} with {found} answered an animation with status {clip.status_code}"
            f" ({redact(clip.text[:200])}); roll back with the command rollback, or read its log"
        )
    log(f"smoke-test  {found} animated a photo in {time.monotonic() - began:.1f} s")
    return {"version": found.removeprefix("version "), "bytes": str(len(clip.content))}
