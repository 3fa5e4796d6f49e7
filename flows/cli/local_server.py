"""A Prefect server on loopback that ends with the process that started it, however that process ends."""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path

from infra.settings import CHECKOUT

STARTUP_SECONDS = 120.0


@contextlib.contextmanager
def local_server(home: Path, meanwhile: Callable[[], None] = lambda: None) -> Iterator[str]:
    """Yields the API address of a server with its database and log in `home`.

    Args:
        home: folder of the database and the log.
        meanwhile: called while the server starts, in this process.

    Prefect's own server becomes an orphan when the command is killed. This server watches a pipe from its parent, which
    the system closes in every case.

    Raises:
        RuntimeError: the server does not start in time.
    """
    home.mkdir(parents=True, exist_ok=True)
    port = _free_port()
    log_path = home / "server.log"
    with open(log_path, "ab") as log:
        server = subprocess.Popen(
            [sys.executable, "-m", "flows.cli.local_server", str(port)],
            stdin=subprocess.PIPE,
            stdout=log,
            stderr=log,
            cwd=CHECKOUT,
            env=os.environ | {"PREFECT_HOME": str(home), "PREFECT_UI_ENABLED": "0"} | _AS_EPHEMERAL,
            start_new_session=True,  # Ctrl-C reaches the command, which then stops the server itself
        )
    try:
        _bypass_proxies()
        meanwhile()
        _wait_until_healthy(f"http://127.0.0.1:{port}/api/health", server, log_path)
        yield f"http://127.0.0.1:{port}/api"
    finally:
        assert server.stdin is not None
        server.stdin.close()
        try:
            server.wait(timeout=10)
        except subprocess.TimeoutExpired:
            server.kill()
            server.wait()


# Prefect's settings of an ephemeral server: it runs no schedules.
_AS_EPHEMERAL = {"PREFECT__SERVER_EPHEMERAL": "1", "PREFECT__SERVER_FINAL": "1"}


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _bypass_proxies() -> None:
    """Exempts loopback addresses from the machine's proxy."""
    exempt = [name for name in os.environ.get("NO_PROXY", os.environ.get("no_proxy", "")).split(",") if name]
    os.environ["NO_PROXY"] = os.environ["no_proxy"] = ",".join(dict.fromkeys([*exempt, "127.0.0.1", "localhost"]))


def _wait_until_healthy(url: str, server: subprocess.Popen[bytes], log_path: Path) -> None:
    deadline = time.monotonic() + STARTUP_SECONDS
    while time.monotonic() < deadline and server.poll() is None:
        try:
            with urllib.request.urlopen(url, timeout=5) as response:
                if response.status == 200:
                    return
        except (urllib.error.URLError, ConnectionError, TimeoutError):
            pass  # not listening yet
        time.sleep(0.1)
    state = "did not answer" if server.poll() is None else f"ended with code {server.returncode}"
    raise RuntimeError(f"the local Prefect server {state}; its log is {log_path}")


def _serve(port: int) -> None:
    """The server process: uvicorn, and a thread that ends the process when the pipe from the parent closes."""
    import uvicorn

    application = "prefect.server.api.server:create_app"
    config = uvicorn.Config(application, factory=True, host="127.0.0.1", port=port, log_level="error", lifespan="on")
    server = uvicorn.Server(config)

    def end_with_parent() -> None:
        sys.stdin.buffer.read()
        server.should_exit = True  # lets it write pending events
        time.sleep(5)
        os._exit(0)

    threading.Thread(target=end_with_parent, daemon=True).start()
    server.run()


if __name__ == "__main__":
    _serve(int(sys.argv[1]))
