"""Turns one clip's file into samples: decode on the time grid, VAE-encode each window, tokenize the caption."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from tasks.ingest.download import Fetched
from tasks.records import ClipRef, Failure, UserError
from tasks.shards import Sample, sample_key
from trip_model.encoders import encode_pixels, load_text_encoder, load_vae, vae_factor
from trip_model.video import ClipError, read_windows

_FP16_MAX = float(np.finfo(np.float16).max)


@dataclass(frozen=True)
class EncodeSpec:
    """What a sample is. The defaults are the paper's: 16 frames at 4 fps, 256 pixels (Section 4.1)."""

    num_frames: int = 16
    fps: float = 4.0
    size: int = 256
    windows_per_clip: int = 1
    keep_pixels: bool = False  # also store uint8 frames, the real clips of the evaluation


class ClipEncoder:
    """Loads the VAE and the tokenizer of a base folder once; then `encode` is a pure function of a clip's bytes.

    Raises:
        UserError: a spec that the VAE cannot serve. trip_model.encoders.BaseFolderError: a part cannot be loaded.
    """

    def __init__(self, base: str | Path, spec: EncodeSpec, device: str = "cpu") -> None:
        check_spec(spec)
        self.spec = spec
        self._vae = load_vae(base, device)
        factor = vae_factor(self._vae)
        if spec.size % factor:
            raise UserError(f"size {spec.size} is no multiple of {factor}, the step of the VAE in {base}")
        self._text = load_text_encoder(base)

    def encode(self, ref: ClipRef, fetched: Fetched) -> list[Sample] | Failure:
        """The samples of one clip, one per window; or a Failure under the decoder's reason, or `non_finite_latents`."""
        spec = self.spec
        try:
            clips = read_windows(fetched.data, spec.num_frames, spec.fps, spec.size, spec.windows_per_clip)
        except ClipError as error:
            return Failure(ref.key, ref.row, error.reason, error.detail)
        tokens = self._text.tokenize([ref.caption])[0].numpy().astype(np.int32)
        samples = []
        for window, clip in enumerate(clips):
            latents = encode_pixels(self._vae, clip.pixels).numpy()
            if not np.isfinite(latents).all() or np.abs(latents).max() > _FP16_MAX:
                return Failure(ref.key, ref.row, "non_finite_latents", f"window {window} does not fit float16")
            samples.append(
                Sample(
                    key=sample_key(ref.key, window),
                    caption=ref.caption,
                    latents=latents.astype(np.float16),
                    first=clip.pixels[0],
                    tokens=tokens,
                    meta={
                        "clip": ref.key,
                        "row": ref.row,
                        "url": ref.url,
                        "sha256": fetched.sha256,
                        "size_bytes": len(fetched.data),
                        "window": window,
                        "times": [round(float(t), 6) for t in clip.times],
                        "fps": spec.fps,
                        "size": spec.size,
                        "decoder": clip.info,
                        "pixels_sha256": hashlib.sha256(clip.pixels.tobytes()).hexdigest(),
                    },
                    pixels=clip.pixels if spec.keep_pixels else None,
                )
            )
        return samples


def check_spec(spec: EncodeSpec) -> None:
    """Raises UserError for a number that no clip can satisfy."""
    for name in ("num_frames", "fps", "size", "windows_per_clip"):
        if not getattr(spec, name) > 0:
            raise UserError(f"{name} {getattr(spec, name)}, expected a number above 0")
    if spec.num_frames < 2:
        raise UserError(f"num_frames {spec.num_frames}; a clip needs at least 2 frames to move")
