"""The commands around a data set: `sample` draws rows, `verify` names every problem, `forget` and
`deduplicate` remove clips.
"""

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
    """Draw a seeded sample of a source into a file with a hash, which is a source itself.

    Args:
        source: a table, an annotation or a folder of captioned videos.
        output: the JSON file to write.
        count: how many clips.
        seed: which clips.
        options: how the source is read.
    """
    report = write_sample(options.spec(source), count, seed, output)
    log(f"sample      {report.rows} of {report.usable} usable rows in {report.sample}, sha256 {report.sha256}")


def verify(data: str, workers: int | None = None) -> int:
    """Check every byte of a data set and name each problem in a line of its own; exit code 1 where there is one.

    Args:
        data: address of the data set's folder, as the prepare stage names it.
        workers: how many shards are read at once; without it one a core, at most 8.
    """
    count = 0
    for problem in problems(data, log, min(8, os.cpu_count() or 1) if workers is None else workers):
        print(redact(problem), flush=True)
        count += 1
    log(f"verify      {data}: {f'{count} problems' if count else 'whole'}")
    return int(count > 0)


def forget(data: str, ids: Path, reason: str = "asked for") -> int:
    """Remove clips from a finished data set for good, because a rights holder asks; killed, the same command continues.

    Args:
        data: address of the data set's folder, as the prepare stage names it.
        ids: a file with a clip key (`videoid`) or a URL, as the table has it, in each line.
        reason: kept in the data set's books instead of the clip.
    """
    try:
        words = [line.strip() for line in ids.read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--ids {ids} cannot be read ({error}); give a text file with an id in each line") from error
    if not words:
        raise UserError(f"--ids {ids} names no clip; give a text file with an id in each line")
    report = forget_clips(data, words, reason, clean_key, log)
    for word in report.unknown:
        print(f"not in the data set: {word}")
    log(f"forget      {report.rows} rows ({report.samples} samples) removed, {report.shards} shards made anew")
    return int(bool(report.unknown))


def deduplicate(data: str, distance: int = 4) -> None:
    """Remove clips that show what an earlier row shows, by their perceptual hashes; the same again changes nothing.

    Args:
        data: address of the data set's folder; it was prepared with filters.
        distance: how many of a hash's 64 bits may differ, 0 to 8.
    """
    removal = remove_duplicates(data, distance, log)
    log(f"deduplicate {removal.rows} rows ({removal.samples} samples) removed, {removal.shards} shards made anew")
