"""A CLIP image encoder as the judge of frame consistency (section 4.1)."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from tasks.evaluate.judges import JudgeError, JudgeName
from tasks.evaluate.random_nets import random_clip_model

OPENAI_VIT_L_14_SHA256 = "b8cca3fd41ae0c99ba7e8951adf17d267cdb84cd88be6f7c2e0eca1737a03836"


@dataclass(frozen=True)
class ImageJudge:
    """Embeds frames. `metric` is the honest name of the consistency it yields, `official` says it is the paper's."""

    metric: str
    official: bool
    sha256: str
    model: Any
    transform: Callable[..., torch.Tensor]

    @torch.no_grad()
    def embed(self, pixels: NDArray[np.uint8], batch: int = 32) -> NDArray[np.float32]:
        """Frames uint8 [F, H, W, 3] -> embeddings float32 [F, D], each frame on its own; not normalised."""
        from PIL import Image

        device = next(self.model.parameters()).device
        inputs = torch.stack([self.transform(Image.fromarray(frame)) for frame in pixels])
        parts = [self.model.encode_image(inputs[i : i + batch].to(device)) for i in range(0, len(inputs), batch)]
        return torch.cat(parts).float().cpu().numpy()


def random_clip() -> ImageJudge:
    """open_clip's vision tower with fixed random weights: sees that frames differ, knows nothing of their content."""
    import open_clip

    model, sha256 = random_clip_model()
    transform: Any = open_clip.image_transform(model.visual.image_size, is_train=False)
    return ImageJudge(f"rfc-clip-random@{sha256[:8]}", False, sha256, model, transform)


def identify_clip(path: str | None, sha256: str | None = None) -> JudgeName:
    """Checks and names the weights that `load_clip` would load; the hash comes first because loading may run code.

    Raises:
        JudgeError: nothing at the path, another hash, or a folder that leaves open which activation it wants.
    """
    if path is None:
        judge = random_clip()
        return JudgeName(judge.metric, judge.official, judge.sha256)
    place = Path(path)
    weights = place
    if place.is_dir():
        config_file, weights = place / "open_clip_config.json", place / "open_clip_model.safetensors"
        for part in (config_file, weights):
            if not part.is_file():
                raise JudgeError(f"{place} lacks {part.name}; give a folder saved by open_clip, with both files")
        # OpenAI's weights need QuickGELU, and loading them with plain GELU raises no error, only other numbers.
        if "quick_gelu" not in json.loads(config_file.read_text()).get("model_cfg", {}):
            raise JudgeError(f'{config_file} does not say "quick_gelu" in model_cfg; write true for OpenAI weights')
    elif not place.is_file():
        raise JudgeError(f"no CLIP weights at {place}; give OpenAI's ViT-L-14.pt or an open_clip folder")
    with weights.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    wanted = (sha256 or OPENAI_VIT_L_14_SHA256).lower()
    if found != wanted:
        source = "the given clip_sha256" if sha256 else "that of OpenAI's ViT-L-14.pt"
        raise JudgeError(
            f"{weights} has sha256 {found}, {source} is {wanted};"
            " give the official file, or this file's own hash as clip_sha256 to use it under another name"
        )
    official = found == OPENAI_VIT_L_14_SHA256
    return JudgeName("F-Consistency" if official else f"rfc-clip@{found[:8]}", official, found)


def load_clip(path: str | None, sha256: str | None = None, device: str = "cpu") -> ImageJudge:
    """The judge of frame consistency, see `identify_clip` for its errors.

    Args:
        path: OpenAI's `ViT-L-14.pt`, or a folder with `open_clip_config.json` and `open_clip_model.safetensors`,
            or None for the random tower.
        sha256: the hash that the weights file must have; without it only the official one is accepted.
    """
    if path is None:
        judge = random_clip()
        judge.model.to(device)
        return judge
    import open_clip

    name = identify_clip(path, sha256)
    if Path(path).is_dir():
        # This function, unlike create_model, refuses a folder without weights instead of returning random ones.
        loaded: Any = open_clip.create_model_from_pretrained(f"local-dir:{path}", device=device)
        model, transform = loaded
    else:
        model = open_clip.load_openai_model(path, precision="fp32", device=device)  # sets QuickGELU itself
        transform: Any = open_clip.image_transform(model.visual.image_size, is_train=False)  # type: ignore[arg-type]
    return ImageJudge(name.metric, name.official, name.sha256, model.eval().requires_grad_(False), transform)
