"""Draws docs/images/photo.png: a photo that is unlike the training data, what the VAE keeps of it, and its animation.

    python -m benchmarks.photo PHOTO "a cat moving left slowly" --model examples/demo_trip/weights --output photo.png

From left to right: the photo, its round trip through the VAE, and frames 4, 7, 10, 13 and 16 of the animation. Prints
the PSNR of the round trip and of the last frame to the photo.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from tasks.metrics.pixels import psnr
from trip_model.encoders import decode_latents, encode_pixels
from trip_model.images import load_image
from trip_model.pipeline import TripPipeline

FRAMES = 4, 7, 10, 13, 16
SCALE = 2

Pixels = NDArray[np.uint8]


def strip(photo: Path, prompt: str, model: str, seed: int = 0) -> list[Pixels]:
    """The frames of the picture, each uint8 [size, size, 3]."""
    pipeline = TripPipeline.from_pretrained(model)
    given = load_image(photo.read_bytes(), pipeline.size)
    with torch.no_grad():
        latents = encode_pixels(pipeline.vae, given[None]) * float(pipeline.vae.config.scaling_factor)
        (round_trip,) = decode_latents(pipeline.vae, latents)
    (frames,) = pipeline.generate([given], [prompt], [seed])
    return [given, round_trip, *(frames[number - 1] for number in FRAMES)]


def main(arguments: argparse.Namespace) -> None:
    frames = strip(arguments.photo, arguments.prompt, arguments.model, arguments.seed)
    height, width, _ = frames[0].shape
    picture = Image.fromarray(np.concatenate(frames, axis=1))
    picture.resize((SCALE * width * len(frames), SCALE * height), Image.Resampling.NEAREST).save(arguments.output)
    print(f"VAE's round trip {psnr(frames[1], frames[0]):.1f} dB, frame 16 {psnr(frames[-1], frames[0]):.1f} dB")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("photo", type=Path)
    parser.add_argument("prompt")
    parser.add_argument("--model", default="examples/demo_trip/weights")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, required=True)
    main(parser.parse_args())
