"""Identifies feature extractors by their files: names, hashes and geometry, without loading a network.

Imports no torch: the driver of an evaluation needs these identities for the key of its report.
"""

from __future__ import annotations

import json
from pathlib import Path

from tasks.metrics.extractors.extractor import (
    ExtractorError,
    ExtractorInfo,
    MetricKind,
    checked_sha256,
    extractor_info,
    file_sha256,
)

CLIP_TOKENS = 49408  # vocabulary size of open_clip's tokenizer, which is OpenAI's
_CLIP_GEOMETRY = "shorter side by antialiased bicubic to the tower's size, centre crop"

# SHA-256 of the states of the fixed random networks. Building one checks its state against this value.
RANDOM_SHA256 = {
    "clip_frames": "db8a3869c8044295e0f1b32954d46765248f2edb5d38fb4096e945090be6b0ed",
    "rfd_app": "2c1eb0770ab8318abb086829a79e84674c73ffa6097eb48ba06e594ec9410961",
    "rfd_motion": "5eab684f39e22abb7d9a059b468feaf1d6edfbf0ea0c84a477f2e0f7ae02c721",
}
_RANDOM_GEOMETRY = {
    "rfd_app": "frames 2 to the last at their own size, 0-1",
    "rfd_motion": "differences of consecutive frames at their own size, 0-1",
}


def identify_clip(path: str | None = None, sha256: str | None = None) -> ExtractorInfo:
    """The identity of CLIP in a file or an open_clip folder; None: of the random tower.

    Raises:
        ExtractorError: no such file, another hash, or a folder whose configuration does not define the activation.
    """
    if path is None:
        found = RANDOM_SHA256["clip_frames"]
        metric = f"rfc-clip-random@{found[:8]}"
        return ExtractorInfo(metric, False, found, ("clip_frames",), _CLIP_GEOMETRY, MetricKind.CONSISTENCY)
    features, geometry = ("clip_frames", "clip_text"), _CLIP_GEOMETRY
    weights = folder = Path(path)
    if folder.is_dir():
        config_file, weights = folder / "open_clip_config.json", folder / "open_clip_model.safetensors"
        for part in (config_file, weights):
            if not part.is_file():
                raise ExtractorError(f"{folder} lacks {part.name}; give a folder saved by open_clip, with both files")
        config = json.loads(config_file.read_text()).get("model_cfg", {})
        # OpenAI's weights need QuickGELU. Loading them with plain GELU raises no error and gives other numbers.
        if "quick_gelu" not in config:
            raise ExtractorError(f'{config_file} has no "quick_gelu" in model_cfg; write true for OpenAI weights')
        text = config.get("text_cfg", {})
        if "hf_tokenizer_name" in text or text.get("vocab_size", CLIP_TOKENS) != CLIP_TOKENS:
            features = ("clip_frames",)
        geometry = f"as open_clip_config.json {file_sha256(config_file)[:8]} says"
    elif not weights.is_file():
        raise ExtractorError(f"no CLIP weights at {weights}; give OpenAI's ViT-L-14.pt or an open_clip folder")
    found = checked_sha256(weights, "clip", sha256)
    return extractor_info("clip", "rfc-clip", found, features, geometry, MetricKind.CONSISTENCY)


def identify_random(feature: str) -> ExtractorInfo:
    """The identity of the random network of a feature, `rfd_app` or `rfd_motion`."""
    sha256 = RANDOM_SHA256[feature]
    metric = f"{feature.replace('_', '-')}@{sha256[:8]}"
    return ExtractorInfo(
        metric, False, sha256, (feature,), _RANDOM_GEOMETRY[feature], MetricKind.CLIP_SETS, least_frames=2
    )


def identify_i3d(path: str, sha256: str | None = None) -> ExtractorInfo:
    """The identity of I3D. Raises ExtractorError on no file, or another hash than the known or the stated one."""
    geometry = "all frames, squashed to 224x224 (bilinear) and mapped to [-1, 1] by the file itself; logits"
    found = checked_sha256(Path(path), "i3d", sha256)
    return extractor_info("i3d", "fvd-i3d", found, ("i3d",), geometry, MetricKind.CLIP_SETS, 16)


def identify_i3d_port(path: str, sha256: str | None = None) -> ExtractorInfo:
    """The identity of the ported I3D. Raises ExtractorError on no file, or another hash than the known or stated one.

    Its file is known, its values are not published ones, so its metric is never FVD.
    """
    geometry = "all frames, squashed to 224x224 (bilinear) and mapped to [-1, 1]; logits"
    found = checked_sha256(Path(path), "i3d_port", sha256)
    return ExtractorInfo(f"fvd-i3d-port@{found[:8]}", False, found, ("i3d_port",), geometry, MetricKind.CLIP_SETS, 16)


def identify_inception(path: str, sha256: str | None = None, clean: bool = False) -> ExtractorInfo:
    """The identity of Inception. Raises ExtractorError on no file, or another hash than the known or the stated one."""
    feature, variant = ("inception_clean", "-clean") if clean else ("inception", "")
    kernel = "bicubic with antialias, as clean-fid" if clean else "bilinear as TensorFlow 1, as torch-fidelity"
    geometry = f"each frame squashed to 299x299 ({kernel}), (x - 128) / 128; 2048 pooled features"
    found = checked_sha256(Path(path), "inception", sha256)
    return extractor_info(
        "inception", "fid-inception", found, (feature,), geometry, MetricKind.FRAME_SETS, variant=variant
    )


def identify_video_mae(path: str, sha256: str | None = None) -> ExtractorInfo:
    """The identity of VideoMAE. Raises ExtractorError on an incomplete folder, or another hash than the stated one."""
    folder = Path(path)
    for part in (config := folder / "config.json", weights := folder / "model.safetensors"):
        if not part.is_file():
            raise ExtractorError(f"{path} lacks {part.name}; give a folder saved by transformers, with both files")
    geometry = (
        f"all frames squashed to the size of config.json {file_sha256(config)[:8]} (bilinear), 0-1 without mean and"
        " deviation; mean of the tokens, normalised by the head's layer"
    )
    found = checked_sha256(weights, "videomae", sha256)
    return extractor_info("videomae", "fvd-videomae", found, ("videomae",), geometry, MetricKind.CLIP_SETS, 16)


def identify_raft(path: str, sha256: str | None = None) -> ExtractorInfo:
    """The identity of RAFT. Raises ExtractorError on no file, or another hash than the known or the stated one."""
    geometry = "shorter side to 256 (bilinear with antialias), sides multiples of 8; 12 updates"
    found = checked_sha256(Path(path), "raft", sha256)
    return extractor_info("raft", "flow_ratio", found, ("flow",), geometry, MetricKind.FLOW_RATIO, 2)
