"""Runs the prepare stage: workers turn the missing work units into finished shards."""

from __future__ import annotations

import errno
import itertools
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import replace
from pathlib import PurePosixPath
from typing import Any

import ray
import ray.exceptions

from infra import storage
from infra.cluster import ray_session
from infra.leases import lease
from infra.redaction import redact
from infra.workers import MAX_DEATHS, NoRoom, WorkerDied, WorkerPool
from tasks import shards
from tasks.encode.delta import Delta
from tasks.encode.encoder import ClipEncoder, open_decoders
from tasks.encode.exclusions import GAVE_UP, read_exclusions, record_failed_retries
from tasks.encode.fingerprint import fingerprint_of
from tasks.encode.progress import Progress, ProgressAccounting
from tasks.encode.report import write_report, write_report_apart
from tasks.encode.resume import find_existing, retry_reasons
from tasks.encode.spec import PrepareReport, PrepareSpec
from tasks.encode.work_unit import Unit, encode_unit
from tasks.ingest.sources import addressed_rows, opened
from tasks.ingest.spec import SourceSpec
from tasks.records import ClipRef, Failure, UserError, add_counts, digest, to_json
from tasks.shards import ShardSummary
from tasks.shards.takedowns import TAKEDOWN_REASON
from trip_model.folders import BaseFolderError, folder_hash, resolve_base


def prepare(spec: PrepareSpec, progress: Progress | None = None) -> PrepareReport:
    """Creates the data set, continues it, or brings it to the present rows of its source.

    Rows that exist are not requested again, whatever their order: new rows become new shards, the shards of rows that
    the source does not have anymore are rebuilt without them, and a row with another caption is tokenized again. Rows
    that failed for a reason in the classes of `retry` are processed again; their shards are rebuilt and keep the bytes
    of all other samples. Clips in the takedowns of the data set or of its root are excluded, and removed if they are
    present, as are the root's duplicates and links whose retries gave up.

    Args:
        spec: what to prepare, from where, to where.
        progress: called after each shard, and about every 10 s in between, with `stage`, `done`, `total` (rows),
            `encoded`, `failed`, `clips_per_second`, `eta_seconds` (None until known).
    Raises:
        LeaseHeld: another process writes to the output.
        UserError: the input is invalid; the output contains another recipe or cannot be written; fewer than two clips
            are usable (the message counts the reasons); a range of rows repeatedly loses its worker.
    """
    began = time.monotonic()
    output = storage.absolute(spec.output)
    if output.startswith("memory://") and spec.workers > 0:
        raise UserError(
            f"output {output}: memory is not shared between workers; give a folder or an object store, or 0 workers"
        )
    spec = replace(spec, source=opened(spec.source), output=output)
    fingerprint = spec.fingerprint or fingerprint_of(spec)
    retried = retry_reasons(spec.retry)
    with ExitStack() as held:
        with _write_errors(f"output {output}"):
            held.enter_context(lease(output))  # before anything that exists is read: another writer would change it
        return _prepare(spec, fingerprint, retried, progress, began)


def _prepare(
    spec: PrepareSpec,
    fingerprint: dict[str, Any],
    retried: frozenset[str],
    progress: Progress | None,
    began: float,
) -> PrepareReport:
    """`prepare` as the only writer of the output; the spec is checked, and its source opened."""
    output, recipe_hash = spec.output, digest(fingerprint)
    pool = shards.pool_of(output, recipe_hash)
    with _write_errors(f"output {output}"):
        _upgrade(output, fingerprint)
        shards.open_dataset(output, fingerprint)
        published = storage.exists(storage.join(output, shards.MANIFEST))
        dataset_takedowns, all_takedowns = _takedowns_of(spec.source, output)
    exclusions = read_exclusions(output, dataset_takedowns, GAVE_UP in spec.retry)
    delta = Delta(spec, recipe_hash, exclusions, retried)
    if delta.total == 0:
        raise UserError(f"table {spec.source.table} has no rows; give a table with at least two clips")

    accounting = ProgressAccounting(delta.total, progress)
    done: dict[int, ShardSummary] = {}
    rows_retried = 0
    gave_up: dict[str, str] = {}  # links that failed again, with their reasons
    replaced: dict[str, int] = {}  # shards with rows that were taken down since, with the numbers of their units

    def missing_units() -> Iterator[Unit]:
        for number, change in enumerate(delta.changes):
            if change.is_whole:
                done[number] = change.shard.summary(recipe_hash)
                accounting.add(done[number], reused=True)
        by_label: dict[int | str, list[str]] | None = None
        for unit in delta.units():
            if by_label is None:  # a run that was killed may have left what is missing
                by_label = shards.existing_shards(pool)
            names = by_label.get(shards.rows_label(unit.row_ids), ())
            existing = find_existing(pool, names, unit.rows, unit.row_ids, recipe_hash, retried, exclusions.reasons)
            if unit.existing is not None:
                taken_down = [r for r in unit.rows if isinstance(r, Failure) and r.reason == TAKEDOWN_REASON]
                if any(row.row in unit.redo for row in taken_down):
                    replaced[unit.existing] = unit.index
                # Another shard of these rows may be older, or of another data set: it must be ahead of this one.
                before = delta.changes[unit.index].encoded
                retries = any(isinstance(unit.rows[row], ClipRef) for row in unit.redo)
                if existing is None or existing.summary.encoded < before + retries:
                    yield unit
                    continue
            # A unit without an encoded row is tried again until the data set is finished: the network may work again.
            if existing is None or not (existing.summary.encoded or published):
                yield unit
            elif existing.redo:
                origins = tuple(range(len(unit.rows)))
                name = existing.summary.shard
                yield replace(unit, existing=name, origins=origins, redo=existing.redo, recaption=frozenset())
            else:
                done[unit.index] = existing.summary
                accounting.add(existing.summary, reused=True)

    with _Workers(spec, pool, fingerprint, all_takedowns) as workers:
        with _write_errors(f"output {output}"):
            for unit, summary in workers.run(missing_units(), accounting.tick):
                done[unit.index] = summary
                accounting.add(summary)
                rows_retried += len(unit.redo)
                gave_up |= _failed_again(pool, unit, summary, retried)
            record_failed_retries(output, gave_up, uuid.uuid4().hex)

        parts = [done[index] for index in sorted(done)]
        failed = add_counts(part.failed for part in parts)
        encoded = sum(part.encoded for part in parts)
        if encoded < 2:
            reasons = ", ".join(f"{reason} {count}" for reason, count in failed.items()) or "none failed"
            raise UserError(
                f"{encoded} of {delta.total} clips of {spec.source.table} can be used ({reasons});"
                f" at least 2 are needed, see the failures in {storage.join(pool, 'shard-*.json')}"
            )
        with _write_errors(f"output {output}"):
            manifest_sha = shards.publish_dataset(output, fingerprint, recipe_hash, {}, parts)
            shards.erase_shards(output, recipe_hash, {name: done[index] for name, index in replaced.items()})
        report = PrepareReport(
            dataset=shards.version_of(output, manifest_sha),
            rows=delta.total,
            encoded=encoded,
            samples=sum(part.samples for part in parts),
            failed=failed,
            recipe_hash=recipe_hash,
            manifest_sha=manifest_sha,
            shards=len(parts),
            shards_reused=accounting.shards_reused,
            rows_retried=rows_retried,
            seconds=round(time.monotonic() - began, 3),
            page=shards.report_addresses(output)["html"],
            source=PurePosixPath(redact(spec.source.table)).name,
            allowed=tuple(redact(name) for name in (*spec.source.allow, spec.source.proxy) if name is not None),
            frame_sizes=add_counts(part.frame_sizes for part in parts),
        )
        with _write_errors(f"report {report.page}"):
            workers.write_report(to_json(report), sum(part.size_bytes for part in parts), accounting.rows_made)
    return report


def _failed_again(pool: str, unit: Unit, summary: ShardSummary, retried: frozenset[str]) -> dict[str, str]:
    """Returns the links of a unit's retried rows that failed for a reason to retry, with the reason."""
    index = shards.read_shard_manifest(pool, summary.shard) if unit.redo and retried else None
    failures = {failure.row: failure.reason for failure in index.failures} if index is not None else {}
    return {
        row.url: failures[row.row]
        for row in unit.rows
        if isinstance(row, ClipRef) and row.row in unit.redo and failures.get(row.row) in retried
    }


def _upgrade(output: str, fingerprint: dict[str, Any]) -> None:
    """Upgrades data sets of schema 2 with these samples: the output itself, and others of its root."""
    for name in (output, *shards.siblings_of(output)):
        try:
            manifest, _ = shards.read_manifest(name)
        except UserError:  # not finished
            continue
        if manifest.schema_version == 2 and digest(shards.recipe_of_samples(manifest.recipe)) == digest(fingerprint):
            shards.upgrade(name)


def _takedowns_of(source: SourceSpec, output: str) -> tuple[shards.Takedowns, shards.Takedowns]:
    """Returns the data set's takedowns, and those together with all of its root.

    First the data set's list gets the entries of the root that match this source. Other entries are not added, so that
    the takedown of a clip that the source does not contain leaves the data set unchanged.
    """
    own = shards.read_takedowns(output)
    root = shards.gather_root_takedowns(output)
    new = root.matching(addressed_rows(source)).marks if root.marks.keys() - own.marks.keys() else {}
    if new.keys() - own.marks.keys():
        own = shards.Takedowns(new | shards.read_takedowns(output).marks)  # read again: others may have added entries
        shards.write_takedowns(output, own)
    return own, shards.Takedowns(root.marks | own.marks)


@contextmanager
def _write_errors(target: str) -> Iterator[None]:
    """Converts the OSError of a store to a UserError that names the target and what to do."""
    try:
        yield
    except OSError as error:
        reason = error.strerror or str(error) or type(error).__name__
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            remedy = "free some space or give another output"
        elif isinstance(error, FileNotFoundError):
            remedy = "create its bucket or folder, or give another output"
        elif isinstance(error, PermissionError):
            remedy = "give credentials that may write there, or another output"
        elif storage.local_path(target.partition(" ")[2]) is None:
            remedy = "the store did not take it; the same command continues"
        else:
            remedy = "give another output"
        raise UserError(f"{target} cannot be written ({reason}); {remedy}") from error


class EncodeWorker:
    """Loads the encoders and starts the decoders once, then turns work units into shards."""

    def __init__(
        self, spec: PrepareSpec, output: str, fingerprint: dict[str, Any], takedowns: shards.Takedowns
    ) -> None:
        self._spec, self._output, self._fingerprint, self._takedowns = spec, output, fingerprint, takedowns
        self._encoder: ClipEncoder | None = None
        self._decoders = open_decoders(spec, spec.decode, spec.cpus_per_worker)

    def encode(self, unit: Unit) -> ShardSummary:
        # Loaded by the first unit rather than in __init__, where an error would reach the driver as a dead actor.
        if self._encoder is None:
            import torch  # only in the worker: a driver that finds its work done needs no torch

            torch.set_num_threads(self._spec.cpus_per_worker)
            self._encoder = _load_encoder(self._spec, self._fingerprint)
        recipe_hash = digest(self._fingerprint)
        return encode_unit(self._encoder, self._decoders, self._spec, self._output, recipe_hash, self._takedowns, unit)

    def write_report(self, numbers: dict[str, Any], base: str, size_bytes: int, rows_made: int) -> None:
        write_report(numbers, base, size_bytes, rows_made)


def _load_encoder(spec: PrepareSpec, fingerprint: dict[str, Any]) -> ClipEncoder:
    """Loads the encoders on this machine. Raises UserError if their hashes are not those of the fingerprint."""
    try:
        base = resolve_base(spec.base)
        for part in ("vae", "tokenizer", "text_encoder"):
            if f"{part}_sha256" in fingerprint and folder_hash(base, part) != fingerprint[f"{part}_sha256"]:
                raise UserError(
                    f"{part} of base {base} on a worker differs from the driver's; give a folder that all share"
                )
        return ClipEncoder(base, spec, "cuda" if spec.gpus_per_worker > 0 else "cpu")
    except BaseFolderError as error:
        raise UserError(str(error)) from error


class _Workers:
    """The workers of one run, in this process or on Ray; Ray's start with the first unit and end with the block."""

    def __init__(
        self, spec: PrepareSpec, output: str, fingerprint: dict[str, Any], takedowns: shards.Takedowns
    ) -> None:
        self._spec, self._output, self._fingerprint, self._takedowns = spec, output, fingerprint, takedowns
        self._pool: WorkerPool | None = None
        self._session = ExitStack()

    def __enter__(self) -> _Workers:
        return self

    def __exit__(self, *error: object) -> None:
        self._session.close()

    def run(self, units: Iterator[Unit], tick: Callable[[], None]) -> Iterator[tuple[Unit, ShardSummary]]:
        """Assigns units to workers, one each, and yields them as they finish. Starts Ray only if there is a unit.

        `tick` is called about every 10 s while no unit finishes.

        Raises:
            UserError: raised by a worker; the workers of a unit died repeatedly; no worker fits on the cluster.
            ray.exceptions.NodeDiedError: machines were lost and no unit is the cause; the same command continues.
        """
        spec, output, fingerprint, takedowns = self._spec, self._output, self._fingerprint, self._takedowns
        first = next(units, None)
        if first is None:
            return
        if spec.workers == 0:
            encoder = _load_encoder(spec, fingerprint)
            with open_decoders(spec, spec.decode, spec.cpus_per_worker) as decoders:
                for unit in itertools.chain([first], units):
                    yield unit, encode_unit(encoder, decoders, spec, output, digest(fingerprint), takedowns, unit)
            return
        self._session.enter_context(_joined_ray(spec))
        arguments = (spec, output, fingerprint, takedowns)
        try:
            self._pool = self._session.enter_context(
                WorkerPool(EncodeWorker, arguments, spec.workers, spec.cpus_per_worker, spec.gpus_per_worker)
            )
            yield from self._pool.run(
                itertools.chain([first], units), lambda actor, unit: actor.encode.remote(unit), tick
            )
        except NoRoom as error:
            raise UserError(str(error)) from None
        except WorkerDied as error:
            if error.task is None:
                raise UserError(str(error)) from error
            raise UserError(
                f"rows {error.task.start} to {error.task.stop - 1} lost their worker {MAX_DEATHS} times;"
                " give the machine more memory, or use fewer workers or fewer decoder processes"
            ) from None
        except ray.exceptions.RayTaskError as error:
            if isinstance(error.cause, UserError):
                raise UserError(str(error.cause)) from None
            if isinstance(error.cause, OSError):
                raise error.cause from None
            raise

    def write_report(self, numbers: dict[str, Any], size_bytes: int, rows_made: int) -> None:
        """Writes the report in a worker, which has the VAE loaded; importing it here costs 10 s and 0.5 GB.

        Without workers this process writes it, since the output may be in its memory; if no worker was started, a
        separate process does.
        """
        arguments = (numbers, self._spec.base, size_bytes, rows_made)
        if self._spec.workers == 0:
            write_report(*arguments)
            return
        if self._pool is not None and (actor := self._pool.idle_actor()) is not None:
            with suppress(ray.exceptions.RayError):
                ray.get(actor.write_report.remote(*arguments))
        write_report_apart(*arguments)  # returns at once if a worker wrote it


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
