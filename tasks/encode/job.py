"""Drives the prepare stage on Ray: row ranges of the table go to workers, each comes back as one finished shard."""

from __future__ import annotations

import importlib.metadata
import itertools
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, fields, replace
from typing import Any

import ray
import ray.exceptions
import torch

from infra import storage
from infra.cluster import ray_session
from tasks import shards
from tasks.encode.decoder import DecoderPool, DecodeSpec, check_decoding
from tasks.encode.encoder import ClipEncoder, EncodeSpec, check_spec, decode_ahead, open_decoders
from tasks.encode.filters import VERSION, FilterSpec
from tasks.encode.repair import find_held, retry_reasons
from tasks.encode.report import write_report, write_report_apart
from tasks.ingest.download import DownloadSpec, Fetched, download_clips
from tasks.ingest.sources import SourceSpec, count_rows, read_rows, settled, source_identity
from tasks.records import ClipRef, Failure, UserError, add_counts, digest, to_json
from tasks.shards import Forgotten, Outcome, ShardSummary
from trip_model.encoders import BaseFolderError, folder_hash, resolve_base

Progress = Callable[[dict[str, Any]], None]
_LOST_WORKER_RETRIES = 2
_TICK_SECONDS = 10.0


@dataclass(frozen=True)
class PrepareSpec:
    """From a table of links to a data set of latents. What changes the samples is in `recipe`; the rest is means."""

    source: SourceSpec
    output: str  # address of the data set's folder
    base: str  # folder with vae/, text_encoder/ and tokenizer/, readable by every worker; or a hub name
    num_frames: int = 16
    fps: float = 4.0
    size: int = 256
    windows_per_clip: int = 1
    keep_pixels: bool = False
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


@dataclass(frozen=True)
class _Unit:
    """One work unit: rows start (inclusive) to stop of the table, which become shard `index`.

    Where the shard `held` exists, it is made anew: the rows in `redo` are done again, all others taken over from it.
    """

    index: int
    start: int
    stop: int
    rows: tuple[ClipRef | Failure, ...]
    held: str | None = None
    redo: frozenset[int] = frozenset()


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
    return {
        "schema_version": shards.SCHEMA_VERSION,
        **source_identity(spec.source),
        "num_frames": spec.num_frames,
        "fps": spec.fps,
        "size": spec.size,
        "windows_per_clip": spec.windows_per_clip,
        "keep_pixels": spec.keep_pixels,
        "frames_per_batch": spec.frames_per_batch,
        "clips_per_shard": spec.clips_per_shard,
        # Without filters not a word, so that data sets from before there were any are still of their recipe.
        **({"filters": chosen | {"version": VERSION}} if (chosen := spec.filters.chosen()) else {}),
        "latents": "posterior mean, float16, unscaled",
        "vae_sha256": folder_hash(base, "vae"),
        "tokenizer_sha256": folder_hash(base, "tokenizer"),
    }


def prepare(spec: PrepareSpec, progress: Progress | None = None) -> PrepareReport:
    """Makes the data set, or finishes it: shards whose index is there and agrees are kept as they are.

    Rows that failed under a class in `retry` are done again, and their shards made anew with the bytes of all other
    samples. Clips in the data set's list of forgotten ones are left out, and taken out where they still are.

    Args:
        progress: called after each shard, and about every 10 s between, with `stage`, `done`, `total` (rows),
            `encoded`, `failed`, `clips_per_second`, `eta_seconds` (None until known).
    Raises:
        UserError: bad input; an output that holds another recipe or cannot be written; fewer than two usable clips
            (the message counts the reasons); a row range that loses its worker again and again.
    """
    began = time.monotonic()
    output = storage.absolute(spec.output)
    if output.startswith("memory://") and spec.workers > 0:
        raise UserError(
            f"output {output}: memory is not shared between workers; give a folder or an object store, or 0 workers"
        )
    spec = replace(spec, source=settled(spec.source))
    made_of = recipe(spec)
    retried = retry_reasons(spec.retry)
    recipe_hash = digest(made_of)
    total = count_rows(spec.source)
    if total == 0:
        raise UserError(f"table {spec.source.table} has no rows; give a table with at least two clips")
    with _explained(f"output {output}"):
        shards.open_dataset(output, made_of)
        published = storage.exists(storage.join(output, shards.MANIFEST))
        forgotten = shards.read_forgotten(output)

    ledger = _Ledger(total, progress)
    done: dict[int, ShardSummary] = {}
    names = shards.shards_held(output)
    rows_retried = 0

    def missing_units() -> Iterator[_Unit]:
        for unit in _plan(spec, total, forgotten):
            held = find_held(output, names.get(unit.index, ()), unit.rows, recipe_hash, retried)
            # A unit that gave nothing is tried again as long as the data set is unfinished: the network may be back.
            if held is None or not (held.summary.encoded or published):
                yield unit
            elif held.redo:
                yield replace(unit, held=held.summary.shard, redo=held.redo)
            else:
                done[unit.index] = held.summary
                ledger.add(held.summary, reused=True)

    with _explained(f"output {output}"):
        for unit, summary in _run_units(spec, output, made_of, missing_units(), ledger):
            done[unit.index] = summary
            ledger.add(summary)
            rows_retried += len(unit.redo)

    parts = [done[index] for index in sorted(done)]
    failed = add_counts(part.failed for part in parts)
    encoded = sum(part.encoded for part in parts)
    if encoded < 2:
        reasons = ", ".join(f"{reason} {count}" for reason, count in failed.items()) or "none failed"
        raise UserError(
            f"{encoded} of {total} clips of {spec.source.table} can be used ({reasons});"
            f" at least 2 are needed, see the failures in {storage.join(output, 'shard-*.json')}"
        )
    source = {"columns": dict(spec.source.columns), "table_sha256": made_of["table_sha256"], "limit": spec.source.limit}
    with _explained(f"output {output}"):
        manifest_sha = shards.publish_dataset(output, made_of, recipe_hash, source, parts)
    report = PrepareReport(
        dataset=output,
        rows=total,
        encoded=encoded,
        samples=sum(part.samples for part in parts),
        failed=failed,
        recipe_hash=recipe_hash,
        manifest_sha=manifest_sha,
        shards=len(parts),
        shards_reused=ledger.shards_reused,
        rows_retried=rows_retried,
        seconds=round(time.monotonic() - began, 3),
        page=shards.report_addresses(output)["html"],
    )
    with _explained(f"report {report.page}"):
        # Without workers this process has loaded the VAE anyway, and its memory may be the store.
        write = write_report_apart if spec.workers else write_report
        write(to_json(report), spec.base, sum(part.size_bytes for part in parts), ledger.rows_made)
    return report


def encode_unit(
    encoder: ClipEncoder, decoders: DecoderPool, spec: PrepareSpec, output: str, recipe_hash: str, unit: _Unit
) -> ShardSummary:
    """Downloads, decodes, encodes and writes the rows of one unit; frames never leave this machine."""
    made_with = {name: importlib.metadata.version(name) for name in ("av", "numpy", "torch", "diffusers")}
    kept: Iterator[Outcome] = iter(())
    if unit.held is not None:
        held = shards.read_shard_manifest(output, unit.held)
        if held is None:
            raise UserError(f"the index of {unit.held} in {output} is gone; is another command at work there?")
        kept = shards.stored_outcomes(output, held)
        made_with = {name: _both(held.made_with.get(name, now), now) for name, now in made_with.items()}
    redone = [row for row in unit.rows if unit.held is None or row.row in unit.redo]
    fetched = download_clips([row for row in redone if isinstance(row, ClipRef)], spec.source, spec.download)

    def files() -> Iterator[tuple[ClipRef, Fetched] | Failure]:
        for row in redone:
            if isinstance(row, Failure):
                yield row
                continue
            ref, result = next(fetched)
            assert ref == row
            yield result if isinstance(result, Failure) else (ref, result)

    made = encoder.encode(decode_ahead(files(), decoders, encoder.screen))

    def outcomes() -> Iterator[Outcome]:
        for row in unit.rows:
            before = next(kept, None)
            yield before if before is not None and row.row not in unit.redo else next(made)

    rows = (unit.start, unit.stop)
    return shards.write_shard(output, unit.index, rows, outcomes(), recipe_hash, made_with).summary()


def _both(before: str, now: str) -> str:
    """The versions that the samples of one shard were made with."""
    return before if now in before.split(", ") else f"{before}, {now}"


# Ray restarts a lost worker and gives it its unit again, but not for ever: the unit may be more than its machine holds.
@ray.remote(max_restarts=-1, max_task_retries=_LOST_WORKER_RETRIES)
class EncodeWorker:
    """Loads the encoders and starts the decoders once, then turns units into shards."""

    def __init__(self, spec: PrepareSpec, output: str, made_of: dict[str, Any]) -> None:
        self._spec, self._output, self._made_of = spec, output, made_of
        self._encoder: ClipEncoder | None = None
        self._decoders = open_decoders(spec.encode_spec(), spec.decode, spec.cpus_per_worker)

    def encode(self, unit: _Unit) -> ShardSummary:
        # Loaded by the first unit rather than in __init__, where an error would reach the driver as a dead actor.
        if self._encoder is None:
            torch.set_num_threads(self._spec.cpus_per_worker)
            self._encoder = _load_encoder(self._spec, self._made_of)
        recipe_hash = digest(self._made_of)
        return encode_unit(self._encoder, self._decoders, self._spec, self._output, recipe_hash, unit)


def _load_encoder(spec: PrepareSpec, made_of: dict[str, Any]) -> ClipEncoder:
    """The encoders on this machine, which must be those that the recipe names."""
    try:
        base = resolve_base(spec.base)
        if folder_hash(base, "vae") != made_of["vae_sha256"]:
            raise UserError(f"base {base} on a worker is not the driver's; give a folder that all machines share")
        return ClipEncoder(base, spec.encode_spec(), "cuda" if spec.gpus_per_worker > 0 else "cpu")
    except BaseFolderError as error:
        raise UserError(str(error)) from error


def _plan(spec: PrepareSpec, total: int, forgotten: Forgotten) -> Iterator[_Unit]:
    """The work units in order, made while the table streams by: unit i is always the same rows and the same shard."""
    rows: list[ClipRef | Failure] = []
    start = 0
    for row in read_rows(spec.source):
        rows.append(forgotten.failure(row) or row)
        if len(rows) == spec.clips_per_shard or start + len(rows) == total:
            yield _Unit(start // spec.clips_per_shard, start, start + len(rows), tuple(rows))
            start += len(rows)
            rows = []


def _run_units(
    spec: PrepareSpec, output: str, made_of: dict[str, Any], units: Iterator[_Unit], ledger: _Ledger
) -> Iterator[tuple[_Unit, ShardSummary]]:
    """Hands units to workers, one each, and yields them as they finish. Starts Ray only when there is work."""
    first = next(units, None)
    if first is None:
        return
    if spec.workers == 0:
        encoder = _load_encoder(spec, made_of)
        with open_decoders(spec.encode_spec(), spec.decode, spec.cpus_per_worker) as decoders:
            for unit in itertools.chain([first], units):
                yield unit, encode_unit(encoder, decoders, spec, output, digest(made_of), unit)
        return
    with _joined_ray(spec):
        workers = _workers_that_fit(spec)
        worker = EncodeWorker.options(num_cpus=spec.cpus_per_worker, num_gpus=spec.gpus_per_worker)
        running: dict[ray.ObjectRef, tuple[Any, _Unit]] = {}
        actors: list[Any] = []  # handles; Ray types them by a plugin
        try:
            unit: _Unit | None = first
            while unit is not None or running:
                if unit is not None and len(running) < workers:
                    idle = [actor for actor in actors if all(actor is not busy for busy, _ in running.values())]
                    if not idle:
                        idle = [worker.remote(spec, output, made_of)]
                        actors += idle
                    running[idle[0].encode.remote(unit)] = (idle[0], unit)
                    unit = next(units, None)
                    continue
                ready, _ = ray.wait(list(running), num_returns=1, timeout=_TICK_SECONDS)
                ledger.tick()
                for reference in ready:
                    _, finished = running.pop(reference)
                    yield finished, _result(reference, finished)
        finally:
            for actor in actors:
                ray.kill(actor)


def _result(reference: ray.ObjectRef, unit: _Unit) -> ShardSummary:
    """A unit's summary. Raises UserError for what the worker raised for a person, or when its process kept dying."""
    try:
        return ray.get(reference)
    except ray.exceptions.RayTaskError as error:
        if isinstance(error.cause, UserError):
            raise UserError(str(error.cause)) from None
        if isinstance(error.cause, OSError):
            raise error.cause from None
        raise
    except ray.exceptions.RayActorError:
        raise UserError(
            f"rows {unit.start} to {unit.stop - 1} lost their worker {_LOST_WORKER_RETRIES + 1} times;"
            " give the machine more memory, or ask for fewer workers or fewer processes that decode"
        ) from None


@contextmanager
def _joined_ray(spec: PrepareSpec) -> Iterator[None]:
    session = ray_session(spec.ray_address, spec.workers * spec.cpus_per_worker)
    try:
        session.__enter__()
    except ConnectionError as error:
        raise UserError(f"no Ray cluster answers at {spec.ray_address!r}; give its address, or none") from error
    with ExitStack() as stack:
        stack.push(session)
        yield


def _workers_that_fit(spec: PrepareSpec) -> int:
    """How many workers the Ray session can hold at once: one more would wait with its unit for ever."""
    resources = ray.cluster_resources()
    fit = int(resources.get("CPU", 0) // spec.cpus_per_worker)
    if spec.gpus_per_worker > 0:
        fit = min(fit, int(resources.get("GPU", 0) // spec.gpus_per_worker))
    if fit < 1:
        raise UserError(
            f"a worker of {spec.cpus_per_worker} CPUs and {spec.gpus_per_worker:g} GPUs does not fit the Ray session"
            f" ({resources.get('CPU', 0):g} CPUs, {resources.get('GPU', 0):g} GPUs); ask for less"
        )
    return min(spec.workers, fit)


@contextmanager
def _explained(place: str) -> Iterator[None]:
    """Turns what a full or read-only store says into one sentence for a person."""
    try:
        yield
    except OSError as error:
        reason = error.strerror or str(error) or type(error).__name__
        raise UserError(f"{place} cannot be written ({reason}); free some space or give another output") from error


class _Ledger:
    """Counts rows as shards finish and tells the progress callback."""

    def __init__(self, total: int, progress: Progress | None) -> None:
        self._total, self._progress = total, progress
        self._began = self._told = time.monotonic()
        self._done = self._encoded = self._failed = self._made = 0
        self.shards_reused = 0

    def add(self, part: ShardSummary, reused: bool = False) -> None:
        rows = part.stop - part.start
        self._done += rows
        self._encoded += part.encoded
        self._failed += rows - part.encoded
        if reused:
            self.shards_reused += 1
        else:
            self._made += rows
        self._tell()

    @property
    def rows_made(self) -> int:
        return self._made

    def tick(self) -> None:
        """A line while a long shard is under way, at most every `_TICK_SECONDS`."""
        if time.monotonic() - self._told >= _TICK_SECONDS:
            self._tell()

    def _tell(self) -> None:
        self._told = time.monotonic()
        if self._progress is None:
            return
        seconds = max(self._told - self._began, 1e-9)
        rate = self._made / seconds
        self._progress(
            {
                "stage": "prepare",
                "done": self._done,
                "total": self._total,
                "encoded": self._encoded,
                "failed": self._failed,
                "clips_per_second": round(rate, 3),
                "eta_seconds": round((self._total - self._done) / rate, 1) if self._made else None,
            }
        )
