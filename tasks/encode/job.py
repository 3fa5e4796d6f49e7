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
import torch

from infra import storage
from infra.cluster import machines_left, ray_session
from tasks import shards
from tasks.encode.encoder import ClipEncoder, open_decoders
from tasks.encode.ledger import TICK_SECONDS, Ledger, Progress
from tasks.encode.repair import find_held, retry_reasons
from tasks.encode.report import write_report, write_report_apart
from tasks.encode.spec import PrepareReport, PrepareSpec, recipe
from tasks.encode.unit import Unit, addressed_rows, encode_unit, plan
from tasks.ingest.sources import SourceSpec, count_rows, settled
from tasks.records import UserError, add_counts, digest, to_json
from tasks.shards import ShardSummary
from trip_model.encoders import BaseFolderError, folder_hash, resolve_base

_LOST_WORKER_RETRIES = 2


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

    with _Workers(spec, output, made_of, takedowns) as workers:
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
        source = {name: made_of[name] for name in ("columns", "table_sha256")} | {"limit": spec.source.limit}
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


# Ray restarts a lost worker and gives it its unit again, but not for ever: the unit may be more than its machine holds.
@ray.remote(max_restarts=-1, max_task_retries=_LOST_WORKER_RETRIES)
class EncodeWorker:
    """Loads the encoders and starts the decoders once, then turns units into shards."""

    def __init__(self, spec: PrepareSpec, output: str, made_of: dict[str, Any], takedowns: shards.Forgotten) -> None:
        self._spec, self._output, self._made_of, self._takedowns = spec, output, made_of, takedowns
        self._encoder: ClipEncoder | None = None
        self._decoders = open_decoders(spec.encode_spec(), spec.decode, spec.cpus_per_worker)

    def encode(self, unit: Unit) -> ShardSummary:
        # Loaded by the first unit rather than in __init__, where an error would reach the driver as a dead actor.
        if self._encoder is None:
            torch.set_num_threads(self._spec.cpus_per_worker)
            self._encoder = _load_encoder(self._spec, self._made_of)
        recipe_hash = digest(self._made_of)
        return encode_unit(self._encoder, self._decoders, self._spec, self._output, recipe_hash, self._takedowns, unit)

    def write_report(self, numbers: dict[str, Any], base: str, size_bytes: int, rows_made: int) -> None:
        write_report(numbers, base, size_bytes, rows_made)


def _load_encoder(spec: PrepareSpec, made_of: dict[str, Any]) -> ClipEncoder:
    """The encoders on this machine, which must be those that the recipe names."""
    try:
        base = resolve_base(spec.base)
        for part in ("vae", "tokenizer", "text_encoder"):
            if f"{part}_sha256" in made_of and folder_hash(base, part) != made_of[f"{part}_sha256"]:
                raise UserError(
                    f"{part} of base {base} on a worker is not the driver's; give a folder that all machines share"
                )
        return ClipEncoder(base, spec.encode_spec(), "cuda" if spec.gpus_per_worker > 0 else "cpu")
    except BaseFolderError as error:
        raise UserError(str(error)) from error


class _Workers:
    """Whoever does the units of one run; Ray's workers start when there is work and stay warm until the block ends."""

    def __init__(self, spec: PrepareSpec, output: str, made_of: dict[str, Any], takedowns: shards.Forgotten) -> None:
        self._spec, self._output, self._made_of, self._takedowns = spec, output, made_of, takedowns
        self._actors: list[Any] = []  # handles; Ray types them by a plugin
        self._session = ExitStack()

    def __enter__(self) -> _Workers:
        return self

    def __exit__(self, *error: object) -> None:
        with self._session:
            for actor in self._actors:
                ray.kill(actor)

    def run(self, units: Iterator[Unit], tick: Callable[[], None]) -> Iterator[tuple[Unit, ShardSummary]]:
        """Hands units to workers, one each, and yields them as they finish. Starts Ray only when there is work.

        `tick` is called about every `TICK_SECONDS` while nothing finishes.
        """
        spec, output, made_of, takedowns = self._spec, self._output, self._made_of, self._takedowns
        first = next(units, None)
        if first is None:
            return
        if spec.workers == 0:
            encoder = _load_encoder(spec, made_of)
            with open_decoders(spec.encode_spec(), spec.decode, spec.cpus_per_worker) as decoders:
                for unit in itertools.chain([first], units):
                    yield unit, encode_unit(encoder, decoders, spec, output, digest(made_of), takedowns, unit)
            return
        self._session.enter_context(_joined_ray(spec))
        workers = _workers_that_fit(spec)
        worker = EncodeWorker.options(num_cpus=spec.cpus_per_worker, num_gpus=spec.gpus_per_worker)
        running: dict[ray.ObjectRef, tuple[Any, Unit]] = {}
        unit: Unit | None = first
        while unit is not None or running:
            if unit is not None and len(running) < workers:
                idle = [actor for actor in self._actors if all(actor is not busy for busy, _ in running.values())]
                if not idle:
                    idle = [worker.remote(spec, output, made_of, takedowns)]
                    self._actors += idle
                running[idle[0].encode.remote(unit)] = (idle[0], unit)
                unit = next(units, None)
                continue
            ready, _ = ray.wait(list(running), num_returns=1, timeout=TICK_SECONDS)
            tick()
            for reference in ready:
                _, finished = running.pop(reference)
                yield finished, _result(reference, finished)

    def write_report(self, numbers: dict[str, Any], size_bytes: int, rows_made: int) -> None:
        """Has the report written by who has the VAE's libraries loaded, for they are ten seconds and half a gigabyte.

        Without workers that is this process, whose memory may be the store; where no worker was needed, one apart.
        """
        arguments = (numbers, self._spec.base, size_bytes, rows_made)
        if self._spec.workers == 0:
            write_report(*arguments)
            return
        for actor in self._actors[:1]:
            with suppress(ray.exceptions.RayError):
                ray.get(actor.write_report.remote(*arguments))
        write_report_apart(*arguments)  # nothing is left to do where a worker did it


def _result(reference: ray.ObjectRef, unit: Unit) -> ShardSummary:
    """A unit's summary.

    Raises:
        UserError: what the worker raised for a person; or its process kept dying.
        ray.exceptions.NodeDiedError: Ray has lost its machine; the unit is not to blame, and a new session may do it.
    """
    try:
        return ray.get(reference)
    except ray.exceptions.RayTaskError as error:
        if isinstance(error.cause, UserError):
            raise UserError(str(error.cause)) from None
        if isinstance(error.cause, OSError):
            raise error.cause from None
        raise
    except ray.exceptions.RayActorError:
        if not machines_left():
            raise ray.exceptions.NodeDiedError("Ray's session lost its machine; the same command continues") from None
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
