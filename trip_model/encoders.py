"""The frozen encoders around the diffusion model: the 2D VAE (pixels to latents and back) and the CLIP text encoder.

A base folder has the layout of `text-to-video-ms-1.7b`: `unet/ vae/ text_encoder/ tokenizer/ scheduler/`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from trip_model.folders import BaseFolderError
from trip_model.text import unescape_entities


def load_vae(base: str | Path, device: str | torch.device = "cpu") -> nn.Module:
    """Loads the `AutoencoderKL` of a base folder, frozen, in float32 and eval mode."""
    from diffusers import AutoencoderKL

    try:
        vae: Any = AutoencoderKL.from_pretrained(
            Path(base) / "vae", torch_dtype=torch.float32, use_safetensors=True, low_cpu_mem_usage=False
        )
    except OSError as error:
        raise BaseFolderError(f"the VAE of {base} cannot be loaded: {str(error).splitlines()[0]}") from error
    return vae.requires_grad_(False).eval().to(device)


def vae_factor(vae: Any) -> int:
    """Pixels per latent cell along one side (8 for the Stable Diffusion VAE)."""
    return 2 ** (len(vae.config.block_out_channels) - 1)


@torch.no_grad()
def encode_pixels(
    vae: Any, pixels: np.ndarray, batch: int = 32, device: str | torch.device | None = None
) -> torch.Tensor:
    """Encodes pixels uint8 [F, H, W, 3] to *raw latents* float32 [F, 4, h, w]: the posterior mean, unscaled.

    Frames are encoded independently: the image latent of a photo equals frame 1 of the clip that starts with it.
    """
    return encode_posterior(vae, pixels, batch, device)[0]


@torch.no_grad()
def encode_posterior(
    vae: Any, pixels: np.ndarray, batch: int = 32, device: str | torch.device | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Encodes pixels uint8 [F, H, W, 3] to the posterior's mean and log variance, float32 [F, 4, h, w], unscaled.

    `device` is where the VAE computes, by default where its weights are; the two differ if it is offloaded.
    """
    weights = next(vae.parameters())
    device = device or weights.device
    frames = torch.from_numpy(np.ascontiguousarray(pixels)).permute(0, 3, 1, 2)
    # In place: a clip's floats are 12 MB, and each new tensor of them costs as much time as the arithmetic.
    scaled = (part.to(device, torch.float32, copy=True).div_(127.5).sub_(1) for part in frames.split(batch))
    parts = [vae.encode(part.to(weights.dtype)).latent_dist for part in scaled]
    mean, logvar = torch.cat([part.mean for part in parts]), torch.cat([part.logvar for part in parts])
    return mean.float().cpu(), logvar.float().cpu()


@torch.no_grad()
def decode_latents(
    vae: Any, final_latents_FCHW: torch.Tensor, batch: int = 32, device: str | torch.device | None = None
) -> np.ndarray:
    """Decodes *final latents* [F, 4, h, w] to pixels uint8 [F, H, W, 3]; `device` as in `encode_posterior`."""
    weights = next(vae.parameters())
    latents = final_latents_FCHW.to(device or weights.device, torch.float32) / vae.config.scaling_factor
    frames = torch.cat([vae.decode(part.to(weights.dtype)).sample.float().cpu() for part in latents.split(batch)])
    pixels = ((frames.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
    return pixels.permute(0, 2, 3, 1).contiguous().numpy()


class TextEncoder(nn.Module):
    """The frozen text encoder: captions to token ids to text features c (Equation 2)."""

    def __init__(self, model: nn.Module, tokenizer: Any, length: int, width: int, vocab_size: int) -> None:
        super().__init__()
        self.model = model.requires_grad_(False).eval()
        self.tokenizer = tokenizer
        self.length = length
        self.width = width
        self.vocab_size = vocab_size

    def tokenize(self, captions: list[str]) -> torch.Tensor:
        """Returns token ids int64 [B, length], padded or truncated to the encoder's length; entities are unescaped."""
        texts = [unescape_entities(caption) for caption in captions]
        out = self.tokenizer(texts, padding="max_length", truncation=True, max_length=self.length, return_tensors="pt")
        return out["input_ids"].to(torch.int64)

    def truncates(self, caption: str) -> bool:
        """Returns whether `tokenize` drops the end of a caption."""
        return len(self.tokenizer(unescape_entities(caption))["input_ids"]) > self.length

    @torch.no_grad()
    def encode(self, token_ids_BL: torch.Tensor) -> torch.Tensor:
        """Returns text features float32 [B, length, width]: the last hidden state after the final layer norm."""
        device = getattr(getattr(self.model, "_hf_hook", None), "execution_device", None)  # set if it is offloaded
        device = next(self.model.parameters()).device if device is None else device
        return self.model(token_ids_BL.to(device))[0].float()


def text_encoder(model: Any, tokenizer: Any) -> TextEncoder:
    """Returns the text encoder of a CLIP text model and its tokenizer."""
    length = min(int(model.config.max_position_embeddings), int(tokenizer.model_max_length))
    return TextEncoder(model, tokenizer, length, int(model.config.hidden_size), int(model.config.vocab_size))


def load_text_encoder(base: str | Path, device: str | torch.device = "cpu") -> TextEncoder:
    """Loads the text encoder and tokenizer of a base folder.

    Raises:
        BaseFolderError: a part that cannot be read.
    """
    folder = Path(base)
    try:
        from transformers import CLIPTextModel, CLIPTokenizer

        model = CLIPTextModel.from_pretrained(folder / "text_encoder", dtype=torch.float32, use_safetensors=True)
        tokenizer: Any = CLIPTokenizer.from_pretrained(folder / "tokenizer")
    except OSError as error:
        raise BaseFolderError(f"the text encoder of {folder} cannot be loaded: {str(error).splitlines()[0]}") from error
    return text_encoder(model, tokenizer).to(device)
