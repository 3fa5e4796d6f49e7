"""The options of a source: the flags that every command with a source accepts."""

from __future__ import annotations

import codecs
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated

from cyclopts import Group, Parameter

from flows.parameters import CAPTIONS, FORMAT, POSITIVE, SHARE
from tasks.records import UserError

if TYPE_CHECKING:
    from tasks.ingest.spec import SourceSpec


@Parameter(name="*", group=Group("Source options", sort_key=1))
@dataclass(frozen=True)
class SourceOptions:
    """How a source is read, apart from its address. In a deployment it is an object: `{split: train}`.

    Attributes:
        format: csv, parquet, jsonl, json, tar, msrvtt, sample, folder or classes; auto goes by the name.
        columns: a table's own names, as --columns.key id --columns.url link --columns.caption text; --columns.start and
            --columns.end for spans in seconds or HH:MM:SS.mmm; --columns.key '' makes keys from the links.
        split: MSR-VTT's own; of any other source train, validation or test, by a hash of each key.
        held_out_share: the share of the keys in validation, and again in test.
        captions: of several captions per clip: first, all (a row each), or a number, the seed of a draw.
        limit: the first rows only.
        base_url: the address that relative links resolve against, instead of the table's own folder.
        encoding: of a CSV or JSON lines that are not UTF-8, such as cp1252.
        allow_host: a host of the private network that links may name, as HOST or HOST:PORT, or the address of a folder
            or bucket that they may name; repeat the flag for several.
        proxy: an HTTP proxy for all requests; it decides which private addresses are reached.
    """

    format: Annotated[str, FORMAT] = "auto"
    columns: dict[str, str] | None = None
    split: str | None = None
    held_out_share: Annotated[float, SHARE] = 0.01
    captions: Annotated[int | str, CAPTIONS] = "first"
    limit: Annotated[int | None, POSITIVE] = None
    base_url: str | None = None
    encoding: str | None = None
    allow_host: list[str] = field(default_factory=list)
    proxy: str | None = None

    def spec(self, table: str) -> SourceSpec:
        """The source at that address with these options. Raises UserError for a limit that leaves no row."""
        from tasks.ingest.spec import WEBVID_COLUMNS, SourceSpec

        if self.limit is not None and self.limit < 1:
            raise UserError(f"limit {self.limit}, expected the number of rows to read, at least 1")
        return SourceSpec(
            table,
            # With WebVid's names for what is not named: the columns are part of a data set's address.
            columns=WEBVID_COLUMNS | (self.columns or {}),
            limit=self.limit,
            base_url=self.base_url,
            format=self.format,
            split=self.split,
            held_out=self.held_out_share,
            captions=self.captions,
            encoding=_known_encoding(self.encoding),
            allow=tuple(self.allow_host),
            proxy=self.proxy,
        )


DEFAULT = SourceOptions()


def _known_encoding(name: str | None) -> str | None:
    """The name of an encoding as Python writes it. Raises UserError for an unknown one."""
    try:
        return None if name is None else codecs.lookup(name).name
    except LookupError as error:
        raise UserError(f"encoding {name!r} is not known; give one such as utf-8, cp1252 or utf-16") from error


def named_source(table: str | None, options: SourceOptions) -> SourceSpec | None:
    """The source that a command names; None if it names none. Raises UserError for options without a source."""
    if table is not None:
        return options.spec(table)
    if options != DEFAULT:
        raise UserError("source options without a source; name a table or a folder: --source TABLE")
    return None
