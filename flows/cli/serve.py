"""The command `serve`: the model that an alias names, over HTTP and on a page, until a signal ends it."""

from __future__ import annotations

import os
import tempfile

from flows.console import log, results
from flows.mlflow_store import existing_store
from infra.settings import DEFAULT_ROOT
from tasks.records import UserError

KEY_VARIABLE = "TRIP_API_KEY"
LAST_WORDS_SECONDS = 2  # for connections that are open when the last request is answered


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
    seconds: float = 120,
    ray_address: str | None = None,
    service: str = "",
    page: bool = True,
) -> None:
    """Answer POST /v1/animate with the model that an alias names, and follow the alias when it moves.

    With TRIP_API_KEY in the environment only those who send that key are answered. SIGTERM finishes what is under way.

    Args:
        name: the model's name in the registry.
        alias: which of its versions.
        root: folder whose MLflow store is asked, unless another is named.
        tracking_uri: where MLflow keeps models.
        host: address to listen at; 0.0.0.0 is all of this machine's.
        port: port to listen at.
        replicas: how many processes hold the model.
        cpus: processors, and threads, of each; without it this machine's are shared out.
        gpus: accelerators of each, also a part of one.
        max_batch: requests of equal shape that one pass of the model answers; above 1 a clip may differ from the same
            request's alone by one level of 255 in a few values.
        max_queue: requests that wait at each replica; more are refused with 429.
        seconds: time that a request has.
        ray_address: a Ray cluster for the replicas, instead of this machine.
        service: the name of the service on that cluster, where no other may have it; without it the model's and the
            alias's.
        page: whether / is a page to play with.
    """
    counts = {"--replicas": replicas, "--max-batch": max_batch, "--max-queue": max_queue, "--seconds": seconds}
    for flag, value in counts.items():
        if value < 1:
            raise UserError(f"{flag} {value:g} is less than 1; give 1 or more")
    cores = os.cpu_count() or 1
    cpus = max(1, cores // replicas) if cpus is None else cpus
    if ray_address is None and replicas * cpus > cores:
        raise UserError(
            f"{replicas} replicas of {cpus} processors need {replicas * cpus}, there are {cores}; give fewer"
        )

    uri = existing_store(tracking_uri, root)

    import uvicorn

    from tasks.serve.api import create_app
    from tasks.serve.gateway import Desk, Server
    from tasks.serve.job import serving
    from tasks.serve.messages import EngineSpec
    from tasks.serve.web_ui import mount_page

    key = os.environ.get(KEY_VARIABLE) or None
    with tempfile.TemporaryDirectory(prefix="trip-serve-", ignore_cleanup_errors=True) as cache:
        spec = EngineSpec(name, alias, uri, cache, max_batch, max_queue)
        log(f"serve: starting {replicas} of {name}@{alias} from {uri}")
        with serving(spec, replicas, cpus, gpus, ray_address, service) as animators:
            desk = Desk(animators, seconds)
            app = create_app(desk, key)
            if page:
                mount_page(app, desk, key)
            config = uvicorn.Config(app, host, port, log_level="warning", timeout_graceful_shutdown=LAST_WORDS_SECONDS)
            place = f"http://{host}:{port}"
            results("serve", {"page": place, "api": f"{place}/v1/animate", "docs": f"{place}/docs"})
            Server(config, desk).run()
    log("serve: stopped, every request that was taken is answered")
