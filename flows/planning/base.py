"""The shapes of a base model: from its folder's JSON files, or the published ones of text-to-video-ms-1.7b."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trip_model.config import TripConfig
from trip_model.folders import BaseFolderError, resolve_base

MS_1_7B = "damo-vilab/text-to-video-ms-1.7b"


@dataclass(frozen=True)
class BaseConfig:
    """The `config.json` of each network of a base, and its source."""

    unet: dict[str, Any]
    vae: dict[str, Any]
    text: dict[str, Any]
    source: str

    def latent_shape(self, config: TripConfig, frame_size: tuple[int, int] | None = None) -> tuple[int, int, int, int]:
        """(C, F, h, w) of one clip's latents, of frames of (width, height) or else of the configuration's square."""
        width, height = frame_size or (config.size, config.size)
        factor = 2 ** (len(self.vae["block_out_channels"]) - 1)
        return self.vae["latent_channels"], config.num_frames, height // factor, width // factor

    def text_shape(self) -> tuple[int, int]:
        """(L, D) of one caption's features."""
        return self.text["max_position_embeddings"], self.text["hidden_size"]


# The published config.json files of the base, without what diffusers' and transformers' classes default to: the 3D-UNet
# of ModelScope text-to-video, Stable Diffusion 2.1's VAE, and the first 23 layers of OpenCLIP ViT-H's text tower.
PUBLISHED = BaseConfig(
    unet={
        "sample_size": 32,
        "block_out_channels": (320, 640, 1280, 1280),
        "layers_per_block": 2,
        "cross_attention_dim": 1024,
        "attention_head_dim": 64,
        "norm_num_groups": 32,
    },
    vae={
        "block_out_channels": (128, 256, 512, 512),
        "down_block_types": ("DownEncoderBlock2D",) * 4,
        "up_block_types": ("UpDecoderBlock2D",) * 4,
        "layers_per_block": 2,
        "latent_channels": 4,
        "norm_num_groups": 32,
        "scaling_factor": 0.18215,
    },
    text={
        "vocab_size": 49408,
        "hidden_size": 1024,
        "intermediate_size": 4096,
        "num_hidden_layers": 23,
        "num_attention_heads": 16,
        "max_position_embeddings": 77,
        "hidden_act": "gelu",
    },
    source="published configuration of text-to-video-ms-1.7b",
)


def read_base(base: str) -> BaseConfig:
    """The shapes of a base folder. text-to-video-ms-1.7b by its hub name needs neither files nor a network.

    Raises:
        BaseFolderError: no such folder, or a part without a readable `config.json`.
    """
    if base == MS_1_7B and not Path(base).is_dir():
        return PUBLISHED
    folder = resolve_base(base)
    try:
        unet, vae, text = (
            json.loads((folder / part / "config.json").read_text()) for part in ("unet", "vae", "text_encoder")
        )
    except (OSError, ValueError) as error:
        raise BaseFolderError(f"base {folder}: a config.json cannot be read ({error}); fetch the base again") from error
    return BaseConfig(unet, vae, text, "config.json files of the base")
