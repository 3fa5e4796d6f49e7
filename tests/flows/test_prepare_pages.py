"""Prefect artifacts of a prepare run: progress and final counts, with a real server or none."""

from __future__ import annotations

import logging
import socket
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from uuid import UUID

import pytest
from prefect import flow, task
from prefect.client.orchestration import get_client
from prefect.client.schemas.filters import LogFilter, LogFilterFlowRunId
from prefect.client.schemas.objects import Artifact
from prefect.context import FlowRunContext
from prefect.logging.handlers import APILogWorker
from prefect.settings import PREFECT_API_URL, temporary_settings

from flows import recipes
from flows.cli.app import main
from flows.cli.local_server import local_server
from flows.prefect_artifacts import PrepareArtifacts
from flows.stage import STAGE_POLICY
from tasks.ingest.demo import FIRST_SEED, write_demo_corpus
from tests.support.tiny_cli import tiny

pytestmark = pytest.mark.slow  # a Prefect server, and calls that wait for one that is gone


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A Prefect server that commands and flows of this process speak to."""
    with local_server(tmp_path_factory.mktemp("prefect")) as url, pytest.MonkeyPatch.context() as patch:
        patch.setenv("PREFECT_API_URL", url)
        with temporary_settings({PREFECT_API_URL: url}):
            yield


def artifacts(key: str) -> list[Artifact]:
    with get_client(sync_client=True) as client:
        return [artifact for artifact in client.read_artifacts() if artifact.key == key]


def test_the_pages_of_a_run_say_what_became_of_the_rows(
    server: None, tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = tiny(str(tiny_base))
    recipe = replace(recipe, prepare=replace(recipe.prepare, workers=0, clips_per_shard=2))
    monkeypatch.setitem(recipes.RECIPES, "tiny", lambda: recipe)
    table = Path(write_demo_corpus(tmp_path / "corpus", 3, 32)).with_name("own.csv")
    links = [f"videos/32px/{FIRST_SEED + number}.mp4" for number in range(3)]
    rows = zip("abcde", [*links, "videos/none.mp4", "beyond the limit.mp4"], strict=True)
    table.write_text("id,link,text\n" + "".join(f"{key},{link},a shape\n" for key, link in rows))
    columns = ["--columns.key", "id", "--columns.url", "link", "--columns.caption", "text"]
    command = ["prepare-latents", "--recipe", "tiny", "--source", str(table), "--root", str(tmp_path / "run")]
    assert main([*command, *columns, "--limit", "4"]) == 0

    [progress] = artifacts("prepare-progress")
    assert progress.type == "progress" and progress.data == 100.0 and progress.description is not None
    assert progress.description.startswith("prepare     4/4  encoded 3  failed 1")
    [books] = artifacts("prepare-result")
    assert books.task_run_id is not None and books.description == "Outcomes of 4 rows"
    assert isinstance(books.data, str)
    for line in ("| **encoded** | 3 | 75.00% |", "| missing_file | 1 | 25.00% |", "| all | 4 | |"):
        assert line in books.data.splitlines()
    [page] = (tmp_path / "run" / "data").glob("*.report.html")
    assert f"`{page}`" in books.data and "3 samples in 2 shards" in books.data


def test_a_warning_of_a_stage_is_on_the_page_of_the_run(server: None) -> None:
    @task(name="stage", **STAGE_POLICY)
    def stage() -> None:
        logging.getLogger("tasks.train.job").warning("workers at %s were restarted", "s3://user:secret@host/data")

    @flow(name="warns")
    def warns() -> UUID:
        stage()
        context = FlowRunContext.get()
        assert context is not None and context.flow_run is not None
        return context.flow_run.id

    run = warns()
    APILogWorker.drain_all(timeout=10)
    with get_client(sync_client=True) as client:
        logs = client.read_logs(LogFilter(flow_run_id=LogFilterFlowRunId(any_=[run])))
    (line,) = [entry.message for entry in logs if "restarted" in entry.message]
    assert line == "warning     workers at s3://***@host/data were restarted"


@pytest.fixture
def silent() -> Iterator[str]:
    """An address that takes connections and never answers."""
    with socket.create_server(("127.0.0.1", 0)) as listening:
        yield f"http://127.0.0.1:{listening.getsockname()[1]}/api"


@pytest.mark.parametrize("kind", ["refusing", "silent"])
def test_a_server_that_goes_away_neither_fails_nor_holds_up_a_stage(server: None, silent: str, kind: str) -> None:
    @task
    def stage() -> list[float]:
        pages, seconds = PrepareArtifacts(), []
        with temporary_settings({PREFECT_API_URL: silent if kind == "silent" else "http://127.0.0.1:9/api"}):
            for done in (1, 2, 10):
                began = time.monotonic()
                pages({"stage": "prepare", "done": done, "total": 10, "clips_per_second": 1.0})
                seconds.append(time.monotonic() - began)
        return seconds

    @flow
    def parent() -> list[float]:
        return stage()

    before = len(artifacts("prepare-progress"))
    seconds = parent()
    assert max(seconds) < 3 and seconds[1] < 0.1  # between, the server is left alone
    assert len(artifacts("prepare-progress")) == before
