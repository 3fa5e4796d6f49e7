"""Whether the judges' files give the values that others published for them, on clips that need no data."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields

import numpy as np
from numpy.typing import NDArray

from tasks.metrics.extractors.extractor import KNOWN_FILES, NOT_COMPARABLE, Judge, judge_item
from tasks.metrics.extractors.files import JudgeFiles
from tasks.metrics.extractors.loading import load_judges
from tasks.metrics.frechet import Moments, frechet_distance
from tasks.records import UserError

# README of JunyaoHu/common_metrics_on_video_quality: eight clips of zeros and eight of ones, 30 frames of 64 x 64, with
# i3d_torchscript.pt. Clips of one colour are the same under every resizing, and only the means of the features differ.
I3D_FVD, I3D_TOLERANCE = 151.256, 1.0


@dataclass(frozen=True)
class Finding:
    """What one judge gave; `passed` is None where nothing is published to hold it against."""

    metric: str
    passed: bool | None
    text: str


def selftest(files: JudgeFiles, device: str = "cpu") -> Iterator[Finding]:
    """A finding for every file that is given, as it is made.

    Raises:
        UserError: no file is given.
        JudgeError: a file that cannot be used.
    """
    if not any(getattr(files, field.name) for field in fields(files) if "sha256" not in field.name):
        known = ", ".join(f"{kind} ({file.title}, sha256 {file.sha256[:8]}...)" for kind, file in KNOWN_FILES.items())
        raise UserError(f"no file of a judge is given to test; there are {known}")
    given = load_judges(files, device)
    without = {judge.name.id for judge in load_judges(JudgeFiles())}
    for judge in given:
        if judge.name.id not in without:  # the stand-ins have no file
            yield _i3d(judge) if "i3d" in judge.name.features else _looked_at(judge)


def _i3d(judge: Judge) -> Finding:
    black, white = (_features(judge, np.full((30, 64, 64, 3), value, np.uint8)) for value in (0, 255))
    found = frechet_distance(Moments.of(np.repeat(black, 8, axis=0)), Moments.of(np.repeat(white, 8, axis=0)))
    said = f"8 black clips against 8 white ones: {found:.3f}"
    if not judge.name.official:
        return Finding(
            judge.name.metric,
            None,
            f"{said}; the published {I3D_FVD} does not apply, it is of sha256 {KNOWN_FILES['i3d'].sha256[:8]}...",
        )
    return Finding(
        judge.name.metric, abs(found - I3D_FVD) <= I3D_TOLERANCE, f"{said}, published {I3D_FVD} +- {I3D_TOLERANCE:g}"
    )


def _looked_at(judge: Judge) -> Finding:
    noise = np.random.default_rng(0).integers(0, 256, (max(2, judge.name.least_frames), 256, 256, 3), np.uint8)
    shape = list(_features(judge, noise).shape)
    known = "the known file" if judge.name.official else NOT_COMPARABLE
    return Finding(
        judge.name.metric, None, f"{known}; no value is published that needs no data; features {shape} are finite"
    )


def _features(judge: Judge, pixels: NDArray[np.uint8]) -> NDArray[np.float32]:
    return judge_item(judge, "of the self-test", pixels, "a clip")[judge.name.features[0]]
