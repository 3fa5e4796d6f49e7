"""The spec of the prepare stage and its report."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Literal

from tasks.ingest.spec import DownloadSpec, SourceSpec
from tasks.records import Artifact
from tasks.video.spec import DecodeSpec
from trip_model.config import Fit, TripConfig


@dataclass(frozen=True)
class FilterSpec:
    """Which windows are left out; None is off. A bound that is met is kept, and `scores` says what is measured.

    With any bound set, every sample says all its scores and a hash of its picture. A scorer gets the frames of a window
    as uint8 [F, H, W, 3] and returns a float from 0, clean, to 1; the module is importable on every worker.
    """

    least_side: int | None = None  # pixels
    least_brightness: float | None = None
    least_contrast: float | None = None
    most_bars: float | None = None
    most_cut: float | None = None
    least_motion: float | None = None
    most_watermark: float | None = None
    watermark_scorer: str | None = None  # module:function

    def chosen(self) -> dict[str, Any]:
        """What is set, by name: the filters' part of a data set's identity, empty where all are off."""
        return {name: value for name, value in asdict(self).items() if value is not None}


@dataclass(frozen=True)
class PrepareSpec:
    """From a source to a data set of latents. What changes the samples is in `fingerprint`; the rest is means.

    The defaults of a sample are the paper's: 16 frames at 4 fps, 256 pixels (Section 4.1).
    """

    source: SourceSpec = SourceSpec("")
    output: str = ""  # address of the data set's folder
    base: str = ""  # folder with vae/, text_encoder/ and tokenizer/, readable by every worker; or a hub name
    num_frames: int = TripConfig.num_frames
    fps: float = TripConfig.fps
    size: int = TripConfig.size
    fit: Fit = "crop"  # of a frame into the square
    stride: int | None = None  # takes every n-th native frame, whatever `fps`; None: `fps` chooses
    clip: Literal["windows", "track"] = "windows"  # what is stored of a clip: windows of num_frames, or all its frames
    windows_per_clip: int = 1  # at most
    longest_track: int = 240  # frames; a longer track is cut off there
    keep_pixels: bool = False  # also store uint8 frames, the real clips of the evaluation
    keep_logvar: bool = False  # also store the posterior's log variance, so that training can draw latents
    keep_text: bool = False  # also store the caption's text features
    frames_per_batch: int = 16  # of one VAE call, at most; another number rounds another way in the last bits
    filters: FilterSpec = FilterSpec()
    clips_per_shard: int = 256  # rows of one work unit: what a lost worker costs
    workers: int = 2  # Ray workers; 0 runs in this process, without Ray
    cpus_per_worker: int = 1  # also its torch threads
    gpus_per_worker: float = 0.0
    ray_address: str | None = None
    download: DownloadSpec = DownloadSpec()
    decode: DecodeSpec = DecodeSpec()
    fingerprint: dict[str, Any] | None = None  # of `tasks.encode.fingerprint`, if it was taken already
    retry: tuple[str, ...] = ()  # classes of failures that are tried again, see tasks.records.RETRY_CLASSES


@dataclass(frozen=True)
class PrepareReport:
    """The closed accounting: `rows == encoded + sum(failed.values())`, in clips; a clip gives one or more samples."""

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
    page: str  # the report for people, next to the data set

    @property
    def data(self) -> Artifact:
        return Artifact(self.dataset, self.manifest_sha)
