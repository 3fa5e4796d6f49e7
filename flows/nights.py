"""Records of the nightly flow below a root, and the check whether a night has anything new; imports no framework."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime

import numpy as np

from flows import layout
from flows.layout import Run
from flows.source import SourceOptions
from infra import storage
from tasks.json_records import parse_record
from tasks.records import Artifact, digest
from tasks.shards import MANIFEST, ShardDataset

FOLDER = "nights"


@dataclass(frozen=True)
class Night:
    """What one night did; written at its end.

    Attributes:
        time: when it ended, UTC.
        question: digest of all that a night's result follows from: the source's rows, the recipe and the base.
        data: address and hash of the data set.
        outcome: in words.
        new_clips: clips of the data set that the last training had not.
        trained_on: address of the data set of the last training up to this night, "" without one.
        model: address of the model folder, "" if none was trained.
        report: address of its evaluation, "" if none was trained.
        version: of the registry, "" if none was trained.
        champion: whether this version is champion now.
    """

    time: str
    question: str
    data: Artifact
    outcome: str
    new_clips: int
    trained_on: str = ""
    model: str = ""
    report: str = ""
    version: str = ""
    champion: bool = False


def write_night(root: str, night: Night) -> None:
    storage.write_json(storage.join(root, FOLDER, f"{night.time}.json"), asdict(night))


def read_nights(root: str) -> list[Night]:
    """The nights of a root, the newest last. Raises ValueError for a damaged record."""
    folder = storage.join(root, FOLDER)
    names = [name for name in storage.list_dir(folder) if name.endswith(".json")]
    return [parse_record(Night, storage.read_bytes(storage.join(folder, name))) for name in names]


def now() -> str:
    """The time as a name that sorts: 2026-11-28T03-00-00-123456Z."""
    return datetime.now(UTC).strftime("%Y-%m-%dT%H-%M-%S-%fZ")


def question_of(run: Run, held_out: Run | None, parameters: Sequence[object]) -> str:
    """The digest of all that a night's result follows from; reads the source, downloads nothing."""
    sources = [[asdict(r.prepare.source), r.prepare.fingerprint] for r in (run, held_out) if r is not None]
    base = layout.base_hash(run.recipe.train.base)
    return digest([run.recipe.identity(), base, sources, list(parameters)])


def nothing_new(run: Run, question: str) -> str | None:
    """A sentence if the last night answered the same question and its data set is unchanged, else None."""
    nights = read_nights(run.root)
    if not nights or nights[-1].question != question:
        return None
    last = nights[-1]
    try:
        unchanged = layout.data_set(last.data.uri) == last.data
    except ValueError:  # UserError: removed, or a removal of clips from it is not complete
        return None
    return f"nothing new since {last.time}: {last.outcome}" if unchanged else None


def count_new_clips(data: Artifact, trained_on: str) -> int:
    """How many clips a data set has that the data set of the last training had not; all without a training."""
    clips = ShardDataset(data.uri).index.clip_hashes_N
    before = np.empty(0, np.uint64)
    if trained_on and storage.exists(storage.join(trained_on, MANIFEST)):
        before = ShardDataset(trained_on).index.clip_hashes_N
    return len(np.setdiff1d(clips, before))


def check(
    recipe: str,
    source: str | None,
    root: str,
    base: str | None,
    held_out_source: str | None,
    protocol: str | None,
    name: str,
    least_new: int,
    start: str,
    values: Sequence[str] | None,
    options: SourceOptions,
    held_out_options: SourceOptions,
    **_: object,
) -> str | None:
    """`nothing_new` for the parameters of the nightly flow."""
    run = layout.resolve(recipe, source, root, base, options, values)
    second = layout.held_out_run(run, held_out_source, held_out_options)
    return nothing_new(run, question_of(run, second, [protocol, name, least_new, start]))
