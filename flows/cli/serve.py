"""The commands `serve` and `serve-key`: the model of a registry alias over HTTP, and the keys of its callers."""

from __future__ import annotations

import contextlib
import logging
import os
import socket
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from flows.console import log, results
from flows.mlflow_store import existing_store
from infra import storage
from infra.redaction import RedactingFilter, redact
from infra.settings import DEFAULT_ROOT, MODEL_NAME, SERVICE_KEY
from tasks.records import UserError
from tasks.serve.server_limits import SERVER, VIDEOS, ServerLimits, VideoLimits
from trip_model.request_limits import BOUNDS, RequestError, check_number

if TYPE_CHECKING:
    from tasks.serve.callbacks import Callbacks

KEY_FILE_VARIABLE = "TRIP_API_KEY_FILE"
CLOSE_SECONDS = 2  # for connections that are open after the last response
LOOPBACK = ("127.0.0.1", "localhost", "::1")


def serve(
    name: str = MODEL_NAME,
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
    max_step_frames: int = SERVER.step_frames,
    seconds: float = 120,
    ray_address: str | None = None,
    service: str = "",
    page: bool = True,
    about: str = "",
    keys: Path | None = None,
    videos: str = "",
    keep_hours: float = VIDEOS.keep_seconds / 3600,
    connections: int = SERVER.connections,
    requests_per_minute: int = SERVER.requests_per_minute,
    root_path: str = "",
    trusted_proxies: str = "",
    trusted_hosts: tuple[str, ...] = (),
    cors_origins: tuple[str, ...] = (),
    tls_certificate: Path | None = None,
    tls_key: Path | None = None,
    drain_pause: float = 0,
    access_log: bool = True,
    callbacks: bool = False,
    callback_hosts: tuple[str, ...] = (),
    traces: bool = False,
) -> None:
    """Serve the model of a registry alias over HTTP, and follow the alias when it moves.

    With a key file, or TRIP_API_KEY in the environment, requests must send a key; docs/decisions/serving.md lists the
    routes that stay open. SIGTERM completes accepted requests and ends the service; videos in the background are
    continued by the next start.

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
        max_step_frames: the largest product of steps and frames of a request.
        seconds: time limit of a request.
        ray_address: a Ray cluster for the replicas, instead of this machine.
        service: the name of the service on that cluster, unique there; by default the names of model and alias.
        page: whether the web UI is at /.
        about: a sentence for the web UI that says what the model can do.
        keys: file of the accepted keys, which the command serve-key writes; also TRIP_API_KEY_FILE. It is read again
            when it changes.
        videos: address of the records and files of videos in the background, for this service only; by default
            below the root.
        keep_hours: how long they are kept.
        connections: connections that may be open at once.
        requests_per_minute: POST and DELETE requests of one caller, in bursts of a third of them.
        root_path: the path below which a proxy serves this service, such as /trip.
        trusted_proxies: addresses of proxies, separated by commas, whose X-Forwarded-For and -Proto headers are used.
        trusted_hosts: the host names that are served; by default all, or only loopback names with a loopback host.
        cors_origins: other sites whose pages may use the API, such as https://app.example.
        tls_certificate: file of the certificate and its chain, for HTTPS.
        tls_key: file of its private key.
        drain_pause: seconds at SIGTERM in which /readyz is 503 and requests are still accepted, for a load balancer.
        access_log: whether each request is logged to standard error, as one line of JSON.
        callbacks: whether a caller may give an address that is called when its video in the background has ended. It
            needs a secret for signatures in TRIP_CALLBACK_SECRET.
        callback_hosts: HOST or HOST:PORT in the private network that may be called too.
        traces: whether traces are sent over OTLP, to OTEL_EXPORTER_OTLP_ENDPOINT and as OpenTelemetry's other variables
            say; it needs the extra `traces`.
    """
    counts = {
        "--replicas": replicas, "--max-batch": max_batch, "--max-queue": max_queue, "--seconds": seconds,
        "--connections": connections, "--requests-per-minute": requests_per_minute,
        "--max-step-frames": max_step_frames,
    }  # fmt: skip
    for flag, value in counts.items():
        if value < 1:
            raise UserError(f"{flag} {value:g} is less than 1; give 1 or more")
    if drain_pause < 0:
        raise UserError(f"--drain-pause {drain_pause:g} is negative; give 0 or more seconds")
    if keep_hours <= 0:
        raise UserError(f"--keep-hours {keep_hours:g} is not positive; give more than 0")
    if root_path and not (root_path.startswith("/") and not root_path.endswith("/")):
        raise UserError(f"--root-path {root_path} does not begin with / or ends with it; give a path such as /trip")
    if (tls_certificate is None) != (tls_key is None):
        raise UserError("--tls-certificate and --tls-key belong together; give both or none")
    for file in filter(None, (tls_certificate, tls_key)):
        if not file.is_file():
            raise UserError(f"{file} is not a file; give a PEM file")
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

    from tasks.serve.api import ABOUT_MODEL, AppOptions, create_app
    from tasks.serve.connections import Connections
    from tasks.serve.gateway import Gateway, Server
    from tasks.serve.job import serving
    from tasks.serve.keys import Keys
    from tasks.serve.messages import EngineSpec
    from tasks.serve.tracing import NO_TRACES, otlp_provider
    from tasks.serve.videos import Videos

    file = keys or (Path(os.environ[KEY_FILE_VARIABLE]) if os.environ.get(KEY_FILE_VARIABLE) else None)
    key = os.environ.get(SERVICE_KEY) or None
    limits = ServerLimits(
        connections=connections,
        requests_per_minute=requests_per_minute,
        burst=max(1, requests_per_minute // 3),
        step_frames=max_step_frames,
    )
    options = AppOptions(
        limits,
        Keys(file, key) if file or key else None,
        trusted_hosts or (LOOPBACK if host in LOOPBACK else ()),
        cors_origins,
        page,
        about or ABOUT_MODEL,
    )
    callers = _callbacks(callback_hosts) if callbacks else None
    provider = otlp_provider() if traces else None
    tracer = NO_TRACES if provider is None else provider.get_tracer("trip")
    videos = videos or storage.join(root, "videos", service or f"{name}-{alias}")
    with (
        _listening(host, port) as listener,
        tempfile.TemporaryDirectory(prefix="trip-serve-", ignore_cleanup_errors=True) as cache,
    ):
        _log_to_stderr(access_log)
        spec = EngineSpec(name, alias, uri, cache, max_batch, max_queue, step_frames=max_step_frames)
        log(f"serve: starting {replicas} replicas of {name}@{alias} from {redact(uri)}")
        with serving(spec, replicas, cpus, gpus, ray_address, service) as backend:
            gateway = Gateway(backend, seconds, max_steps, tracer)
            video_limits = VideoLimits(keep_seconds=keep_hours * 3600, parallel=replicas * max_batch)
            line = Videos(gateway, videos, video_limits, callers)
            config = uvicorn.Config(
                create_app(gateway, line, options),
                http=Connections(limits, gateway.metrics),  # pyright: ignore[reportArgumentType] - uvicorn calls it as it calls a class
                ws="none",
                lifespan="on",
                log_level="warning",
                access_log=False,
                server_header=False,
                root_path=root_path,
                proxy_headers=bool(trusted_proxies),
                forwarded_allow_ips=trusted_proxies or None,
                ssl_certfile=None if tls_certificate is None else str(tls_certificate),
                ssl_keyfile=None if tls_key is None else str(tls_key),
                timeout_graceful_shutdown=CLOSE_SECONDS,
            )
            address = (
                f"{'http' if tls_certificate is None else 'https'}://{host}:{listener.getsockname()[1]}{root_path}"
            )
            shown = {"web UI": f"{address}/"} if page else {}
            results("serve", {**shown, "api": f"{address}/v1/animate", "docs": f"{address}/docs"})
            Server(config, gateway, drain_pause).run([listener])
            if provider is not None:
                provider.shutdown()  # sends what it still has
    log("serve: stopped; all accepted requests were completed")


def serve_key(name: str, file: Path) -> None:
    """Add a key to the key file of the service, and print the key once. Remove its line to revoke it.

    Args:
        name: who uses the key, for the log: letters, digits and '_.-'.
        file: the file; it contains the keys' hashes only.
    """
    from tasks.serve.keys import key_line, new_key

    key = new_key()
    line = key_line(name, key)
    existing = file.read_text(encoding="utf-8") if file.exists() else ""
    separator = "" if not existing or existing.endswith("\n") else "\n"
    storage.write_bytes(str(file), (existing + separator + line).encode())
    os.chmod(file, 0o600)
    results("serve-key", {"name": name, "key": key, "file": str(file)})


def _callbacks(private_hosts: tuple[str, ...]) -> Callbacks:
    """Raises UserError."""
    from tasks.serve.callbacks import SECRET_VARIABLE, CallbackOptions, Callbacks

    try:
        return Callbacks(CallbackOptions(os.environ.get(SECRET_VARIABLE, ""), private_hosts))
    except ValueError as error:
        raise UserError(f"--callbacks: {error}") from error


@contextlib.contextmanager
def _listening(host: str, port: int) -> Iterator[socket.socket]:
    """Listens before the model is loaded, so that an address in use is known at once. Raises UserError."""
    if not 0 <= port < 2**16:
        raise UserError(f"cannot listen on {host}:{port} (a port is at most 65535); give another --host or --port")
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        listener = socket.create_server((host, port), family=family, backlog=2048)
    except (OSError, UnicodeError) as error:
        raise UserError(f"cannot listen on {host}:{port} ({error}); give another --host or --port") from error
    with listener:
        yield listener


def _log_to_stderr(access_log: bool) -> None:
    """Sends the service's log, and its lines of access, to standard error."""
    from tasks.serve.request_log import ACCESS_LOG

    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    handler.addFilter(RedactingFilter())
    service = logging.getLogger("tasks.serve")
    service.addHandler(handler)
    service.setLevel(logging.INFO)
    lines = logging.StreamHandler(sys.stderr)
    access = logging.getLogger(ACCESS_LOG)
    access.propagate = False
    if access_log:
        access.addHandler(lines)
