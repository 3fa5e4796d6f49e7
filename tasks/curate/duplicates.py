"""Removes clips that show what an earlier row of the data set shows, by the hashes that prepare stores with filters."""

from __future__ import annotations

import itertools
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from infra import storage
from tasks.curate.removal import Progress, Removal, indexes, remove_rows
from tasks.records import Failure, UserError
from tasks.shards import Entry, ShardDataset, ShardManifest, clip_key_of, decode_field, report_addresses

REASON = "duplicate"
MOST_DISTANCE = 8  # bits of 64; further away lie clips that have nothing to do with each other
_READS = 16  # range reads under way at once
_BLOCK = 1 << 22  # comparisons at once


def deduplicate(dataset: str, distance: int = 4, progress: Progress | None = None) -> Removal:
    """Removes each clip whose hash is at most `distance` bits from that of an earlier clip that stays.

    The hash is that of a clip's first stored window; a clip without one is no duplicate. The rows become failures under
    `duplicate` that name the earlier row. What goes depends on the stored samples and their order alone, whoever made
    them when; the same again changes nothing, and prepare leaves these rows as they are. Memory: 16 bytes a clip.

    Args:
        progress: called after each shard, twice, with `stage`, `done` and `total` (rows).
    Raises:
        UserError: no finished data set, one that was prepared without filters, a damaged shard, a distance beyond 8.
    """
    if not 0 <= distance <= MOST_DISTANCE:
        raise UserError(f"distance {distance}, expected a number of bits from 0 to {MOST_DISTANCE}")
    dataset = storage.absolute(dataset)
    manifest = ShardDataset(dataset).published
    if "filters" not in manifest.recipe:
        raise UserError(f"{dataset} holds no hashes of its clips; prepare it with a filter on, as demo-filtered does")
    rows: list[np.ndarray] = []
    hashes: list[np.ndarray] = []
    for index in indexes(dataset, manifest):
        found = _hashes(dataset, index)
        rows.append(np.fromiter(found, np.int64))
        hashes.append(np.fromiter(found.values(), np.uint64))
        if progress is not None:
            progress({"stage": "compare", "done": index.stop, "total": manifest.rows})
    near = near_earlier(np.concatenate(hashes), distance)
    row_of = np.concatenate(rows)
    earlier = {int(row_of[later]): (int(row_of[first]), bits) for later, (first, bits) in near.items()}
    if earlier:
        for address in report_addresses(dataset).values():  # it counts what is no longer there
            storage.delete(address)

    def removed(index: ShardManifest) -> dict[int, Failure]:
        found = {}
        for row, entries in index.clips().items():
            if row in earlier:
                first, bits = earlier[row]
                # By its number: a key would outlive the clip in the books should that be forgotten.
                detail = f"shows what row {first} shows, {bits} of 64 bits differ, at most {distance} were taken"
                found[row] = Failure(clip_key_of(entries[0].key), row, REASON, detail)
        return found

    return remove_rows(dataset, manifest, removed, "deduplicate", progress)


def near_earlier(hashes: np.ndarray, distance: int) -> dict[int, tuple[int, int]]:
    """For each hash (uint64 [N]) that has to go, the place of the earlier one that stays and the bits between them.

    From first to last, a hash stays unless one that stays already is at most `distance` bits away.
    """
    # Equal hashes share the fate of the first of them, so that many copies of one clip are no many pairs.
    distinct, first, group = np.unique(hashes, return_index=True, return_inverse=True)
    order = np.argsort(first)
    place = first[order]
    gone: dict[int, tuple[int, int]] = {}
    for later, earlier, bits in _pairs(distinct[order], distance):
        if int(place[earlier]) not in gone and int(place[later]) not in gone:
            gone[int(place[later])] = (int(place[earlier]), bits)
    copies = np.flatnonzero(first[group] != np.arange(len(hashes)))
    for copy in copies.tolist():
        original = int(first[group[copy]])
        gone[copy] = gone.get(original, (original, 0))
    return gone


def _pairs(hashes: np.ndarray, distance: int) -> list[tuple[int, int, int]]:
    """(later, earlier, bits) of all near pairs of distinct hashes, by later, then by earlier.

    Of `distance` + 1 bands of the bits, a near pair agrees in one at least; only pairs that do are compared.
    """
    edges = np.linspace(0, 64, distance + 2).round().astype(int).tolist()
    found: set[tuple[int, int, int]] = set()
    for low, high in itertools.pairwise(edges):
        band = (hashes >> np.uint64(low)) & np.uint64((1 << (high - low)) - 1)
        order = np.argsort(band, kind="stable")
        _, begins, counts = np.unique(band[order], return_index=True, return_counts=True)
        for begin, count in zip(begins[counts > 1].tolist(), counts[counts > 1].tolist(), strict=True):
            members = order[begin : begin + count]
            for start in range(0, count, max(1, _BLOCK // count)):
                some = members[start : start + max(1, _BLOCK // count)]
                bits = np.bitwise_count(hashes[some, None] ^ hashes[None, members])
                for one, other in np.argwhere(bits <= distance):
                    if members[other] < some[one]:
                        found.add((int(some[one]), int(members[other]), int(bits[one, other])))
    return sorted(found)


def _hashes(dataset: str, index: ShardManifest) -> dict[int, np.uint64]:
    """The hash of each clip's first window, by row."""
    tar = storage.join(dataset, index.shard)

    def read(entry: Entry) -> str | None:
        offset, size = entry.members["meta"]
        return decode_field("meta", storage.read_range(tar, offset, offset + size))["picture_hash"]

    clips = index.clips()
    with ThreadPoolExecutor(_READS) as threads:
        try:
            words = list(threads.map(read, [entries[0] for entries in clips.values()]))
            return {row: np.uint64(int(word, 16)) for row, word in zip(clips, words, strict=True) if word is not None}
        except (KeyError, OverflowError, TypeError, ValueError) as error:
            raise UserError(f"{index.shard} of {dataset} is damaged ({error}); verify the data set") from error
