"""The command `serve`: serves the model of a registry alias over HTTP, with a web UI, until a signal ends it."""

from __future__ import annotations

import os
import tempfile

from flows.console import log, results
from flows.mlflow_store import existing_store
from infra.settings import DEFAULT_ROOT
from tasks.records import UserError
from trip_model.request_limits import BOUNDS, RequestError, check_number

KEY_VARIABLE = "TRIP_API_KEY"
CLOSE_SECONDS = 2  # for connections that are open after the last response


def serve(
    name: str = "trip",
    alias: str = "champion",
    root: str = DEFAULT_ROOT,
    tracking_uri: str | None = None,
    host: str = "127.0.0.1",
    port: int = 8000,
    replicas: int = 1,
    cpus: int | None = None,
    gpus: float = 0,
    max_batch: int = 1,
    max_queue: int = 16,
    max_steps: int = int(BOUNDS["steps"].maximum),
    seconds: float = 120,
    ray_address: str | None = None,
    service: str = "",
    page: bool = True,
) -> None:
    """Serve the model of a registry alias at POST /v1/animate, and follow the alias when it moves.

    With TRIP_API_KEY in the environment, requests must send that key; docs/decisions/serving.md lists the routes that
    stay open. SIGTERM completes accepted requests and ends the service.

    Args:
        name: the model's name in the registry.
        alias: the alias of the version to serve.
        root: the root whose MLflow store is used, unless tracking_uri is given.
        tracking_uri: address of the MLflow registry.
        host: address to listen on; 0.0.0.0 stands for all addresses of this machine.
        port: port to listen on.
        replicas: number of processes with the model.
        cpus: processors and threads of each replica; by default the processors of this machine are divided.
        gpus: GPUs of each replica, also a fraction of one.
        max_batch: requests of equal shape in one batch; with more than 1, a few values of a clip may differ by one
            level of 255 from the clip of the request alone.
        max_queue: requests that wait at each replica; further ones are refused with 429.
        max_steps: the largest number of DDIM steps of a request.
        seconds: time limit of a request.
        ray_address: a Ray cluster for the replicas, instead of this machine.
        service: the name of the service on that cluster, unique there; by default the names of model and alias.
        page: whether the web UI is at /.
    """
    counts = {"--replicas": replicas, "--max-batch": max_batch, "--max-queue": max_queue, "--seconds": seconds}
    for flag, value in counts.items():
        if value < 1:
            raise UserError(f"{flag} {value:g} is less than 1; give 1 or more")
    try:
        check_number("steps", max_steps)
    except RequestError as error:
        raise UserError(f"--max-steps: {error}") from error
    cores = os.cpu_count() or 1
    cpus = max(1, cores // replicas) if cpus is None else cpus
    if ray_address is None and replicas * cpus > cores:
        raise UserError(
            f"{replicas} replicas of {cpus} processors need {replicas * cpus}, but this machine has {cores}; give fewer"
        )

    uri = existing_store(tracking_uri, root)

    import uvicorn

    from tasks.serve.api import create_app
    from tasks.serve.gateway import Gateway, Server
    from tasks.serve.job import serving
    from tasks.serve.messages import EngineSpec
    from tasks.serve.web_ui import mount_web_ui

    key = os.environ.get(KEY_VARIABLE) or None
    with tempfile.TemporaryDirectory(prefix="trip-serve-", ignore_cleanup_errors=True) as cache:
        spec = EngineSpec(name, alias, uri, cache, max_batch, max_queue)
        log(f"serve: starting {replicas} replicas of {name}@{alias} from {uri}")
        with serving(spec, replicas, cpus, gpus, ray_address, service) as backend:
            gateway = Gateway(backend, seconds, max_steps)
            app = create_app(gateway, key)
            if page:
                mount_web_ui(app, gateway, key)
            config = uvicorn.Config(app, host, port, log_level="warning", timeout_graceful_shutdown=CLOSE_SECONDS)
            address = f"http://{host}:{port}"
            results("serve", {"web UI": address, "api": f"{address}/v1/animate", "docs": f"{address}/docs"})
            Server(config, gateway).run()
    log("serve: stopped; all accepted requests were completed")
