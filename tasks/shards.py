"""The data set at rest: webdataset tar shards with a byte index beside each, and a manifest that is written last.

A data set is a folder at any address:

    recipe.json        what the samples are made with, written first; another recipe is refused here
    shard-00000.tar    plain webdataset tar: members `<sample key>.<field>`; the same samples give the same bytes
    shard-00000.json   its manifest: rows, failures, sha256, and where each member lies; written after the tar
    manifest.json      counts and the list of shards; written last, a reader trusts nothing without it

Fields of a sample: `latents.npy` fp16 [F, 4, h, w] raw latents, `first.png` uint8 [H, W, 3] frame 1, `caption.txt`,
`tokens.npy` int32 [L], `meta.json` provenance, and `pixels.npy` uint8 [F, H, W, 3] where pixels were kept.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import io
import json
import tarfile
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from infra import storage
from tasks.records import Failure, UserError, add_counts, count_by_reason

SCHEMA_VERSION = 1
MANIFEST = "manifest.json"
RECIPE = "recipe.json"
# Where each field lies in the tar. The order is part of the format: equal samples give equal bytes.
SUFFIXES = {
    "caption": "caption.txt",
    "first": "first.png",
    "latents": "latents.npy",
    "meta": "meta.json",
    "pixels": "pixels.npy",
    "tokens": "tokens.npy",
}


@dataclass(frozen=True)
class Sample:
    """One window of one clip, as it is stored; see the head of this file for the shapes."""

    key: str
    caption: str
    latents: np.ndarray
    first: np.ndarray
    tokens: np.ndarray
    meta: dict[str, Any]
    pixels: np.ndarray | None = None


@dataclass(frozen=True)
class ShardManifest:
    """What one shard holds; its books close: `stop - start == encoded + len(failures)`."""

    shard: str
    start: int  # first row of the source table, inclusive
    stop: int  # exclusive
    recipe_hash: str
    encoded: int  # rows that gave at least one sample
    samples: list[dict[str, Any]]  # {"key", "members": {field: [offset, size]}}
    failures: list[Failure]
    sha256: str
    size_bytes: int
    schema_version: int = SCHEMA_VERSION
    made_with: dict[str, str] = field(default_factory=dict)  # library versions, for the record

    def summary(self) -> ShardSummary:
        return ShardSummary(
            shard=self.shard,
            start=self.start,
            stop=self.stop,
            recipe_hash=self.recipe_hash,
            encoded=self.encoded,
            samples=len(self.samples),
            failed=count_by_reason(self.failures),
            size_bytes=self.size_bytes,
            sha256=self.sha256,
        )


@dataclass(frozen=True)
class ShardSummary:
    """What the data set's manifest says of one shard: small, so that millions of clips pass the driver as counts."""

    shard: str
    start: int
    stop: int
    recipe_hash: str
    encoded: int
    samples: int
    failed: dict[str, int]
    size_bytes: int
    sha256: str


def shard_name(index: int) -> str:
    return f"shard-{index:05d}"


def sample_key(clip_key: str, window: int) -> str:
    """Key of a clip's window; the clip key must be clean (`[A-Za-z0-9_-]`, at most 80), for a dot would split it."""
    return f"{clip_key}_{window:03d}"


def clip_key_of(key: str) -> str:
    """The clip a sample was cut from."""
    return key.rsplit("_", 1)[0]


def write_shard(
    dataset: str,
    index: int,
    rows: tuple[int, int],
    outcomes: Iterable[Sequence[Sample] | Failure],
    recipe_hash: str,
    made_with: dict[str, str] | None = None,
) -> ShardManifest:
    """Writes one shard: the tar in one atomic put, then its manifest.

    Args:
        dataset: address of the data set's folder.
        index: number of the shard. rows: the range of the source table it stands for.
        outcomes: one per row, in order: the samples of its clip, or why there are none. Consumed one by one.
    Raises:
        OSError: the address cannot be written.
    """
    samples: list[dict[str, Any]] = []
    failures: list[Failure] = []
    encoded = 0
    name = shard_name(index)
    with tempfile.TemporaryDirectory(prefix="trip-shard-") as spool:
        path = Path(spool) / f"{name}.tar"
        with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
            for outcome in outcomes:
                if isinstance(outcome, Failure):
                    failures.append(outcome)
                    continue
                encoded += 1
                for sample in outcome:
                    samples.append({"key": sample.key, "members": _add_sample(tar, sample)})
        assert encoded + len(failures) == rows[1] - rows[0], f"{name}: {encoded} + {len(failures)} of rows {rows}"
        manifest = ShardManifest(
            shard=f"{name}.tar",
            start=rows[0],
            stop=rows[1],
            recipe_hash=recipe_hash,
            encoded=encoded,
            samples=samples,
            failures=failures,
            sha256=storage.sha256_file(path),
            size_bytes=path.stat().st_size,
            made_with=made_with or {},
        )
        storage.upload_file(path, storage.join(dataset, manifest.shard))
    storage.write_json(storage.join(dataset, f"{name}.json"), dataclasses.asdict(manifest))
    return manifest


def read_shard_manifest(dataset: str, index: int) -> ShardManifest | None:
    """The manifest of a shard, or None when there is none that can be trusted."""
    try:
        value = storage.read_json(storage.join(dataset, f"{shard_name(index)}.json"))
        failures = [Failure(**failure) for failure in value.pop("failures")]
        manifest = ShardManifest(**value, failures=failures)
    except (FileNotFoundError, ValueError, TypeError, KeyError, AttributeError):
        return None
    return manifest if manifest.schema_version == SCHEMA_VERSION else None


def open_dataset(dataset: str, recipe: dict[str, Any]) -> None:
    """Claims a folder for one recipe before the first shard; also the early test that it can be written.

    Raises:
        UserError: the folder holds samples of another recipe; the message names what differs.
    """
    address = storage.join(dataset, RECIPE)
    try:
        held = storage.read_json(address)
    except FileNotFoundError:
        storage.write_json(address, recipe)
        return
    except ValueError:
        held = {}
    if held != json.loads(json.dumps(recipe)):
        names = sorted(name for name in {*held, *recipe} if held.get(name) != recipe.get(name))
        changes = ", ".join(f"{name} {held.get(name)!r} -> {recipe.get(name)!r}" for name in names)
        raise UserError(
            f"{dataset} holds a data set made another way ({changes});"
            " choose another output, or delete that folder to make it anew"
        )


def publish_dataset(
    dataset: str, recipe: dict[str, Any], recipe_hash: str, source: dict[str, Any], shards: Sequence[ShardSummary]
) -> str:
    """Writes the data set's manifest, the mark of completion, and returns its sha256. Every row is accounted for."""
    position = 0
    for shard in shards:
        assert shard.start == position and shard.recipe_hash == recipe_hash, f"{shard.shard} does not follow"
        position = shard.stop
    failed = add_counts(shard.failed for shard in shards)
    encoded = sum(shard.encoded for shard in shards)
    assert position == encoded + sum(failed.values()), f"{position} rows, {encoded} encoded, failed {failed}"
    content = storage.json_bytes(
        {
            "schema_version": SCHEMA_VERSION,
            "recipe": recipe,
            "recipe_hash": recipe_hash,
            "source": source,
            "rows": position,
            "encoded": encoded,
            "samples": sum(shard.samples for shard in shards),
            "failed": failed,
            "shards": [
                {
                    "shard": shard.shard,
                    "rows": [shard.start, shard.stop],
                    "samples": shard.samples,
                    "size_bytes": shard.size_bytes,
                    "sha256": shard.sha256,
                }
                for shard in shards
            ],
        }
    )
    storage.write_bytes(storage.join(dataset, MANIFEST), content)
    return hashlib.sha256(content).hexdigest()


class ShardDataset:
    """Random access to a published data set, by range reads at the recorded offsets. Nothing is ever unpickled.

    Raises:
        UserError: no manifest at the address, or one of another schema.
    """

    def __init__(self, uri: str) -> None:
        self.uri = storage.absolute(uri)
        address = storage.join(self.uri, MANIFEST)
        try:
            content = storage.read_bytes(address)
            self.manifest: dict[str, Any] = json.loads(content)
        except FileNotFoundError as error:
            raise UserError(f"no finished data set at {uri}: {MANIFEST} is missing; run the prepare stage") from error
        except ValueError as error:
            raise UserError(f"{address} is not JSON; delete the folder and run the prepare stage again") from error
        if self.manifest.get("schema_version") != SCHEMA_VERSION:
            found = self.manifest.get("schema_version")
            raise UserError(f"{address} has schema {found!r}, expected {SCHEMA_VERSION}; prepare the data set anew")
        self.manifest_sha256 = hashlib.sha256(content).hexdigest()
        counts = [shard["samples"] for shard in self.manifest["shards"]]
        self._ends = np.cumsum(counts, dtype=np.int64)

    def __len__(self) -> int:
        return int(self._ends[-1]) if len(self._ends) else 0

    @functools.cached_property
    def keys(self) -> list[str]:
        """All sample keys in the order of the table; reads every shard manifest once."""
        shards = range(len(self.manifest["shards"]))
        return [entry["key"] for shard in shards for entry in self._shard_manifest(shard).samples]

    def clip_of(self, i: int) -> str:
        """Key of the clip that sample i was cut from."""
        return clip_key_of(self.keys[i])

    def read(self, i: int, fields: Sequence[str] = ("latents", "caption")) -> dict[str, Any]:
        """The named fields of sample i: arrays, str for `caption`, dict for `meta`; `key` comes along always.

        Raises:
            IndexError: no sample i. KeyError: the data set does not hold a field. UserError: the shard is damaged.
        """
        if not 0 <= i < len(self):
            raise IndexError(f"sample {i} of {len(self)}")
        shard = int(np.searchsorted(self._ends, i, side="right"))
        manifest = self._shard_manifest(shard)
        entry = manifest.samples[i - (int(self._ends[shard - 1]) if shard else 0)]
        sample: dict[str, Any] = {"key": entry["key"]}
        for name in fields:
            if name not in entry["members"]:
                raise KeyError(f"{name!r} is not among the fields of {self.uri}: {', '.join(entry['members'])}")
            offset, size = entry["members"][name]
            data = storage.read_range(storage.join(self.uri, manifest.shard), offset, offset + size)
            if len(data) != size:
                raise UserError(f"{manifest.shard} of {self.uri} is cut short; delete it and prepare the data again")
            sample[name] = _decode(name, data)
        return sample

    def __getstate__(self) -> dict[str, Any]:
        return {"uri": self.uri}  # a loader's worker process reads the index itself

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(state["uri"])

    def _shard_manifest(self, shard: int) -> ShardManifest:
        if not hasattr(self, "_loaded"):
            self._loaded: dict[int, ShardManifest] = {}
        if shard not in self._loaded:
            manifest = read_shard_manifest(self.uri, shard)
            if manifest is None or manifest.sha256 != self.manifest["shards"][shard]["sha256"]:
                raise UserError(f"the index of {shard_name(shard)} in {self.uri} is missing or stale; prepare it again")
            self._loaded[shard] = manifest
        return self._loaded[shard]


def split_keys(clip_keys: Iterable[str], held_out_fraction: float) -> tuple[list[str], list[str]]:
    """Splits clips into (train, held out) by a hash of the key, so a clip keeps its side when others come or go.

    At least one clip lies on each side: where the threshold leaves a side empty, the clip with the smallest hash is
    held out, or the one with the largest is trained on.

    Raises:
        UserError: fewer than two clips, or a fraction outside 0 to 1.
    """
    if not 0 <= held_out_fraction <= 1:
        raise UserError(f"held_out_fraction {held_out_fraction}, expected a number from 0 to 1")
    keys = list(dict.fromkeys(clip_keys))
    if len(keys) < 2:
        raise UserError(f"{len(keys)} clips cannot be split into training and held-out ones; at least 2 are needed")
    place = {key: int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "big") / 2**64 for key in keys}
    held_out = {key for key in keys if place[key] < held_out_fraction} or {min(keys, key=place.__getitem__)}
    if len(held_out) == len(keys):
        held_out.remove(max(keys, key=place.__getitem__))
    return [key for key in keys if key not in held_out], [key for key in keys if key in held_out]


def _add_sample(tar: tarfile.TarFile, sample: Sample) -> dict[str, list[int]]:
    """Appends a sample's members and returns where their data lie: {field: [offset, size]}."""
    members: dict[str, list[int]] = {}
    for name, suffix in SUFFIXES.items():
        value = getattr(sample, name)
        if value is None:
            continue
        data = _encode(name, value)
        info = tarfile.TarInfo(f"{sample.key}.{suffix}")
        info.size, info.mode = len(data), 0o644
        tar.addfile(info, io.BytesIO(data))
        blocks = -(-len(data) // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE
        members[name] = [tar.offset - blocks, len(data)]
    return members


def _encode(name: str, value: Any) -> bytes:
    suffix = SUFFIXES[name].rsplit(".", 1)[1]
    if suffix == "txt":
        return value.encode()
    if suffix == "json":
        return storage.json_bytes(value)
    buffer = io.BytesIO()
    if suffix == "png":
        Image.fromarray(value).save(buffer, "PNG")
    else:
        np.save(buffer, np.ascontiguousarray(value), allow_pickle=False)
    return buffer.getvalue()


def _decode(name: str, data: bytes) -> Any:
    suffix = SUFFIXES[name].rsplit(".", 1)[1]
    if suffix == "txt":
        return data.decode()
    if suffix == "json":
        return json.loads(data)
    if suffix == "png":
        return np.array(Image.open(io.BytesIO(data)).convert("RGB"))
    return np.load(io.BytesIO(data), allow_pickle=False)
