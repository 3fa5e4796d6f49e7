"""Decodes one stored sample to pixels, next to the frames of its source where the file can still be read."""

from __future__ import annotations

import difflib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from tasks.ingest.download import download_clips
from tasks.ingest.sources import opened, read_rows
from tasks.ingest.spec import SourceSpec
from tasks.records import ClipRef, Failure, UserError
from tasks.shards import ShardDataset, clip_key_of
from tasks.shards.split import row_key
from tasks.video.decode import ClipError, read_track, read_windows
from tasks.video.decode_pool import DecoderPool
from tasks.video.frame_sizes import parse_frame_sizes
from tasks.video.spec import DecodeSpec
from trip_model.folders import BaseFolderError, folder_hash, resolve_base


@dataclass(frozen=True)
class ShownSample:
    """A stored sample as pixels: uint8 [F, H, W, 3]."""

    key: str
    caption: str
    fps: float
    decoded: np.ndarray  # the stored latents, decoded by the VAE
    original: np.ndarray | None  # the same frames of the source
    why_no_original: str = ""

    def side_by_side(self) -> np.ndarray:
        """Returns uint8 [F, H, W', 3]: the source's frames, a white bar, and the decoded frames."""
        if self.original is None:
            return self.decoded
        bar = np.full((*self.decoded.shape[:2], 4, 3), 255, np.uint8)
        return np.concatenate([self.original, bar, self.decoded], axis=2)


def show_sample(dataset: str, key: str, base: str, source: SourceSpec | None = None) -> ShownSample:
    """Returns a stored sample as pixels.

    Args:
        dataset: address of the data set's folder.
        key: of a sample, or of a clip, whose first sample is taken.
        base: folder or hub name of the base with the VAE that encoded the data set.
        source: the table or folder that the data set was made from; without it, links that are no complete URL cannot
            be followed.
    Raises:
        UserError: there is no such data set or sample, or the base has another VAE.
    """
    data = ShardDataset(dataset)
    recipe: dict[str, Any] = data.manifest["recipe"]
    index = _find(data, key)
    sample = data.read(index, ("latents", "caption", "meta"))
    decoded = _decoded(sample["latents"], base, recipe["vae_sha256"])
    try:
        original, why = _source_frames(sample["meta"], recipe, source), ""
    except _Unreachable as error:
        original, why = None, str(error)
    return ShownSample(sample["key"], sample["caption"], float(recipe["fps"]), decoded, original, why)


class _Unreachable(ValueError):
    """The frames of the source cannot be shown, and why."""


def _find(data: ShardDataset, key: str) -> int:
    keys = data.keys
    if key in keys:
        return keys.index(key)
    clips = [clip_key_of(stored) for stored in keys]
    if key in clips:
        return clips.index(key)
    similar = difflib.get_close_matches(key, dict.fromkeys([*clips, *keys]), 3, 0) or keys[:3]
    raise UserError(f"key {key!r} is not in {data.uri}, which has {len(keys)} samples; try {', '.join(similar)}")


def _decoded(raw_latents: np.ndarray, base: str, vae_sha256: str) -> np.ndarray:
    import torch  # only here: a wrong key needs no torch

    from trip_model.encoders import decode_latents, load_vae

    try:
        folder = resolve_base(base)
        if folder_hash(folder, "vae") != vae_sha256:
            raise UserError(f"base {base} has another VAE than the one that encoded the data set; name it (--base)")
        vae: Any = load_vae(folder)
    except BaseFolderError as error:
        raise UserError(str(error)) from error
    return decode_latents(vae, torch.from_numpy(raw_latents.astype(np.float32) * vae.config.scaling_factor))


def _source_frames(meta: dict[str, Any], recipe: dict[str, Any], source: SourceSpec | None) -> np.ndarray:
    ref = _reference(meta, source)
    [(_, fetched)] = download_clips([ref], opened(source) if source else SourceSpec("no-table.csv"))
    if isinstance(fetched, Failure):
        raise _Unreachable(f"the source cannot be read ({fetched.reason}: {fetched.detail})")
    if fetched.sha256 != meta["sha256"]:
        raise _Unreachable("the source file has changed since it was encoded")
    grid: dict[str, Any] = {"num_frames": recipe["num_frames"], "fps": recipe["fps"], "size": recipe["size"]}
    grid |= {name: recipe[name] for name in ("fit", "stride") if name in recipe}
    grid |= {"frame_sizes": parse_frame_sizes(recipe.get("frame_sizes", ()))}
    is_track = recipe.get("clip") == "track"
    if is_track:
        grid["longest"] = recipe["longest_track"]
    else:
        grid["windows"] = meta["window"] + 1
    with DecoderPool(1, DecodeSpec(), grid, read_track if is_track else read_windows) as decoders:
        try:
            if "span" in meta:
                [clips] = decoders.submit_spans(fetched.data, [tuple(meta["span"])]).result()
            else:
                clips = decoders.submit(fetched.data).result()
        except ClipError as error:
            clips = error
    if isinstance(clips, ClipError):
        raise _Unreachable(f"the source cannot be decoded ({clips})")
    position = 0 if is_track else meta["window"]
    if position >= len(clips):
        raise _Unreachable("the source file decodes to fewer windows than before")
    return clips[position].pixels


def _reference(meta: dict[str, Any], source: SourceSpec | None) -> ClipRef:
    key = row_key(meta["clip"])
    if source is not None:
        for row in read_rows(opened(source)):
            if isinstance(row, ClipRef) and row.key == key:
                return row
        raise _Unreachable(f"{source.table} has no row with the key {key}")
    if meta["url"].lower().startswith(("http://", "https://")) and " (sha256 " not in meta["url"]:
        return ClipRef(key, meta["url"], "", 0)
    raise _Unreachable(f"the link {meta['url']} needs its table; name it (--source)")


def check_target(output: Path) -> None:
    """Raises UserError if a clip cannot be written to `output`."""
    from trip_model.images import check_video_target

    try:
        check_video_target(output)
    except ValueError as error:
        raise UserError(f"-o {error}") from error
