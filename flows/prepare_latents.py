"""Flow: a table of links, or the demo corpus that it draws, becomes a data set of latents."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterator
from dataclasses import replace
from typing import Annotated, Any

from prefect import flow, task

from flows import layout
from flows.console import log
from flows.layout import Run, prepared_for
from flows.parameters import PROTOCOL, RECIPE, RETRY
from flows.prefect_artifacts import PrepareArtifacts
from flows.recipe_values import Values
from flows.source import DEFAULT, SourceOptions
from flows.stage import STAGE_POLICY
from infra import storage
from infra.metrics import record
from infra.output import outlive_reader
from infra.settings import DEFAULT_ROOT
from tasks.encode.spec import PrepareReport, PrepareSpec
from tasks.evaluate.protocol.protocol import load_protocol
from tasks.ingest.spec import SourceSpec
from tasks.records import Artifact, to_json
from tasks.shards import ShardDataset


@contextlib.contextmanager
def reachable_source(run: Run) -> Iterator[PrepareSpec]:
    """The spec of prepare, its videos reachable inside the block: the demo's are drawn and served on loopback."""
    spec = run.prepare
    if run.source is not None:
        _log_source(spec.source)
        yield spec
        return
    from tasks.ingest.demo import serve_folder, write_demo_corpus

    assert run.recipe.demo_clips is not None
    folder = storage.parent(spec.source.table)
    log(f"corpus      {run.recipe.demo_clips} drawn clips of {spec.size} pixels in {folder}")
    write_demo_corpus(folder, run.recipe.demo_clips, spec.size)
    with serve_folder(folder) as url:
        yield replace(spec, source=replace(spec.source, base_url=url))


def _log_source(source: SourceSpec) -> None:
    """Logs how the source is understood, before any work begins, and what its options open."""
    from tasks.ingest.survey import preview

    for line in preview(source):
        log(f"source      {line}")
    if source.allow:
        log(f"allowed     {', '.join(source.allow)}: links may name them though they are private")
    unused = [name for name in ("HTTPS_PROXY", "HTTP_PROXY") if os.environ.get(name) or os.environ.get(name.lower())]
    if source.proxy is not None:
        log(f"proxy       {source.proxy} gets all requests, and decides which private addresses they reach")
    elif unused:
        log(f"proxy       {unused[0]} is set and not used for videos; to use it, give --proxy with its value")


@task(name="prepare", **STAGE_POLICY)
def prepare_stage(run: Run) -> PrepareReport:
    """Ray workers download, decode and encode; finished shards are kept."""
    from tasks.encode.job import prepare

    artifacts = PrepareArtifacts()
    with reachable_source(run) as spec:
        report = prepare(spec, artifacts)
    record("prepare", {"complete_timestamp_seconds": time.time()}, {"failed_clips": report.failed})
    reasons = ", ".join(f"{reason} {count}" for reason, count in report.failed.items()) or "none failed"
    reused = f", {report.shards_reused} of {report.shards} shards reused" if report.shards_reused else ""
    log(f"prepare     {report.encoded} of {report.rows} clips encoded ({reasons}) in {report.seconds:.0f} s{reused}")
    if report.frame_sizes:
        log(f"frame sizes {', '.join(f'{size} {count}' for size, count in report.frame_sizes.items())} samples")
    log(f"report      {report.page}")
    artifacts.close(report)
    return report


def prepare_held_out(second: Run, protocol: str | None) -> Artifact:
    """Prepares a second source with the frames that the evaluation needs, of this protocol or else the recipe's.

    Raises:
        UserError: the data cannot serve the protocol; known before days of training.
    """
    numbers = second.recipe.evaluate
    rules = protocol or numbers.protocol
    frames = prepared_for(second.recipe.prepare, None if rules.endswith(".json") else rules)
    held_out = prepare_stage(replace(second, recipe=replace(second.recipe, prepare=frames))).data
    load_protocol(rules, ShardDataset(held_out.uri), 1.0, numbers.clips, numbers.seed)
    return held_out


@flow(name="prepare-latents", on_running=[outlive_reader])
def prepare_latents(
    recipe: Annotated[str, RECIPE] = "demo",
    source: str | None = None,
    root: str = DEFAULT_ROOT,
    base: str | None = None,
    keep_frames: bool = False,
    protocol: Annotated[str | None, PROTOCOL] = None,
    retry: Annotated[str | None, RETRY] = None,
    values: Values = None,
    *,
    options: SourceOptions = DEFAULT,
) -> dict[str, Any]:
    """Download, decode and encode the clips of a table; continues an interrupted call.

    Args:
        recipe: the configuration of the run, a name or a file .toml; see the command `recipes`.
        source: a table of links (CSV, Parquet, JSON lines), a folder of videos, MSR-VTT's annotation or a sample;
            without it the demo draws its own clips.
        root: folder or address that everything is written below.
        base: folder (or hub name) of the text-to-video model to start from, instead of the recipe's.
        keep_frames: also store the frames, which an evaluation needs, if the recipe does not.
        protocol: a preset or its file .toml whose frames to take and to store, for a data set to evaluate on.
        retry: classes of failures to try again in place, with commas: network, timeout, server, throttled, decoder.
        values: FIELD=VALUE, a number of your own instead of the recipe's, as train.steps=200; once for each.
        options: how the source is read.
    """
    run = layout.resolve(recipe, source, root, base, options, values)
    spec = replace(run.recipe.prepare, keep_pixels=keep_frames or run.recipe.prepare.keep_pixels)
    if protocol is not None:
        spec = prepared_for(spec, protocol)
    if retry is not None:
        spec = replace(spec, retry=tuple(name.strip() for name in retry.split(",")))
    return to_json(prepare_stage(replace(run, recipe=replace(run.recipe, prepare=spec))))
