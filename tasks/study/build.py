"""Builds a study: draws items, pairs the systems, adds gold and repeated pairs, writes media, plan and key."""

from __future__ import annotations

import hashlib
import itertools
import os
import secrets
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path

import numpy as np
from PIL import Image

from infra import storage
from infra.redaction import redact
from tasks.evaluation_record import REAL
from tasks.records import UserError, to_json
from tasks.study.assign import assign
from tasks.study.media import common_sizes, frame_sizes, padded
from tasks.study.plan import (
    BUNDLE,
    KEY_FILE,
    PLAN_FILE,
    QUESTIONS,
    ExclusionRule,
    Key,
    Kind,
    Pair,
    Place,
    Plan,
    Platform,
    Question,
    SealedPair,
)
from tasks.study.power import power_sentences
from tasks.study.rating_page import write_page
from tasks.study.sources import Clips, Folder, Pixels, Report, open_system, read_photo, read_prompts
from trip_model.images import video_bytes

FRAMES, FPS, SIZE = 16, 4.0, 256  # of clips from folders, where no report says otherwise: Section 4.1 of the paper
ITEMS = 256  # at most: Section 4.1, human evaluation
LEAST_ITEMS = 2
SPARE = 2  # assignments for each planned rater: some raters stop and are replaced


@dataclass(frozen=True)
class StudySpec:
    """What to compare, and how the study is laid out. None stands for a value that follows from the sources.

    Attributes:
        systems: addresses by name, of folders of videos, reports, or rows of reports (REPORT#ROW).
        output: folder of the study.
        key: address of the sealed key; None: next to the output, as OUTPUT-key.json.
        real: folder or REPORT#real with the true clips that gold pairs are made of; None: the first report's.
        photos: folder with the given images by item; None: first frames of the true clips.
        prompts: CSV of the columns key and prompt; None: the captions of the first report, if any.
        items: number of items, drawn with `seed`; None: all that every system has, at most ITEMS.
        raters: number of raters that are planned.
        per_rater: pairs of each rater, gold and repeated ones not counted; None: all.
        gold: number of gold pairs, half of them shuffled in time and half frozen.
        repeats: number of pairs that each rater sees twice, sides swapped; None: a tenth of `per_rater`.
        crf: quality of the encoder, lower is better.
    """

    systems: dict[str, str]
    output: str
    key: str | None = None
    real: str | None = None
    photos: str | None = None
    prompts: str | None = None
    items: int | None = None
    raters: int = 32
    per_rater: int | None = None
    gold: int = 4
    repeats: int | None = None
    frames: int | None = None
    fps: float | None = None
    size: int | None = None
    seed: int = 0
    crf: int = 16
    title: str = "Which clip is better?"
    contact: str = ""
    platform: Platform = "none"
    completion_code: str = ""
    rule: ExclusionRule = field(default_factory=ExclusionRule)
    questions: tuple[Question, ...] = QUESTIONS


@dataclass(frozen=True)
class _Item:
    key: str
    clip: str
    prompt: str


@dataclass(frozen=True)
class _Draft:
    """A pair before it has names: what it is, and how to make its two clips."""

    kind: Kind
    item: _Item
    first: str
    second: str
    clips: tuple[Callable[[], Pixels], Callable[[], Pixels]]


class _Sources:
    """The systems of a study, opened, with the items that all of them have."""

    def __init__(self, spec: StudySpec) -> None:
        self.spec = spec
        opened = {name: open_system(address) for name, address in spec.systems.items()}
        self.systems: dict[str, Clips] = {name: clips for name, (clips, _) in opened.items()}
        self.reports = [report for _, report in opened.values() if report is not None]
        self.report: Report | None = self.reports[0] if self.reports else None
        if self.report is not None:
            for name, clips in self.systems.items():
                if isinstance(clips, Folder):
                    self.systems[name] = replace(clips, clips=self.report.clips)
        known = self.report.items if self.report is not None else None
        self.frames = spec.frames or (known.frames if known else FRAMES)
        self.fps = spec.fps or (known.fps if known else FPS)
        self.size = spec.size or (known.size if known else SIZE)
        for name, value, least in (("frames", self.frames, 2), ("size", self.size, 16), ("raters", spec.raters, 2)):
            if value < least:
                raise UserError(f"--{name} {value}, expected at least {least}")
        if self.size % 2:
            raise UserError(f"--size {self.size} is odd, mp4 needs even sides")
        if not 0 < self.fps <= 60:
            raise UserError(f"--fps {self.fps:g}, expected above 0 and at most 60")
        self._prompts = read_prompts(spec.prompts) if spec.prompts is not None else {}

    @cached_property
    def real(self) -> Clips | None:
        if self.spec.real is not None:
            return open_system(self.spec.real)[0]
        return self.report.system(REAL) if self.report is not None else None

    @cached_property
    def common(self) -> tuple[_Item, ...]:
        """The items that every system has a clip of, ordered by key."""
        keys = set.intersection(*(clips.keys for clips in self.systems.values()))
        if self.real is not None:
            keys &= self.real.keys
        by_key = self.report.by_key if self.report is not None else {}
        keys = keys & set(by_key) if by_key else keys
        items = []
        for key in sorted(keys):
            known = by_key.get(key)
            items.append(
                _Item(key, known.clip if known else key, self._prompts.get(key, known.caption if known else ""))
            )
        return tuple(items)

    def photo(self, item: _Item) -> Pixels:
        if self.spec.photos is not None:
            return read_photo(self.spec.photos, item.key, self.size)
        assert self.real is not None
        return self.real.read(item.key, 1, self.size)[0]


def build(spec: StudySpec, log: Callable[[str], None]) -> Plan:
    """Builds a study into an empty folder and returns its plan; the key is written last, apart from it.

    Raises:
        UserError: an output that exists, systems without common items, numbers that do not fit, or a clip that cannot
            be read.
    """
    output = _local(spec.output, "--output")
    key_address = str(_local(spec.key or f"{str(output).rstrip('/')}-{KEY_FILE}", "--key"))
    if output.exists() and any(output.iterdir()):
        raise UserError(f"{output} is not empty; a study is never changed, so name a new folder")
    if storage.exists(key_address):
        raise UserError(f"{key_address} exists; name another file with --key")
    if Path(key_address).resolve().is_relative_to(output.resolve()):
        raise UserError(f"--key {key_address} lies inside the study, which the server reads; name a place outside")
    sources = _Sources(spec)
    items, repeats, per_rater = _layout(spec, sources, log)
    rng = np.random.default_rng(secrets.randbits(128))
    drafts, groups = _study_pairs(sources, items)
    copies = _repeated(groups, repeats, rng)
    gold = _gold_pairs(spec, sources, items, rng)
    every = [*drafts, *(_copy(drafts[pair]) for pair in copies), *gold]
    copy_of = {pair: len(drafts) + number for number, pair in enumerate(copies)}
    gold_places = [(len(drafts) + len(copies) + n, draft.first == REAL) for n, draft in enumerate(gold)]
    assignments = assign(groups, gold_places, copy_of, per_rater, SPARE * spec.raters, rng)
    # Neither a pair's place in the plan nor which clip is its first says what it is.
    order = rng.permutation(len(every)).tolist()
    place = {old: new for new, old in enumerate(order)}
    turned = rng.integers(2, size=len(every)).astype(bool).tolist()
    mixed = [_turned(every[old]) if turned[old] else every[old] for old in order]
    bundle = output / BUNDLE
    pairs, sealed, media_bytes = _write_media(mixed, sources, bundle, spec.crf, log)
    key = Key(
        study=secrets.token_hex(8),
        salt=secrets.token_hex(32),
        systems=tuple(spec.systems),
        sources={name: redact(address) for name, address in spec.systems.items()},
        report=redact(sources.report.address) if sources.report is not None else "",
        pairs=tuple(sealed),
    )
    content = storage.json_bytes(to_json(key))
    plan = Plan(
        study=key.study,
        title=spec.title,
        contact=spec.contact,
        questions=spec.questions,
        rule=spec.rule,
        platform=spec.platform,
        completion_code=spec.completion_code,
        raters=spec.raters,
        pairs=tuple(pairs),
        assignments=tuple(
            tuple(Place(place[shown.pair], shown.swapped != turned[shown.pair]) for shown in rater)
            for rater in assignments
        ),
        seconds=sources.frames / sources.fps,
        media_bytes=media_bytes,
        power=power_sentences(spec.raters, len(items), per_rater, len(groups)),
        key_sha256=hashlib.sha256(content).hexdigest(),
    )
    write_page(plan, bundle)
    storage.write_bytes(key_address, content)
    os.chmod(key_address, 0o600)
    storage.write_json(str(output / PLAN_FILE), to_json(plan))
    log(f"study       {len(items)} items, {len(plan.assignments[0])} pairs for each rater, in {output}")
    log(f"study       the key is in {key_address}: keep it from the server and the raters until the votes are in")
    return plan


def _local(address: str, flag: str) -> Path:
    path = storage.local_path(storage.absolute(address))
    if path is None:
        raise UserError(f"{flag} {redact(address)} is not a local path; the server of a study reads a local folder")
    return path


def _layout(spec: StudySpec, sources: _Sources, log: Callable[[str], None]) -> tuple[tuple[_Item, ...], int, int]:
    """The items, the number of repeated pairs and of pairs for each rater. Raises UserError."""
    if spec.photos is None and sources.real is None:
        raise UserError("the given photos are unknown; add --photos FOLDER, or --real FOLDER with the true clips")
    common = sources.common
    count = min(len(common), ITEMS) if spec.items is None else spec.items
    if count < LEAST_ITEMS or count > len(common):
        of_each = ", ".join(f"{name} {len(clips.keys)}" for name, clips in sources.systems.items())
        raise UserError(
            f"{count} items of {len(common)} that all systems have ({of_each}), expected {LEAST_ITEMS} to that number"
        )
    left_out = len(set.union(*(clips.keys for clips in sources.systems.values()))) - len(common)
    if left_out:
        log(f"study       {left_out} items are left out: not every system has a clip of them")
    drawn = np.random.default_rng(spec.seed).permutation(len(common))[:count]
    items = tuple(common[i] for i in sorted(drawn.tolist()))
    comparisons = len(list(itertools.combinations(spec.systems, 2)))
    per_rater = count * comparisons if spec.per_rater is None else spec.per_rater
    if not comparisons <= per_rater <= count * comparisons:
        raise UserError(f"--per-rater {per_rater}, expected {comparisons} to {count * comparisons} pairs")
    repeats = max(1, round(per_rater / 10)) if spec.repeats is None else spec.repeats
    if not 0 <= repeats <= per_rater // 2:
        raise UserError(f"--repeats {repeats}, expected 0 to {per_rater // 2}, half of the pairs of a rater")
    if not 0 <= spec.gold <= 2 * count:
        raise UserError(f"--gold {spec.gold}, expected 0 to {2 * count}, two for each item")
    if spec.gold and sources.real is None:
        raise UserError("gold pairs need the true clips: add --real FOLDER, or --gold 0 for a study without them")
    return items, repeats, per_rater


def _study_pairs(sources: _Sources, items: tuple[_Item, ...]) -> tuple[list[_Draft], list[list[int]]]:
    """Each two systems on each item, and the indices of each two systems' pairs."""
    drafts: list[_Draft] = []
    groups: list[list[int]] = []
    for first, second in itertools.combinations(sources.systems, 2):
        groups.append(list(range(len(drafts), len(drafts) + len(items))))
        for item in items:
            clips = (_reader(sources, first, item), _reader(sources, second, item))
            drafts.append(_Draft("study", item, first, second, clips))
    return drafts, groups


def _reader(sources: _Sources, system: str, item: _Item) -> Callable[[], Pixels]:
    return lambda: sources.systems[system].read(item.key, sources.frames, sources.size)


def _copy(draft: _Draft) -> _Draft:
    return replace(draft, kind="repeat")


def _turned(draft: _Draft) -> _Draft:
    return replace(draft, first=draft.second, second=draft.first, clips=draft.clips[::-1])


def _repeated(groups: list[list[int]], count: int, rng: np.random.Generator) -> list[int]:
    """Pairs to repeat, from all comparisons in turn, in random order of their items."""
    shuffled = [rng.permutation(group).tolist() for group in groups]
    in_turn = [pair for column in zip(*shuffled, strict=True) for pair in column]
    return in_turn[:count]


def _gold_pairs(spec: StudySpec, sources: _Sources, items: tuple[_Item, ...], rng: np.random.Generator) -> list[_Draft]:
    """Half shuffled, half frozen, on items in random order; the true clip is first in every second one."""
    drafts: list[_Draft] = []
    order = rng.permutation(len(items)).tolist()
    real = sources.real
    for number in range(spec.gold):
        assert real is not None
        item = items[order[number % len(order)]]
        kind: Kind = "shuffled" if number % 2 == 0 else "frozen"
        # The first frame stays: it is the photo.
        frames = np.concatenate([[0], 1 + _derangement(sources.frames - 1, rng)]) if kind == "shuffled" else [0]
        positions = np.resize(np.asarray(frames), sources.frames)
        spoiled = _at(real, item.key, sources, positions)
        true = _at(real, item.key, sources, np.arange(sources.frames))
        if number // 2 % 2 == 0:
            drafts.append(_Draft(kind, item, REAL, kind, (true, spoiled)))
        else:
            drafts.append(_Draft(kind, item, kind, REAL, (spoiled, true)))
    return drafts


def _at(real: Clips, key: str, sources: _Sources, positions: np.ndarray) -> Callable[[], Pixels]:
    return lambda: real.read(key, sources.frames, sources.size)[positions]


def _derangement(count: int, rng: np.random.Generator) -> np.ndarray:
    """A random order in which no frame keeps its place (for a single one, its own)."""
    while True:
        order = rng.permutation(count)
        if count < 2 or not (order == np.arange(count)).any():
            return order


def _write_media(
    drafts: list[_Draft], sources: _Sources, bundle: Path, crf: int, log: Callable[[str], None]
) -> tuple[list[Pair], list[SealedPair], int]:
    """Encodes every clip, pads all of them to one size and writes them with the photos under random names."""
    (bundle / "media").mkdir(parents=True, exist_ok=True)
    pairs, sealed = [], []
    with tempfile.TemporaryDirectory(prefix="trip-study-") as scratch:
        sizes: list[list[int]] = []
        for number, draft in enumerate(drafts):
            for side, clip in enumerate(draft.clips):
                video = video_bytes(clip(), sources.fps, "mp4", crf)
                (Path(scratch) / f"{number}-{side}").write_bytes(video)
                sizes.append(frame_sizes(video))
            if number % 64 == 0:
                log(f"study       encoding pair {number + 1} of {len(drafts)}")
        common = common_sizes(sizes)
        lengths: set[int] = set()
        for number, draft in enumerate(drafts):
            names = [secrets.token_hex(16) for _ in range(4)]
            for side in (0, 1):
                content = padded((Path(scratch) / f"{number}-{side}").read_bytes(), common)
                lengths.add(len(content))
                _write(bundle / "media" / f"{names[side]}.mp4", content)
            photo = bundle / "media" / f"{names[2]}.png"
            Image.fromarray(sources.photo(draft.item)).save(photo)
            os.utime(photo, (0, 0))
            pairs.append(Pair(names[3], names[2], draft.item.prompt, names[0], names[1]))
            sealed.append(SealedPair(names[3], draft.kind, draft.item.key, draft.item.clip, draft.first, draft.second))
    assert len(lengths) == 1, f"clips of {sorted(lengths)} bytes"
    return pairs, sealed, lengths.pop()


def _write(path: Path, content: bytes) -> None:
    """Writes a file with the same time of change as every other."""
    path.write_bytes(content)
    os.utime(path, (0, 0))


def parts(plan: Plan) -> Iterator[str]:
    """The power statement and the rule, as lines for the console."""
    yield from plan.power
    rule = plan.rule
    yield (
        f"Excluded is a rater with votes on less than {rule.least_answered:.0%} of the pairs, fewer than "
        f"{rule.least_gold:.0%} right answers to gold pairs, fewer than {rule.least_repeats:.0%} equal answers to "
        f"repeated pairs, or more than {rule.most_one_side:.0%} of answers on one side."
    )
