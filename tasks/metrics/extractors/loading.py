"""All judges that an evaluation asks, by the files that it was given."""

from __future__ import annotations

from tasks.metrics.extractors.clip import Clip
from tasks.metrics.extractors.custom import Custom
from tasks.metrics.extractors.extractor import Judge, JudgeError, JudgeName
from tasks.metrics.extractors.files import JudgeFiles
from tasks.metrics.extractors.flow import Raft
from tasks.metrics.extractors.i3d import I3D
from tasks.metrics.extractors.inception import Inception
from tasks.metrics.extractors.random_nets import RandomDistance
from tasks.metrics.extractors.video_mae import VideoMAE


def load_judges(files: JudgeFiles, device: str = "cpu") -> list[Judge]:
    """The judges that are asked: CLIP or its stand-in and the two random nets always, the others where they are given.

    Weights are hashed here and read with the first clip.

    Raises:
        JudgeError: a file that is not there or has another hash, a folder that is not whole, a module that fails.
    """
    judges: list[Judge] = [Clip(files.clip_model, files.clip_sha256, device)]
    judges += [RandomDistance(feature, device) for feature in ("rfd_app", "rfd_motion")]
    if files.i3d is not None:
        judges.append(I3D(files.i3d, files.i3d_sha256, device))
    if files.inception is not None:
        for clean in (False, True) if files.inception_clean else (False,):
            judges.append(Inception(files.inception, files.inception_sha256, clean, device))
    elif files.inception_clean:
        raise JudgeError("inception_clean is set and no inception file is given; give both or neither")
    if files.videomae is not None:
        judges.append(VideoMAE(files.videomae, files.videomae_sha256, device))
    if files.raft is not None:
        judges.append(Raft(files.raft, files.raft_sha256, device))
    if files.custom is not None:
        judges.append(Custom(files.custom, device))
    return judges


def identify_judges(files: JudgeFiles) -> list[JudgeName]:
    """The names of these judges, in their order; errors as of `load_judges`. Only a custom module is run for it."""
    return [judge.name for judge in load_judges(files)]
