"""What a judge of frames is: its honest name, and a hash that is checked before its file is loaded.

A judge's name is part of its metric's name. "F-Consistency" (section 4.1), "FVD" and "FID" are printed only for the
files of `KNOWN_FILES`; whatever else looks at the frames carries its hash and the words of `NOT_COMPARABLE`.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray
from torch import nn

from tasks.records import UserError, digest

NOT_COMPARABLE = "not comparable with published values"


class JudgeError(UserError):
    """A judge that cannot be used; one sentence with the value, what was expected, and the remedy."""


@dataclass(frozen=True)
class KnownFile:
    """A file that published numbers were made with; `sha256` in hex, or its leading digits where no more are told."""

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
    "inception": KnownFile(
        "FID",
        "torch-fidelity's weights-inception-2015-12-05-6726825d.pth",
        "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2",
    ),
    # Of RAFT its authors publish the leading digits alone. They guard a name here and no door: loading it runs no code.
    "raft": KnownFile("flow_ratio", "torchvision's raft_large_C_T_SKHT_V2-ff5fadd5.pth", "ff5fadd5"),
}


@dataclass(frozen=True)
class JudgeName:
    """A judge's identity, known before its weights are loaded.

    `metric` is the honest name of what it measures, `official` says that the weights are those of published numbers,
    `sha256` is theirs. `features` names the arrays it makes, the one that `metric` is computed from first, `geometry`
    says how frames come to the network, and `least_frames` how many a clip must have.
    """

    metric: str
    official: bool
    sha256: str
    features: tuple[str, ...]
    geometry: str
    least_frames: int = 1

    @property
    def id(self) -> str:
        """A name for files of features: equal for judges that give equal features, and only for those."""
        return f"{self.features[0]}-{digest(self)}"

    @property
    def of_sets(self) -> bool:
        """Whether distances between sets of clips are taken of its features; the others measure clip by clip."""
        return self.features[0] not in ("clip_frames", "flow")

    @property
    def mark(self) -> str:
        """What a further metric of this judge is to carry behind its name: nothing, or the hash."""
        return "" if self.official else f"@{self.sha256[:8]}"

    @property
    def kernel_metric(self) -> str:
        """Name of the kernel distance in the same features: FVD -> KVD, fid-inception@... -> kid-inception@..."""
        place = self.metric.lower().index("f")
        return f"{self.metric[:place]}{'K' if self.metric[place].isupper() else 'k'}{self.metric[place + 1 :]}"


class Judge(Protocol):
    """Looks at one clip. Construction checks and names its weights, its first clip loads them."""

    @property
    def name(self) -> JudgeName: ...

    def features(self, pixels: NDArray[np.uint8], caption: str) -> dict[str, NDArray[np.float32]]:
        """Pixels uint8 [F, H, W, 3] -> an array for each of `name.features`, its shape as the judge's file says."""
        ...


def judge_item(judge: Judge, item: str, pixels: NDArray[np.uint8], caption: str) -> dict[str, NDArray[np.float32]]:
    """The judge's features of one item of a protocol, with input and output checked.

    Raises:
        JudgeError: pixels that are not uint8 [F, H, W, 3], a clip too short for the judge, features that are NaN or
            infinite; with the item and the judge.
    """
    name = judge.name
    if pixels.dtype != np.uint8 or pixels.ndim != 4 or pixels.shape[-1] != 3:
        raise JudgeError(
            f"item {item}: {name.metric} takes frames uint8 [F, H, W, 3] in 0-255, got {pixels.dtype} {pixels.shape}"
        )
    if len(pixels) < name.least_frames:
        raise JudgeError(
            f"item {item}: {len(pixels)} frames, {name.metric} needs at least {name.least_frames};"
            " give longer clips, or leave this judge out"
        )
    found = judge.features(pixels, caption)
    for feature, values in found.items():
        if not np.isfinite(values).all():
            raise JudgeError(
                f"item {item}: {name.metric} gave NaN or infinity in {feature}; its weights are broken, leave it out"
            )
    return found


def checked_sha256(path: Path, kind: str, stated: str | None) -> str:
    """Hex sha256 of a judge's file, once it is the hash that was stated, or without one that of the known file.

    To be asked before a file is loaded, since loading may run what is in it.

    Raises:
        JudgeError: no such file, or another hash.
    """
    known = KNOWN_FILES.get(kind)
    if not path.is_file():
        raise JudgeError(f"no file {path} for the judge {kind}; give {known.title if known else 'one'}")
    with path.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    own = f"this file's own hash as {kind}_sha256 to use it under another name"
    if stated is not None and found != stated.lower():
        raise JudgeError(f"{path} has sha256 {found}, the given {kind}_sha256 is {stated}; give {own}")
    if stated is None and known is None:
        raise JudgeError(f"{path} has sha256 {found}, and no published one is known; give {own}")
    if stated is None and known is not None and not found.startswith(known.sha256):
        raise JudgeError(
            f"{path} has sha256 {found}, that of {known.title} is {known.sha256}; give that file, or {own}"
        )
    return found


def judge_name(
    kind: str,
    otherwise: str,
    sha256: str,
    features: tuple[str, ...],
    geometry: str,
    least_frames: int = 1,
    variant: str = "",
) -> JudgeName:
    """The published name for the known file of this kind, for any other `otherwise` and the hash."""
    known = KNOWN_FILES.get(kind)
    official = known is not None and sha256.startswith(known.sha256)
    metric = f"{known.metric}{variant}" if known and official else f"{otherwise}{variant}@{sha256[:8]}"
    return JudgeName(metric, official, sha256, features, geometry, least_frames)


def file_sha256(path: Path) -> str:
    """Hex sha256 of a small file, such as the configuration beside weights."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def state_sha256(module: nn.Module) -> str:
    """Hex sha256 over names, shapes and float32 bytes of a module's state: the identity of a net without a file."""
    total = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        array: NDArray[Any] = np.ascontiguousarray(tensor.detach().cpu().float().numpy())
        total.update(f"{name}{array.shape}".encode() + array.astype("<f4").tobytes())
    return total.hexdigest()
