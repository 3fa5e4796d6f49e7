"""Turns the files of clips into samples: decodes ahead, encodes clip by clip with the VAE, tokenizes captions.

The files of a work unit pass through `decode_ahead`, then `ClipEncoder.encode`. Both keep the order and number of rows.
"""

from __future__ import annotations

import hashlib
import itertools
import math
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from infra.redaction import name_of
from tasks.encode.filters import Screen, Window, read_measured, read_measured_spans
from tasks.encode.fingerprint import check_spec
from tasks.encode.hooks import load_captioner
from tasks.encode.spec import FilterSpec, PrepareSpec
from tasks.ingest.download import Fetched
from tasks.records import ClipRef, Failure, UserError
from tasks.shards import PackedSample, Sample, encode_field, sample_key
from tasks.shards.split import MAX_SHOTS, shot_key
from tasks.video.decode import Clip, ClipError, read_shots, read_spans, read_track, read_windows
from tasks.video.decode_pool import DecoderPool
from tasks.video.frame_sizes import FrameSize, parse_frame_sizes
from tasks.video.spec import DecodeSpec

_TRANSNET_SLOWNESS = 20  # TransNetV2 on one core takes this many times as long as decoding
_TRANSNET_BYTES = 4 << 30  # address space of the libraries that run it
_FP16_MAX = float(np.finfo(np.float16).max)


@dataclass(frozen=True)
class Decoded:
    """A decoded clip."""

    ref: ClipRef
    sha256: str
    size_bytes: int
    windows: list[Window]  # a track is one long window; of all shots, in their order


def open_decoders(spec: PrepareSpec, decode: DecodeSpec, cpus: int) -> DecoderPool:
    """Starts the decoder processes of one encoder."""
    names = ("num_frames", "fps", "size", "fit", "stride")
    grid: dict[str, Any] = {name: getattr(spec, name) for name in names}
    grid |= {"longest": spec.longest_track} if spec.clip == "track" else {"windows": spec.windows_per_clip}
    grid |= {"frame_sizes": sizes} if (sizes := parse_frame_sizes(spec.frame_sizes)) else {}
    if spec.clip == "shots":
        grid["shots"] = asdict(spec.shots)
        if spec.shots.rule == "transnetv2":
            seconds, memory_bytes = _TRANSNET_SLOWNESS * decode.seconds, decode.memory_bytes + _TRANSNET_BYTES
            decode = replace(decode, seconds=seconds, memory_bytes=memory_bytes)
    reader = {"windows": read_windows, "track": read_track, "shots": read_shots}[spec.clip]
    readers = (read_measured, read_measured_spans) if spec.filters.chosen() else (reader, read_spans)
    return DecoderPool(decode.processes or cpus, decode, grid, *readers)


def decode_ahead(
    rows: Iterable[tuple[ClipRef, Fetched] | Failure], decoders: DecoderPool, screen: Screen | None = None
) -> Iterator[Decoded | Failure]:
    """Decodes up to `decoders.ahead` videos ahead of the caller and yields the rows in order.

    Successive rows of one file are decoded once: their spans together, in one pass. Windows that `screen` rejects are
    dropped; a clip without a remaining window becomes a Failure.
    """
    screen = screen or Screen(FilterSpec())

    def finish(row: _Waiting) -> Decoded | Failure:
        if isinstance(row, Failure):
            return row
        try:
            return Decoded(row.ref, row.fetched.sha256, len(row.fetched.data), _screened(screen, row.clips()))
        except ClipError as error:
            return Failure(row.ref.key, row.ref.row, error.reason, error.detail)

    waiting: deque[list[_Waiting]] = deque()
    for file in _files(rows):
        waiting.append([file] if isinstance(file, Failure) else _submit(file, decoders))
        if len(waiting) >= decoders.ahead:
            yield from map(finish, waiting.popleft())
    while waiting:
        yield from map(finish, waiting.popleft())


def _screened(screen: Screen, clips: list[Clip]) -> list[Window]:
    """Returns the windows that pass, by shot where clips are shots. Raises ClipError if none passes, as the first."""
    kept: list[Window] = []
    errors: list[ClipError] = []
    for _, shot in itertools.groupby(clips, shot_number):
        try:
            kept += screen(list(shot))
        except ClipError as error:
            errors.append(error)
    if not kept:
        raise errors[0]
    return kept


def shot_number(clip: Clip) -> int | None:
    """Returns the number of a clip's shot, None without shots. The reply of a decoder is not trusted."""
    if "shot" not in clip.info:
        return None
    try:
        shot = clip.info["shot"]
        number, (start, end) = shot["number"], _span_of(clip)
    except (KeyError, TypeError, ValueError):
        number, start, end = -1, 0.0, None
    last = math.inf if end is None else end
    if not isinstance(number, int) or not 0 <= number < MAX_SHOTS or not 0 <= start < last:
        raise ClipError("decoder_crash", "malformed reply from the decoder process (shot)")
    return number


def _span_of(clip: Clip) -> tuple[float, float | None]:
    shot = clip.info["shot"]
    return float(shot["start"]), None if shot["end"] is None else float(shot["end"])


@dataclass(frozen=True)
class _Row:
    """A row whose video is being decoded; `place` is that of its span among those of the video."""

    ref: ClipRef
    fetched: Fetched
    future: Future[list[Clip]] | Future[list[list[Clip] | ClipError]]
    place: int | None = None

    def clips(self) -> list[Clip]:
        """Returns the clips once they are decoded. Raises ClipError."""
        result: Any = self.future.result()
        clips = result if self.place is None else result[self.place]
        if isinstance(clips, ClipError):
            raise clips
        return clips


_Waiting = _Row | Failure
_File = tuple[Fetched, list[ClipRef]]


def _files(rows: Iterable[tuple[ClipRef, Fetched] | Failure]) -> Iterator[_File | Failure]:
    """Joins successive rows with the same file. A row without a span is not held back until the next one is there."""
    file: _File | None = None
    for row in rows:
        if file is not None and not isinstance(row, Failure) and row[1] is file[0] and row[0].span is not None:
            file[1].append(row[0])
            continue
        if file is not None:
            yield file
            file = None
        if isinstance(row, Failure) or row[0].span is None:
            yield row if isinstance(row, Failure) else (row[1], [row[0]])
        else:
            file = row[1], [row[0]]
    if file is not None:
        yield file


def _submit(file: _File, decoders: DecoderPool) -> list[_Waiting]:
    fetched, refs = file
    if refs[0].span is None:
        return [_Row(refs[0], fetched, decoders.submit(fetched.data))]
    spans = list(dict.fromkeys(ref.span for ref in refs if ref.span is not None))
    future = decoders.submit_spans(fetched.data, spans)
    return [_Row(ref, fetched, future, spans.index(ref.span)) for ref in refs if ref.span is not None]


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
        self._captioner = load_captioner(spec.captioner) if spec.captioner is not None else None
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

    def recaption(self, samples: Sequence[PackedSample], ref: ClipRef) -> list[PackedSample] | Failure:
        """Returns stored samples of a clip with the caption of its row; latents and frames keep their bytes.

        Adds the failure `non_finite_text`.
        """
        values: dict[str, Any] = {"caption": ref.caption} | self._caption_fields(ref.caption)
        if "text" in values and not np.isfinite(values["text"]).all():
            return Failure(ref.key, ref.row, "non_finite_text", "the caption's features do not fit float16")
        members = {name: encode_field(name, value) for name, value in values.items()}
        return [replace(packed, members=packed.members | members) for packed in samples]

    def _caption_fields(self, caption: str) -> dict[str, np.ndarray]:
        """Returns the tokens int32 [L] of a caption and, if they are kept, its text features float16 [L, D]."""
        tokens = self._text.tokenize([caption])
        fields: dict[str, np.ndarray] = {"tokens": tokens[0].numpy().astype(np.int32)}
        if self.spec.keep_text:
            fields["text"] = self._text.encode(tokens)[0].cpu().numpy().astype(np.float16)
        return fields

    def _latents(self, row: Decoded) -> np.ndarray:
        """Returns raw latents of all windows of a clip, and their log variance if kept: float32 [1 or 2, F, 4, h, w].

        A VAE call contains frames of one clip only: with several threads the position of a frame in its call changes
        its last bits, and a clip must not depend on others. Calls begin at every `frames_per_batch`-th frame; if that
        divides `num_frames`, a window has the same bits as those frames of its track.
        """
        windows = [window.clip.pixels for window in row.windows]
        frames = windows[0] if len(windows) == 1 else np.concatenate(windows)  # which copies also a single one
        from trip_model.encoders import encode_posterior

        posterior = encode_posterior(self._vae, frames, self.spec.frames_per_batch)
        return np.stack(posterior[: 2 if self.spec.keep_logvar else 1])

    def _captions(self, row: Decoded) -> dict[int | None, str]:
        """Returns the caption of each shot, or of None: the source's, or that of the captioner for its first window."""
        captions: dict[int | None, str] = {}
        for clip in (window.clip for window in row.windows):
            number = shot_number(clip)
            if number not in captions:
                captions[number] = self._captioner(clip.pixels, row.ref.caption) if self._captioner else row.ref.caption
        return captions

    def _samples(self, row: Decoded, latents: np.ndarray) -> list[Sample] | Failure:
        ref, spec = row.ref, self.spec
        captions = self._captions(row)
        fields_of = {caption: self._caption_fields(caption) for caption in dict.fromkeys(captions.values())}
        if any("text" in fields and not np.isfinite(fields["text"]).all() for fields in fields_of.values()):
            return Failure(ref.key, ref.row, "non_finite_text", "the caption's features do not fit float16")
        samples = []
        for window in row.windows:
            clip = window.clip
            number = shot_number(clip)
            caption = captions[number]
            part, latents = np.split(latents, [len(clip.pixels)], axis=1)
            if not np.isfinite(part).all() or np.abs(part).max() > _FP16_MAX:
                return Failure(ref.key, ref.row, "non_finite_latents", f"window {window.position} does not fit float16")
            key = ref.key if number is None else shot_key(ref.key, number)
            span = ref.span if number is None else _span_of(clip)
            height, width = clip.pixels.shape[1:3]
            samples.append(
                Sample(
                    key=sample_key(key, window.position),
                    caption=caption,
                    latents=part[0].astype(np.float16),
                    first=clip.pixels[0],
                    tokens=fields_of[caption]["tokens"],
                    meta={
                        "clip": key,
                        "url": name_of(ref.url),
                        "sha256": row.sha256,
                        "size_bytes": row.size_bytes,
                        "window": window.position,
                        **({"span": list(span)} if span is not None else {}),
                        **({"source_caption": ref.caption} if self._captioner is not None else {}),
                        "times": [round(float(t), 6) for t in clip.times],
                        "fps": spec.fps,
                        "size": spec.size,
                        "decoder": clip.info,
                        "pixels_sha256": hashlib.sha256(clip.pixels.data).hexdigest(),
                    }
                    | window.meta,
                    pixels=clip.pixels if spec.keep_pixels else None,
                    logvar=part[1].astype(np.float16) if spec.keep_logvar else None,
                    text=fields_of[caption].get("text"),
                    frame_size=FrameSize(width, height) if spec.frame_sizes else None,
                )
            )
        return samples
