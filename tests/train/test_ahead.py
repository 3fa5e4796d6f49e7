"""Are batches read ahead in order, does an error reach the step that it belongs to, does a step wait for the device?"""

from __future__ import annotations

import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from tasks.train.ahead import DEPTH, ReadAhead, StepInput
from tasks.train.checkpoints import CheckpointStore
from tasks.train.loop import Training, run_training
from tests.train.test_ticks import make_spec
from trip_model.objective import Draw


def given(step: int) -> StepInput:
    one = torch.full((1,), step)
    return StepInput(one.float(), one, Draw(one, one.float(), one > 0), one >= 0)


def test_inputs_come_in_order_and_at_most_two_are_read_ahead() -> None:
    read: list[int] = []
    enough = threading.Event()

    def reading(step: int) -> StepInput:
        read.append(step)
        if len(read) == DEPTH:
            enough.set()
        return given(step)

    with ReadAhead(reading, 3, 9) as ahead:
        assert enough.wait(30)
        assert read == [3, 4]  # before the first one is taken
        assert [int(ahead.take().text) for _ in range(3, 9)] == [3, 4, 5, 6, 7, 8]
    assert read == [3, 4, 5, 6, 7, 8]


def test_an_error_is_raised_where_its_step_begins() -> None:
    def reading(step: int) -> StepInput:
        if step == 1:
            raise OSError("the store is gone")
        return given(step)

    with ReadAhead(reading, 0, 5) as ahead:
        assert int(ahead.take().text) == 0
        with pytest.raises(OSError, match="the store is gone"):
            ahead.take()


class Waits(TorchDispatchMode):
    """Records the operations that would wait for a GPU: a number read from it."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.equal.default):
            self.found.append(str(func))
        return func(*args, **(kwargs or {}))


def test_a_step_reads_no_number_from_the_device(
    tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = make_spec(tiny_base, tmp_path, average_decay=0.9, micro_batch=1)
    training = Training(spec, 0, 1, "cpu", None)
    inputs = [training._read(step) for step in range(2)]
    lists: list[torch.Tensor] = []
    tolist = torch.Tensor.tolist
    monkeypatch.setattr(torch.Tensor, "tolist", lambda tensor: lists.append(tensor) or tolist(tensor))
    with Waits() as waits:
        torch.zeros(1).item()
        expected = len(waits.found)
        for one in inputs:
            training._train_step(one)
    # `intact_B` and the places of a part are on the CPU in every training: 1 + 3 numbers for each of 2 parts.
    assert expected == 1 and len(waits.found) - expected <= len(inputs) * (1 + 3 * 2)
    assert not [tensor for tensor in lists if tensor.is_floating_point()]
    training._settle()
    assert training.losses.first > 0


def test_a_loss_that_is_not_finite_ends_the_training_before_a_checkpoint(tiny_base: Path, tmp_path: Path) -> None:
    spec = make_spec(tiny_base, tmp_path, steps=40, tick_every=7, checkpoint_every=5, learning_rate_unet=1e30)
    with pytest.raises(FloatingPointError, match=r"the loss is (nan|inf) at step [1-9]"):
        run_training(replace(spec, clip_norm=1e30))
    assert CheckpointStore(f"{spec.output}/checkpoints").newest() is None
