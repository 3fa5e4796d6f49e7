"""Which items are judged and how: held-out clips of a data set, their captions, and one seed per item (section 4.1)."""

from __future__ import annotations

import hashlib
from dataclasses import asdict, dataclass

from tasks.records import UserError, digest
from tasks.shards import ShardDataset, split_keys


@dataclass(frozen=True)
class Item:
    """One window to animate: its place in the data set, its clip (the cluster of statistics), caption and seed."""

    key: str
    clip: str
    index: int
    caption: str
    seed: int


def window_frames(dataset: ShardDataset, index: int) -> int:
    """How many frames of a sample are judged: all of a window; of a track, what is a window by the data set's recipe.

    Raises:
        KeyError: the data set holds no pixels.
    """
    held = dataset.num_frames(index, "pixels")
    return min(held, dataset.published.recipe.get("num_frames", held))


@dataclass(frozen=True)
class Protocol:
    """The items of one evaluation in their fixed order; equal hashes mean that the same thing was asked."""

    items: tuple[Item, ...]
    sha: str

    @property
    def clips(self) -> int:
        """Unique clips: the N of every statement, however many windows each clip gives."""
        return len({item.clip for item in self.items})


def item_seed(key: str, seed: int) -> int:
    """The seed of one item, 31 bits of sha256(key, run seed): subsets and resumed runs see the same noise."""
    return int.from_bytes(hashlib.sha256(f"{key}\0{seed}".encode()).digest()[:4], "big") >> 1


def held_out_protocol(dataset: ShardDataset, held_out_fraction: float, limit: int, seed: int) -> Protocol:
    """At most `limit` held-out windows. The split is by clip, so no window of a judged clip was trained on.

    The first window of every clip comes before the second of any, and within that clips come by the hash of their key:
    a smaller limit is a subset of a larger one, and as many different clips as possible are seen. A fraction of 1
    means a data set that was never trained on: every clip of it is held out.

    Raises:
        UserError: a limit below 1, or a data set without pixels to compare with, or with fewer than 4 frames.
    """
    if limit < 1:
        raise UserError(f"clips {limit}, expected at least 1 held-out clip to evaluate")
    keys = dataset.keys
    clips = [dataset.clip_of(i) for i in range(len(keys))]
    # A fraction of 1 says that nothing here was trained on; the split would still keep one clip back for training.
    held_out = set(clips) if held_out_fraction == 1 else set(split_keys(clips, held_out_fraction)[1])
    window: dict[int, int] = {}
    seen: dict[str, int] = {}
    for i, clip in enumerate(clips):
        if clip in held_out:
            window[i] = seen[clip] = seen.get(clip, -1) + 1
    order = sorted(window, key=lambda i: (window[i], hashlib.sha256(keys[i].encode()).digest()))
    items = []
    for i in order[:limit]:
        caption = str(dataset.read(i, ("caption",))["caption"])
        items.append(Item(keys[i], clips[i], i, caption, item_seed(keys[i], seed)))
    try:
        frames = window_frames(dataset, items[0].index)
    except KeyError as error:
        raise UserError(
            f"{dataset.uri} holds no real frames to compare with; prepare it again with keep_pixels"
        ) from error
    if frames < 4:
        raise UserError(f"{dataset.uri} holds clips of {frames} frames, frame consistency needs at least 4")
    return Protocol(tuple(items), digest([asdict(item) for item in items]))
