"""Removes near-duplicates of earlier clips, by the perceptual hashes that prepare stores with filters."""

from __future__ import annotations

import itertools
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from infra import storage
from tasks.curate.removal import Progress, Removal, remove_rows
from tasks.records import Failure, UserError
from tasks.shards import (
    DUPLICATE_REASON,
    DUPLICATES_FOLDER,
    Entry,
    ShardDataset,
    ShardManifest,
    Takedowns,
    add_root_takedowns,
    clip_key_of,
    decode_field,
    mark,
    named,
    read_indexes,
    report_addresses,
    shards_folder,
    upgrade,
)

MOST_DISTANCE = 8  # bits of 64; unrelated clips have larger distances
_READS = 16  # concurrent range reads
_BLOCK = 1 << 22  # comparisons at once


def deduplicate(dataset: str, distance: int = 4, progress: Progress | None = None) -> Removal:
    """Removes each clip whose hash is at most `distance` bits from that of an earlier clip that stays.

    The hash is that of a clip's first stored window; a clip without a hash is not a duplicate. The rows become failures
    with reason `duplicate` whose detail names the earlier row. The result depends only on the stored samples and their
    order. Repeating the call changes nothing. The root lists the removed keys, and no prepare below it encodes them
    again, whatever the table or the recipe. Memory: 16 bytes per clip.

    Args:
        dataset: address of the data set's folder.
        distance: bits of 64, from 0 to 8.
        progress: called twice for each shard with `stage`, `done` and `total` (rows).
    Raises:
        UserError: the data set is not finished, was prepared without filters or contains shots, a shard is damaged, or
            the distance is outside 0 to 8.
    """
    if not 0 <= distance <= MOST_DISTANCE:
        raise UserError(f"distance {distance}, expected a number of bits from 0 to {MOST_DISTANCE}")
    dataset = named(storage.absolute(dataset))
    upgrade(dataset)
    manifest = ShardDataset(dataset).published
    pool = shards_folder(dataset, manifest)
    if "filters" not in manifest.recipe:
        raise UserError(f"{dataset} contains no hashes of its clips; prepare it with a filter (recipe demo-filtered)")
    if manifest.recipe.get("clip") == "shots":
        raise UserError(f"{dataset} contains shots, and a title that many videos share would remove them as a whole")
    rows: list[np.ndarray] = []
    hashes: list[np.ndarray] = []
    begin_of = {shard.shard: shard.rows[0] for shard in manifest.shards}
    marks: dict[str, str] = {}  # of the keys of removed clips
    for index in read_indexes(dataset, manifest):
        # A call that was killed may have removed clips without listing them.
        marks |= {mark(f.key): f.detail for f in index.failures if f.reason == DUPLICATE_REASON}
        hash_of_row, begin = _hashes(pool, index), begin_of[index.shard] - index.start
        rows.append(begin + np.fromiter(hash_of_row, np.int64))
        hashes.append(np.fromiter(hash_of_row.values(), np.uint64))
        if progress is not None:
            progress({"stage": "compare", "done": begin + index.stop, "total": manifest.rows})
    near = near_earlier(np.concatenate(hashes), distance)
    row_of = np.concatenate(rows)
    earlier = {int(row_of[later]): (int(row_of[first]), bits) for later, (first, bits) in near.items()}
    if earlier:
        for address in report_addresses(dataset).values():  # its counts are outdated
            storage.delete(address)

    def removed(index: ShardManifest) -> dict[int, Failure]:
        failures, begin = {}, begin_of[index.shard] - index.start
        for row, entries in index.clips().items():
            if begin + row in earlier:
                first, bits = earlier[begin + row]
                # The detail has the number of the row, as the key must not remain after a takedown of that clip.
                detail = f"shows what row {first} shows, {bits} of 64 bits differ, at most {distance} were taken"
                failures[row] = Failure(clip_key_of(entries[0].key), row, DUPLICATE_REASON, detail)
                marks[mark(clip_key_of(entries[0].key))] = detail
        return failures

    removal = remove_rows(dataset, manifest, removed, "deduplicate", progress)
    add_root_takedowns(dataset, Takedowns(marks), DUPLICATES_FOLDER)
    return removal


def near_earlier(hashes: np.ndarray, distance: int) -> dict[int, tuple[int, int]]:
    """Returns {index of a removed hash: (index of the earlier hash that stays, bits between them)} for uint64 [N].

    In order, a hash stays unless an earlier one that stays is at most `distance` bits away.
    """
    # Equal hashes are handled as one, so that many copies of a clip do not give a quadratic number of pairs.
    distinct, first, group = np.unique(hashes, return_index=True, return_inverse=True)
    order = np.argsort(first)
    position = first[order]
    removed: dict[int, tuple[int, int]] = {}
    for later, earlier, bits in _pairs(distinct[order], distance):
        if int(position[earlier]) not in removed and int(position[later]) not in removed:
            removed[int(position[later])] = (int(position[earlier]), bits)
    copies = np.flatnonzero(first[group] != np.arange(len(hashes)))
    for copy in copies.tolist():
        original = int(first[group[copy]])
        removed[copy] = removed.get(original, (original, 0))
    return removed


def _pairs(hashes: np.ndarray, distance: int) -> list[tuple[int, int, int]]:
    """Returns (later, earlier, bits) of all near pairs of distinct hashes, sorted.

    If the bits are cut into `distance` + 1 bands, a near pair agrees in at least one; only such pairs are compared.
    """
    edges = np.linspace(0, 64, distance + 2).round().astype(int).tolist()
    pairs: set[tuple[int, int, int]] = set()
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
                        pairs.add((int(some[one]), int(members[other]), int(bits[one, other])))
    return sorted(pairs)


def _hashes(pool: str, index: ShardManifest) -> dict[int, np.uint64]:
    """Returns the hash of each clip's first window, by row."""
    tar = storage.join(pool, index.shard)

    def read(entry: Entry) -> str | None:
        offset, size = entry.members["meta"]
        return decode_field("meta", storage.read_range(tar, offset, offset + size))["picture_hash"]

    clips = index.clips()
    with ThreadPoolExecutor(_READS) as threads:
        try:
            words = list(threads.map(read, [entries[0] for entries in clips.values()]))
            return {row: np.uint64(int(word, 16)) for row, word in zip(clips, words, strict=True) if word is not None}
        except (KeyError, OverflowError, TypeError, ValueError) as error:
            raise UserError(f"{index.shard} of {pool} is damaged ({error}); verify the data set") from error
