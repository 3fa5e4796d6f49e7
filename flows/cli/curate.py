"""The commands of a data set.

`sample` draws rows, `verify` lists problems, `show` decodes a sample, `forget` and `deduplicate` remove clips,
`compact` merges small shards, `upgrade` rewrites the index of an older format.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import cyclopts
import numpy as np

from flows.console import log
from flows.recipes import DEMO_BASE
from flows.source import DEFAULT, SourceOptions, named_source
from infra import storage
from infra.leases import lease
from infra.redaction import redact
from tasks.curate.compact import compact as merge_shards
from tasks.curate.duplicates import deduplicate as remove_duplicates
from tasks.curate.forget import forget as forget_clips
from tasks.curate.verify import problems
from tasks.ingest.rows import clean_key
from tasks.ingest.samples import write_sample
from tasks.records import UserError
from tasks.shards import named
from tasks.shards import upgrade as upgrade_dataset


@contextlib.contextmanager
def _only_writer(data: str) -> Iterator[None]:
    """Holds the lease of a data set. A prepare at the same time would publish the rows that it read before.

    Raises:
        LeaseHeld: another process writes to the data set.
    """
    dataset = named(storage.absolute(data))
    with lease(dataset) if storage.exists(dataset) else contextlib.nullcontext():
        yield


def sample(
    source: str,
    output: Annotated[str, cyclopts.Parameter(alias="-o")],
    count: int = 2048,
    seed: int = 0,
    *,
    options: SourceOptions = DEFAULT,
) -> None:
    """Draw a seeded sample of a source into a hashed JSON file, which can itself be used as a source.

    Args:
        source: a table, an annotation or a folder of captioned videos.
        output: the JSON file to write.
        count: number of clips.
        seed: seed of the draw.
        options: reading options of the source.
    """
    report = write_sample(options.spec(source), count, seed, output)
    log(f"sample      {report.rows} of {report.usable} usable rows in {report.sample}, sha256 {report.sha256}")


def verify(data: str, workers: int | None = None) -> int:
    """Check every byte of a data set and print one line per problem; the exit code is 1 if there are any.

    Args:
        data: address of the data set's folder, as the prepare stage prints it.
        workers: shards read at the same time; by default one per core, at most 8.
    """
    count = 0
    for problem in problems(data, log, min(8, os.cpu_count() or 1) if workers is None else workers):
        print(redact(problem), flush=True)
        count += 1
    log(f"verify      {data}: {f'{count} problems' if count else 'no problems'}")
    return int(count > 0)


def show(
    data: str,
    key: str,
    output: Annotated[Path, cyclopts.Parameter(alias="-o")],
    base: str = DEMO_BASE,
    source: str | None = None,
    scale: int = 1,
    *,
    options: SourceOptions = DEFAULT,
) -> None:
    """Decode a stored sample into a video: the frames of its source, then those of its latents, next to each other.

    Args:
        data: address of the data set's folder, as the prepare stage prints it.
        key: the key of a sample, or of a clip, whose first sample is shown.
        output: an .mp4, a .gif, or a folder for png frames.
        base: folder or hub name of the base whose VAE encoded the data set; by default the demo's.
        source: the table or folder that the data set was made from, to follow relative links.
        scale: enlarges the frames by an integer factor.
        options: reading options of the source.
    """
    from tasks.encode.show import check_target, show_sample  # torch, which the other commands do not need
    from trip_model.images import write_video

    check_target(output)
    if not 1 <= scale <= 16:
        raise UserError(f"--scale {scale}, expected 1 to 16")
    shown = show_sample(data, key, base, named_source(source, options))
    frames = shown.side_by_side().repeat(scale, axis=1).repeat(scale, axis=2)
    write_video(output, frames, shown.fps)
    if shown.original is None:
        log(f"show        only the decoded latents: {shown.why_no_original}")
    else:
        error = np.sqrt(np.mean((shown.original.astype(np.float32) - shown.decoded) ** 2))
        log(f"show        left the source, right its latents decoded; RMSE {error:.1f} of 255")
    log(f"show        {shown.key} ({len(frames)} frames, {shown.caption!r}) in {output}")


def forget(data: str, ids: Path, reason: str = "asked for") -> int:
    """Take down clips of a finished data set at a rights holder's request; after a kill, repeat the command.

    Args:
        data: address of the data set's folder, as the prepare stage prints it.
        ids: a file with one clip key (`videoid`) or URL per line, as in the table.
        reason: stored in the data set in place of the clip.
    """
    try:
        words = [line.strip() for line in ids.read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--ids {ids} cannot be read ({error}); give a text file with one id per line") from error
    if not words:
        raise UserError(f"--ids {ids} is empty; give a text file with one id per line")
    with _only_writer(data):
        report = forget_clips(data, words, reason, clean_key, log)
    for word in report.unknown:
        print(f"not in the data set: {word}")
    log(f"forget      {report.rows} rows ({report.samples} samples) removed, {report.shards} shards rebuilt")
    return int(bool(report.unknown))


def deduplicate(data: str, distance: int = 4) -> None:
    """Remove near-duplicates of earlier clips, by their perceptual hashes; repeating the command changes nothing.

    Args:
        data: address of the folder of a data set that was prepared with filters.
        distance: number of a hash's 64 bits that may differ, 0 to 8.
    """
    with _only_writer(data):
        removal = remove_duplicates(data, distance, log)
    log(f"deduplicate {removal.rows} rows ({removal.samples} samples) removed, {removal.shards} shards rebuilt")


def compact(data: str, rows_per_shard: int | None = None) -> None:
    """Merge the small shards of many nights into full ones; every sample keeps its bytes, full shards stay.

    Args:
        data: address of the data set's folder, as the prepare stage prints it.
        rows_per_shard: rows of a full shard; by default the number of the largest shard.
    """
    with _only_writer(data):
        report = merge_shards(data, rows_per_shard, log)
    log(f"compact     {report.merged} of {report.before} shards merged, {report.after} now, in {report.dataset}")


def upgrade(data: str) -> None:
    """Upgrade a data set of an earlier format in place; nothing is downloaded or encoded.

    Args:
        data: address of the data set's folder, as the prepare stage prints it.
    """
    with _only_writer(data):
        done = upgrade_dataset(data)
    log(f"upgrade     {data}: {'done' if done else 'has the present format already'}")
