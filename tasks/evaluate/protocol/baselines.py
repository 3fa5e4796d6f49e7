"""Other methods' videos of a protocol's items: found by name in a folder, read frame by frame, never silently fewer."""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace

from infra import storage
from tasks.evaluate.protocol.protocol import Item, Protocol, check_clips
from tasks.evaluation_record import read_evaluation
from tasks.records import UserError, digest
from tasks.video.clip_files import files_of

# And `champion`: names that no folder may have.
OWN_ROWS = ("frozen", "base", "closed_form", "trip", "round_trip", "best_of_k", "real")
CHAMPION = "champion"
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
        UserError: no such folder, nothing in it belongs to an item, or frames whose order cannot be determined.
    """
    names = set(storage.list_dir(folder))
    if not names:
        raise UserError(f"no videos of method {name} at {folder}; give the folder that holds them by the items' keys")
    windows = Counter(item.clip for item in items)
    files: dict[str, tuple[str, ...]] = {}
    for item in items:
        keys = [item.key, item.clip] if windows[item.clip] == 1 else [item.key]
        item_files = next(filter(None, (files_of(folder, key, names) for key in keys)), ())
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
