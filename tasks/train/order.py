"""The order of the training samples: a pure function of (seed, step), in batches of one frame size each."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from trip_model.objective import addressed_generator


class SampleOrder:
    """The samples of every global batch, in the order of training.

    The samples of each frame size are a stream: one permutation of them after another, cut into global batches. After e
    epochs a stream of n samples has given floor(e n / global_batch) batches; what is left over begins its first batch
    of the next epoch. The batches of an epoch, of all streams, are shuffled. So every batch is complete, how often two
    samples of a frame size were read differs by one at most, and after an epoch a stream lacks less than one batch of
    it. With one frame size, step k takes batch k of its stream.

    Args:
        streams: the samples of each frame size, int64 [n] each, none empty.
        seed: of the permutations and of the order of the batches.
    """

    def __init__(self, streams: Sequence[np.ndarray], seed: int) -> None:
        self._streams, self._seed = streams, seed
        self._permutations: dict[int, tuple[int, np.ndarray]] = {}  # by stream: the epoch and its permutation
        self._turns: tuple[tuple[int, int], np.ndarray, np.ndarray] | None = None

    def sample_at(self, place: int, stream: int = 0) -> int:
        """Returns the data set's index of the sample at a place of an infinite stream."""
        epoch, offset = divmod(place, len(self._streams[stream]))
        known, order = self._permutations.get(stream, (-1, self._streams[stream]))
        if epoch != known:
            order = np.random.default_rng([self._seed, epoch]).permutation(self._streams[stream])
            self._permutations[stream] = epoch, order
        return int(order[offset])

    def batch(self, step: int, global_batch: int, positions: range) -> list[int]:
        """Returns the samples at some positions of the global batch of a step (counted from 0)."""
        stream, number = self._turn(step, global_batch)
        return [self.sample_at(number * global_batch + position, stream) for position in positions]

    def _turn(self, step: int, global_batch: int) -> tuple[int, int]:
        """Returns whose batch a step takes: the stream, and the number of its batch."""
        counts = [len(samples) for samples in self._streams]

        def given(epochs: int) -> list[int]:
            return [epochs * count // global_batch for count in counts]

        epoch = step * global_batch // sum(counts)  # or later: streams give whole batches only
        while sum(given(epoch + 1)) <= step:
            epoch += 1
        begin = given(epoch)
        if self._turns is None or self._turns[0] != (epoch, global_batch):
            per_stream = [after - before for before, after in zip(begin, given(epoch + 1), strict=True)]
            streams_S = np.repeat(np.arange(len(counts)), per_stream)
            generator = addressed_generator("frame sizes", self._seed, epoch)
            streams_S = streams_S[torch.randperm(len(streams_S), generator=generator).numpy()]
            ranks_S = np.zeros_like(streams_S)
            for stream, count in enumerate(per_stream):
                ranks_S[streams_S == stream] = np.arange(count)
            self._turns = (epoch, global_batch), streams_S, ranks_S
        _, streams_S, ranks_S = self._turns
        place = step - sum(begin)
        stream = int(streams_S[place])
        return stream, begin[stream] + int(ranks_S[place])
