"""The paper's own figures (Tables 1, 5 and 6), to print beside ours: as published, measured by another harness."""

from __future__ import annotations

from dataclasses import dataclass

AS_PUBLISHED = "as published, other harness"


@dataclass(frozen=True)
class PublishedRow:
    """One row on WebVid-10M: 2,048 validation videos, 16 frames of 256x256 at 4 fps, DDIM with 50 steps.

    Consistencies in percent by CLIP ViT-L/14; the paper states neither the pair rule, nor the FVD code, nor intervals.
    """

    table: int
    method: str
    consistency_4: float
    consistency_all: float
    fvd: float


WEBVID_10M = (
    PublishedRow(1, "T2V-Zero", 91.59, 92.15, 279.0),
    PublishedRow(1, "VideoComposer", 88.78, 92.52, 231.0),
    PublishedRow(1, "TRIP", 95.36, 96.41, 38.9),
    PublishedRow(5, "TRIP_C", 94.77, 96.13, 41.3),
    PublishedRow(5, "TRIP_TE", 95.17, 96.20, 39.8),
    PublishedRow(6, "TRIP^-", 94.66, 95.92, 39.9),
    PublishedRow(6, "TRIP^W", 95.22, 95.96, 43.0),
)
