"""The commands that care for a finished data set: `verify` names every problem, `forget` removes clips."""

from __future__ import annotations

from pathlib import Path

from flows.console import tell
from tasks.curate.forget import forget as forget_clips
from tasks.curate.verify import problems
from tasks.ingest.sources import clean_key
from tasks.records import UserError


def verify(data: str) -> int:
    """Check every byte of a data set and name each problem in a line of its own; exit code 1 where there is one.

    Args:
        data: address of the data set's folder, as the prepare stage names it.
    """
    count = 0
    for problem in problems(data, tell):
        print(problem, flush=True)
        count += 1
    tell(f"verify      {data}: {f'{count} problems' if count else 'whole'}")
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
    report = forget_clips(data, words, reason, clean_key, tell)
    for word in report.unknown:
        print(f"not in the data set: {word}")
    tell(f"forget      {report.rows} rows ({report.samples} samples) removed, {report.shards} shards made anew")
    return int(bool(report.unknown))
