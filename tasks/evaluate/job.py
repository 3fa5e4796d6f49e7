"""Drives the evaluation on Ray: actors animate, actors extract features of all rows, the driver reports."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from typing import Any

import ray
import ray.exceptions

from infra import storage
from infra.cluster import ray_session
from infra.leases import leased
from infra.workers import MAX_DEATHS, NoRoom, WorkerDied, WorkerPool
from tasks.evaluate import champion, generate, systems
from tasks.evaluate.animators import Animator, AnimatorSpec, Kind, find_base, load_animator
from tasks.evaluate.gate import CLIP_DISTANCE, ENERGY_SCORE, RULES_VERSION, Against, Evidence, gate
from tasks.evaluate.generate import Batch
from tasks.evaluate.progress import Ticks
from tasks.evaluate.protocol.baselines import CHAMPION, Method, find_champion, find_method, missing_of, without_missing
from tasks.evaluate.protocol.protocol import Item, Protocol, load_protocol
from tasks.evaluate.report import aggregate, page
from tasks.evaluate.report.aggregate import Summary
from tasks.evaluate.report.figures import Example
from tasks.evaluate.spec import (
    EvaluateReport,
    EvaluateSpec,
    check_spec,
    finished_report,
    provenance_of,
)
from tasks.evaluate.systems import BEST_OF, CLOSED_FORM, ORACLES, ROUND_TRIP, Row
from tasks.evaluation_record import (
    BASE,
    FROZEN,
    PROTOCOL_FILE,
    REAL,
    REPORT_FILE,
    REPORT_SCHEMA,
    TRIP,
    EvaluationRecord,
)
from tasks.metrics.extractors.extractor import ExtractorInfo
from tasks.metrics.extractors.loading import identify_extractors, load_extractors
from tasks.model_folder import local_model
from tasks.records import UserError, digest
from tasks.shards import ShardDataset
from trip_model.folders import folder_hash


@dataclass(frozen=True)
class Generated:
    """One sample of a system whose clips are made here; `label` names it on progress lines."""

    method: Method
    animator: AnimatorSpec
    label: str


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
    """Animates batches; keeps what it loaded last, since the batches of one system follow each other."""

    loaded: tuple[AnimatorSpec, Animator] | None = None

    def __init__(self, spec: EvaluateSpec, frames: int, models: Sequence[Generated], scaled: bool) -> None:
        super().__init__(spec, frames)
        self.models, self.scaled = models, scaled

    def run(self, index: int, batch: Batch) -> None:
        model = self.models[index]
        if self.loaded is None or self.loaded[0] != model.animator:
            self.loaded = None  # before the next one: two models may not fit
            spec = self.spec
            animator = load_animator(model.animator, spec.model, self.frames, spec.steps, spec.guidance, self.device)
            self.loaded = model.animator, animator
        generate.generate_batch(self.loaded[1], self.dataset, batch, self.frames, model.method.folder, self.scaled)


class Extractor(_Worker):
    """Loads the feature extractors once, then extracts the missing features of batches of clips, clip by clip."""

    extractors: Any = None

    def __init__(self, spec: EvaluateSpec, frames: int, table: Sequence[Row], clips: dict[str, Any]) -> None:
        super().__init__(spec, frames)
        self.rows, self.clips = {row.name: row for row in table}, clips

    def run(self, names: Sequence[str], batch: Batch) -> None:
        if self.extractors is None:
            self.extractors = load_extractors(self.spec.judges, self.device)
        reals = [generate.real_pixels(self.dataset, item, self.frames) for item in batch]
        for name in names:
            systems.measure_batch(self.spec.output, self.rows[name], self.clips, batch, reals, self.extractors)


@leased
def evaluate(spec: EvaluateSpec, progress: Callable[[str], None] = print) -> EvaluateReport:
    """Evaluates a model export, or finishes an evaluation: existing frames and features are not made again.

    Runs in the Ray session that is open, else in one of its own; with 0 workers in this process. `report.json` is
    written last; an existing one of the same key is returned.

    Raises:
        LeaseHeld: another process writes to the output.
        UserError: a model, data set, protocol, method, extractor or number that cannot be used, items that are missing
            although the protocol allows none, or an output that cannot be written.
    """
    start = time.monotonic()
    check_spec(spec)
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
    others = [Row(name, find_method(name, folder, protocol.items)) for name, folder in spec.methods.items()]
    if spec.champion is not None:
        first, *further = find_champion(spec.champion, protocol)
        others.append(Row(CHAMPION, first, tuple(further)))
    without_missing(protocol, {row.name: missing_of(row.methods, protocol.items) for row in others})
    clips = {
        "dataset_manifest_sha256": dataset.manifest_sha256,
        "items": digest([asdict(item) for item in protocol.items]),
        "frames": protocol.frames,
        "batch": spec.batch,
    }
    model_identity = clips | {
        "model_sha256": spec.model_sha256 or folder_hash(local_model(spec.model)),
        "steps": spec.steps,
        "guidance": spec.guidance,
    }
    base = None if spec.base is None else find_base(spec.base, spec.model, spec.steps, spec.guidance)
    deterministic = spec.deterministic_motion or protocol.rules.deterministic_motion
    identity = model_identity | {
        "protocol_sha": protocol.sha,
        "judges": [extractor.id for extractor in extractors],
        "methods": {row.name: _identity(row) for row in others},
        "base": base and base.identity(),
        "references": spec.references,
        "samples": spec.samples,
        "deterministic_motion": deterministic,
        "gate": asdict(spec.gate),
        "schema": REPORT_SCHEMA,
        "rules": RULES_VERSION,
        "bootstrap": spec.bootstrap,
        "examples": spec.examples,
    }
    key = digest(identity)
    existing = finished_report(output, key, start)
    if existing is not None:
        progress(f"evaluate   report of before is up to date: {storage.join(output, 'report.html')}")
        return existing

    def generated(kind: Kind, row: str, label: str, folder: str, clips_identity: Any, samples: int) -> list[Generated]:
        models = []
        for sample in range(samples):
            name = digest(clips_identity | ({"sample": sample} if sample else {}))
            method = _method(row, storage.join(folder, name), name, protocol.items)
            animator = AnimatorSpec(kind, sample, base if kind == "base" else None)
            models.append(Generated(method, animator, label if sample == 0 else f"{label} {sample + 1}"))
        return models

    try:
        storage.write_json(storage.join(output, PROTOCOL_FILE), protocol.manifest())
        generations = storage.join(output, "generations")
        trip = generated("model", TRIP, "generate", generations, model_identity, spec.samples)
        by_row = {TRIP: trip}
        samples = 1 if deterministic else spec.samples  # of the references: the energy score does not decide there
        if base is not None:
            folder = spec.base_clips or storage.join(output, "base")
            by_row[BASE] = generated("base", BASE, "base", folder, clips | base.identity(), samples)
        if spec.references:
            closed, trip_round = (model_identity | {"system": name} for name in (CLOSED_FORM, ROUND_TRIP))
            by_row[CLOSED_FORM] = generated("closed_form", CLOSED_FORM, "closed", generations, closed, samples)
            by_row[ROUND_TRIP] = generated("round_trip", ROUND_TRIP, "round trip", generations, trip_round, 1)
        rows = {name: _row(models) for name, models in by_row.items()}
        if spec.references and spec.samples > 1:
            rows[BEST_OF] = replace(rows[TRIP], name=BEST_OF, nearest=True)
        order = (BASE, CLOSED_FORM, TRIP, BEST_OF, ROUND_TRIP)
        own = [rows[name] for name in order if name in rows]
        before = [row for row in own if row.name in (BASE, CLOSED_FORM)]
        table = [Row(FROZEN), *before, *others, *own[len(before) :], Row(REAL)]
        models = [model for name in order for model in by_row.get(name, ())]
        records, items, excluded = _run_stages(spec, protocol, dataset, table, extractors, models, progress)
        summary = aggregate.summarise(
            protocol,
            items,
            records,
            lambda extractor, row: systems.load_features(output, extractor, records[row]),
            extractors,
            spec.bootstrap,
            excluded,
        )
        best, champions = _champions(spec, summary, items, identity["model_sha256"], deterministic, extractors)
        trip_row, score = summary.metrics[TRIP], CLIP_DISTANCE if deterministic else ENERGY_SCORE
        moved = summary.by_item["coarse_motion_ratio"]
        verdict = gate(
            Evidence(
                summary.clips,
                trip_row.get("motion_ratio"),
                trip_row.get("coarse_motion_ratio"),
                champion.still_clips(moved[TRIP], moved[REAL], [item.clip for item in items]),
                score,
                trip_row.get(f"{score}_minus_{FROZEN}"),
                champions,
            ),
            spec.gate,
        )
        provenance = identity | provenance_of(spec, dataset, protocol, extractors)
        for note in aggregate.exclusions(summary.counts):
            progress(f"evaluate   {note}")
        progress(f"report     writing tables, figures and {min(spec.examples, len(items))} videos")
        examples = _examples(dataset, protocol.frames, items[: spec.examples], table)
        pages = page.build(summary, verdict, extractors, protocol, examples, provenance)
        pages |= {champion.BEST_FILE: champion.best_bytes(best)}
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
            files=tuple(sorted([*pages, PROTOCOL_FILE])),
            generations=storage.join("generations", trip[0].method.identity),
            samples=tuple(storage.join("generations", model.method.identity) for model in trip[1:]),
            best={measure: model.model_sha256 for measure, model in best.items()},
            provenance=provenance,
        )
        storage.write_json(storage.join(output, REPORT_FILE), asdict(record))
    except ConnectionError as error:
        raise UserError(f"no Ray cluster answers at {spec.ray_address!r}; give its address or none") from error
    except OSError as error:
        raise UserError(
            f"the evaluation cannot read or write a file ({error}); free space, or choose another output than {output}"
        ) from error
    report = finished_report(output, key, start)
    assert report is not None, f"the report at {output} does not read back"
    message = "gate passed" if verdict.passed else f"gate not passed: {'; '.join(verdict.reasons)}"
    progress(f"evaluate   {summary.clips} clips, {message}; {storage.join(output, 'report.html')}")
    return report


def _method(name: str, folder: str, identity: str, items: Sequence[Item]) -> Method:
    """The clips that a `Generator` keeps in a folder."""
    files = {item.key: (storage.join(folder, generate.file_name(item)),) for item in items}
    return Method(name, folder, files, identity, given_frame=True)


def _identity(row: Row) -> str:
    """Of the bytes of a baseline's clips."""
    identities = [method.identity for method in row.methods]
    return identities[0] if len(identities) == 1 else digest(identities)


def _row(models: Sequence[Generated]) -> Row:
    first, *further = (model.method for model in models)
    return Row(first.name, first, tuple(further))


def _champions(
    spec: EvaluateSpec,
    summary: Summary,
    items: Sequence[Item],
    model_sha256: str,
    deterministic: bool,
    extractors: Sequence[ExtractorInfo],
) -> tuple[dict[champion.Measure, champion.PerClip], tuple[Against, ...]]:
    """The best champions including this model, and the comparisons with the champion and with the best before."""
    score, by_item = CLIP_DISTANCE if deterministic else ENERGY_SCORE, summary.by_item
    real = by_item["motion_ratio"][REAL]
    model = champion.model_values(model_sha256, TRIP, items, by_item)
    if spec.champion is None:
        return champion.best_so_far(model, {}, real, score), ()
    still = champion.model_values("", FROZEN, items, by_item)
    current = champion.model_values(champion.champion_model(spec.champion), CHAMPION, items, by_item)
    differences = summary.differences[CHAMPION]
    sets = {name: differences[name] for name in aggregate.distances_of_sets(extractors) if name in differences}
    champions = [champion.compare("the champion", model, current, still, real, score, items, spec.bootstrap, sets=sets)]
    earlier: dict[champion.Measure, champion.PerClip] = {}
    for measure, earlier_best in champion.read_best(spec.champion).items():
        best = earlier_best.for_items(items)
        if best is not None and best.model_sha256 == current.model_sha256:
            best = current
        if best is not None and (measure == "motion" or score in best.values):
            earlier[measure] = best
            if best.model_sha256 != current.model_sha256:
                name = f"the best champion so far ({best.model_sha256[:8]})"
                champions.append(
                    champion.compare(name, model, best, still, real, score, items, spec.bootstrap, [measure])
                )
    for measure in ("score", "motion"):
        earlier.setdefault(measure, current)
    return champion.best_so_far(model, earlier, real, score), tuple(champions)


def _run_stages(
    spec: EvaluateSpec,
    protocol: Protocol,
    dataset: ShardDataset,
    table: Sequence[Row],
    extractors: Sequence[ExtractorInfo],
    models: Sequence[Generated],
    progress: Callable[[str], None],
) -> tuple[dict[str, list[dict[str, Any]]], tuple[Item, ...], dict[str, dict[str, int]]]:
    """Makes what is missing. Returns each system's records of the items that all systems have, those items, and counts
    of the others.

    Other methods' clips come first: a file that cannot be used is reported before any clip is animated. `models` are
    the systems that are animated here.
    """
    clips: dict[str, Any] = {"dataset_manifest_sha256": dataset.manifest_sha256, "frames": protocol.frames}
    clips |= {"shifted": True} if protocol.rules.shifted else {}
    plan = generate.batches(protocol.items, spec.batch)
    own = {model.method.name for model in models} | {BEST_OF}
    given = [row for row in table if row.method is not None and row.name not in own]

    def missing_items() -> dict[str, dict[str, str]]:
        reasons = {}
        for row in given:
            rows = systems.read_records(spec.output, row, clips, plan)
            failed = {key: record["failed"] for key, record in rows.items() if "failed" in record}
            reasons[row.name] = missing_of(row.methods, protocol.items) | failed
        return reasons

    def extract(label: str, rows: Sequence[Row]) -> None:
        tasks = systems.unmeasured(spec.output, rows, clips, plan, extractors)
        done = len(protocol.items) - sum(len(batch) for _, batch in tasks)
        _drive(Extractor, (rows, clips), spec, protocol, [(label, task) for task in tasks], {label: done}, progress)

    missing = [generate.unfinished(plan, model.method.folder) for model in models]
    if any(missing) or systems.unmeasured(spec.output, table, clips, plan, extractors):
        with nullcontext() if spec.workers == 0 else ray_session(spec.ray_address):
            if given:
                extract("methods", given)
                without_missing(protocol, missing_items())
            tasks = [
                (model.label, (index, batch))
                for index, (model, batches) in enumerate(zip(models, missing, strict=True))
                for batch in batches
            ]
            done = {
                model.label: len(protocol.items) - sum(map(len, batches))
                for model, batches in zip(models, missing, strict=True)
            }
            _drive(Generator, (models, protocol.rules.scaled), spec, protocol, tasks, done, progress)
            extract("judge", table)
    items, excluded = without_missing(protocol, missing_items())
    records = {row.name: systems.read_records(spec.output, row, clips, plan) for row in table}
    return {name: [rows[item.key] for item in items] for name, rows in records.items()}, items, excluded


def _drive(
    kind: type[Generator] | type[Extractor],
    arguments: tuple[Any, ...],
    spec: EvaluateSpec,
    protocol: Protocol,
    tasks: Sequence[tuple[str, tuple[Any, ...]]],
    done: Mapping[str, int],
    progress: Callable[[str], None],
) -> None:
    """Runs tasks in this process, or over actors, each with one at a time; the task of a lost actor goes to another.

    A task is the label of its progress line and the arguments of `run`, the batch last; `done` items of a label need
    none.
    """
    if not tasks:
        return
    arguments = (spec, protocol.frames, *arguments)
    labels = "/".join(dict.fromkeys(label for label, _ in tasks))
    ticks: dict[str, Ticks] = {}

    def begin(label: str) -> None:
        if label not in ticks:  # its clock starts with its first task
            ticks[label] = Ticks(label, len(protocol.items), progress, done[label])

    def send(actor: Any, task: tuple[str, tuple[Any, ...]]) -> Any:
        begin(task[0])
        return actor.run.remote(*task[1])

    if spec.workers == 0:
        worker = kind(*arguments)
        for label, task in tasks:
            begin(label)
            try:
                worker.run(*task)
            except ValueError as error:
                raise UserError(str(error)) from None
            ticks[label].tick(len(task[-1]))
        return
    try:
        with WorkerPool(kind, arguments, spec.workers, spec.cpus_per_worker, spec.gpus_per_worker) as pool:
            for (label, task), _ in pool.run(tasks, send):
                ticks[label].tick(len(task[-1]))
    except ray.exceptions.RayTaskError as error:
        cause = error.cause
        if isinstance(cause, UserError | OSError):
            raise cause from None
        if isinstance(cause, ValueError):  # a sentence for a person, not a worker's stack
            raise UserError(str(cause)) from None
        raise
    except NoRoom as error:
        raise UserError(f"{labels}: {error}") from None
    except WorkerDied as error:
        if error.task is None:
            raise UserError(f"{labels}: {error}") from error
        raise UserError(
            f"a {error.task[0]} worker died {MAX_DEATHS} times; give it more memory, or a smaller batch than"
            f" {spec.batch}"
        ) from error


def _examples(dataset: ShardDataset, frames: int, items: Sequence[Item], table: Sequence[Row]) -> Sequence[Example]:
    examples = []
    for item in items:
        real = generate.real_pixels(dataset, item, frames)
        visible = [row for row in table if row.method is not None and row.name not in (CLOSED_FORM, *ORACLES)]
        clips = {row.name: row.frames(item, real)[0] for row in visible}
        examples.append(Example(item.key, item.caption, real, clips.pop(TRIP), clips))
    return examples
