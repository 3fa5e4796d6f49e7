"""Reads batches ahead of the step that takes them, in a thread, and moves them to the device without waiting for it."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from types import TracebackType

import numpy as np
import torch

from tasks.train.loader import Batch
from trip_model.objective import Draw

DEPTH = 2  # batches that are read or being read while a step runs


@dataclass(frozen=True)
class StepInput:
    """One worker's share of a global batch with its random draws."""

    z_0_BCFHW: torch.Tensor  # final latents, float32
    text: torch.Tensor  # tokens [B, L], int64, or text features [B, L, D], float32, where the stored ones are used
    drawn: Draw
    intact_B: torch.Tensor  # bool, on the CPU; False for a damaged sample

    @classmethod
    def of(cls, batch: Batch, scaling: float, drawn: Draw) -> StepInput:
        """The input of a step from what was read; `scaling` turns raw latents into final ones."""
        raw = batch.raw_latents_BFCHW.permute(0, 2, 1, 3, 4).numpy()
        # By numpy, in this thread: torch would start its threads next to those of the step that runs.
        z_0 = torch.from_numpy(np.multiply(raw, np.float32(scaling), dtype=np.float32))
        return cls(z_0, batch.tokens_BL if batch.text_BLD is None else batch.text_BLD, drawn, batch.intact_B)

    def pinned(self) -> StepInput:
        """A copy in page-locked memory, from which a GPU copies by itself."""
        return self._mapped(torch.Tensor.pin_memory)

    def to(self, device: str) -> StepInput:
        """A copy on the device. From page-locked memory it is queued: neither this process nor the device waits."""
        return self._mapped(lambda tensor: tensor.to(device, non_blocking=True))

    def _mapped(self, move: Callable[[torch.Tensor], torch.Tensor]) -> StepInput:
        drawn = Draw(move(self.drawn.t_B), move(self.drawn.noise), move(self.drawn.drop_B))
        return StepInput(move(self.z_0_BCFHW), move(self.text), drawn, self.intact_B)


class ReadAhead:
    """The inputs of the steps from `first` to `end` (excluded), in order, read by one thread, `DEPTH` ahead.

    Leaving the `with` block waits for the read in progress.
    """

    def __init__(self, read: Callable[[int], StepInput], first: int, end: int) -> None:
        self._read, self._next, self._end = read, first, end
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="read-ahead")
        self._reads: deque[Future[StepInput]] = deque()

    def __enter__(self) -> ReadAhead:
        self._submit()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        self._thread.shutdown(cancel_futures=True)

    def take(self) -> StepInput:
        """The input of the next step. Raises what its read raised."""
        current = self._reads.popleft().result()
        self._submit()
        return current

    def _submit(self) -> None:
        while len(self._reads) < DEPTH and self._next < self._end:
            self._reads.append(self._thread.submit(self._read, self._next))
            self._next += 1
