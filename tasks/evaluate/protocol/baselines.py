"""Other methods' videos of a protocol's items: found by name in a folder, read frame by frame, never silently fewer."""

from __future__ import annotations

import hashlib
import io
import itertools
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace

import av
import numpy as np
from av.video.reformatter import VideoReformatter
from numpy.typing import NDArray

from infra import storage
from tasks.evaluate.protocol.protocol import Item, Protocol, check_clips
from tasks.evaluation_record import read_evaluation
from tasks.records import UserError, digest
from tasks.video.decode import CONTAINERS, ClipError
from tasks.video.frame import to_square
from tasks.video.streams import decoded_frames, deinterlaced, main_stream
from trip_model.images import load_image

# And `champion`: names that no folder may have.
OWN_ROWS = ("frozen", "base", "closed_form", "trip", "round_trip", "best_of_k", "real")
CHAMPION = "champion"
SUFFIXES = (".npz", ".mp4", ".gif", ".webm", ".mov", ".avi", ".mkv", ".m4v")
FRAME_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff")
READERS = 16  # at once: on an object store each read alone is a round trip
_NAME = re.compile(r"[A-Za-z0-9^_][A-Za-z0-9^_.+-]{0,39}")


@dataclass(frozen=True)
class Method:
    """A row of the table whose videos lie in a folder; `identity` is that of the bytes that lie there for the items.

    Args:
        files: of each item that has any, its video file, or its frames in their order.
        given_frame: whether its user gets the given image as frame 1, as TRIP's does; else frame 1 is as it was made.
    """

    name: str
    folder: str
    files: dict[str, tuple[str, ...]]
    identity: str
    given_frame: bool = False


def parse_methods(given: Sequence[str]) -> dict[str, str]:
    """Folders by name from NAME=FOLDER each. Raises UserError for a name that cannot be a row's, or stands twice."""
    folders: dict[str, str] = {}
    for text in given:
        name, equals, folder = text.partition("=")
        if not equals or not folder:
            raise UserError(f"method {text!r}, expected NAME=FOLDER, such as VideoComposer=videos/videocomposer")
        if not _NAME.fullmatch(name) or name in (*OWN_ROWS, CHAMPION) or name in folders:
            raise UserError(
                f"method name {name!r} is a row already, or no word of letters, digits and ^_.+-; choose another"
            )
        folders[name] = storage.absolute(folder)
    return folders


def find_method(name: str, folder: str, items: Sequence[Item], given_frame: bool = False) -> Method:
    """Looks for KEY.npz, a video KEY.mp4, .gif, .webm .. or KEY/ (numbered frames) of each item; KEY is the item's, or
    its clip's.

    Every byte is read once, for the numbers of a report must change when a video does.

    Raises:
        UserError: no such folder, nothing in it belongs to an item, or frames whose order cannot be told.
    """
    names = set(storage.list_dir(folder))
    if not names:
        raise UserError(f"no videos of method {name} at {folder}; give the folder that holds them by the items' keys")
    windows = Counter(item.clip for item in items)
    files: dict[str, tuple[str, ...]] = {}
    for item in items:
        keys = [item.key, item.clip] if windows[item.clip] == 1 else [item.key]
        item_files = next(filter(None, (_files(folder, key, names) for key in keys)), ())
        if item_files:
            files[item.key] = item_files
    if not files:
        raise UserError(
            f"method {name}: none of the {len(items)} items has a video in {folder}; name each after its item, such as "
            f"{items[0].key}.mp4"
        )
    with ThreadPoolExecutor(READERS) as pool:
        digests = pool.map(_digest, files.values())
    identity = [[key, hashes] for key, hashes in zip(files, digests, strict=True)]
    return Method(name, folder, files, digest(identity), given_frame)


def _digest(files: Sequence[str]) -> list[str]:
    return [hashlib.sha256(storage.read_bytes(file)).hexdigest() for file in files]


def find_champion(address: str, protocol: Protocol) -> tuple[Method, ...]:
    """The clips of the model of an earlier report, a method for each sample of the items.

    Raises:
        UserError: no report, or one of other items.
    """
    try:
        record = read_evaluation(address)
    except UserError as error:
        raise UserError(f"champion: {error}") from error
    if record.provenance.get("protocol_sha") != protocol.sha:
        raise UserError(
            f"the champion's report at {address} is of other items; evaluate it with --protocol of this evaluation"
        )
    folders = (storage.join(storage.absolute(address), name) for name in (record.generations, *record.samples))
    return tuple(find_method(CHAMPION, folder, protocol.items, given_frame=True) for folder in folders)


def _files(folder: str, key: str, names: set[str]) -> tuple[str, ...]:
    for suffix in SUFFIXES:
        for name in (key + suffix, key + suffix.upper()):
            if name in names:
                return (storage.join(folder, name),)
    if key not in names:
        return ()
    frames = storage.join(folder, key)
    frame_names = [n for n in storage.list_dir(frames) if n.lower().endswith(FRAME_SUFFIXES) and not n.startswith(".")]
    return tuple(storage.join(frames, name) for name in _numbered(frames, frame_names))


def _numbered(folder: str, names: Sequence[str]) -> list[str]:
    """The files of one video's frames by their number, however many digits it has.

    Names may hold several numbers; the frame's is the first that no two files share. Where there is none, as in
    SECOND_FRAME, all of them count, from left to right, if each has the same number of digits in every name.

    Raises:
        UserError: names that differ in more than numbers, two files of one number, or a number that is left out.
    """
    if len(names) < 2:
        return list(names)
    parts = {name: re.split(r"([0-9]+)", name.rpartition(".")[0]) for name in names}
    texts = {tuple(split[::2]) for split in parts.values()}
    if len(texts) > 1:
        first, second = sorted(next(n for n in names if tuple(parts[n][::2]) == text) for text in sorted(texts)[:2])
        raise UserError(
            f"the frames in {folder} differ in more than a number ({first!r}, {second!r}), so their order is not known;"
            " name them 000.png, 001.png, .."
        )
    groups = list(zip(*(split[1::2] for split in parts.values()), strict=True))
    for group in groups:
        numbers = sorted(map(int, group))
        if len({*numbers}) < len(numbers):
            continue
        steps = {after - before for before, after in itertools.pairwise(numbers)}
        if len(steps) > 1:
            gap = next(b for b, a in itertools.pairwise(numbers) if a - b > min(steps))
            raise UserError(f"the frames in {folder} have no number {gap + min(steps)}, which follows {gap}; add it")
        position = groups.index(group)
        return sorted(names, key=lambda name: int(parts[name][1::2][position]))
    order = {name: tuple(map(int, split[1::2])) for name, split in parts.items()}
    if len({*order.values()}) < len(names) or any(len({*map(len, group)}) > 1 for group in groups):
        raise UserError(
            f"the frames in {folder} share their numbers ({', '.join(map(repr, sorted(names)[:3]))}, ..), so their"
            " order is not known; name them 000.png, 001.png, .."
        )
    return sorted(names, key=lambda name: order[name])


def read_method(files: Sequence[str], frames: int, size: int) -> NDArray[np.uint8]:
    """The first frames of one video, uint8 [frames, size, size, 3], resized and cropped as every clip here.

    Frames are taken one by one, whatever rate a file states: methods write the same 16 frames at 4, 8 or 10 a second.

    Raises:
        ClipError: `too_short` or `undecodable`.
    """
    try:
        if files[0].lower().endswith(FRAME_SUFFIXES):
            clip = [load_image(storage.read_bytes(file), size) for file in files[:frames]]
        elif files[0].lower().endswith(".npz"):
            clip = _arrays(storage.read_bytes(files[0]), frames, size)
        else:
            clip = _video(storage.read_bytes(files[0]), frames, size)
    except ClipError:
        raise
    except (ValueError, OSError, KeyError, av.FFmpegError) as error:
        raise ClipError("undecodable", f"{files[0]}: {error}") from error
    if len(clip) < frames:
        raise ClipError("too_short", f"{files[0]} has {len(clip)} frames, {frames} are needed")
    return np.stack(clip)


def _arrays(data: bytes, frames: int, size: int) -> list[NDArray[np.uint8]]:
    with np.load(io.BytesIO(data), allow_pickle=False) as file:
        pixels = file["frames" if "frames" in file.files else file.files[0]]
    if pixels.dtype != np.uint8 or pixels.ndim != 4 or pixels.shape[-1] != 3:
        raise ValueError(f"frames of {pixels.dtype} {pixels.shape}, expected uint8 [F, H, W, 3]")
    return [f if f.shape[:2] == (size, size) else load_image(f, size) for f in pixels[:frames]]


def _video(data: bytes, frames: int, size: int) -> list[NDArray[np.uint8]]:
    frames_read: list[NDArray[np.uint8]] = []
    reformatter = VideoReformatter()
    with av.open(
        io.BytesIO(data), "r", options={"format_whitelist": CONTAINERS}, metadata_errors="ignore"
    ) as container:
        stream = main_stream(container)
        if stream is None:
            raise ClipError("undecodable", "the file holds no video stream")
        stream.codec_context.thread_count = 1
        aspect = float(stream.sample_aspect_ratio or 1)
        for frame, _ in deinterlaced(decoded_frames(container, stream)):
            frames_read.append(to_square(frame, size, aspect, reformatter))
            if len(frames_read) == frames:
                break
    return frames_read


def without_missing(
    protocol: Protocol, missing_items: Mapping[str, Mapping[str, str]]
) -> tuple[tuple[Item, ...], dict[str, dict[str, int]]]:
    """The items that every method has, and how many each method lacked, by reason; an item leaves all rows at once.

    Args:
        protocol: the items, and how many may be missing.
        missing_items: by method and item key, the reason.
    Raises:
        UserError: items are missing although the protocol allows none, or too little is left.
    """
    counts = {
        name: dict(sorted(Counter(reasons.values()).items())) for name, reasons in missing_items.items() if reasons
    }
    incomplete = {key for reasons in missing_items.values() for key in reasons}
    if incomplete and protocol.rules.missing == "error":
        raise UserError(
            "; ".join(
                _missing_sentence(name, reasons, len(protocol.items))
                for name, reasons in missing_items.items()
                if reasons
            )
            + '; make them, or state missing = "exclude" in a copy of the protocol'
        )
    left = tuple(item for item in protocol.items if item.key not in incomplete)
    if not left:
        raise UserError(f"no item of protocol {protocol.name} is left that every method has: {counts}")
    check_clips(replace(protocol, items=left))
    return left, counts


def _missing_sentence(name: str, reasons: Mapping[str, str], total: int) -> str:
    first = ", ".join(f"{key} ({reason})" for key, reason in list(reasons.items())[:5])
    more = ", ..." if len(reasons) > 5 else ""
    return f"method {name} lacks {len(reasons)} of {total} items: {first}{more}"


def missing_of(methods: Sequence[Method], items: Iterable[Item]) -> dict[str, str]:
    """Item key -> reason, of the items that one of a system's samples has no file of."""
    return {item.key: "missing" for item in items if any(item.key not in method.files for method in methods)}
