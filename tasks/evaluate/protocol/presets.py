"""Protocols as data: each preset in a file that opens with its citation, published rows next to its rules."""

from __future__ import annotations

import json
import tomllib
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from infra import storage
from tasks.json_records import parse_record
from tasks.records import UserError
from trip_model.config import Fit

PRESETS = Path(__file__).with_name("published")
AS_PUBLISHED = "as published, other harness"
# Not named in a manifest where they say nothing, so that manifests from before they existed are still of their hash.
_UNNAMED = ("fit", "stride", "repeats", "shifted", "scaled", "deterministic_motion")


@dataclass(frozen=True)
class PublishedRow:
    """A row of a published table: percents, dB and distances by the name of their metric, measured by another harness.

    `kind` is what the table says of the method next to its name, such as T2V or zero-shot.
    """

    table: int
    method: str
    values: dict[str, float]
    kind: str = ""


@dataclass(frozen=True)
class Preset:
    """A protocol as its file states it; None where the data set decides. Paper: WebVid-10M, `webvid-2048`."""

    title: str
    sources: tuple[str, ...] = ()  # formats of the source that the data set may be prepared from; none: any
    split: str | None = None  # of that source
    held_out: bool = False  # only clips that training held out
    number: int | Literal["all", "asked"] = (
        "all"  # of clips, exactly; "asked": windows, at most as many as the run asks
    )
    seed: int = 0  # of the choice among more clips
    windows: Literal["first", "all"] = "first"  # of a clip
    frames: int | None = None
    fps: float | None = None
    stride: int | None = None  # of native frames, instead of `fps`
    size: int | None = None
    fit: Fit | None = None  # of a frame into the square; where a size is asked for and no fit, "crop"
    scaled: bool = False  # a model of another size animates the frame scaled to its own, and its clips are scaled back
    repeats: int = 1  # items of each window, each with a seed of its own
    shifted: bool = False  # sets of clips are compared as real frames 1..F-1, the given one among them, and made 2..F
    deterministic_motion: bool = False  # the first frame and the caption decide the clip: its distance then decides
    captions: Literal["first", "random", "all"] | None = None  # of MSR-VTT's 20: how the data set was prepared
    categories: tuple[str, ...] = ()  # clips of these captions; distances are the mean of the categories' own
    least_clips: int = 1  # in each category, or of all
    missing: Literal["error", "exclude"] = "error"  # an item that the data set or a method lacks
    caveats: tuple[str, ...] = ()
    beside: str | None = None  # the preset whose published rows are printed with it
    published: tuple[PublishedRow, ...] = ()

    def stated(self) -> dict[str, Any]:
        """The rules as a manifest has them."""
        return {k: v for k, v in asdict(self).items() if k not in _UNNAMED or v != getattr(Preset, k)}


def preset_names() -> list[str]:
    return sorted(path.stem for path in PRESETS.glob("*.toml"))


def load_preset(name: str) -> Preset:
    """The preset of this name, or of a TOML file at this address. Raises UserError with what is wrong where."""
    if name not in preset_names() and not name.endswith(".toml"):
        raise UserError(f"no protocol {name!r}; give {', '.join(preset_names())}, or a file .toml or .json")
    address = name if name.endswith(".toml") else str(PRESETS / f"{name}.toml")
    try:
        preset = parse_record(Preset, json.dumps(tomllib.loads(storage.read_bytes(address).decode())).encode())
    except FileNotFoundError as error:
        raise UserError(f"no protocol file at {address}; give one, or {', '.join(preset_names())}") from error
    except (ValueError, TypeError) as error:
        raise UserError(
            f"protocol file {address} is not usable ({error}); see the presets in tasks/evaluate/protocol/published"
        ) from error
    for field in ("number", "frames", "fps", "stride", "size", "repeats", "least_clips"):
        value = getattr(preset, field)
        if isinstance(value, int | float) and value <= 0:
            raise UserError(f"protocol file {address}: {field} {value}, expected a number above 0")
    if preset.fps and preset.stride:
        raise UserError(f"protocol file {address}: fps {preset.fps:g} and stride {preset.stride}, expected one of them")
    return preset


def published_rows(name: str) -> tuple[PublishedRow, ...]:
    """The rows to print next to a protocol's, as published, other harness."""
    preset = load_preset(name)
    return preset.published or (published_rows(preset.beside) if preset.beside else ())
