"""Drives the evaluation on Ray: actors animate, actors extract features of all rows, the driver reports."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from functools import cached_property
from typing import Any

import ray
import ray.exceptions

from infra import storage
from infra.cluster import ray_session
from infra.workers import MAX_DEATHS, NoRoom, WorkerDied, WorkerPool
from tasks.evaluate import generate
from tasks.evaluate import systems as rows
from tasks.evaluate.base import UntrainedBase, find_base, load_base
from tasks.evaluate.gate import gate
from tasks.evaluate.generate import Batch
from tasks.evaluate.progress import Ticks
from tasks.evaluate.protocol.baselines import CHAMPION, Method, find_champion, find_method, missing_of, without_missing
from tasks.evaluate.protocol.protocol import Item, Protocol, load_protocol
from tasks.evaluate.report import aggregate as score
from tasks.evaluate.report import page as report
from tasks.evaluate.spec import (
    EvaluateReport,
    EvaluateSpec,
    finished_report,
    model_sha256,
    provenance_of,
)
from tasks.evaluate.systems import BASE, FROZEN, REAL, TRIP, Row
from tasks.evaluation_record import REPORT_FILE, REPORT_SCHEMA, EvaluationRecord
from tasks.metrics.extractors.extractor import ExtractorInfo
from tasks.metrics.extractors.loading import identify_extractors, load_extractors
from tasks.records import UserError, digest
from tasks.shards import ShardDataset

PROTOCOL = "protocol.json"


class _Worker:
    """What the two kinds of actors share: the data set and how many frames. Loading waits for the first batch.

    An error of loading in a constructor would reach the driver as a dead actor instead of as its sentence.
    """

    def __init__(self, spec: EvaluateSpec, frames: int) -> None:
        import torch

        torch.set_num_threads(spec.cpus_per_worker)
        self.spec, self.frames = spec, frames
        self.device = "cuda" if spec.gpus_per_worker > 0 and torch.cuda.is_available() else "cpu"

    @cached_property
    def dataset(self) -> ShardDataset:
        return ShardDataset(self.spec.dataset)


class Generator(_Worker):
    """Loads the model, or its untrained base, once, then animates batches."""

    pipeline: Any = None

    def __init__(self, spec: EvaluateSpec, frames: int, folder: str, scaled: bool, base: UntrainedBase | None) -> None:
        super().__init__(spec, frames)
        self.folder, self.scaled, self.base = folder, scaled, base

    def run(self, batch: Batch) -> None:
        if self.pipeline is None:
            from trip_model.pipeline import TripPipeline

            if self.base is None:
                self.pipeline = TripPipeline.from_folder(storage.local_folder(self.spec.model), device=self.device)
            else:
                self.pipeline = load_base(self.base, self.frames, self.device)
        of = self.spec if self.base is None else self.base
        steps, guidance = of.steps, of.guidance
        generate.generate_batch(
            self.pipeline, self.dataset, batch, self.frames, self.folder, steps, guidance, self.scaled
        )


class Extractor(_Worker):
    """Loads the feature extractors once, then extracts the missing features of batches of clips, clip by clip."""

    extractors: Any = None

    def __init__(self, spec: EvaluateSpec, frames: int, table: Sequence[Row], made: dict[str, Any]) -> None:
        super().__init__(spec, frames)
        self.rows, self.made = {row.name: row for row in table}, made

    def run(self, names: Sequence[str], batch: Batch) -> None:
        if self.extractors is None:
            self.extractors = load_extractors(self.spec.judges, self.device)
        reals = [generate.real_pixels(self.dataset, item, self.frames) for item in batch]
        for name in names:
            rows.look(self.spec.output, self.rows[name], self.made, batch, reals, self.extractors)


def evaluate(spec: EvaluateSpec, progress: Callable[[str], None] = print) -> EvaluateReport:
    """Evaluates a model export, or finishes an evaluation: frames and features that are there are not made again.

    Runs in the Ray session that is open, else in one of its own. `report.json` is written last; where one of the same
    key stands already, it is the answer.

    Raises:
        UserError: a model, data set, protocol, method, extractor or number that cannot be used, items that are missing
            although the protocol allows none, or an output that cannot be written.
    """
    start = time.monotonic()
    for name in ("clips", "batch", "bootstrap", "examples", "cpus_per_worker"):
        if getattr(spec, name) < 1:
            raise UserError(f"{name} {getattr(spec, name)}, expected at least 1")
    output = storage.absolute(spec.output)
    spec = replace(spec, output=output)
    dataset = ShardDataset(spec.dataset)
    protocol = load_protocol(spec.protocol, dataset, spec.held_out_fraction, spec.clips, spec.seed)
    extractors = identify_extractors(spec.judges)
    for extractor in extractors:
        if extractor.least_frames > protocol.frames:
            raise UserError(
                f"{extractor.metric} needs {extractor.least_frames} frames, the protocol's clips have {protocol.frames}"
            )
    others = [find_method(name, folder, protocol.items) for name, folder in spec.methods.items()]
    if spec.champion is not None:
        others.append(find_champion(spec.champion, protocol))
    without_missing(protocol, {method.name: missing_of(method, protocol.items) for method in others})
    clips = {
        "dataset_manifest_sha256": dataset.manifest_sha256,
        "items": digest([asdict(item) for item in protocol.items]),
        "frames": protocol.frames,
        "batch": spec.batch,
    }
    made = clips | {
        "model_sha256": spec.model_sha256 or model_sha256(spec.model),
        "steps": spec.steps,
        "guidance": spec.guidance,
    }
    base = None if spec.base is None else find_base(spec.base, spec.model, spec.steps, spec.guidance)
    summed = made | {
        "protocol_sha": protocol.sha,
        "judges": [extractor.id for extractor in extractors],
        "methods": {method.name: method.identity for method in others},
        "base": base and base.identity(),
        "schema": REPORT_SCHEMA,
        "bootstrap": spec.bootstrap,
        "examples": spec.examples,
    }
    key = digest(summed)
    found = finished_report(output, key, start)
    if found is not None:
        progress(f"evaluate   report of before is up to date: {storage.join(output, 'report.html')}")
        return found
    generations = storage.join("generations", digest(made))
    try:
        storage.write_json(storage.join(output, PROTOCOL), protocol.manifest())
        trip = _generated(TRIP, storage.join(output, generations), digest(made), protocol.items)
        models: list[tuple[Method, UntrainedBase | None]] = [(trip, None)]
        if base is not None:
            name = digest(clips | base.identity())
            folder = storage.join(spec.base_clips or storage.join(output, "base"), name)
            models.insert(0, (_generated(BASE, folder, name, protocol.items), base))
        methods = [*(method for method, of in models if of is not None), *others, trip]
        table = [Row(FROZEN), *(Row(method.name, method) for method in methods), Row(REAL)]
        records, items, excluded = _run_stages(spec, protocol, dataset, table, extractors, models, progress)
        summary = score.summarise(
            protocol,
            items,
            records,
            lambda extractor, row: rows.load_features(output, extractor, records[row]),
            extractors,
            spec.bootstrap,
            excluded,
        )
        trip_row = summary.metrics[TRIP]
        ratio = trip_row["motion_ratio"].value if "motion_ratio" in trip_row else None
        from_champion = summary.differences.get(CHAMPION, {})
        verdict = gate(
            ratio,
            trip_row["clip_distance_minus_frozen"],
            summary.clips,
            {name: from_champion[name] for name in score.lower_is_better(extractors) if name in from_champion},
        )
        provenance = summed | provenance_of(spec, dataset, protocol, extractors)
        for note in score.exclusions(summary.counts):
            progress(f"evaluate   {note}")
        progress(f"report     writing tables, pictures and {min(spec.examples, len(items))} videos")
        examples = _examples(dataset, protocol.frames, items[: spec.examples], table)
        pages = report.build(summary, verdict, extractors, protocol, examples, provenance)
        for name, content in pages.items():
            storage.write_bytes(storage.join(output, name), content)
        record = EvaluationRecord(
            key=key,
            gate=verdict,
            rows=summary.metrics,
            differences=summary.differences,
            floors=summary.floors,
            infinity=summary.infinity,
            curves=summary.curves,
            counts=summary.counts,
            notes=summary.notes,
            clips=summary.clips,
            items=len(items),
            files=tuple(sorted([*pages, PROTOCOL])),
            generations=generations,
            provenance=provenance,
        )
        storage.write_json(storage.join(output, REPORT_FILE), asdict(record))
    except ConnectionError as error:
        raise UserError(f"no Ray cluster answers at {spec.ray_address!r}; give its address or none") from error
    except OSError as error:
        raise UserError(
            f"the evaluation cannot read or write a file ({error}); free space, or choose another output than {output}"
        ) from error
    done = finished_report(output, key, start)
    assert done is not None, f"the report at {output} does not read back"
    said = "gate passed" if verdict.passed else f"gate not passed: {'; '.join(verdict.reasons)}"
    progress(f"evaluate   {summary.clips} clips, {said}; {storage.join(output, 'report.html')}")
    return done


def _generated(name: str, folder: str, identity: str, items: Sequence[Item]) -> Method:
    """A row whose clips a `Generator` keeps in a folder."""
    files = {item.key: (storage.join(folder, generate.file_name(item)),) for item in items}
    return Method(name, folder, files, identity, given_frame=True)


def _run_stages(
    spec: EvaluateSpec,
    protocol: Protocol,
    dataset: ShardDataset,
    table: Sequence[Row],
    extractors: Sequence[ExtractorInfo],
    models: Sequence[tuple[Method, UntrainedBase | None]],
    progress: Callable[[str], None],
) -> tuple[dict[str, list[dict[str, Any]]], tuple[Item, ...], dict[str, dict[str, int]]]:
    """Makes what is missing. Returns each row's records of the items that all rows have, those items, and the others.

    Other methods' clips come first: one that cannot be used is told before any is animated. `models` are the rows that
    are animated here.
    """
    made = {"dataset_manifest_sha256": dataset.manifest_sha256, "frames": protocol.frames}
    made |= {"shifted": True} if protocol.rules.shifted else {}
    plan = generate.batches(protocol.items, spec.batch)
    own = [method.name for method, _ in models]
    given = [row for row in table if row.method is not None and row.name not in own]

    def missing_items() -> dict[str, dict[str, str]]:
        found = {}
        for row in given:
            assert row.method is not None
            read = rows.read_records(spec.output, row, made, plan)
            failed = {key: record["failed"] for key, record in read.items() if "failed" in record}
            found[row.name] = missing_of(row.method, protocol.items) | failed
        return found

    def extract(label: str, of: Sequence[Row]) -> None:
        tasks = rows.unmeasured(spec.output, of, made, plan, extractors)
        done = len(protocol.items) - sum(len(batch) for _, batch in tasks)
        _drive(label, Extractor, (of, made), spec, protocol, tasks, done, progress)

    missing = [generate.unfinished(plan, method.folder) for method, _ in models]
    if any(missing) or rows.unmeasured(spec.output, table, made, plan, extractors):
        with ray_session(spec.ray_address):
            if given:
                extract("methods", given)
                without_missing(protocol, missing_items())
            for (method, base), batches in zip(models, missing, strict=True):
                label, arguments = "base" if base else "generate", (method.folder, protocol.rules.scaled, base)
                done = len(protocol.items) - sum(map(len, batches))
                _drive(label, Generator, arguments, spec, protocol, [(batch,) for batch in batches], done, progress)
            extract("judge", table)
    items, excluded = without_missing(protocol, missing_items())
    found = {row.name: rows.read_records(spec.output, row, made, plan) for row in table}
    return {name: [records[item.key] for item in items] for name, records in found.items()}, items, excluded


def _drive(
    label: str,
    kind: type[_Worker],
    arguments: tuple[Any, ...],
    spec: EvaluateSpec,
    protocol: Protocol,
    tasks: Sequence[tuple[Any, ...]],
    done: int,
    progress: Callable[[str], None],
) -> None:
    """Runs tasks over actors, each actor with one in hand; the task of one that is lost goes to another.

    A task is the arguments of `run`, the batch last; `done` items need none.
    """
    if not tasks:
        return
    ticks = Ticks(label, len(protocol.items), progress, done)
    actors = (kind, (spec, protocol.frames, *arguments), spec.workers, spec.cpus_per_worker, spec.gpus_per_worker)
    try:
        with WorkerPool(*actors) as pool:
            for task, _ in pool.run(tasks, lambda actor, task: actor.run.remote(*task)):
                ticks.tick(len(task[-1]))
    except ray.exceptions.RayTaskError as error:
        cause = error.cause
        if isinstance(cause, UserError | OSError):
            raise cause from None
        if isinstance(cause, ValueError):  # a sentence for a person, not a worker's stack
            raise UserError(str(cause)) from None
        raise
    except NoRoom as error:
        raise UserError(f"{label}: {error}") from None
    except WorkerDied as error:
        if error.task is None:
            raise UserError(f"{label}: {error}") from error
        raise UserError(
            f"a {label} worker died {MAX_DEATHS} times; give it more memory, or a smaller batch than {spec.batch}"
        ) from error


def _examples(
    dataset: ShardDataset, frames: int, items: Sequence[Item], table: Sequence[Row]
) -> Sequence[report.Example]:
    examples = []
    for item in items:
        real = generate.real_pixels(dataset, item, frames)
        shown = {row.name: row.frames(item, real)[0] for row in table if row.method is not None}
        examples.append(report.Example(item.key, item.caption, real, shown.pop(TRIP), shown))
    return examples
