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
    """Whether the weight of this name gets an adapter."""
    return name.endswith(tuple(f".{projection}.weight" for projection in PROJECTIONS))


def add_adapters(unet: UNet3D, spec: TrainSpec) -> PeftModel:
    """Adds adapters to the 3D-UNet in place and freezes its other weights; its output does not change at first.

    The adapters are initialised from torch's global random state.
    """
    from peft import LoraConfig, get_peft_model  # slow to import, and only needed here

    config = LoraConfig(r=spec.lora_rank, lora_alpha=spec.lora_alpha, target_modules=list(PROJECTIONS))
    return get_peft_model(unet, config)  # pyright: ignore[reportArgumentType] - takes any nn.Module


def save_and_merge(adapters: PeftModel, folder: Path) -> None:
    """Writes the adapters, in peft's layout for diffusers' 3D-UNet; then merges them into the 3D-UNet."""
    adapters.save_pretrained(str(folder))
    (folder / "README.md").unlink()  # PEFT writes an empty model card template
    adapters.merge_and_unload()
