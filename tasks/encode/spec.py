"""The spec of the prepare stage and its report."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from tasks.ingest.spec import DownloadSpec, SourceSpec
from tasks.records import Artifact
from tasks.video.spec import DecodeSpec, ShotSpec
from trip_model.config import BEFORE, Fit, TripConfig


@dataclass(frozen=True)
class FilterSpec:
    """Bounds on the scores of a window (`tasks.encode.filters.scores`); None is off. A window at a bound is kept.

    With any bound set, the meta of every sample contains all its scores and a perceptual hash. A scorer takes the
    frames of a window as uint8 [F, H, W, 3] and returns a float from 0 (clean) to 1; every worker must be able to
    import its module.
    """

    least_side: int | None = None  # pixels
    least_brightness: float | None = None
    least_contrast: float | None = None
    most_bars: float | None = None
    most_cut: float | None = None
    least_motion: float | None = None
    most_watermark: float | None = None
    watermark_scorer: str | None = None  # module:function
    most_unsafe: float | None = None
    unsafe_scorer: str | None = None  # module:function; tasks.encode.scorers:unsafe_content with the extra `unsafe`
    most_text: float | None = None
    text_scorer: str | None = None  # module:function; tasks.encode.scorers:overlaid_text with the extra `text`

    def chosen(self) -> dict[str, Any]:
        """Returns the fields that are set, by name: the filters' part of the fingerprint, empty if all are off."""
        return {name: value for name, value in asdict(self).items() if value is not None}


@dataclass(frozen=True)
class PrepareSpec:
    """Configures how a source becomes a data set of latents. `fingerprint` covers what changes the samples.

    The defaults of a sample are the paper's: 16 frames at 4 fps, 256 pixels (Section 4.1).
    """

    source: SourceSpec = SourceSpec("")
    output: str = ""  # address of the data set's folder
    base: str = ""  # folder with vae/, text_encoder/ and tokenizer/, readable by every worker; or a hub name
    num_frames: int = TripConfig.num_frames
    fps: float = TripConfig.fps
    size: int = TripConfig.size
    # Width x height of frames, such as "352x192": a video takes the nearest by its aspect ratio. None: the square of
    # `size`, which they are near in area.
    frame_sizes: tuple[str, ...] = field(default=(), metadata={BEFORE: ()})
    fit: Fit = "crop"  # of a frame into the square, or into its frame size
    stride: int | None = None  # takes every n-th native frame and ignores `fps`; None: frames at `fps`
    # What is stored of a clip: windows of num_frames, or all its frames; `shots`: each shot is a clip, as windows.
    clip: Literal["windows", "track", "shots"] = "windows"
    shots: ShotSpec = ShotSpec()  # of clip "shots"
    windows_per_clip: int = 1  # at most
    longest_track: int = 240  # frames; a longer track is truncated
    keep_pixels: bool = False  # also store uint8 frames, the real clips of the evaluation
    keep_logvar: bool = False  # also store the posterior's log variance, so that training can draw latents
    keep_text: bool = False  # also store the caption's text features
    captioner: str | None = None  # module:function; of frames and the source's caption to the caption to store
    frames_per_batch: int = 16  # of one VAE call, at most; changes the last bits of the latents
    filters: FilterSpec = FilterSpec()
    clips_per_shard: int = 256  # rows of one work unit, which is lost with its worker
    workers: int = 2  # Ray workers; 0 runs in this process, without Ray
    cpus_per_worker: int = 1  # and torch threads
    gpus_per_worker: float = 0.0
    ray_address: str | None = None
    download: DownloadSpec = DownloadSpec()
    decode: DecodeSpec = DecodeSpec()
    fingerprint: dict[str, Any] | None = None  # from `tasks.encode.fingerprint`, if computed already
    retry: tuple[str, ...] = ()  # classes of failures to try again, see tasks.records.RETRY_CLASSES


@dataclass(frozen=True)
class PrepareReport:
    """Accounts for every row: `rows == encoded + sum(failed.values())`. An encoded row gives one or more samples."""

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
    page: str  # address of the HTML report, next to the data set
    source: str = ""  # name of the table or folder, without its address
    allowed: tuple[str, ...] = ()  # hosts, folders and the proxy that the caller opened to the links of the source
    frame_sizes: dict[str, int] = field(default_factory=dict)  # samples of each; empty if all are squares of `size`

    @property
    def data(self) -> Artifact:
        return Artifact(self.dataset, self.manifest_sha)
