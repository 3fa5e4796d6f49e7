"""Reads training batches from latent shards in an order that is a pure function of (seed, step).

The stream of samples is one permutation after another, so a step needs no state: resuming is asking for the next
step, and any number of workers sees the same global batches. Of a sample with more frames than are trained on, a track,
each place of the stream draws a window anew; only its frames are read.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from tasks.records import UserError
from tasks.shards import ShardDataset, clip_key_of, split_keys
from trip_model.objective import addressed_generator

_KEPT_BY = {"logvar": "keep_logvar", "text": "keep_text"}


def share(global_batch: int, rank: int, world: int) -> range:
    """The places in a global batch that worker `rank` of `world` trains on; shares differ by one sample at most."""
    return range(rank * global_batch // world, (rank + 1) * global_batch // world)


@dataclass(frozen=True)
class Batch:
    """The part of one global batch that one worker trains on."""

    raw_latents_BFCHW: torch.Tensor  # float32, unscaled
    tokens_BL: torch.Tensor  # int64
    positions: tuple[int, ...]  # places in the global batch, the address of every random draw
    keys: tuple[str, ...]
    starts: tuple[int, ...]  # the frames of the samples at which these windows begin
    text_BLD: torch.Tensor | None  # float32 text features, where the stored ones are used


@dataclass(frozen=True)
class _Window:
    key: str
    start: int
    latents_FCHW: torch.Tensor
    tokens: np.ndarray
    text: np.ndarray | None


class TrainingData:
    """The training side of a data set's split, in an order fixed by a seed, in windows of `num_frames` frames.

    Args:
        sample_posterior: draw each latent from the VAE's posterior; else it is the mean.
        stored_text: read the captions' text features.
    Raises:
        UserError: the data set does not hold what is asked for; a split that cannot be made.
    """

    def __init__(
        self,
        dataset: ShardDataset,
        held_out_fraction: float,
        seed: int,
        num_frames: int,
        sample_posterior: bool = False,
        stored_text: bool = False,
    ) -> None:
        self.dataset = dataset
        self.num_frames = num_frames
        optional = (["logvar"] if sample_posterior else []) + (["text"] if stored_text else [])
        for name in optional:
            if name not in dataset.fields(0):
                raise UserError(f"{dataset.uri} holds no {name}; prepare it with {_KEPT_BY[name]}, or train without")
        self._fields = ("latents", "tokens", *optional)
        train_clips, held_out = split_keys({clip_key_of(key): None for key in dataset.keys}, held_out_fraction)
        chosen = set(train_clips)
        self.samples = np.array([i for i, key in enumerate(dataset.keys) if clip_key_of(key) in chosen])
        first_of = {clip_key_of(key): i for i, key in reversed(list(enumerate(dataset.keys)))}
        self.held_out_samples = np.array([first_of[clip] for clip in held_out], dtype=np.int64)  # one of each clip
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
        """Worker `rank`'s share of global batch `step` (counted from 0)."""
        positions = tuple(share(global_batch, rank, world))
        places = [step * global_batch + position for position in positions]
        return _collate([self._window(self.sample_at(place), place) for place in places], positions)

    def held_out(self, count: int) -> Batch:
        """One window of each of up to `count` held-out clips, always the same ones."""
        picks = self.held_out_samples[:count].tolist()
        return _collate([self._window(index, place) for place, index in enumerate(picks)], tuple(range(len(picks))))

    def first_latents(self, count: int) -> torch.Tensor:
        """Raw latents [B, F, C, H, W] of up to `count` training samples, for measuring the data set."""
        picks = self.samples[:count].tolist()
        return torch.stack([self._window(index, place).latents_FCHW for place, index in enumerate(picks)])

    def _window(self, index: int, place: int) -> _Window:
        """What training sees of a sample at a place of the stream; every draw is a function of seed and place alone."""
        frames = self.dataset.num_frames(index)
        if frames < self.num_frames:
            raise UserError(
                f"{self.dataset.uri} holds a clip of {frames} frames, {self.num_frames} are trained on;"
                " give a data set prepared with that many, or train on fewer"
            )
        start = 0
        if frames > self.num_frames:
            generator = addressed_generator("window", self.seed, place)
            start = int(torch.randint(frames - self.num_frames + 1, (), generator=generator))
        read = self.dataset.read(index, self._fields, (start, start + self.num_frames))
        latents = torch.from_numpy(read["latents"]).float()
        if "logvar" in read:
            noise = torch.randn(latents.shape, generator=addressed_generator("posterior", self.seed, place))
            latents = latents + torch.exp(0.5 * torch.from_numpy(read["logvar"]).float()) * noise
        return _Window(read["key"], start, latents, read["tokens"], read.get("text"))


def _collate(windows: list[_Window], positions: tuple[int, ...]) -> Batch:
    text = [window.text for window in windows if window.text is not None]
    return Batch(
        raw_latents_BFCHW=torch.stack([window.latents_FCHW for window in windows]),
        tokens_BL=torch.from_numpy(np.stack([window.tokens for window in windows]).astype(np.int64)),
        positions=positions,
        keys=tuple(window.key for window in windows),
        starts=tuple(window.start for window in windows),
        text_BLD=torch.from_numpy(np.stack(text).astype(np.float32)) if text else None,
    )
