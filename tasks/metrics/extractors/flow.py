"""RAFT, the extractor of motion: how far pixels move from frame to frame.

Feature: "flow" [F-1], the mean length of the flow of each pair of consecutive frames, in pixels of a frame whose
shorter side has 256.
"""

from __future__ import annotations

from functools import cached_property

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import nn

from tasks.metrics.extractors.extractor import ExtractorError
from tasks.metrics.extractors.identity import identify_raft

_SIDE = 256


class Raft:
    """torchvision's raft_large with the weights of a given file, which holds a state dict.

    Raises:
        ExtractorError: no file, or another hash than the known or the stated one.
    """

    def __init__(self, path: str, sha256: str | None = None, device: str = "cpu") -> None:
        self.path, self.device = path, device
        self.info = identify_raft(path, sha256)

    @cached_property
    def _net(self) -> nn.Module:
        from torchvision.models.optical_flow import raft_large

        with torch.random.fork_rng(devices=[]):  # its constructor draws from the global generator
            net = raft_large(weights=None)
        try:
            net.load_state_dict(torch.load(self.path, map_location="cpu", weights_only=True))
        except Exception as error:  # whatever torch says of a file that is something else
            raise ExtractorError(f"{self.path} holds no weights of torchvision's raft_large") from error
        return net.to(self.device).eval().requires_grad_(False)

    @torch.no_grad()
    def features(self, pixels: NDArray[np.uint8], caption: str, batch: int = 4) -> dict[str, NDArray[np.float32]]:
        """Pixels uint8 [F, H, W, 3] -> "flow" [F-1]; the caption is not read."""
        net, frames = self._net, flow_frames(pixels).to(self.device)
        pairs = zip(frames[:-1].split(batch), frames[1:].split(batch), strict=True)
        lengths = [net(first, second)[-1].norm(dim=1).mean(dim=(1, 2)) for first, second in pairs]
        return {"flow": torch.cat(lengths).cpu().numpy()}


def flow_frames(pixels: NDArray[np.uint8]) -> torch.Tensor:
    """uint8 [F, H, W, 3] -> float32 [F, 3, h, w] in [-1, 1], the shorter side 256 and both multiples of 8."""
    height, width = pixels.shape[1:3]
    size = [8 * round(side * _SIDE / min(height, width) / 8) for side in (height, width)]
    frames = torch.from_numpy(pixels).permute(0, 3, 1, 2).float()
    if (height, width) != tuple(size):
        frames = F.interpolate(frames, size, mode="bilinear", align_corners=False, antialias=True)
    return frames / 127.5 - 1
