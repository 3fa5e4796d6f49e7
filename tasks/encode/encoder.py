"""Turns the files of clips into samples: decodes ahead, encodes clip by clip with the VAE, tokenizes captions.

The files of a work unit pass through `decode_ahead`, then `ClipEncoder.encode`. Both keep the order and number of rows.
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
from tasks.encode.filters import Screen, Window, read_measured
from tasks.encode.fingerprint import check_spec
from tasks.encode.spec import FilterSpec, PrepareSpec
from tasks.ingest.download import Fetched
from tasks.records import ClipRef, Failure, UserError
from tasks.shards import Sample, sample_key
from tasks.video.decode import Clip, ClipError, read_track, read_windows
from tasks.video.decode_pool import DecoderPool
from tasks.video.spec import DecodeSpec

_FP16_MAX = float(np.finfo(np.float16).max)


@dataclass(frozen=True)
class Decoded:
    """A decoded clip."""

    ref: ClipRef
    sha256: str
    size_bytes: int
    windows: list[Window]  # a track is one long window


def open_decoders(spec: PrepareSpec, decode: DecodeSpec, cpus: int) -> DecoderPool:
    """Starts the decoder processes of one encoder."""
    names = ("num_frames", "fps", "size", "fit", "stride")
    grid: dict[str, Any] = {name: getattr(spec, name) for name in names}
    grid |= {"windows": spec.windows_per_clip} if spec.clip == "windows" else {"longest": spec.longest_track}
    reader = read_windows if spec.clip == "windows" else read_track
    return DecoderPool(decode.processes or cpus, decode, grid, read_measured if spec.filters.chosen() else reader)


def decode_ahead(
    rows: Iterable[tuple[ClipRef, Fetched] | Failure], decoders: DecoderPool, screen: Screen | None = None
) -> Iterator[Decoded | Failure]:
    """Decodes up to `decoders.ahead` rows ahead of the caller and yields them in order.

    Windows that `screen` rejects are dropped; a clip without a remaining window becomes a Failure.
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
    """Loads the VAE and the text encoder of a base folder once; a sample is a pure function of its clip's frames.

    Raises:
        UserError: the spec does not fit the VAE. trip_model.encoders.BaseFolderError: a part cannot be loaded.
    """

    def __init__(self, base: str | Path, spec: PrepareSpec, device: str = "cpu") -> None:
        check_spec(spec)
        self.spec = spec
        from trip_model.encoders import load_text_encoder, load_vae, vae_factor  # torch, which a driver does not need

        self._vae = load_vae(base, device)
        factor = vae_factor(self._vae)
        if spec.size % factor:
            raise UserError(f"size {spec.size}, expected a multiple of {factor}, the factor of the VAE in {base}")
        self._text = load_text_encoder(base, device if spec.keep_text else "cpu")
        self.screen = Screen(spec.filters)
        self._vae_thread = ThreadPoolExecutor(1, "vae")  # encodes the next clips while the caller stores the last ones

    def encode(self, rows: Iterable[Decoded | Failure]) -> Iterator[list[Sample] | Failure]:
        """Yields the samples of each clip, one per window, or its Failure, in order.

        Adds the failures `non_finite_latents` and `non_finite_text`. Up to two clips are in the VAE's queue while the
        caller handles another.
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
        """Returns raw latents of all windows of a clip, and their log variance if kept: float32 [1 or 2, F, 4, h, w].

        A VAE call contains frames of one clip only: with several threads the position of a frame in its call changes
        its last bits, and a clip must not depend on others. Calls begin at every `frames_per_batch`-th frame; if that
        divides `num_frames`, a window has the same bits as those frames of its track.
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
                return Failure(ref.key, ref.row, "non_finite_latents", f"window {window.position} does not fit float16")
            samples.append(
                Sample(
                    key=sample_key(ref.key, window.position),
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
                        "window": window.position,
                        "times": [round(float(t), 6) for t in clip.times],
                        "fps": spec.fps,
                        "size": spec.size,
                        "decoder": clip.info,
                        "pixels_sha256": hashlib.sha256(clip.pixels.data).hexdigest(),
                    }
                    | window.meta,
                    pixels=clip.pixels if spec.keep_pixels else None,
                    logvar=part[1].astype(np.float16) if spec.keep_logvar else None,
                    text=text,
                )
            )
        return samples
