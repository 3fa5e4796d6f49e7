"""Drives the prepare stage: the units that are missing go to workers, each comes back as one finished shard."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import replace
from typing import Any

import ray
import ray.exceptions

from infra import storage
from infra.cluster import ray_session
from infra.workers import MAX_DEATHS, NoRoom, WorkerDied, WorkerPool
from tasks import shards
from tasks.encode.encoder import ClipEncoder, open_decoders
from tasks.encode.fingerprint import fingerprint_of
from tasks.encode.progress import Ledger, Progress
from tasks.encode.report import write_report, write_report_apart
from tasks.encode.resume import find_held, retry_reasons
from tasks.encode.spec import PrepareReport, PrepareSpec
from tasks.encode.work_unit import Unit, addressed_rows, encode_unit, plan
from tasks.ingest.sources import count_rows, opened
from tasks.ingest.spec import SourceSpec
from tasks.records import UserError, add_counts, digest, to_json
from tasks.shards import ShardSummary
from trip_model.folders import BaseFolderError, folder_hash, resolve_base


def prepare(spec: PrepareSpec, progress: Progress | None = None) -> PrepareReport:
    """Makes the data set, or finishes it: shards whose index is there and agrees are kept as they are.

    Rows that failed under a class in `retry` are done again, and their shards made anew with the bytes of all other
    samples. Clips in the data set's list of forgotten ones, and in the takedowns of the root that the output lies
    below, are left out, and taken out where they still are.

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
    spec = replace(spec, source=opened(spec.source))
    fingerprint = spec.fingerprint or fingerprint_of(spec)
    retried = retry_reasons(spec.retry)
    recipe_hash = digest(fingerprint)
    total = count_rows(spec.source)
    if total == 0:
        raise UserError(f"table {spec.source.table} has no rows; give a table with at least two clips")
    with _explained(f"output {output}"):
        shards.open_dataset(output, fingerprint)
        published = storage.exists(storage.join(output, shards.MANIFEST))
        forgotten, takedowns = _removed_clips(spec.source, output)

    ledger = Ledger(total, progress)
    done: dict[int, ShardSummary] = {}
    names = shards.shards_held(output)
    rows_retried = 0

    def missing_units() -> Iterator[Unit]:
        for unit in plan(spec, total, forgotten):
            held = find_held(output, names.get(unit.index, ()), unit.rows, recipe_hash, retried)
            # A unit that gave nothing is tried again as long as the data set is unfinished: the network may be back.
            if held is None or not (held.summary.encoded or published):
                yield unit
            elif held.redo:
                yield replace(unit, held=held.summary.shard, redo=held.redo)
            else:
                done[unit.index] = held.summary
                ledger.add(held.summary, reused=True)

    with _Workers(spec, output, fingerprint, takedowns) as workers:
        with _explained(f"output {output}"):
            for unit, summary in workers.run(missing_units(), ledger.tick):
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
        source = {name: fingerprint[name] for name in ("columns", "table_sha256")} | {"limit": spec.source.limit}
        with _explained(f"output {output}"):
            manifest_sha = shards.publish_dataset(output, fingerprint, recipe_hash, source, parts)
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
            workers.write_report(to_json(report), sum(part.size_bytes for part in parts), ledger.rows_made)
    return report


def _removed_clips(source: SourceSpec, output: str) -> tuple[shards.Forgotten, shards.Forgotten]:
    """The data set's list of forgotten clips, and all that is removed below the root.

    What the root's takedowns say of this source is added to the list first. Only that part is, so that the takedown of
    a clip that the source does not have leaves the data set as it is.
    """
    forgotten = shards.read_forgotten(output)
    takedowns = shards.gather_takedowns(output)
    new = takedowns.about(addressed_rows(source)).marks if takedowns.marks.keys() - forgotten.marks.keys() else {}
    if new.keys() - forgotten.marks.keys():
        forgotten = shards.Forgotten(new | shards.read_forgotten(output).marks)  # read again: others may have added
        shards.write_forgotten(output, forgotten)
    return forgotten, shards.Forgotten(takedowns.marks | forgotten.marks)


@contextmanager
def _explained(place: str) -> Iterator[None]:
    """Turns what a full or read-only store says into one sentence for a person."""
    try:
        yield
    except OSError as error:
        reason = error.strerror or str(error) or type(error).__name__
        raise UserError(f"{place} cannot be written ({reason}); free some space or give another output") from error


class EncodeWorker:
    """Loads the encoders and starts the decoders once, then turns units into shards."""

    def __init__(
        self, spec: PrepareSpec, output: str, fingerprint: dict[str, Any], takedowns: shards.Forgotten
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
    """The encoders on this machine, which must be those that the recipe names."""
    try:
        base = resolve_base(spec.base)
        for part in ("vae", "tokenizer", "text_encoder"):
            if f"{part}_sha256" in fingerprint and folder_hash(base, part) != fingerprint[f"{part}_sha256"]:
                raise UserError(
                    f"{part} of base {base} on a worker is not the driver's; give a folder that all machines share"
                )
        return ClipEncoder(base, spec, "cuda" if spec.gpus_per_worker > 0 else "cpu")
    except BaseFolderError as error:
        raise UserError(str(error)) from error


class _Workers:
    """Whoever does the units of one run; Ray's workers start when there is work and stay warm until the block ends."""

    def __init__(
        self, spec: PrepareSpec, output: str, fingerprint: dict[str, Any], takedowns: shards.Forgotten
    ) -> None:
        self._spec, self._output, self._fingerprint, self._takedowns = spec, output, fingerprint, takedowns
        self._pool: WorkerPool | None = None
        self._session = ExitStack()

    def __enter__(self) -> _Workers:
        return self

    def __exit__(self, *error: object) -> None:
        self._session.close()

    def run(self, units: Iterator[Unit], tick: Callable[[], None]) -> Iterator[tuple[Unit, ShardSummary]]:
        """Hands units to workers, one each, and yields them as they finish. Starts Ray only when there is work.

        `tick` is called about every 10 s while nothing finishes.

        Raises:
            UserError: what a worker raised for a person; a unit's workers kept dying; no worker fits.
            ray.exceptions.NodeDiedError: machines are lost and no unit is to blame; the same command continues.
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
                " give the machine more memory, or ask for fewer workers or fewer processes that decode"
            ) from None
        except ray.exceptions.RayTaskError as error:
            if isinstance(error.cause, UserError):
                raise UserError(str(error.cause)) from None
            if isinstance(error.cause, OSError):
                raise error.cause from None
            raise

    def write_report(self, numbers: dict[str, Any], size_bytes: int, rows_made: int) -> None:
        """Has the report written by who has the VAE's libraries loaded, for they are ten seconds and half a gigabyte.

        Without workers that is this process, whose memory may be the store; where no worker was needed, one apart.
        """
        arguments = (numbers, self._spec.base, size_bytes, rows_made)
        if self._spec.workers == 0:
            write_report(*arguments)
            return
        if self._pool is not None and (actor := self._pool.idle_actor()) is not None:
            with suppress(ray.exceptions.RayError):
                ray.get(actor.write_report.remote(*arguments))
        write_report_apart(*arguments)  # nothing is left to do where a worker did it


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
