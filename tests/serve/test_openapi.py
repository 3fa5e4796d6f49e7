"""The OpenAPI document against the service: schemathesis sends generated requests to every route."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tasks.serve.api import AppOptions
from tasks.serve.server_limits import ServerLimits
from tests.support.service import QuickBackend, running_service

EXAMPLES = 100  # of each route
pytestmark = pytest.mark.slow


def test_generated_requests_find_no_answer_that_the_document_does_not_describe(tmp_path: Path):
    program = shutil.which("schemathesis", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    if program is None:
        pytest.skip("schemathesis is not installed")
    options = AppOptions(ServerLimits(requests_per_minute=10**7, burst=10**6))
    with running_service(QuickBackend(), options) as service:
        command = [
            *(program, "run", f"{service.url}/openapi.json"),
            # No schema can say which bytes are a photo of enough pixels.
            *("--exclude-checks", "positive_data_acceptance"),
            *("--max-examples", str(EXAMPLES), "--checks", "all", "--seed", "1", "--no-color"),
            *("--phases", "examples,coverage,fuzzing"),
        ]
        done = subprocess.run(command, capture_output=True, text=True, timeout=550, cwd=tmp_path)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
