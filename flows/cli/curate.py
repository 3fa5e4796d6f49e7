"""The commands of a data set: `sample` draws rows, `verify` lists problems, `forget` and `deduplicate` remove clips."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import cyclopts

from flows.console import log
from flows.source import DEFAULT, SourceOptions
from infra.redaction import redact
from tasks.curate.duplicates import deduplicate as remove_duplicates
from tasks.curate.forget import forget as forget_clips
from tasks.curate.verify import problems
from tasks.ingest.rows import clean_key
from tasks.ingest.samples import write_sample
from tasks.records import UserError


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
    removal = remove_duplicates(data, distance, log)
    log(f"deduplicate {removal.rows} rows ({removal.samples} samples) removed, {removal.shards} shards rebuilt")
