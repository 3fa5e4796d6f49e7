"""The fingerprint of samples: everything but their rows that changes them, with contents as hashes."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from tasks.encode.filters import VERSION, check_filters
from tasks.encode.hooks import check_name
from tasks.encode.spec import PrepareSpec
from tasks.ingest.rows import MAX_SPAN_SECONDS
from tasks.records import UserError
from tasks.shards.layout import SAMPLE_VERSION
from tasks.shards.split import MAX_SHOTS
from tasks.video.decode import DECODE_VERSION
from tasks.video.decode_pool import check_decoding
from tasks.video.frame_sizes import check_multiples, parse_frame_sizes
from tasks.video.shots import RULES, TRANSNET_SHA256, MissingPackageError, transnet_weights
from tasks.video.shots import VERSION as SHOTS_VERSION
from trip_model.folders import BaseFolderError, folder_hash, resolve_base, stored_vae_factor


def fingerprint_of(spec: PrepareSpec) -> dict[str, Any]:
    """Returns the fingerprint: with it, equal rows give equal samples on any machine with any number of workers.

    The source is not part of it. Rows have an identity of their own (`tasks.shards.identity`), and the samples of all
    sources of a root with one fingerprint are in one pool.

    Raises:
        UserError: the base cannot be read, or a value is invalid.
    """
    check_spec(spec)
    frame_sizes = parse_frame_sizes(spec.frame_sizes)
    try:
        base = resolve_base(spec.base)
        if frame_sizes:
            check_multiples(frame_sizes, stored_vae_factor(base), base)
    except BaseFolderError as error:
        raise UserError(str(error)) from error
    return {
        "schema_version": SAMPLE_VERSION,
        "decode_version": DECODE_VERSION,
        "num_frames": spec.num_frames,
        "fps": spec.fps,
        "size": spec.size,
        # Options that are off are omitted, so that older data sets keep their fingerprint.
        **({"frame_sizes": [str(size) for size in frame_sizes]} if frame_sizes else {}),
        **({"fit": spec.fit} if spec.fit != "crop" else {}),
        **({"stride": spec.stride} if spec.stride is not None else {}),
        **_stored_part(spec),
        "keep_pixels": spec.keep_pixels,
        "frames_per_batch": spec.frames_per_batch,
        **({"filters": chosen | {"version": VERSION}} if (chosen := spec.filters.chosen()) else {}),
        **({"captioner": spec.captioner} if spec.captioner is not None else {}),
        "latents": f"posterior mean{' and log variance' if spec.keep_logvar else ''}, float16, unscaled",
        "vae_sha256": folder_hash(base, "vae"),
        **({"text_encoder_sha256": folder_hash(base, "text_encoder")} if spec.keep_text else {}),
        "tokenizer_sha256": folder_hash(base, "tokenizer"),
    }


def _stored_part(spec: PrepareSpec) -> dict[str, Any]:
    if spec.clip == "windows":
        return {"windows_per_clip": spec.windows_per_clip}
    if spec.clip == "track":
        return {"clip": spec.clip, "longest_track": spec.longest_track}
    network = {"weights_sha256": TRANSNET_SHA256} if spec.shots.rule == "transnetv2" else {}
    rule = asdict(spec.shots) | network | {"version": SHOTS_VERSION}
    return {"clip": spec.clip, "windows_per_clip": spec.windows_per_clip, "shots": rule}


def check_spec(spec: PrepareSpec) -> None:
    """Raises UserError for a value that no clip, decoder or worker can satisfy."""
    for name in ("num_frames", "fps", "size", "windows_per_clip", "frames_per_batch"):
        if not getattr(spec, name) > 0:
            raise UserError(f"{name} {getattr(spec, name)}, expected a number above 0")
    if spec.num_frames < 2:
        raise UserError(f"num_frames {spec.num_frames}; a clip needs at least 2 frames to move")
    parse_frame_sizes(spec.frame_sizes)
    if spec.fit not in ("crop", "squash"):
        raise UserError(f"fit {spec.fit!r}, expected 'crop' or 'squash'")
    if spec.stride is not None and spec.stride < 1:
        raise UserError(f"stride {spec.stride}, expected at least 1, or none for the time grid of fps")
    if spec.clip not in ("windows", "track", "shots"):
        raise UserError(f"clip {spec.clip!r}, expected 'windows', 'track' or 'shots'")
    if spec.clip == "shots":
        _check_shots(spec)
    if spec.clip == "track" and spec.longest_track < spec.num_frames:
        raise UserError(f"longest_track {spec.longest_track}, expected at least num_frames, which is {spec.num_frames}")
    check_filters(spec.filters)
    check_name("captioner", spec.captioner)
    check_decoding(spec.decode)
    for name, least in (("clips_per_shard", 1), ("workers", 0), ("cpus_per_worker", 1)):
        if getattr(spec, name) < least:
            raise UserError(f"{name} {getattr(spec, name)}, expected at least {least}")


def _check_shots(spec: PrepareSpec) -> None:
    shots = spec.shots
    if shots.rule not in RULES:
        raise UserError(f"shots.rule {shots.rule!r}, expected {' or '.join(map(repr, RULES))}")
    if not 0 < shots.threshold < 1:
        raise UserError(f"shots.threshold {shots.threshold}, expected a number between 0 and 1")
    if not 0 <= shots.least_seconds < shots.most_seconds <= MAX_SPAN_SECONDS:
        raise UserError(
            f"shots of {shots.least_seconds:g} to {shots.most_seconds:g} s (shots.least_seconds, shots.most_seconds),"
            f" expected a range within 0 to {MAX_SPAN_SECONDS:g}"
        )
    if not 1 <= shots.most <= MAX_SHOTS:
        raise UserError(f"shots.most {shots.most}, expected 1 to {MAX_SHOTS}")
    if shots.rule == "transnetv2":
        try:
            transnet_weights()
        except MissingPackageError as error:
            raise UserError(f"shots.rule 'transnetv2': {error}, or take the rule 'difference'") from error
