"""Turns clips' files into samples: decoded ahead, VAE-encoded clip by clip, captions tokenized.

The files of a unit pass `decode_ahead`, then `ClipEncoder.encode`; every row keeps its place and comes out once.
"""

from __future__ import annotations

import hashlib
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from infra.redaction import name_of
from tasks.encode.filters import MEASURING_READER, Screen, Window
from tasks.encode.fingerprint import check_spec
from tasks.encode.spec import FilterSpec, PrepareSpec
from tasks.ingest.download import Fetched
from tasks.records import ClipRef, Failure, UserError
from tasks.shards import Sample, sample_key
from tasks.video.decode import Clip, ClipError
from tasks.video.decode_pool import READER, TRACK_READER, DecoderPool
from tasks.video.spec import DecodeSpec

_FP16_MAX = float(np.finfo(np.float16).max)


@dataclass(frozen=True)
class Decoded:
    """One clip on its way from its file to its samples."""

    ref: ClipRef
    sha256: str
    size_bytes: int
    windows: list[Window]  # a track is one long window


def open_decoders(spec: PrepareSpec, decode: DecodeSpec, cpus: int) -> DecoderPool:
    """The processes that decode for one encoder."""
    names = ("num_frames", "fps", "size", "fit", "stride")
    grid: dict[str, Any] = {name: getattr(spec, name) for name in names}
    reader = READER if spec.clip == "windows" else TRACK_READER
    grid |= {"windows": spec.windows_per_clip} if spec.clip == "windows" else {"longest": spec.longest_track}
    return DecoderPool(decode.processes or cpus, decode, grid, MEASURING_READER if spec.filters.chosen() else reader)


def decode_ahead(
    rows: Iterable[tuple[ClipRef, Fetched] | Failure], decoders: DecoderPool, screen: Screen | None = None
) -> Iterator[Decoded | Failure]:
    """Decodes the rows ahead of the caller, `decoders.ahead` at most, and yields them in their order.

    What `screen` leaves out is not encoded; a clip that it leaves no window of becomes a Failure.
    """
    screen = screen or Screen(FilterSpec())

    def finish(row: tuple[ClipRef, Fetched, Future[list[Clip]]] | Failure) -> Decoded | Failure:
        if isinstance(row, Failure):
            return row
        ref, fetched, future = row
        try:
            return Decoded(ref, fetched.sha256, len(fetched.data), screen(future.result()))
        except ClipError as error:
            return Failure(ref.key, ref.row, error.reason, error.detail)

    waiting: deque[tuple[ClipRef, Fetched, Future[list[Clip]]] | Failure] = deque()
    for row in rows:
        waiting.append(row if isinstance(row, Failure) else (*row, decoders.submit(row[1].data)))
        if len(waiting) >= decoders.ahead:
            yield finish(waiting.popleft())
    while waiting:
        yield finish(waiting.popleft())


class ClipEncoder:
    """Loads the VAE and the text encoder of a base folder once; then a sample is a pure function of its clip's frames.

    Raises:
        UserError: a spec that the VAE cannot serve. trip_model.encoders.BaseFolderError: a part cannot be loaded.
    """

    def __init__(self, base: str | Path, spec: PrepareSpec, device: str = "cpu") -> None:
        check_spec(spec)
        self.spec = spec
        from trip_model.encoders import load_text_encoder, load_vae, vae_factor  # torch, which a driver does not need

        self._vae = load_vae(base, device)
        factor = vae_factor(self._vae)
        if spec.size % factor:
            raise UserError(f"size {spec.size} is no multiple of {factor}, the step of the VAE in {base}")
        self._text = load_text_encoder(base, device if spec.keep_text else "cpu")
        self.screen = Screen(spec.filters)
        self._vae_thread = ThreadPoolExecutor(1, "vae")  # encodes the next clips while the caller stores the last ones

    def encode(self, rows: Iterable[Decoded | Failure]) -> Iterator[list[Sample] | Failure]:
        """The samples of each clip, one per window, or its Failure (`non_finite_latents` comes in here), in order.

        Two clips are with the VAE, or wait for it, while another is with the caller.
        """

        def finish(row: tuple[Decoded, Future[np.ndarray]] | Failure) -> list[Sample] | Failure:
            return row if isinstance(row, Failure) else self._samples(row[0], row[1].result())

        waiting: deque[tuple[Decoded, Future[np.ndarray]] | Failure] = deque()
        for row in rows:
            waiting.append(row if isinstance(row, Failure) else (row, self._vae_thread.submit(self._latents, row)))
            if len(waiting) > 2:
                yield finish(waiting.popleft())
        while waiting:
            yield finish(waiting.popleft())

    def _latents(self, row: Decoded) -> np.ndarray:
        """Raw latents of all windows of one clip, then their log variance where kept: float32 [1 or 2, F, 4, h, w].

        A call of the VAE holds frames of one clip alone: with several threads the place of a frame in its call decides
        its last bits, and a clip must not depend on its neighbours. Calls begin at every `frames_per_batch`-th frame;
        where that divides `num_frames`, a window has the bits of the same frames of its track.
        """
        frames = np.concatenate([window.clip.pixels for window in row.windows])
        from trip_model.encoders import encode_posterior

        posterior = encode_posterior(self._vae, frames, self.spec.frames_per_batch)
        return np.stack(posterior[: 2 if self.spec.keep_logvar else 1])

    def _samples(self, row: Decoded, latents: np.ndarray) -> list[Sample] | Failure:
        ref, spec = row.ref, self.spec
        tokens = self._text.tokenize([ref.caption])
        text = self._text.encode(tokens)[0].cpu().numpy().astype(np.float16) if spec.keep_text else None
        if text is not None and not np.isfinite(text).all():
            return Failure(ref.key, ref.row, "non_finite_text", "the caption's features do not fit float16")
        samples = []
        for window in row.windows:
            clip = window.clip
            part, latents = np.split(latents, [len(clip.pixels)], axis=1)
            if not np.isfinite(part).all() or np.abs(part).max() > _FP16_MAX:
                return Failure(ref.key, ref.row, "non_finite_latents", f"window {window.place} does not fit float16")
            samples.append(
                Sample(
                    key=sample_key(ref.key, window.place),
                    caption=ref.caption,
                    latents=part[0].astype(np.float16),
                    first=clip.pixels[0],
                    tokens=tokens[0].numpy().astype(np.int32),
                    meta={
                        "clip": ref.key,
                        "row": ref.row,
                        "url": name_of(ref.url),
                        "sha256": row.sha256,
                        "size_bytes": row.size_bytes,
                        "window": window.place,
                        "times": [round(float(t), 6) for t in clip.times],
                        "fps": spec.fps,
                        "size": spec.size,
                        "decoder": clip.info,
                        "pixels_sha256": hashlib.sha256(clip.pixels.data).hexdigest(),
                    }
                    | window.said,
                    pixels=clip.pixels if spec.keep_pixels else None,
                    logvar=part[1].astype(np.float16) if spec.keep_logvar else None,
                    text=text,
                )
            )
        return samples
