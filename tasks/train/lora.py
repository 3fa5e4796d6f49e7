"""Low-rank adapters (LoRA, arXiv 2106.09685) on the attention projections of the 3D-UNet, by the library peft."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from tasks.train.spec import TrainSpec
from trip_model.unet import UNet3D

if TYPE_CHECKING:
    from peft import PeftModel

PROJECTIONS = ("to_q", "to_k", "to_v", "to_out.0")  # of every attention: over space, to the text, over time


def is_projection(name: str) -> bool:
    """Whether a weight of the 3D-UNet, by its name, gets an adapter."""
    return name.endswith(tuple(f".{projection}.weight" for projection in PROJECTIONS))


def add_adapters(unet: UNet3D, spec: TrainSpec) -> PeftModel:
    """Puts adapters into the 3D-UNet in place and freezes all else of it; the output is unchanged at first.

    Their first weights come from torch's random state.
    """
    from peft import LoraConfig, get_peft_model  # takes seconds, and only this recipe needs it

    config = LoraConfig(r=spec.lora_rank, lora_alpha=spec.lora_alpha, target_modules=list(PROJECTIONS))
    return get_peft_model(unet, config)  # pyright: ignore[reportArgumentType] - any nn.Module will do


def save_and_merge(adapters: PeftModel, folder: Path) -> None:
    """Writes the adapters alone, readable by peft on diffusers' 3D-UNet; then the 3D-UNet is a plain one again."""
    adapters.save_pretrained(str(folder))
    (folder / "README.md").unlink()  # an empty form
    adapters.merge_and_unload()
