"""The HTTP endpoint of a machine's metrics: those of its stages, and which services run.

python -m infra.metrics_server --folder FOLDER --port 9464
"""

from __future__ import annotations

import argparse
import json
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from prometheus_client import CollectorRegistry, Gauge, generate_latest

from infra.supervisor import Supervisor


def page(folder: Path, stack: Path | None = None) -> bytes:
    """The metrics of all stages of a folder, and which services of a stack run.

    Args:
        folder: the folder of the stages' files.
        stack: the folder of a stack (`python -m flows up`).
    """
    parts = [path.read_bytes() for path in sorted(folder.glob("*.prom"))]
    if stack is not None:
        registry = CollectorRegistry()
        gauge = Gauge("trip_service_running", "Whether the service has a process", ["service"], registry=registry)
        running = Supervisor(stack).running()
        for path in stack.glob("*/process.json"):
            if "pid" in json.loads(path.read_text()):
                gauge.labels(path.parent.name).set(path.parent.name in running)
        parts.append(generate_latest(registry))
    return b"".join(parts)


class _Handler(BaseHTTPRequestHandler):
    folder: Path
    stack: Path | None

    def do_GET(self) -> None:
        known = self.path.partition("?")[0] == "/metrics"
        body = page(self.folder, self.stack) if known else b"metrics are at /metrics\n"
        self.send_response(200 if known else 404)
        self.send_header("Content-Type", "text/plain; version=0.0.4; charset=utf-8")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:
        """One line for each scrape would be all that the log contains."""


def main() -> None:
    """Serves the metrics of a folder until a signal ends it."""
    parser = argparse.ArgumentParser(description="Prometheus metrics of the stages of this machine")
    parser.add_argument("--folder", type=Path, required=True, help="the folder of the stages' files")
    parser.add_argument("--stack", type=Path, help="the folder of a stack, whose services are shown as well")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=9464)
    given = parser.parse_args()
    handler = type("Handler", (_Handler,), {"folder": given.folder, "stack": given.stack})
    ThreadingHTTPServer((given.host, given.port), handler).serve_forever()


if __name__ == "__main__":
    main()
