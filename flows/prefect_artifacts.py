"""Prefect artifacts of the stages: results with their addresses; of prepare also progress and counts."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Mapping
from typing import Any
from uuid import UUID

import httpx
from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.actions import ArtifactCreate, ArtifactUpdate
from prefect.context import TaskRunContext
from prefect.exceptions import PrefectException
from prefect.settings import PREFECT_CLIENT_MAX_RETRIES, temporary_settings

from flows.console import log, tick_line
from infra.redaction import redact
from tasks.encode.spec import PrepareReport

UPDATE_SECONDS = 10.0
ANSWER_SECONDS = 2.0
# Errors of an unreachable server. The stage neither fails nor waits, and retries after `RETRY_SECONDS`.
UNREACHABLE = (httpx.HTTPError, PrefectException)
RETRY_SECONDS = 300.0


class PrepareArtifacts:
    """The progress callback of the stage: logs every tick, and updates the artifacts of the current task run."""

    def __init__(self) -> None:
        self._clips_per_second = 0.0
        self._artifact: UUID | None = None
        self._due = 0.0

    def __call__(self, counts: dict[str, Any]) -> None:
        log(counts)
        self._clips_per_second = counts["clips_per_second"]
        if time.monotonic() < self._due and counts["done"] < counts["total"]:
            return
        percent, line = round(100.0 * counts["done"] / counts["total"], 2), tick_line(counts)
        self._due = time.monotonic() + RETRY_SECONDS
        with contextlib.suppress(*UNREACHABLE), _client() as client:
            if self._artifact is None:
                self._artifact = client.create_artifact(_artifact("progress", "prepare-progress", line, percent)).id
            else:
                client.update_artifact(self._artifact, ArtifactUpdate(data=percent, description=line))
            self._due = time.monotonic() + UPDATE_SECONDS

    def close(self, report: PrepareReport) -> None:
        """Creates the artifact of the final counts, the speed, and the addresses of the data set and its report."""
        about, text = f"Outcomes of {report.rows} rows", accounting(report, self._clips_per_second)
        with contextlib.suppress(*UNREACHABLE), _client() as client:
            client.create_artifact(_artifact("markdown", "prepare-result", about, text))


def stage_artifact(key: str, about: str, numbers: Mapping[str, object], addresses: Mapping[str, str]) -> None:
    """Creates the artifact of a finished stage: a table of its numbers, and its addresses.

    Args:
        key: the artifact's key, the same in all runs.
        about: one line about the result.
        numbers: by name.
        addresses: by name; empty ones are left out.
    """
    rows = "\n".join(f"| {name} | {value} |" for name, value in numbers.items())
    lines = "\n".join(f"- {name}: {_link(address)}" for name, address in addresses.items() if address)
    text = f"| | |\n|---|--:|\n{rows}\n\n{lines}\n"
    with contextlib.suppress(*UNREACHABLE), _client() as client:
        client.create_artifact(_artifact("markdown", key, about, text))


def _link(address: str) -> str:
    return f"<{address}>" if address.startswith(("http://", "https://")) and " " not in address else f"`{address}`"


def accounting(report: PrepareReport, clips_per_second: float) -> str:
    """The final counts of a prepare run in markdown."""
    counts = {"**encoded**": report.encoded} | dict(sorted(report.failed.items(), key=lambda item: -item[1]))
    rows = "\n".join(f"| {name} | {count:,} | {count / report.rows:.2%} |" for name, count in counts.items())
    sizes = "".join(f"- frame size {size}: {count:,} samples\n" for size, count in report.frame_sizes.items())
    return f"""\
| outcome | rows | share |
|---|--:|--:|
{rows}
| all | {report.rows:,} | |

{report.samples:,} samples in {report.shards:,} shards, of which {report.shards_reused:,} were reused; \
{report.rows_retried:,} rows were retried. \
This run took {report.seconds:,.0f} s, {clips_per_second:g} clips a second.

{sizes}- data set: `{report.dataset}`
- report, with a chart of these counts and a contact sheet of stored latents decoded back: `{report.page}`
"""


def _artifact(kind: str, key: str, description: str, data: float | str) -> ArtifactCreate:
    context = TaskRunContext.get()
    assert context is not None, "artifacts belong to a task run"
    run = context.task_run
    return ArtifactCreate(
        type=kind,
        key=key,
        description=redact(description),
        data=redact(data) if isinstance(data, str) else data,
        task_run_id=run.id,
        flow_run_id=run.flow_run_id,
    )


@contextlib.contextmanager
def _client() -> Iterator[SyncPrefectClient]:
    """A client with one short attempt: the run's own client waits a minute for a response, six times."""
    with (
        temporary_settings({PREFECT_CLIENT_MAX_RETRIES: 0}),
        get_client(sync_client=True, httpx_settings={"timeout": ANSWER_SECONDS}) as client,
    ):
        yield client
