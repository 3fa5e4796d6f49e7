"""Animates the items of a protocol in fixed batches and keeps every frame lossless, so that a killed run continues."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from infra import storage
from tasks.evaluate.animators import Animator
from tasks.evaluate.protocol.protocol import Item
from tasks.records import UserError
from tasks.shards import ShardDataset
from trip_model.images import load_image

Batch = tuple[Item, ...]


def batches(items: Sequence[Item], size: int) -> list[Batch]:
    """The protocol cut into batches, always at the same places."""
    return [tuple(items[i : i + size]) for i in range(0, len(items), size)]


def unfinished(plan: list[Batch], folder: str) -> list[Batch]:
    """The batches of which anything is missing under `folder`.

    A batch with a missing item is done again as a whole: sums in a net can differ in the last bit with the number of
    clips in a batch, and a resumed run has to end with the very same numbers.
    """
    present = set(storage.list_dir(folder))
    return [batch for batch in plan if any(file_name(item) not in present for item in batch)]


def file_name(item: Item) -> str:
    return f"{item.key}.npz"


def save_arrays(uri: str, arrays: dict[str, NDArray[Any]]) -> None:
    """Arrays at an address as one compressed npz, atomically."""
    buffer = io.BytesIO()
    np.savez_compressed(buffer, **arrays)  # type: ignore[arg-type]
    storage.write_bytes(uri, buffer.getvalue())


def load_arrays(uri: str) -> dict[str, NDArray[Any]]:
    with np.load(io.BytesIO(storage.read_bytes(uri)), allow_pickle=False) as file:
        return {name: file[name] for name in file.files}


def real_pixels(dataset: ShardDataset, item: Item, frames: int) -> NDArray[np.uint8]:
    """The first true frames of an item, uint8 [frames, H, W, 3].

    Of a data set with frame sizes they are the central squares, at the recipe's `size`: an evaluation compares squares.
    """
    pixels = dataset.read(item.index, ("pixels",), (0, frames))["pixels"]
    if dataset.frame_sizes == (None,):
        return pixels
    size = int(dataset.published.recipe["size"])
    return np.stack([load_image(frame, size) for frame in pixels])


def load_generated(folder: str, item: Item) -> NDArray[np.uint8]:
    return load_arrays(storage.join(folder, file_name(item)))["frames"]


def generate_batch(
    animator: Animator, dataset: ShardDataset, batch: Batch, frames: int, folder: str, scaled: bool = False
) -> None:
    """Animates the first real frame of each item and stores uint8 [F, H, W, 3] per item under `folder`.

    Args:
        animator: makes the clips.
        dataset: holds the first frames and captions.
        batch: the items and their seeds.
        frames: F of each video.
        folder: address under which the videos are stored.
        scaled: a model of another size than the data set's gets the frame at its own, and its clip is scaled back.
    Raises:
        UserError: the model makes frames of another size than the data set holds, and is not to be scaled.
    """
    real = [real_pixels(dataset, item, frames) for item in batch]
    height, width = real[0].shape[1:3]
    fits = (height, width) == (animator.size, animator.size)
    if not fits and not scaled:
        raise UserError(
            f"the model makes frames of {animator.size}x{animator.size}, {dataset.uri} holds {width}x{height};"
            " evaluate on a data set prepared with the model's size"
        )
    for item, clip in zip(batch, animator.animate(real, batch), strict=True):
        pixels = clip if fits else np.stack([load_image(frame, width) for frame in clip])
        save_arrays(storage.join(folder, file_name(item)), {"frames": pixels})


def shown(generated: NDArray[np.uint8], real: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """The clip as the user gets it: the given image, then the generated frames."""
    return np.concatenate([real[:1], generated[1:]])
