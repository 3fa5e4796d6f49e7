"""Which items are evaluated and how (section 4.1): presets as data, resolved on a data set to a hashed manifest."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from infra import storage
from tasks.evaluate.protocol.presets import Preset, PublishedRow, load_preset, preset_names, published_rows
from tasks.evaluation_record import PROTOCOL_SCHEMA
from tasks.json_records import parse_record
from tasks.records import UserError
from tasks.shards import ShardDataset, split_keys

LEAST_FRAMES = 4  # of F-Consistency/4


@dataclass(frozen=True)
class Item:
    """One window to animate: its place in the data set, its clip (the cluster of statistics), caption and seed.

    `start` is where the window begins in the clip, in seconds (at the stated rate, where frames are taken by a stride);
    `category` is empty where the protocol has none. Of a window's repeats, those after the first have a number behind
    the sample's key.
    """

    key: str
    clip: str
    index: int
    caption: str
    seed: int
    category: str = ""
    start: float = 0.0


@dataclass(frozen=True)
class _Line:
    """An item in a manifest: without its place, which is the data set's affair."""

    key: str
    clip: str
    caption: str
    seed: int
    category: str
    start: float


@dataclass(frozen=True)
class Manifest:
    """What is written for another lab: the rules, and the items that they select here."""

    schema: str
    name: str
    rules: Preset
    frames: int
    fps: float
    size: int
    items: tuple[_Line, ...]
    sha256: str = ""


@dataclass(frozen=True)
class Protocol:
    """The items of one evaluation in their fixed order; equal hashes mean that the same thing was asked.

    `excluded` counts, by reason, what was asked and is not in the data set.
    """

    name: str
    rules: Preset
    items: tuple[Item, ...]
    frames: int
    fps: float
    size: int
    excluded: tuple[tuple[str, int], ...] = ()

    @property
    def clips(self) -> int:
        """Unique clips: the N of every statement, however many windows each clip gives."""
        return len({item.clip for item in self.items})

    @property
    def published(self) -> tuple[PublishedRow, ...]:
        """The rows to print next to this protocol's, as published, other harness."""
        return self.rules.published or (published_rows(self.rules.beside) if self.rules.beside else ())

    @property
    def sha(self) -> str:
        """Hex sha256 of the manifest."""
        return self.manifest()["sha256"]

    @property
    def sampling(self) -> str:
        """How many frames an item has, and which."""
        return _sampling(self.frames, self.fps, self.rules.stride)

    def manifest(self) -> dict[str, Any]:
        """The protocol as JSON that `load_protocol` takes again; another lab with the same clips can use it."""
        lines = tuple(_Line(i.key, i.clip, i.caption, i.seed, i.category, i.start) for i in self.items)
        open_ = Manifest(PROTOCOL_SCHEMA, self.name, self.rules, self.frames, self.fps, self.size, lines)
        return _content(replace(open_, sha256=_sha256(open_)))


def _content(manifest: Manifest) -> dict[str, Any]:
    return asdict(manifest) | {"rules": manifest.rules.stated()}


def _sha256(manifest: Manifest) -> str:
    return hashlib.sha256(storage.json_bytes(_content(replace(manifest, sha256="")))).hexdigest()


def _sampling(frames: int, fps: float, stride: int | None) -> str:
    return f"{frames} frames at {f'{fps:g} fps' if stride is None else f'a stride of {stride} native frames'}"


def item_seed(key: str, seed: int) -> int:
    """The seed of one item, 31 bits of sha256(key, run seed): subsets and resumed runs see the same noise."""
    return int.from_bytes(hashlib.sha256(f"{key}\0{seed}".encode()).digest()[:4], "big") >> 1


def load_protocol(name: str, dataset: ShardDataset, held_out_fraction: float, limit: int, seed: int) -> Protocol:
    """The items of a preset (by name or TOML file) or of a manifest (a JSON file) in a data set.

    Args:
        name: a preset, or the path of a TOML or JSON file.
        dataset: holds the items' windows.
        held_out_fraction: the one training split by; 1 for a data set that was never trained on.
        limit: how many windows are taken at most where the preset leaves it to the run.
        seed: of the noise of all items; a manifest has its own.
    Raises:
        UserError: a file or data set that does not fit the protocol, or lacks items where it says "error".
    """
    if name.endswith(".json"):
        return _from_manifest(name, dataset)
    rules = load_preset(name)
    return resolve(Path(name).stem if name.endswith(".toml") else name, rules, dataset, held_out_fraction, limit, seed)


def held_out_protocol(dataset: ShardDataset, held_out_fraction: float, limit: int, seed: int) -> Protocol:
    """At most `limit` held-out windows. The split is by clip, so no window of an evaluated clip was trained on."""
    return load_protocol("held-out", dataset, held_out_fraction, limit, seed)


def resolve(
    name: str, rules: Preset, dataset: ShardDataset, held_out_fraction: float, limit: int, seed: int
) -> Protocol:
    """The items that the rules choose from a data set. Arguments and errors as those of `load_protocol`.

    The first window of every clip comes before the second of any, and within that clips come by the hash of their key:
    a smaller number is a subset of a larger one, and as many different clips as possible are seen.
    """
    if limit < 1:
        raise UserError(f"clips {limit}, expected at least 1 held-out clip to evaluate")
    _check_source(name, rules, dataset)
    keys = dataset.keys
    clips = [dataset.clip_of(i) for i in range(len(keys))]
    # A fraction of 1 says that nothing here was trained on; the split would still keep one clip back for training.
    split = rules.held_out and held_out_fraction != 1
    chosen = set(split_keys(clips, held_out_fraction)[1]) if split else set(clips)
    window: dict[int, int] = {}
    seen: dict[str, int] = {}
    for i, clip in enumerate(clips):
        if clip in chosen:
            window[i] = seen[clip] = seen.get(clip, -1) + 1
    salt = f"{rules.seed}\0" if rules.seed else ""
    order = sorted(window, key=lambda i: (window[i], hashlib.sha256(f"{salt}{keys[i]}".encode()).digest()))
    if rules.windows == "first":
        order = [i for i in order if window[i] == 0]
    if rules.number == "asked":
        order = order[:limit]
    frames, fps, size = _frames(name, rules, dataset, order)
    recipe = dataset.published.recipe
    # Where the rules leave it open, a manifest says how this data set was prepared.
    rules = replace(rules, stride=recipe.get("stride"), fit=recipe.get("fit"))
    seconds = recipe.get("num_frames", frames) / fps

    def items() -> Iterator[Item]:
        for i in order:
            caption = str(dataset.read(i, ("caption",))["caption"])
            if not rules.categories or caption in rules.categories:
                # A caption each makes a clip of its own of one video; the number follows the last hyphen.
                clip = clips[i].rpartition("-")[0] if rules.captions == "all" else clips[i]
                category = caption if rules.categories else ""
                start = int(keys[i].rpartition("_")[2]) * seconds
                for repeat in range(rules.repeats):
                    key = f"{keys[i]}.{repeat}" if repeat else keys[i]
                    yield Item(key, clip, i, caption, item_seed(key, seed), category, start)

    chosen_items = tuple(items())
    excluded = []
    if isinstance(rules.number, int):
        clips_in_order = dict.fromkeys(item.clip for item in chosen_items)
        missing_items = rules.number - len(clips_in_order)
        if missing_items > 0:
            what = f"protocol {name} asks for {rules.number} clips, {dataset.uri} holds {len(clips_in_order)}"
            if rules.missing == "error":
                raise UserError(f'{what}; prepare the others, or state missing = "exclude" in a copy of the protocol')
            excluded = [("not in the data set", missing_items)]
        taken = set(list(clips_in_order)[: rules.number])
        chosen_items = tuple(item for item in chosen_items if item.clip in taken)
    return check_clips(Protocol(name, rules, chosen_items, frames, fps, size, tuple(excluded)))


def check_clips(protocol: Protocol) -> Protocol:
    """The protocol, if every category (or all of it) has its least number of clips; else UserError."""
    rules = protocol.rules
    clips = Counter(category for category, _ in {(item.category, item.clip) for item in protocol.items})
    for category in rules.categories or ("",):
        if clips[category] < rules.least_clips:
            suffix = f" of category {category!r}" if category else ""
            raise UserError(
                f"protocol {protocol.name} needs at least {rules.least_clips} clips{suffix}, {clips[category]} are left"
            )
    return protocol


def _check_source(name: str, rules: Preset, dataset: ShardDataset) -> None:
    recipe = dataset.published.recipe
    captions = recipe.get("captions", "first")
    actual = {
        "format": recipe.get("format", "csv"),
        "split": recipe.get("split"),
        "captions": "random" if isinstance(captions, int) else captions,
    }
    wanted: dict[str, Sequence[Any]] = {"format": rules.sources}
    wanted |= {"split": [rules.split]} if rules.split else {}
    wanted |= {"captions": [rules.captions]} if rules.captions else {}
    for field, values in wanted.items():
        if values and actual[field] not in values:
            expected = " or ".join(map(str, values))
            raise UserError(
                f"protocol {name} takes data of {field} {expected}, {dataset.uri} was prepared with {field} "
                f"{actual[field]}; prepare it so, or choose another protocol ({', '.join(preset_names())})"
            )


def _frames(name: str, rules: Preset, dataset: ShardDataset, order: Sequence[int]) -> tuple[int, float, int]:
    """Frames of an item, frames a second and size of the data set, which have to be the protocol's."""
    recipe = dataset.published.recipe
    if not order:
        raise UserError(f"protocol {name} finds no clip in {dataset.uri}")
    try:
        stored = dataset.num_frames(order[0], "pixels")
    except KeyError as error:
        raise UserError(
            f"{dataset.uri} holds no real frames to compare with; prepare it again with keep_pixels"
        ) from error
    stored = min(stored, recipe.get("num_frames", stored))
    frames, fps, size = rules.frames or stored, float(recipe["fps"]), int(recipe["size"])
    stride, fit = recipe.get("stride"), recipe.get("fit", "crop")
    wanted = (
        (rules.fps or fps, rules.stride or (None if rules.fps else stride)),
        (rules.size or size, rules.fit or ("crop" if rules.size else fit)),
    )
    if frames > stored or wanted != ((fps, stride), (size, fit)):
        (wanted_fps, wanted_stride), (wanted_size, wanted_fit) = wanted
        raise UserError(
            f"protocol {name} takes {_sampling(frames, wanted_fps, wanted_stride)} and {wanted_size} pixels"
            f" ({wanted_fit}), {dataset.uri} holds {_sampling(stored, fps, stride)} and {size} ({fit}); "
            "prepare-latents --protocol makes one that fits"
        )
    if frames < LEAST_FRAMES:
        raise UserError(f"{dataset.uri} holds clips of {frames} frames, frame consistency needs at least 4")
    return frames, fps, size


def _from_manifest(address: str, dataset: ShardDataset) -> Protocol:
    try:
        manifest = parse_record(Manifest, storage.read_bytes(address))
    except FileNotFoundError as error:
        raise UserError(f"no protocol at {address}; give the protocol.json of a report") from error
    except ValueError as error:
        raise UserError(
            f"{address} is no protocol of schema {PROTOCOL_SCHEMA} ({error}); give that of a report"
        ) from error
    if manifest.schema != PROTOCOL_SCHEMA or manifest.sha256 != _sha256(manifest):
        raise UserError(
            f"{address} is not of schema {PROTOCOL_SCHEMA} or was changed after it was written; write it again"
        )
    index_of = {key: i for i, key in enumerate(dataset.keys)}
    # After the dot comes the number of the repeat.
    indices = {line.key: index_of.get(line.key.partition(".")[0]) for line in manifest.items}
    missing_items = [key for key, i in indices.items() if i is None]
    if missing_items and manifest.rules.missing == "error":
        raise UserError(
            f"{dataset.uri} lacks {len(missing_items)} of {len(manifest.items)} items of {address}:"
            f" {', '.join(missing_items[:5])}{', ...' if len(missing_items) > 5 else ''}; prepare them too"
        )
    items = [Item(index=i, **asdict(line)) for line in manifest.items if (i := indices[line.key]) is not None]
    rules = replace(manifest.rules, frames=manifest.frames, fps=manifest.fps, size=manifest.size)
    _frames(manifest.name, rules, dataset, [item.index for item in items])
    excluded = (("not in the data set", len(missing_items)),) if missing_items else ()
    return check_clips(
        Protocol(manifest.name, manifest.rules, tuple(items), manifest.frames, manifest.fps, manifest.size, excluded)
    )
