"""Where the clips of a study come from: folders of videos named after their items, and reports of evaluations."""

from __future__ import annotations

import csv
import io
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import PurePosixPath
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from infra import storage
from tasks.evaluation_record import (
    FROZEN,
    REAL,
    REPORT_FILE,
    TRIP,
    EvaluatedItem,
    EvaluatedItems,
    EvaluationRecord,
    read_evaluation,
    read_items,
)
from tasks.records import UserError
from tasks.shards import ShardDataset
from tasks.video.clip_files import FRAME_SUFFIXES, SUFFIXES, files_of, read_frames
from tasks.video.decode import ClipError
from trip_model.images import load_image

Pixels = NDArray[np.uint8]
_NAME = re.compile(r"[A-Za-z0-9^_][A-Za-z0-9^_.+-]{0,39}")
MAX_PROMPT = 1000  # characters that a page shows


class Clips(Protocol):
    """The clips of one system."""

    @property
    def keys(self) -> set[str]:
        """The items that there is a clip of."""
        ...

    def read(self, key: str, frames: int, size: int) -> Pixels:
        """The first frames of a clip, uint8 [frames, size, size, 3]. Raises UserError."""
        ...


@dataclass(frozen=True)
class Folder:
    """A folder with KEY.mp4 (.gif, .npz ..) or KEY/ with numbered frames; KEY is the item's, or its clip's.

    Attributes:
        address: of the folder.
        clips: by item the name of its clip, of items that are the only one of theirs.
    """

    address: str
    clips: Mapping[str, str] = field(default_factory=dict, repr=False)

    @cached_property
    def names(self) -> set[str]:
        names = set(storage.list_dir(self.address))
        if not names:
            raise UserError(
                f"no videos at {self.address}; give a folder of videos named after their items, or a report"
            )
        return names

    @property
    def keys(self) -> set[str]:
        suffixes = (*SUFFIXES, *(suffix.upper() for suffix in SUFFIXES))
        files = {name[: -len(PurePosixPath(name).suffix)] for name in self.names if name.endswith(suffixes)}
        found = files | {name for name in self.names if "." not in name}
        by_clip = {key for key, clip in self.clips.items() if clip in found}
        return (found - set(self.clips.values())) | by_clip | (found & set(self.clips))

    def read(self, key: str, frames: int, size: int) -> Pixels:
        files = files_of(self.address, key, self.names)
        if not files and key in self.clips:
            files = files_of(self.address, self.clips[key], self.names)
        return _read(files, self.address, key, frames, size)


@dataclass(frozen=True)
class Generations:
    """The clips of the model of a report, as its user gets them: frame 1 is the given image."""

    report: Report
    folder: Folder

    @property
    def keys(self) -> set[str]:
        return self.folder.keys & self.report.keys

    def read(self, key: str, frames: int, size: int) -> Pixels:
        clip = self.folder.read(key, frames, size)
        return np.concatenate([self.report.real(key, 1, size), clip[1:]])


@dataclass(frozen=True)
class Real:
    """The true clips of a report, or with `still` their first frames repeated."""

    report: Report
    still: bool = False

    @property
    def keys(self) -> set[str]:
        return self.report.keys

    def read(self, key: str, frames: int, size: int) -> Pixels:
        if self.still:
            return np.repeat(self.report.real(key, 1, size), frames, axis=0)
        return self.report.real(key, frames, size)


@dataclass(frozen=True)
class Report:
    """A finished evaluation: its items, and the clips of its systems.

    Only what the report's folder, its data set and its folders of other methods hold: the model (`trip`), `real`,
    `frozen`, and each method.
    """

    address: str
    items: EvaluatedItems = field(repr=False)

    @cached_property
    def by_key(self) -> dict[str, EvaluatedItem]:
        return {item.key: item for item in self.items.items}

    @property
    def keys(self) -> set[str]:
        return set(self.by_key) & set(self._indices)

    @cached_property
    def clips(self) -> dict[str, str]:
        """The clip of each item that is the only one of its clip: another method may name its video after either."""
        windows = Counter(item.clip for item in self.items.items)
        return {item.key: item.clip for item in self.items.items if windows[item.clip] == 1}

    @cached_property
    def _record(self) -> EvaluationRecord:
        return read_evaluation(self.address)

    @cached_property
    def _dataset(self) -> ShardDataset:
        return ShardDataset(self._record.provenance["dataset"])

    @cached_property
    def _indices(self) -> dict[str, int]:
        return {key: index for index, key in enumerate(self._dataset.keys)}

    def real(self, key: str, frames: int, size: int) -> Pixels:
        """The first true frames of an item, uint8 [frames, size, size, 3]."""
        pixels = self._dataset.read(self._indices[key], ("pixels",), (0, frames))["pixels"]
        return np.stack([load_image(frame, size) for frame in pixels])

    def system(self, row: str) -> Clips:
        """The clips of a row of the report. Raises UserError for a row whose clips it does not keep."""
        if row == TRIP:
            return Generations(self, Folder(storage.join(self.address, self._record.generations)))
        if row in (REAL, FROZEN):
            return Real(self, still=row == FROZEN)
        folders = {
            name: folder
            for name, folder in self._record.provenance.get("folders", {}).items()
            if name not in ("champion", "base")
        }
        if row in folders:
            return Folder(folders[row], self.clips)
        raise UserError(
            f"the report at {self.address} keeps no clips of {row!r}; use {', '.join((TRIP, REAL, FROZEN, *folders))}"
        )


def open_report(address: str) -> Report:
    """A finished evaluation. Raises UserError if there is none."""
    read_evaluation(address)
    return Report(storage.absolute(address), read_items(address))


def parse_systems(given: Sequence[str]) -> dict[str, str]:
    """Addresses by name from NAME=ADDRESS each. Raises UserError for fewer than two, a bad name or one given twice."""
    systems: dict[str, str] = {}
    for text in given:
        name, equals, address = text.partition("=")
        if not equals or not address or not _NAME.fullmatch(name) or name in systems:
            raise UserError(
                f"system {text!r}, expected NAME=ADDRESS with a new name of letters, digits and ^_.+-, such as"
                " ours=runs/demo/evaluate/0123456789abcdef or other=videos/other"
            )
        systems[name] = address
    if len(systems) < 2:
        raise UserError(f"{len(systems)} systems, expected two or more: --system ours=REPORT --system other=FOLDER")
    return systems


def open_system(address: str) -> tuple[Clips, Report | None]:
    """The clips at ADDRESS, a folder of videos or a report, or at REPORT#ROW; with the report, if it is one."""
    plain, _, row = address.partition("#")
    if storage.exists(storage.join(plain, REPORT_FILE)):
        report = open_report(plain)
        return report.system(row or TRIP), report
    if row:
        raise UserError(f"{address} names the row {row!r}, but there is no {REPORT_FILE} at {plain}")
    return Folder(storage.absolute(plain)), None


def read_photo(folder: str, key: str, size: int) -> Pixels:
    """The given image of an item, uint8 [size, size, 3]: KEY.png, KEY.jpg .., or the first frame of KEY's video.

    Raises:
        UserError: there is none, or it cannot be read.
    """
    names = set(storage.list_dir(folder))
    for suffix in FRAME_SUFFIXES:
        if key + suffix in names:
            address = storage.join(folder, key + suffix)
            try:
                return load_image(storage.read_bytes(address), size)
            except ValueError as error:
                raise UserError(f"photo {address} cannot be read ({error})") from error
    return _read(files_of(folder, key, names), folder, key, 1, size)[0]


def read_prompts(address: str) -> dict[str, str]:
    """Prompts by key, from a CSV with the columns key and prompt. Raises UserError."""
    try:
        text = storage.read_bytes(address).decode("utf-8-sig")
        rows = csv.DictReader(io.StringIO(text))
        if not {"key", "prompt"} <= set(rows.fieldnames or ()):
            raise ValueError(f"its columns are {', '.join(rows.fieldnames or ())}")
        return {row["key"]: (row["prompt"] or "")[:MAX_PROMPT] for row in rows}
    except (OSError, ValueError, csv.Error) as error:
        raise UserError(f"--prompts {address}: {error}; give a CSV with the columns key and prompt") from error


def _read(files: Sequence[str], folder: str, key: str, frames: int, size: int) -> Pixels:
    if not files:
        raise UserError(f"no video of item {key} in {folder}")
    try:
        return read_frames(files, frames, size)
    except ClipError as error:
        raise UserError(f"item {key} in {folder}: {error}") from error


def report_rows(sources: Mapping[str, str]) -> dict[str, str]:
    """The row of a report that each system is, for systems that come from one; addresses by system."""
    rows = {}
    for name, address in sources.items():
        plain, _, row = address.partition("#")
        if row or storage.exists(storage.join(plain, REPORT_FILE)):
            rows[name] = row or TRIP
    return rows
