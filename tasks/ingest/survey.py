"""Reads all rows of a source and downloads none: counts what would be used and what would not, with examples."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from urllib.parse import urlsplit

from infra.redaction import name_of
from tasks.ingest import folders
from tasks.ingest.download import access_of, is_folder_address
from tasks.ingest.files import is_over_http
from tasks.ingest.rows import KeysSeen
from tasks.ingest.sources import find_format, local_root, opened, read_rows, resolve_url, source_files
from tasks.ingest.spec import SourceSpec
from tasks.records import ClipRef, Failure

EXAMPLES = 3  # of rows for each reason
_PLACES = 10_000  # hosts that are counted by name; the others are counted together

Tokens = Callable[[str], int]
IsTakenDown = Callable[[ClipRef, str | None], bool]


@dataclass
class Survey:
    """What the rows of a source are, before any is downloaded: `rows == usable + sum(failed.values()) + taken_down`."""

    format: str
    files: int
    rows: int = 0
    usable: int = 0
    failed: Counter[str] = field(default_factory=Counter)  # by reason
    examples: dict[str, list[str]] = field(default_factory=dict)  # rows by reason
    taken_down: int = 0
    duplicate_links: int = 0  # usable rows whose link and span an earlier row has
    shared_links: int = 0  # usable rows with a link of an earlier row, but another span
    spans: int = 0  # usable rows with a span
    span_seconds: float = 0.0
    inside: int = 0  # usable rows whose video is in a file of the source
    places: Counter[str] = field(default_factory=Counter)  # usable rows by host, or by kind of store
    blocked: int = 0  # usable rows with files outside of the folders that may be read
    damaged: int = 0  # captions that contain U+FFFD, which stands for lost characters
    listed: int = 0  # captions that look like a list written as text
    long_captions: int | None = None  # captions of more tokens than the text encoder reads; None without an encoder
    passed_over: dict[str, int] = field(default_factory=dict)  # files of a folder that are no videos, by ending


def preview(source: SourceSpec, count: int = 3) -> list[str]:
    """Returns a line about the source, and one for each of its first rows, as they are understood."""
    kind, files = find_format(source), source_files(source)
    several = f", {len(files)} files from {files[0]}" if len(files) > 1 else ""
    lines = [f"format {kind}{several}, columns {', '.join(f'{k}={v!r}' for k, v in source.columns.items())}"]
    for row in read_rows(source, 0, count):
        if isinstance(row, Failure):
            lines.append(f"row {row.row}: {row.reason} ({row.detail})")
            continue
        span = (
            "" if row.span is None else f" from {row.start:g} s to {'its end' if row.end is None else f'{row.end:g} s'}"
        )
        where = name_of(_address(source, row) or row.url) if row.inside is None else f"{name_of(row.url)} (in the file)"
        caption = row.caption if len(row.caption) <= 80 else f"{row.caption[:77]}..."
        lines.append(f"row {row.row}: key {row.key}, video {where}{span}, caption {caption!r}")
    return lines


def survey(
    source: SourceSpec, tokens: Tokens | None = None, max_tokens: int = 77, is_taken_down: IsTakenDown | None = None
) -> Survey:
    """Reads all rows of a source once.

    Args:
        source: the source, opened or not.
        tokens: the number of tokens of a caption, with begin and end.
        max_tokens: what the text encoder reads.
        is_taken_down: whether a row, with the address of its link, is in the takedowns of a root.
    Raises:
        UserError: the source is missing or unreadable, or an option is invalid.
    """
    access_of(source)
    source = opened(source)
    result = Survey(source.format, len(source.files or (source.table,)))
    if source.format in ("folder", "classes"):
        result.passed_over = folders.passed_over(source.table)
    result.long_captions = None if tokens is None else 0
    links, clips = KeysSeen(), KeysSeen()
    roots = [root for root in (local_root(source), *filter(is_folder_address, source.allow)) if root is not None]
    for row in read_rows(source):
        result.rows += 1
        if isinstance(row, Failure):
            result.failed[row.reason] += 1
            examples = result.examples.setdefault(row.reason, [])
            if len(examples) < EXAMPLES:
                examples.append(f"row {row.row}: {row.detail}")
            continue
        address = _address(source, row)
        if is_taken_down is not None and is_taken_down(row, address):
            result.taken_down += 1
            continue
        result.usable += 1
        _add(result, source, row, address, roots)
        is_new = links.add(row.url)
        if not clips.add(f"{row.url}\0{row.span}"):
            result.duplicate_links += 1
        elif not is_new:
            result.shared_links += 1
        if tokens is not None and result.long_captions is not None:
            # A token has a character at least, so that most captions are short without a tokenizer.
            result.long_captions += len(row.caption) > max_tokens - 2 and tokens(row.caption) > max_tokens
    return result


def _add(result: Survey, source: SourceSpec, row: ClipRef, address: str | None, roots: list[str]) -> None:
    result.damaged += "\ufffd" in row.caption
    result.listed += row.caption[0] in "[(" and row.caption[-1] in "])" and row.caption[1:2] in "\"'"
    if row.span is not None:
        result.spans += 1
        result.span_seconds += 0.0 if row.end is None else row.end - (row.start or 0.0)
    if row.inside is not None:
        result.inside += 1
        place = "in the files of the source"
    elif address is None:
        place = "not a URL"
    elif is_over_http(address):
        place = urlsplit(address).netloc.rpartition("@")[2].lower()
    else:
        place = f"{address.partition('://')[0]}://" if "://" in address else "local files"
        result.blocked += not any(address.startswith(root.rstrip("/") + "/") for root in roots)
    result.places[place if place in result.places or len(result.places) < _PLACES else "other hosts"] += 1


def _address(source: SourceSpec, row: ClipRef) -> str | None:
    try:
        return resolve_url(source, row.url)
    except ValueError:
        return None


def lines_of(result: Survey, max_tokens: int) -> list[str]:
    """Returns a survey as a page of lines."""
    lines = [
        f"rows        {result.rows} in {result.files} {'file' if result.files == 1 else 'files'} ({result.format})",
        f"usable      {result.usable}",
    ]
    for reason, count in result.failed.most_common():
        lines.append(f"{reason:<11} {count}")
        lines += [f"            {example[:160]}" for example in result.examples[reason]]
    notes = [
        (result.taken_down, "taken down at the root; they are left out"),
        (result.inside, "usable rows have their video in the files of the source"),
        (result.spans, f"usable rows are spans, {result.span_seconds / 3600:.2f} h where both ends are given"),
        (result.shared_links, "usable rows are further spans of a link that an earlier row has"),
        (result.duplicate_links, "usable rows repeat the link (and span) of an earlier row"),
        (result.blocked, "usable rows name files outside of the table's folder; allow them with --allow-host FOLDER"),
        (result.damaged, "captions contain U+FFFD: characters were lost before; read the original, or use --encoding"),
        (result.listed, "captions look like lists; write lists to Parquet or JSON lines, and choose with --captions"),
        (result.long_captions or 0, f"captions have more than {max_tokens} tokens; the text encoder reads the first"),
    ]
    lines += [f"note        {count} {text}" for count, text in notes if count]
    if result.long_captions is None:
        lines.append("note        captions were not counted in tokens: the base has no tokenizer here")
    if result.passed_over:
        endings = ", ".join(f"{ending} {count}" for ending, count in list(result.passed_over.items())[:8])
        lines.append(f"note        files that are no videos: {endings}")
    for place, count in result.places.most_common(8):
        lines.append(f"from        {place}: {count}")
    if len(result.places) > 8:
        lines.append(f"from        {len(result.places) - 8} more hosts")
    return lines
