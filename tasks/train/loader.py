"""Reads training batches from latent shards in an order that is a pure function of (seed, step).

The stream of samples is one permutation after another, so a step needs no state: resuming is asking for the next
step, and any number of workers that divides the global batch sees the same global batches.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from tasks.records import UserError
from tasks.shards import ShardDataset, clip_key_of, split_keys


@dataclass(frozen=True)
class Batch:
    """The part of one global batch that one worker trains on."""

    raw_latents_BFCHW: torch.Tensor  # float32, unscaled
    tokens_BL: torch.Tensor  # int64
    positions: tuple[int, ...]  # places in the global batch, the address of every random draw
    keys: tuple[str, ...]


class TrainingData:
    """The training side of a data set's split, in an order fixed by a seed."""

    def __init__(self, dataset: ShardDataset, held_out_fraction: float, seed: int) -> None:
        self.dataset = dataset
        train_clips, held_out = split_keys({clip_key_of(key): None for key in dataset.keys}, held_out_fraction)
        chosen = set(train_clips)
        self.samples = np.array([i for i, key in enumerate(dataset.keys) if clip_key_of(key) in chosen])
        self.held_out_clips = len(held_out)
        self.seed = seed
        self._epoch = -1
        self._order = self.samples

    def sample_at(self, place: int) -> int:
        """The data set's index of the sample at a place of the endless stream."""
        epoch, offset = divmod(place, len(self.samples))
        if epoch != self._epoch:
            self._order = np.random.default_rng([self.seed, epoch]).permutation(self.samples)
            self._epoch = epoch
        return int(self._order[offset])

    def batch(self, step: int, global_batch: int, rank: int = 0, world: int = 1) -> Batch:
        """Worker `rank`'s share of global batch `step` (counted from 0).

        Raises:
            UserError: the number of workers does not divide the global batch.
        """
        if global_batch % world:
            raise UserError(f"a global batch of {global_batch} cannot be split over {world} workers evenly")
        share = global_batch // world
        positions = tuple(range(rank * share, (rank + 1) * share))
        read = [self._read(self.sample_at(step * global_batch + position)) for position in positions]
        return Batch(
            raw_latents_BFCHW=torch.from_numpy(np.stack([sample["latents"] for sample in read]).astype(np.float32)),
            tokens_BL=torch.from_numpy(np.stack([sample["tokens"] for sample in read]).astype(np.int64)),
            positions=positions,
            keys=tuple(sample["key"] for sample in read),
        )

    def first_latents(self, count: int) -> torch.Tensor:
        """Raw latents [B, F, C, H, W] of up to `count` training samples, for measuring the data set."""
        picks: Sequence[int] = self.samples[:count].tolist()
        return torch.from_numpy(np.stack([self._read(i)["latents"] for i in picks]).astype(np.float32))

    def _read(self, index: int) -> dict:
        return self.dataset.read(index, ("latents", "tokens"))
