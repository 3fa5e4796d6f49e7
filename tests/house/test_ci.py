"""The workflow of GitHub runs what `.ci/run` runs, with few rights, and names targets that exist."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path
from typing import Any

import pytest

yaml = pytest.importorskip("yaml")

REPOSITORY = Path(__file__).resolve().parents[2]
WORKFLOW: dict[str, Any] = yaml.safe_load((REPOSITORY / ".github" / "workflows" / "ci.yml").read_text())
STEPS = [step for job in WORKFLOW["jobs"].values() for step in job["steps"]]
MAKE = re.compile(r"^make ([a-z-]+)", re.MULTILINE)


def test_the_workflow_runs_the_targets_of_the_ci_script() -> None:
    targets = set(re.findall(r"^([a-z-]+):", (REPOSITORY / "Makefile").read_text(), re.MULTILINE))
    called = {target for step in STEPS for target in MAKE.findall(step.get("run", ""))}
    assert set(MAKE.findall((REPOSITORY / ".ci" / "run").read_text())) <= called <= targets


def test_the_workflow_tests_every_python_that_the_project_supports() -> None:
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
    first, past = re.findall(r"3\.(\d+)", project["requires-python"])
    tested = WORKFLOW["jobs"]["test"]["strategy"]["matrix"]["python"]
    assert tested == [f"3.{minor}" for minor in range(int(first), int(past))]


def test_the_workflow_may_only_read_and_ends() -> None:
    assert WORKFLOW["permissions"] == {"contents": "read"}
    for name, job in WORKFLOW["jobs"].items():
        assert "permissions" not in job and job["timeout-minutes"] <= 60, name
    for step in STEPS:
        if "uses" in step:
            assert re.fullmatch(r"actions/[a-z-]+@(v\d+|[0-9a-f]{40})", step["uses"])
        if step.get("uses", "").startswith("actions/checkout@"):
            assert step["with"]["persist-credentials"] is False


def test_a_self_hosted_runner_never_runs_a_pull_request() -> None:
    own = [job for job in WORKFLOW["jobs"].values() if "self-hosted" in job["runs-on"]]
    assert own and all("github.event_name != 'pull_request'" in job["if"] for job in own)
