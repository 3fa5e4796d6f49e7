"""An S3 server in memory (moto) that responds with 503 while a file exists; arguments: the port and the file."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

BUSY = b'<?xml version="1.0"?><Error><Code>ServiceUnavailable</Code><Message>Please try again.</Message></Error>'


def serve(port: int, fault: Path) -> None:
    from moto.moto_server.werkzeug_app import DomainDispatcherApplication, create_backend_app
    from werkzeug.serving import run_simple

    moto = DomainDispatcherApplication(create_backend_app)

    def application(environment: dict[str, Any], start: Callable[..., Any]) -> Iterable[bytes]:
        if fault.exists():
            environment["wsgi.input"].read(int(environment.get("CONTENT_LENGTH") or 0))
            start("503 Service Unavailable", [("Content-Type", "application/xml")])
            return [] if environment["REQUEST_METHOD"] == "HEAD" else [BUSY]
        return moto(environment, start)

    run_simple("127.0.0.1", port, application, threaded=True)


if __name__ == "__main__":
    serve(int(sys.argv[1]), Path(sys.argv[2]))
