"""VideoMAE, an extractor whose Frechet distance is more sensitive to motion than I3D's (Ge et al., 2024).

Feature: "videomae" [1, D], D = 1408 for ViT-g.
"""

from __future__ import annotations

from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray

from tasks.metrics.extractors.extractor import ExtractorError
from tasks.metrics.extractors.identity import identify_video_mae


class VideoMAE:
    """A fine-tuned VideoMAE in a folder of transformers: `config.json` and `model.safetensors`.

    Frames as cd-fvd gives them: squashed to the model's size, divided by 255, and neither mean nor deviation.

    Raises:
        ExtractorError: a folder that is not whole, or another hash of its weights than the stated one.
    """

    def __init__(self, path: str, sha256: str | None = None, device: str = "cpu") -> None:
        self.path, self.device = Path(path), device
        self.info = identify_video_mae(path, sha256)

    @cached_property
    def _net(self) -> Any:
        from transformers import VideoMAEForVideoClassification

        try:
            loaded: Any = VideoMAEForVideoClassification.from_pretrained(
                self.path, local_files_only=True, use_safetensors=True, output_loading_info=True
            )
            net, told = loaded
        except (OSError, ValueError, RuntimeError) as error:
            raise ExtractorError(f"{self.path} cannot be read as a VideoMAE of transformers") from error
        absent = sorted(told["missing_keys"])
        if absent or net.fc_norm is None:  # transformers would go on with random ones
            part = absent[0] if absent else "fc_norm (use_mean_pooling in config.json)"
            raise ExtractorError(f"{self.path} has no {part}; give a fine-tuned VideoMAE with its classifier")
        return net.to(self.device).eval().requires_grad_(False)

    @torch.no_grad()
    def features(self, pixels: NDArray[np.uint8], caption: str) -> dict[str, NDArray[np.float32]]:
        """Pixels uint8 [F, H, W, 3], F as the model wants -> "videomae" [1, D]; the caption is not read."""
        net = self._net
        if len(pixels) != net.config.num_frames:
            raise ExtractorError(f"{self.info.metric} takes clips of {net.config.num_frames} frames, got {len(pixels)}")
        size = (net.config.image_size, net.config.image_size)
        frames = torch.from_numpy(pixels).to(self.device).permute(0, 3, 1, 2).float() / 255
        frames = F.interpolate(frames, size, mode="bilinear", align_corners=False)
        return {"videomae": net.fc_norm(net.videomae(frames[None]).last_hidden_state.mean(1)).cpu().numpy()}
