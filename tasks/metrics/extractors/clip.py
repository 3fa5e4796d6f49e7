"""CLIP as the judge of frame consistency (section 4.1) and of how well frames and caption agree.

Features: "clip_frames" [F, D], the embedding of each frame on its own, and "clip_text" [D], that of the caption, where
the weights have a text tower for open_clip's tokenizer; neither is normalised.
"""

from __future__ import annotations

import json
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from tasks.metrics.extractors.extractor import JudgeError, JudgeName, checked_sha256, file_sha256, judge_name
from tasks.metrics.extractors.random_nets import random_clip_model

_GEOMETRY = "shorter side by antialiased bicubic to the tower's size, centre crop"
_TOKENS = 49408  # size of the vocabulary of open_clip's tokenizer, which is OpenAI's


class Clip:
    """An image encoder of CLIP.

    Args:
        path: OpenAI's `ViT-L-14.pt`, or a folder with `open_clip_config.json` and `open_clip_model.safetensors`,
            or None for a random tower, which sees that frames differ and knows nothing of their content.
        sha256: the hash that the weights file must have; without it only the official one is accepted.
        device: where it runs.

    Raises:
        JudgeError: nothing at the path, another hash, or a folder that leaves open which activation it wants.
    """

    def __init__(self, path: str | None = None, sha256: str | None = None, device: str = "cpu") -> None:
        self.path, self.device = path, device
        if path is None:
            self._random, found = random_clip_model()
            features, metric = ("clip_frames",), f"rfc-clip-random@{found[:8]}"
            self.name = JudgeName(metric, False, found, features, _GEOMETRY)
        else:
            self.name = _identify(Path(path), sha256)

    @torch.no_grad()
    def features(self, pixels: NDArray[np.uint8], caption: str, batch: int = 32) -> dict[str, NDArray[np.float32]]:
        """Pixels uint8 [F, H, W, 3] and their caption -> embeddings by name, see above."""
        from PIL import Image

        model, transform = self._loaded
        inputs = torch.stack([transform(Image.fromarray(frame)) for frame in pixels])
        parts = [model.encode_image(part.to(self.device)) for part in inputs.split(batch)]
        found = {"clip_frames": torch.cat(parts).float().cpu().numpy()}
        if "clip_text" in self.name.features:
            from open_clip.tokenizer import SimpleTokenizer

            tokens = SimpleTokenizer(context_length=model.context_length)([caption])
            found["clip_text"] = model.encode_text(tokens.to(self.device))[0].float().cpu().numpy()
        return found

    @cached_property
    def _loaded(self) -> tuple[Any, Any]:
        """The model and the transform of its images."""
        import open_clip

        transform: Any = None
        if self.path is None:
            model: Any = self._random
        else:
            try:
                if Path(self.path).is_dir():
                    # Unlike create_model this refuses a folder without weights instead of returning random ones.
                    whole: Any = open_clip.create_model_from_pretrained(f"local-dir:{self.path}")
                    model, transform = whole
                else:
                    model = open_clip.load_openai_model(self.path, precision="fp32", device="cpu")  # with QuickGELU
            except Exception as error:  # whatever torch and open_clip say of a file that is something else
                raise JudgeError(f"{self.path} holds no weights of CLIP that open_clip can read") from error
        if "clip_text" in self.name.features and model.vocab_size != _TOKENS:
            raise JudgeError(
                f"{self.path} has a vocabulary of {model.vocab_size}, that of OpenAI's tokenizer is {_TOKENS};"
                " give an open_clip folder whose configuration says so"
            )
        transform = transform or open_clip.image_transform(model.visual.image_size, is_train=False)
        return model.to(self.device).eval().requires_grad_(False), transform


def _identify(place: Path, sha256: str | None) -> JudgeName:
    features, geometry = ("clip_frames", "clip_text"), _GEOMETRY
    weights = place
    if place.is_dir():
        config_file, weights = place / "open_clip_config.json", place / "open_clip_model.safetensors"
        for part in (config_file, weights):
            if not part.is_file():
                raise JudgeError(f"{place} lacks {part.name}; give a folder saved by open_clip, with both files")
        config = json.loads(config_file.read_text()).get("model_cfg", {})
        # OpenAI's weights need QuickGELU, and loading them with plain GELU raises no error, only other numbers.
        if "quick_gelu" not in config:
            raise JudgeError(f'{config_file} does not say "quick_gelu" in model_cfg; write true for OpenAI weights')
        text = config.get("text_cfg", {})
        if "hf_tokenizer_name" in text or text.get("vocab_size", _TOKENS) != _TOKENS:
            features = ("clip_frames",)
        geometry = f"as open_clip_config.json {file_sha256(config_file)[:8]} says"
    elif not place.is_file():
        raise JudgeError(f"no CLIP weights at {place}; give OpenAI's ViT-L-14.pt or an open_clip folder")
    return judge_name("clip", "rfc-clip", checked_sha256(weights, "clip", sha256), features, geometry)
