"""How a source is read: the flags that all commands share which open one."""

from __future__ import annotations

from dataclasses import dataclass

from cyclopts import Group, Parameter

from tasks.ingest.sources import WEBVID_COLUMNS, SourceSpec
from tasks.records import UserError


@Parameter(name="*", group=Group("How the source is read", sort_key=1))
@dataclass(frozen=True)
class Reading:
    """What a command may say of a source beside its address. In a deployment it is an object: `{split: train}`.

    Attributes:
        format: csv, parquet, jsonl, msrvtt, sample, folder or classes; auto goes by the name.
        columns: a table's own names, as --columns.key id --columns.url link --columns.caption text.
        split: MSR-VTT's own; of any other source train, validation or test, by a hash of each key.
        held_out_share: the share of the keys in validation, and again in test.
        captions: of several a clip: first, all (a row each), or a number, the seed of a draw.
        limit: the first rows only.
        base_url: where relative links lie, instead of the table's own folder.
    """

    format: str = "auto"
    columns: dict[str, str] | None = None
    split: str | None = None
    held_out_share: float = 0.01
    captions: int | str = "first"
    limit: int | None = None
    base_url: str | None = None

    def of(self, table: str) -> SourceSpec:
        """The source at that address, read so. Raises UserError for a limit that leaves no row."""
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
        )


PLAIN = Reading()


def named_source(table: str | None, reading: Reading) -> SourceSpec | None:
    """The source that a command names; None where it names none. Raises UserError for a reading of nothing."""
    if table is not None:
        return reading.of(table)
    if reading != PLAIN:
        raise UserError("flags say how a source is read, but there is none; name a table or a folder: --source TABLE")
    return None
