"""Identifies and loads the feature extractors of an evaluation from the files that it is given."""

from __future__ import annotations

from typing import Any

from tasks.metrics.extractors import identity
from tasks.metrics.extractors.extractor import ExtractorError, ExtractorInfo, FeatureExtractor
from tasks.metrics.extractors.files import ExtractorFiles


def _plan(files: ExtractorFiles) -> list[tuple[str, tuple[Any, ...]]]:
    """Kind and arguments of each extractor: CLIP and the two random networks always, the others if their file is given.

    Raises:
        ExtractorError: `inception_clean` without an Inception file.
    """
    plan: list[tuple[str, tuple[Any, ...]]] = [("clip", (files.clip_model, files.clip_sha256))]
    plan += [("random", (feature,)) for feature in ("rfd_app", "rfd_motion")]
    if files.i3d is not None:
        plan.append(("i3d", (files.i3d, files.i3d_sha256)))
    if files.i3d_port is not None:
        plan.append(("i3d_port", (files.i3d_port, files.i3d_port_sha256)))
    if files.inception is not None:
        for clean in (False, True) if files.inception_clean else (False,):
            plan.append(("inception", (files.inception, files.inception_sha256, clean)))
    elif files.inception_clean:
        raise ExtractorError("inception_clean is set and no inception file is given; give both or neither")
    if files.videomae is not None:
        plan.append(("video_mae", (files.videomae, files.videomae_sha256)))
    if files.raft is not None:
        plan.append(("raft", (files.raft, files.raft_sha256)))
    if files.custom is not None:
        plan.append(("custom", (files.custom,)))
    return plan


def identify_extractors(files: ExtractorFiles) -> list[ExtractorInfo]:
    """The identities of the extractors, in the order and with the errors of `load_extractors`.

    Hashes the files and imports no torch. Only a custom extractor is built, because its state is part of its identity.
    """

    def custom(address: str) -> ExtractorInfo:
        from tasks.metrics.extractors.custom import Custom

        return Custom(address).info

    identify: dict[str, Any] = {
        "clip": identity.identify_clip,
        "random": identity.identify_random,
        "i3d": identity.identify_i3d,
        "i3d_port": identity.identify_i3d_port,
        "inception": identity.identify_inception,
        "video_mae": identity.identify_video_mae,
        "raft": identity.identify_raft,
        "custom": custom,
    }
    return [identify[kind](*arguments) for kind, arguments in _plan(files)]


def load_extractors(files: ExtractorFiles, device: str = "cpu") -> list[FeatureExtractor]:
    """The extractors of these files. Construction checks the hashes; the first clip loads the weights.

    Raises:
        ExtractorError: a missing file, another hash, an incomplete folder, or a custom module that fails.
    """
    from tasks.metrics.extractors.clip import Clip
    from tasks.metrics.extractors.custom import Custom
    from tasks.metrics.extractors.flow import Raft
    from tasks.metrics.extractors.i3d import I3D
    from tasks.metrics.extractors.i3d_port import I3DPort
    from tasks.metrics.extractors.inception import Inception
    from tasks.metrics.extractors.random_nets import RandomDistance
    from tasks.metrics.extractors.video_mae import VideoMAE

    classes: dict[str, Any] = {
        "clip": Clip,
        "random": RandomDistance,
        "i3d": I3D,
        "i3d_port": I3DPort,
        "inception": Inception,
        "video_mae": VideoMAE,
        "raft": Raft,
        "custom": Custom,
    }
    return [classes[kind](*arguments, device=device) for kind, arguments in _plan(files)]
