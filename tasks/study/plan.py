"""The plan of a preference study, fixed before the first vote, and its sealed key."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Literal, TypeVar

from infra import storage
from tasks.json_records import parse_record
from tasks.records import UserError, to_json

PLAN_FILE = "plan.json"
KEY_FILE = "key.json"
BUNDLE = "bundle"  # the folder of the study that the server gives to everybody
SCHEMA = 1
Kind = Literal["study", "repeat", "shuffled", "frozen"]
Platform = Literal["none", "prolific", "mturk"]
Record = TypeVar("Record")
ANSWERS = ("left", "right", "unsure")


@dataclass(frozen=True)
class Question:
    """What a rater is asked about every pair: a name for records, a title and what it means."""

    name: str
    title: str
    definition: str


# The three criteria of Section 4.3; the paper does not print its wording.
QUESTIONS = (
    Question("temporal_coherence", "Temporal coherence", "In which clip do things keep their shape and place?"),
    Question("motion_fidelity", "Motion fidelity", "Which clip moves more naturally, and as the sentence says?"),
    Question("visual_quality", "Visual quality", "Which clip looks better: sharper, with fewer faults?"),
)


@dataclass(frozen=True)
class ExclusionRule:
    """Which raters are left out of the second tally. Each share is of the rater's own votes.

    Attributes:
        least_answered: least share of the rater's pairs that have a vote.
        least_gold: least share of right answers to the gold pairs; "not sure" is not right.
        least_repeats: least share of equal answers to the repeated pairs, from 4 answers on.
        most_one_side: largest share of one side among the answers left and right, from 20 answers on.
    """

    least_answered: float = 0.5
    least_gold: float = 0.75
    least_repeats: float = 0.5
    most_one_side: float = 0.95


@dataclass(frozen=True)
class Pair:
    """Two clips of one photo, under opaque names. Nothing here says which system or which kind of pair it is."""

    name: str
    photo: str
    prompt: str
    first: str
    second: str


@dataclass(frozen=True)
class Place:
    """One pair of a rater: its index in the plan, and whether the second clip is on the left."""

    pair: int
    swapped: bool


@dataclass(frozen=True)
class Plan:
    """What the server needs, and what is fixed before the first vote.

    Attributes:
        study: opaque identity of the study.
        title: shown above the page; names no system.
        contact: shown in the consent text; how to reach who runs the study.
        raters: number of raters that the power statement is for.
        assignments: by rater, the pairs in their order with their sides; there are some for later raters, too.
        seconds: length of a clip.
        media_bytes: size of every clip.
        power: sentences about what the study can show, printed before it starts.
        key_sha256: hash of the key's file, which therefore cannot change after the first vote either.
    """

    study: str
    title: str
    contact: str
    questions: tuple[Question, ...]
    rule: ExclusionRule
    platform: Platform
    completion_code: str
    raters: int
    pairs: tuple[Pair, ...]
    assignments: tuple[tuple[Place, ...], ...]
    seconds: float
    media_bytes: int
    power: tuple[str, ...]
    key_sha256: str
    schema_version: int = SCHEMA

    @property
    def sha256(self) -> str:
        """Hash of the plan as it is stored."""
        return hashlib.sha256(storage.json_bytes(to_json(self))).hexdigest()


@dataclass(frozen=True)
class SealedPair:
    """What a pair of the plan is.

    Attributes:
        name: of the pair in the plan.
        kind: a pair of the study, a repeat of one, or a gold pair of the real clip and itself shuffled or frozen.
        item: key of the item.
        clip: source clip of the item, the cluster of the statistics.
        first: system of the pair's first clip; in a gold pair "real" or its kind.
        second: system of the second clip.
    """

    name: str
    kind: Kind
    item: str
    clip: str
    first: str
    second: str


@dataclass(frozen=True)
class Key:
    """Which clip is of which system. Kept apart from the study until the votes are in."""

    study: str
    salt: str
    systems: tuple[str, ...]
    sources: dict[str, str]
    report: str
    pairs: tuple[SealedPair, ...]
    schema_version: int = SCHEMA


def read_plan(folder: str) -> Plan:
    """Reads the plan of a study folder. Raises UserError if there is none or it is damaged."""
    return _read(Plan, storage.join(folder, PLAN_FILE), "plan")


def read_key(address: str, plan: Plan) -> Key:
    """Reads the key of a study. Raises UserError if there is none or the plan was not sealed with it."""
    key = _read(Key, address, "key")
    if hashlib.sha256(storage.read_bytes(address)).hexdigest() != plan.key_sha256:
        raise UserError(f"{address} is not the key that this plan was sealed with; give the key of the same build")
    return key


def _read(kind: type[Record], address: str, what: str) -> Record:
    try:
        content = storage.read_bytes(address)
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError) as error:
        raise UserError(
            f"no {what} of a preference study at {address}; give what preference-study has written"
        ) from error
    try:
        record = parse_record(kind, content)
    except ValueError as error:
        raise UserError(f"{address} is damaged or of another version ({error}); build the study again") from error
    return record
