"""The order of the samples of several frame sizes: whole batches of one size, every sample as often as any other."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tasks.train.order import SampleOrder


def streams_of(*counts: int) -> list[np.ndarray]:
    """Streams of so many samples each, numbered through."""
    return np.split(np.arange(sum(counts)), np.cumsum(counts)[:-1])


def test_with_one_frame_size_the_order_is_one_permutation_after_another() -> None:
    order = SampleOrder([np.arange(3, 10)], seed=5)
    stream = [sample for step in range(9) for sample in order.batch(step, 4, range(4))]
    expected = [np.random.default_rng([5, epoch]).permutation(np.arange(3, 10)) for epoch in range(6)]
    assert stream == np.concatenate(expected)[: len(stream)].tolist()


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(1, 40), min_size=1, max_size=4), st.integers(1, 9), st.integers(0, 99))
def test_after_every_step_samples_of_a_frame_size_were_read_equally_often(
    counts: list[int], global_batch: int, seed: int
) -> None:
    streams = streams_of(*counts)
    order, read = SampleOrder(streams, seed), Counter[int]()
    epochs = 3
    steps = sum(epochs * count // global_batch for count in counts)
    for step in range(steps):
        batch = order.batch(step, global_batch, range(global_batch))
        assert len({next(i for i, s in enumerate(streams) if sample in s) for sample in batch}) == 1
        read.update(batch)
        for samples in streams:
            times = [read[sample] for sample in samples.tolist()]
            assert max(times) - min(times) <= 1
    for samples in streams:  # at the end of an epoch a frame size lacks less than one batch
        lacking = epochs * len(samples) - sum(read[sample] for sample in samples.tolist())
        assert 0 <= lacking < global_batch


def test_whole_epochs_read_every_sample_once_where_batches_divide_the_frame_sizes() -> None:
    streams = streams_of(8, 4, 12)
    order = SampleOrder(streams, 0)
    for epoch in range(3):
        steps = range(6 * epoch, 6 * epoch + 6)
        read = [sample for step in steps for sample in order.batch(step, 4, range(4))]
        assert sorted(read) == list(range(24))
    firsts = [order.batch(step, 4, range(4))[0] for step in range(18)]
    sizes = [next(i for i, samples in enumerate(streams) if sample in samples) for sample in firsts]
    assert sizes != sorted(sizes) and sizes[:6] != sizes[6:12]  # shuffled, each epoch in another way


@pytest.mark.parametrize("world", [1, 2, 3])
def test_the_order_depends_on_neither_the_start_nor_the_number_of_workers(world: int) -> None:
    whole = SampleOrder(streams_of(7, 11), 1)
    expected = [whole.batch(step, 6, range(6)) for step in range(12)]
    resumed = SampleOrder(streams_of(7, 11), 1)
    for step in (*range(7, 12), 2):
        shares = [range(rank * 6 // world, (rank + 1) * 6 // world) for rank in range(world)]
        assert [sample for part in shares for sample in resumed.batch(step, 6, part)] == expected[step]
