"""Compares feature extractors with published values, on clips that need no data."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields

import numpy as np
from numpy.typing import NDArray

from tasks.metrics.extractors.extractor import KNOWN_FILES, NOT_COMPARABLE, FeatureExtractor, extract_features
from tasks.metrics.extractors.files import ExtractorFiles
from tasks.metrics.extractors.loading import identify_extractors, load_extractors
from tasks.metrics.frechet import Moments, frechet_distance
from tasks.records import UserError

# README of JunyaoHu/common_metrics_on_video_quality: eight clips of zeros and eight of ones, 30 frames of 64 x 64, with
# i3d_torchscript.pt. Clips of one colour are the same under every resizing, and only the means of the features differ.
# The original in TensorFlow, whose weights the port has, gives 151.392; the port repeats it to the last digit.
I3D_FVD = {"i3d": (151.256, 1.0), "i3d_port": (151.392, 0.01)}


@dataclass(frozen=True)
class Finding:
    """The result of one extractor; `passed` is None if there is no published value to compare with."""

    metric: str
    passed: bool | None
    text: str


def selftest(files: ExtractorFiles, device: str = "cpu") -> Iterator[Finding]:
    """Yields a finding for every given file.

    Raises:
        UserError: no file is given.
        ExtractorError: a file that cannot be used.
    """
    if not any(getattr(files, field.name) for field in fields(files) if "sha256" not in field.name):
        known = ", ".join(f"{kind} ({file.title}, sha256 {file.sha256[:8]}...)" for kind, file in KNOWN_FILES.items())
        raise UserError(f"no file of a feature extractor is given; known files are {known}")
    given = load_extractors(files, device)
    without = {info.id for info in identify_extractors(ExtractorFiles())}
    for extractor in given:
        if extractor.info.id not in without:  # the stand-ins have no file
            yield _i3d(extractor) if extractor.info.features[0] in I3D_FVD else _looked_at(extractor)


def _i3d(extractor: FeatureExtractor) -> Finding:
    black, white = (_features(extractor, np.full((30, 64, 64, 3), value, np.uint8)) for value in (0, 255))
    found = frechet_distance(Moments.of(np.repeat(black, 8, axis=0)), Moments.of(np.repeat(white, 8, axis=0)))
    said = f"8 black clips against 8 white ones: {found:.3f}"
    (feature,) = extractor.info.features
    published, tolerance = I3D_FVD[feature]
    known = KNOWN_FILES[feature].sha256
    if extractor.info.sha256 != known:
        return Finding(
            extractor.info.metric,
            None,
            f"{said}; the published {published} does not apply, it is of sha256 {known[:8]}...",
        )
    return Finding(
        extractor.info.metric,
        abs(found - published) <= tolerance,
        f"{said}, published {published} +- {tolerance:g}",
    )


def _looked_at(extractor: FeatureExtractor) -> Finding:
    noise = np.random.default_rng(0).integers(0, 256, (max(2, extractor.info.least_frames), 256, 256, 3), np.uint8)
    shape = list(_features(extractor, noise).shape)
    known = "the known file" if extractor.info.official else NOT_COMPARABLE
    return Finding(
        extractor.info.metric, None, f"{known}; no value is published that needs no data; features {shape} are finite"
    )


def _features(extractor: FeatureExtractor, pixels: NDArray[np.uint8]) -> NDArray[np.float32]:
    return extract_features(extractor, "of the self-test", pixels, "a clip")[extractor.info.features[0]]
