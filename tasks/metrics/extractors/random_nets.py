"""Extractors without weights files: fixed random networks for consistency, appearance and motion distances.

Features: "rfd_app" [F-1, 32] of the frames 2..F, "rfd_motion" [F-1, 32] of the differences of consecutive frames.
"""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from tasks.metrics.extractors.extractor import ExtractorError, state_sha256
from tasks.metrics.extractors.identity import RANDOM_SHA256, identify_random

# The stand-in for CLIP: open_clip's vision tower, far too small to mean anything, large enough to see frames differ.
# Average pooling, because in an untrained tower the class token hardly looks at the image.
RANDOM_CLIP = {
    "embed_dim": 64,
    "vision_cfg": {"image_size": 64, "layers": 3, "width": 96, "head_width": 32, "patch_size": 8, "pool_type": "avg"},
    "text_cfg": {"context_length": 8, "vocab_size": 16, "width": 32, "heads": 1, "layers": 1},
}
RANDOM_SEED = 0
# Width of the random features: a Frechet distance wants about 16 samples for each (knowledge of the floor, N >= 16 d).
RANDOM_WIDTH = 32
_SEEDS = {"rfd_app": 1, "rfd_motion": 2}


@torch.no_grad()
def _fill(module: nn.Module, seed: int) -> None:
    """Fixed random weights by numpy's generator, whose stream is the same on every machine and torch version."""
    for index, (name, parameter) in enumerate(sorted(module.named_parameters())):
        rng = np.random.default_rng([seed, index])
        if parameter.ndim >= 2:
            fan_in = parameter[0].numel()
            values = rng.standard_normal(parameter.shape) * np.sqrt(2.0 / fan_in)
        elif "embedding" in name:
            values = rng.standard_normal(parameter.shape) * 0.02
        else:
            values = np.full(parameter.shape, 1.0 if name.endswith("weight") else 0.0)
        parameter.copy_(torch.from_numpy(values.astype(np.float32)))


def _check(module: nn.Module, feature: str) -> None:
    """Raises ExtractorError if a net is not the one whose hash is in its metric's name."""
    found, expected = state_sha256(module), RANDOM_SHA256[feature]
    if found != expected:
        raise ExtractorError(
            f"the random network of {feature} has sha256 {found}, expected {expected};"
            " use the versions of torch, numpy and open_clip in constraints.txt"
        )


def random_clip_model() -> Any:
    """open_clip's model with a fixed random vision tower. Raises ExtractorError if this open_clip gives another one."""
    import open_clip

    with torch.random.fork_rng(devices=[]):  # its constructor draws from the global generator
        model = open_clip.CLIP(quick_gelu=True, **RANDOM_CLIP)  # type: ignore[arg-type]
    model = model.eval().requires_grad_(False)
    _fill(model.visual, RANDOM_SEED)
    _check(model.visual, "clip_frames")
    return model


class RandomConv(nn.Module):
    """A fixed random 2D net without biases: frames [N, 3, H, W] -> features [N, RANDOM_WIDTH], nothing for nothing."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        widths = (3, 16, 24, RANDOM_WIDTH)
        self.layers = nn.ModuleList(
            nn.Conv2d(a, b, 3, stride=2, padding=1, bias=False) for a, b in itertools.pairwise(widths)
        )
        _fill(self, seed)
        self.eval().requires_grad_(False)

    def forward(self, x_NCHW: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x_NCHW = torch.relu(layer(x_NCHW))
        return x_NCHW.mean(dim=(2, 3))


class RandomDistance:
    """Features of single frames (`rfd_app`) or of frame differences (`rfd_motion`) for a Frechet distance.

    Two separate extractors: an untrained net over whole clips nearly misses freezing and speed, one over
    differences sees them at once. Frames must be lossless: differences also see a codec's noise.
    """

    def __init__(self, feature: str, device: str = "cpu") -> None:
        self.device = device
        self.info = identify_random(feature)
        self.net = RandomConv(_SEEDS[feature]).to(device)
        _check(self.net, feature)

    @torch.no_grad()
    def features(self, pixels: NDArray[np.uint8], caption: str) -> dict[str, NDArray[np.float32]]:
        """Pixels uint8 [F, H, W, 3] -> [F-1, 32] by the feature's name; the caption is not read.

        The given frame is left out of the appearance: real and generated share it, which would flatter the distance.
        """
        (feature,) = self.info.features
        frames = torch.from_numpy(pixels).to(self.device).permute(0, 3, 1, 2).float() / 255.0
        seen = frames[1:] if feature == "rfd_app" else frames.diff(dim=0)
        return {feature: self.net(seen).cpu().numpy()}
