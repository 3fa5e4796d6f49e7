"""What prepare is asked for, what it answers, and the recipe that names its samples."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any, Literal

from tasks import shards
from tasks.encode.decoder import DecodeSpec, check_decoding
from tasks.encode.encoder import EncodeSpec, check_spec
from tasks.encode.filters import VERSION, FilterSpec
from tasks.ingest.download import DownloadSpec
from tasks.ingest.sources import SourceSpec, source_identity
from tasks.records import UserError
from trip_model.encoders import BaseFolderError, folder_hash, resolve_base
from trip_model.frame import Fit


@dataclass(frozen=True)
class PrepareSpec:
    """From a table of links to a data set of latents. What changes the samples is in `recipe`; the rest is means."""

    source: SourceSpec
    output: str  # address of the data set's folder
    base: str  # folder with vae/, text_encoder/ and tokenizer/, readable by every worker; or a hub name
    num_frames: int = 16
    fps: float = 4.0
    size: int = 256
    fit: Fit = "crop"
    stride: int | None = None
    clip: Literal["windows", "track"] = "windows"
    windows_per_clip: int = 1
    longest_track: int = 240
    keep_pixels: bool = False
    keep_logvar: bool = False
    keep_text: bool = False
    frames_per_batch: int = 16
    filters: FilterSpec = FilterSpec()
    clips_per_shard: int = 256  # rows of one work unit: what a lost worker costs
    workers: int = 2  # Ray workers; 0 runs in this process, without Ray
    cpus_per_worker: int = 1  # also its torch threads
    gpus_per_worker: float = 0.0
    ray_address: str | None = None
    download: DownloadSpec = DownloadSpec()
    decode: DecodeSpec = DecodeSpec()
    retry: tuple[str, ...] = ()  # classes of failures that are tried again, see tasks.records.RETRY_CLASSES

    def encode_spec(self) -> EncodeSpec:
        names = [field.name for field in fields(EncodeSpec)]
        return EncodeSpec(**{name: getattr(self, name) for name in names})


@dataclass(frozen=True)
class PrepareReport:
    """The closed books: `rows == encoded + sum(failed.values())`, in clips; a clip gives one or more samples."""

    dataset: str
    rows: int
    encoded: int
    samples: int
    failed: dict[str, int]
    recipe_hash: str
    manifest_sha: str
    shards: int
    shards_reused: int
    rows_retried: int
    seconds: float
    page: str  # the report for people, beside the data set


def recipe(spec: PrepareSpec) -> dict[str, Any]:
    """What the samples are made from and how. Equal recipes give equal samples, wherever and by how many workers.

    Raises:
        UserError: the table or the base cannot be read, or a number makes no sense.
    """
    check_spec(spec.encode_spec())
    check_decoding(spec.decode)
    for name, least in (("clips_per_shard", 1), ("workers", 0), ("cpus_per_worker", 1)):
        if getattr(spec, name) < least:
            raise UserError(f"{name} {getattr(spec, name)}, expected at least {least}")
    try:
        base = resolve_base(spec.base)
    except BaseFolderError as error:
        raise UserError(str(error)) from error
    tracks = {"clip": spec.clip, "longest_track": spec.longest_track}
    return {
        "schema_version": shards.SCHEMA_VERSION,
        **source_identity(spec.source),
        "num_frames": spec.num_frames,
        "fps": spec.fps,
        "size": spec.size,
        # What is off is not named, so that data sets from before it existed are still of their recipe.
        **({"fit": spec.fit} if spec.fit != "crop" else {}),
        **({"stride": spec.stride} if spec.stride is not None else {}),
        **({"windows_per_clip": spec.windows_per_clip} if spec.clip == "windows" else tracks),
        "keep_pixels": spec.keep_pixels,
        "frames_per_batch": spec.frames_per_batch,
        "clips_per_shard": spec.clips_per_shard,
        **({"filters": chosen | {"version": VERSION}} if (chosen := spec.filters.chosen()) else {}),
        "latents": f"posterior mean{' and log variance' if spec.keep_logvar else ''}, float16, unscaled",
        "vae_sha256": folder_hash(base, "vae"),
        **({"text_encoder_sha256": folder_hash(base, "text_encoder")} if spec.keep_text else {}),
        "tokenizer_sha256": folder_hash(base, "tokenizer"),
    }
