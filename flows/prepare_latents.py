"""Flow: a table of links, or the demo corpus drawn on the spot, becomes a data set of latents."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from prefect import flow, task

from flows.artifacts import PreparePages
from flows.console import tell
from flows.recipes import Recipe, find_recipe
from flows.source import PLAIN, Reading, named_source
from flows.stage import STAGE_POLICY, address
from infra import storage
from tasks.encode.job import prepare
from tasks.encode.spec import PrepareReport, PrepareSpec
from tasks.encode.spec import recipe as made_of
from tasks.evaluate.presets import Preset, load_preset
from tasks.ingest.demo import serve_folder, write_demo_corpus
from tasks.ingest.sources import SourceSpec, settled
from tasks.records import UserError, to_json


@contextlib.contextmanager
def opened_source(recipe: Recipe, source: SourceSpec | None, root: str) -> Iterator[SourceSpec]:
    """The source that is named; without one the recipe's demo corpus, drawn below `root` and served on loopback."""
    if source is not None:
        yield settled(source)
        return
    if recipe.demo_clips is None:
        raise UserError(f"recipe {recipe.name!r} has no clips of its own; name a table or a folder: --source TABLE.csv")
    folder = storage.absolute(storage.join(root, "corpus"))
    if storage.local_path(folder) is None:
        raise UserError(f"the demo corpus is drawn into a local folder, not {root}; name a table: --source TABLE.csv")
    tell(f"corpus      {recipe.demo_clips} drawn clips of {recipe.prepare.size} pixels in {folder}")
    table = write_demo_corpus(folder, recipe.demo_clips, recipe.prepare.size)
    with serve_folder(folder) as url:
        yield replace(recipe.prepare.source, table=table, base_url=url)


@contextlib.contextmanager
def planned_prepare(recipe: Recipe, source: SourceSpec | None, root: str) -> Iterator[PrepareSpec]:
    """The spec of the stage, its addresses filled in; the source answers inside the block."""
    with opened_source(recipe, source, root) as table:
        spec = replace(recipe.prepare, source=table)
        identity = made_of(spec) | {"limit": table.limit}
        yield replace(spec, output=address(root, "data", identity))


def prepared_for(spec: PrepareSpec, preset: Preset) -> PrepareSpec:
    """The spec with the frames that a protocol asks for, stored too; what it leaves open is the recipe's."""
    asked = {"num_frames": preset.frames} | {n: getattr(preset, n) for n in ("fps", "stride", "size", "fit")}
    return replace(spec, keep_pixels=True, **{name: value for name, value in asked.items() if value is not None})


@task(name="prepare", **STAGE_POLICY)
def prepare_stage(spec: PrepareSpec) -> PrepareReport:
    """Ray workers download, decode and encode; shards that are there are kept."""
    pages = PreparePages()
    report = prepare(spec, pages)
    reasons = ", ".join(f"{reason} {count}" for reason, count in report.failed.items()) or "none failed"
    reused = f", {report.shards_reused} of {report.shards} shards from before" if report.shards_reused else ""
    tell(f"prepare     {report.encoded} of {report.rows} clips encoded ({reasons}) in {report.seconds:.0f} s{reused}")
    tell(f"report      {report.page}")
    pages.close(report)
    return report


@flow(name="prepare-latents")
def prepare_latents(
    recipe: str = "demo",
    source: str | None = None,
    root: str = "runs/demo",
    base: str | None = None,
    keep_frames: bool = False,
    protocol: str | None = None,
    retry: str | None = None,
    *,
    reading: Reading = PLAIN,
) -> dict[str, Any]:
    """Download, decode and encode the clips of a table; continues what an earlier call began.

    Args:
        recipe: which numbers to use; see the command `recipes`.
        source: a table of links (CSV, Parquet, JSON lines), a folder of videos, MSR-VTT's annotation or a sample;
            without it the demo draws its own clips.
        root: folder or address that everything is written below.
        base: folder (or hub name) of the text-to-video model to start from, instead of the recipe's.
        keep_frames: store the frames as well, which judging needs, where the recipe does not.
        protocol: a preset or its file .toml whose frames to take and to store, where this data set is to judge by.
        retry: classes of failures to try again in place, with commas: network, timeout, server, throttled, decoder.
        reading: how the source is read.
    """
    chosen = find_recipe(recipe, base)
    if keep_frames:
        chosen = replace(chosen, prepare=replace(chosen.prepare, keep_pixels=True))
    if protocol is not None:
        chosen = replace(chosen, prepare=prepared_for(chosen.prepare, load_preset(protocol)))
    classes = tuple(name.strip() for name in retry.split(",")) if retry else ()
    chosen = replace(chosen, prepare=replace(chosen.prepare, retry=classes))
    with planned_prepare(chosen, named_source(source, reading), root) as spec:
        return to_json(prepare_stage(spec))
