"""CLIP, the extractor of frame consistency (section 4.1) and of the agreement of frames and caption.

Features: "clip_frames" [F, D], the embedding of each frame on its own, and "clip_text" [D], that of the caption, where
the weights have a text tower for open_clip's tokenizer; neither is normalised.
"""

from __future__ import annotations

from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from tasks.metrics.extractors.extractor import ExtractorError
from tasks.metrics.extractors.identity import CLIP_TOKENS, identify_clip
from tasks.metrics.extractors.random_nets import random_clip_model


class Clip:
    """An image encoder of CLIP.

    Args:
        path: OpenAI's `ViT-L-14.pt`, or a folder with `open_clip_config.json` and `open_clip_model.safetensors`,
            or None for a random tower, which sees that frames differ and knows nothing of their content.
        sha256: the hash that the weights file must have; without it only the official one is accepted.
        device: where it runs.

    Raises:
        ExtractorError: nothing at the path, another hash, or a folder that leaves open which activation it wants.
    """

    def __init__(self, path: str | None = None, sha256: str | None = None, device: str = "cpu") -> None:
        self.path, self.device = path, device
        self.info = identify_clip(path, sha256)

    @torch.no_grad()
    def features(self, pixels: NDArray[np.uint8], caption: str, batch: int = 32) -> dict[str, NDArray[np.float32]]:
        """Pixels uint8 [F, H, W, 3] and their caption -> embeddings by name, see above."""
        from PIL import Image

        model, transform = self._loaded
        inputs = torch.stack([transform(Image.fromarray(frame)) for frame in pixels])
        parts = [model.encode_image(part.to(self.device)) for part in inputs.split(batch)]
        found = {"clip_frames": torch.cat(parts).float().cpu().numpy()}
        if "clip_text" in self.info.features:
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
            model: Any = random_clip_model()
        else:
            try:
                if Path(self.path).is_dir():
                    # Unlike create_model this refuses a folder without weights instead of returning random ones.
                    whole: Any = open_clip.create_model_from_pretrained(f"local-dir:{self.path}")
                    model, transform = whole
                else:
                    model = open_clip.load_openai_model(self.path, precision="fp32", device="cpu")  # with QuickGELU
            except Exception as error:  # whatever torch and open_clip say of a file that is something else
                raise ExtractorError(f"{self.path} holds no weights of CLIP that open_clip can read") from error
        if "clip_text" in self.info.features and model.vocab_size != CLIP_TOKENS:
            raise ExtractorError(
                f"{self.path} has a vocabulary of {model.vocab_size}, that of OpenAI's tokenizer is {CLIP_TOKENS};"
                " give an open_clip folder whose configuration says so"
            )
        transform = transform or open_clip.image_transform(model.visual.image_size, is_train=False)
        return model.to(self.device).eval().requires_grad_(False), transform
