"""Reads training batches from latent shards in an order that is a pure function of (seed, step).

A step needs no state (`tasks.train.order`): a resumed training asks for the next step, and any number of workers sees
the same global batches. All samples of a batch have one frame size. From a track, a sample with more frames than a
window, each step draws a new window; only its frames are read. A damaged sample keeps its place, and is marked as
excluded from the loss.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from tasks.records import UserError
from tasks.shards import ShardDataset, held_out_samples
from tasks.train.order import SampleOrder
from tasks.train.quarantine import Quarantine
from trip_model.objective import addressed_generator

_KEPT_BY = {"logvar": "keep_logvar", "text": "keep_text"}


def share(global_batch: int, rank: int, world: int) -> range:
    """The positions in a global batch that worker `rank` of `world` trains on; shares differ by one sample at most."""
    return range(rank * global_batch // world, (rank + 1) * global_batch // world)


@dataclass(frozen=True)
class Batch:
    """The part of one global batch that one worker trains on."""

    raw_latents_BFCHW: torch.Tensor  # unscaled; float16 as stored, or float32 where drawn from the posterior
    tokens_BL: torch.Tensor  # int64
    positions: tuple[int, ...]  # in the global batch: the address of every random draw
    keys: tuple[str, ...]
    text_BLD: torch.Tensor | None  # float32 text features, where the stored ones are used
    intact_B: torch.Tensor  # bool; False for a damaged sample, whose values are zeros


class TrainingData:
    """The training side of a data set's split, in an order fixed by a seed, in windows of `num_frames` frames.

    Args:
        sample_posterior: draw each latent from the VAE's posterior; else it is the mean.
        stored_text: read the stored text features.
        vocab_size: of the text encoder; a larger token is damage.
        quarantine: folder that records damaged samples; None raises at the first one.
    Raises:
        UserError: a field is missing in the data set, or the split is invalid. While reading: a sample is damaged, or
            more samples than `Quarantine` allows.
    """

    def __init__(
        self,
        dataset: ShardDataset,
        held_out_fraction: float,
        seed: int,
        num_frames: int,
        sample_posterior: bool = False,
        stored_text: bool = False,
        vocab_size: int = 2**31,
        quarantine: str | None = None,
    ) -> None:
        self.dataset = dataset
        self.num_frames = num_frames
        optional = (["logvar"] if sample_posterior else []) + (["text"] if stored_text else [])
        for name in optional:
            if name not in dataset.fields(0):
                raise UserError(f"{dataset.uri} contains no {name}; prepare it with {_KEPT_BY[name]}, or train without")
        self._fields = ("latents", "tokens", *optional)
        clips_N = dataset.clip_hashes()
        held_out_N = held_out_samples(clips_N, held_out_fraction)
        self.samples = np.flatnonzero(~held_out_N)
        first = np.unique(clips_N[held_out_N], return_index=True)[1]
        self.held_out_samples = np.flatnonzero(held_out_N)[np.sort(first)]  # the first one of each clip
        self.seed = seed
        self._order = SampleOrder([self.samples[part] for part in self._by_frame_size(self.samples)], seed)
        self._vocab_size = vocab_size
        self.quarantine = Quarantine(quarantine, len(self.samples)) if quarantine is not None else None

    @property
    def damaged(self) -> int:
        """Damaged samples that all ranks had recorded when this rank last counted them."""
        return self.quarantine.count if self.quarantine is not None else 0

    def refresh_damaged(self) -> None:
        """Counts the damaged samples again; lists the folder of the quarantine."""
        if self.quarantine is not None:
            self.quarantine.refresh()

    def sample_at(self, place: int) -> int:
        """The data set's index of the sample at a place of the infinite stream of the first frame size."""
        return self._order.sample_at(place)

    def batch(self, step: int, global_batch: int, rank: int = 0, world: int = 1) -> Batch:
        """Worker `rank`'s share of global batch `step` (counted from 0)."""
        positions = share(global_batch, rank, world)
        places = [step * global_batch + position for position in positions]
        return self._read(self._order.batch(step, global_batch, positions), places, positions)

    def held_out(self, count: int) -> list[Batch]:
        """One window of each of up to `count` held-out clips, always the same ones, in float32, without damaged ones.

        Returns:
            A batch for each frame size; `positions` are those among all of the clips.
        Raises:
            UserError: all of them are damaged.
        """
        batches = [
            Batch(
                raw_latents_BFCHW=read.raw_latents_BFCHW[intact].float(),
                tokens_BL=read.tokens_BL[intact],
                positions=tuple(read.positions[i] for i in intact.tolist()),
                keys=tuple(read.keys[i] for i in intact.tolist()),
                text_BLD=read.text_BLD[intact] if read.text_BLD is not None else None,
                intact_B=read.intact_B[intact],
            )
            for read in self._first(self.held_out_samples, count)
            if len(intact := torch.nonzero(read.intact_B)[:, 0])
        ]
        if not batches:
            raise UserError(f"the held-out clips of {self.dataset.uri} are damaged; verify the data set")
        ranks = {place: rank for rank, place in enumerate(sorted(p for batch in batches for p in batch.positions))}
        return [replace(batch, positions=tuple(ranks[place] for place in batch.positions)) for batch in batches]

    def measured_latents(self, count: int) -> list[torch.Tensor]:
        """Raw latents of one window of each of up to `count` training clips, for measuring the data set.

        Clips and windows are drawn from the whole data set, always the same ones: the first samples may be windows of a
        few clips.

        Returns:
            float32 [B, F, C, H, W] for each frame size.
        Raises:
            UserError: all of them are damaged.
        """
        shuffled = np.random.default_rng(0).permutation(self.samples)
        one_of_each = np.unique(self.dataset.clip_hashes()[shuffled], return_index=True)[1]
        picks = shuffled[one_of_each][:count]  # in the order of hashes, which is no order of the clips
        reads = self._first(picks, count)
        latents = [read.raw_latents_BFCHW[read.intact_B].float() for read in reads if read.intact_B.any()]
        if not latents:
            raise UserError(
                f"all of {len(picks)} training samples of {self.dataset.uri} are damaged; verify the data set"
            )
        return latents

    def _first(self, samples: np.ndarray, count: int) -> list[Batch]:
        """Reads the first `count` of some samples, a batch for each frame size; positions are those among them."""
        picks = samples[:count]
        return [self._read(picks[part].tolist(), part.tolist(), part.tolist()) for part in self._by_frame_size(picks)]

    def _by_frame_size(self, samples: np.ndarray) -> list[np.ndarray]:
        """Returns the positions of the samples of each frame size, without frame sizes that none of them has."""
        places = self.dataset.frame_size_places(samples)
        return [np.flatnonzero(places == place) for place in np.unique(places)]

    def _read(self, samples: list[int], places: Sequence[int], positions: Sequence[int]) -> Batch:
        """Reads samples at places of the stream; every draw is a function of seed and place."""
        samples_B = np.array(samples)
        starts = self._starts(samples_B, places)
        arrays: dict[str, np.ndarray] = {}
        damage: dict[int, str] = {}
        windows = {n: (starts, self.num_frames) if n in ("latents", "logvar") else (None, None) for n in self._fields}
        for name, (values, reasons) in self.dataset.stacks(samples_B, windows).items():
            arrays[name] = values
            damage |= {b: f"{name}: {reason}" for b, reason in reasons.items()}
        tokens_BL = arrays["tokens"]
        unknown_B = ((tokens_BL < 0) | (tokens_BL >= self._vocab_size)).any(axis=1)
        damage |= dict.fromkeys(np.flatnonzero(unknown_B).tolist(), "tokens: unknown to the text encoder")
        latents = torch.from_numpy(arrays["latents"])
        if "logvar" in arrays:
            latents, logvar = latents.float(), torch.from_numpy(arrays["logvar"]).float()
            for b, place in enumerate(places):
                noise = torch.randn(latents.shape[1:], generator=addressed_generator("posterior", self.seed, place))
                latents[b] += torch.exp(0.5 * logvar[b]) * noise
                if not latents[b].isfinite().all():
                    damage[b] = "logvar: too large"
        tokens = torch.from_numpy(tokens_BL).long()
        text = torch.from_numpy(arrays["text"]).float() if "text" in arrays else None
        keys = self.dataset.keys_of(samples_B)
        intact = torch.ones(len(samples), dtype=torch.bool)
        for b, reason in damage.items():
            if self.quarantine is None:
                raise UserError(f"sample {keys[b]} of {self.dataset.uri} is damaged ({reason}); verify the data set")
            self.quarantine.add(keys[b], self.dataset.uri, reason)
            for values in (latents, tokens, intact, *([text] if text is not None else [])):
                values[b] = 0
        return Batch(latents, tokens, tuple(positions), keys, text, intact)

    def _starts(self, samples_B: np.ndarray, places: Sequence[int]) -> list[int]:
        """The frames at which windows begin."""
        counts = self.dataset.frame_counts(samples_B).tolist()
        if min(counts) < self.num_frames:
            raise UserError(
                f"{self.dataset.uri} contains a clip of {min(counts)} frames, {self.num_frames} are trained on;"
                " give a data set prepared with that many, or train on fewer"
            )
        starts = []
        for count, place in zip(counts, places, strict=True):
            generator = addressed_generator("window", self.seed, place) if count > self.num_frames else None
            starts.append(int(torch.randint(count - self.num_frames + 1, (), generator=generator)) if generator else 0)
        return starts
