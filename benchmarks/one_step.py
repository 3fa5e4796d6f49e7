"""What a small 3D-UNet knows at t = 999: the error of its clip and the shapes kept after one step from pure noise.

    python -m benchmarks.one_step examples/demo_base/weights examples/demo_trip/weights

Each folder has a 3D-UNet that predicts velocity, a VAE and a text encoder; the first frame is at the head, and there
is neither prior nor fusion. Prints for each, on drawn scenes of no training, the root mean square error of the final
latents in the nine worst of 64 cells (about an object's) by frame, and in how many clips frame 16 still shows the
caption's shape; then how far the text features of two captions differ that differ in one word.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch

from benchmarks.shapes import read_shape
from examples.demo_base.common import NUM_FRAMES, clip_pixels
from trip_model.conditioning import drop_condition_slot, unet_input
from trip_model.config import ScheduleConfig
from trip_model.encoders import decode_latents, encode_pixels, load_text_encoder, load_vae
from trip_model.schedule import NoiseSchedule
from trip_model.unet import load_unet

SCENES, T, CELLS, SHOWN = range(990_000, 990_064), 999, 9, (4, 8, 16)
CAPTION = "a red circle moving left slowly"
WORDS = {"circle": "square", "red": "blue", "left": "right", "slowly": "quickly"}


@torch.no_grad()
def measure(folder: Path) -> list[str]:
    """Returns the cells of a folder's row."""
    unet, text, vae = load_unet(folder).eval(), load_text_encoder(folder), load_vae(folder)
    scaling: float = vae.config.scaling_factor  # pyright: ignore[reportAttributeAccessIssue]
    signal, sigma = NoiseSchedule(ScheduleConfig()).signal_and_noise(torch.tensor([T]), 5)
    errors, kept = [], 0
    for scene in SCENES:
        pixels, caption = clip_pixels(scene)
        z_0 = (encode_pixels(vae, pixels) * scaling).permute(1, 0, 2, 3)[None]
        noise = torch.randn(z_0.shape, generator=torch.Generator().manual_seed(scene))
        z_t = signal * z_0 + sigma * noise
        features = text.encode(text.tokenize([caption]))
        velocity: Any = unet(unet_input(z_t, z_0[:, :, :1], "head"), torch.tensor([T]), features)
        made = signal * z_t - sigma * drop_condition_slot(velocity, "head")
        errors.append((made - z_0).square().mean(1).flatten(2).topk(CELLS, -1).values.mean(-1)[0])
        last = decode_latents(vae, made[0, :, NUM_FRAMES - 1 :].permute(1, 0, 2, 3))[0]
        kept += read_shape(last, pixels[0]).shape in caption.split()
    by_frame = torch.stack(errors).mean(0).sqrt()
    own = text.encode(text.tokenize([CAPTION]))
    others = [text.encode(text.tokenize([CAPTION.replace(word, other)])) for word, other in WORDS.items()]
    differences = [f"{(other - own).norm():.1f}" for other in others]
    return [*(f"{by_frame[k - 1]:.3f}" for k in SHOWN), f"{kept} of {len(SCENES)}", *differences]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", type=Path, nargs="+")
    given = parser.parse_args()
    torch.set_num_threads(1)
    heads = [*(f"frame {k}" for k in SHOWN), "shapes", *(f"{word}, {other}" for word, other in WORDS.items())]
    print(f"| folder | {' | '.join(heads)} |\n|---|{'---|' * len(heads)}")
    for folder in given.folders:
        print(f"| {folder} | {' | '.join(measure(folder))} |", flush=True)
