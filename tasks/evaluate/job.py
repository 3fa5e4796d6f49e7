"""Drives the evaluation on Ray: actors animate held-out clips, actors judge them, the driver sums up and reports."""

from __future__ import annotations

import platform
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from typing import Any

import ray
import ray.exceptions

from infra import storage
from infra.cluster import ray_session
from tasks.evaluate import generate, report, score
from tasks.evaluate.generate import Batch
from tasks.evaluate.judges import JudgeFiles, JudgeName, identify_judges, load_judges
from tasks.evaluate.progress import Ticks
from tasks.evaluate.protocols import Protocol, held_out_protocol
from tasks.records import UserError, digest
from tasks.shards import ShardDataset
from trip_model.encoders import folder_hash

SCHEMA_VERSION = 1
REPORT = "report.json"
_RESTARTS = 2  # a worker lost to a full memory or a dead node is started again this often


@dataclass(frozen=True)
class EvaluateSpec:
    """What to evaluate, on what, and with which judges; the rest says by how many hands.

    `model` is the folder of a model export and `dataset` that of a shard data set with pixels; `output` receives the
    report. `held_out_fraction` is the one training split by. None for `steps` and `guidance`: the model's own values.
    """

    model: str
    dataset: str
    output: str
    clips: int = 48
    held_out_fraction: float = 0.1
    steps: int | None = None
    guidance: float | None = None
    seed: int = 0
    batch: int = 8
    judges: JudgeFiles = JudgeFiles()
    bootstrap: int = 2000
    examples: int = 6
    workers: int | None = None  # None: one for every `cpus_per_worker` that Ray has
    cpus_per_worker: int = 1  # also its torch threads
    gpus_per_worker: float = 0.0
    ray_address: str | None = None


@dataclass(frozen=True)
class EvaluateReport:
    """The report's address and its content that later stages need.

    `metrics` is row ("frozen", "trip", "real") -> metric -> {"value", "ci_low", "ci_high"}, `clips` the number of
    unique held-out clips, `files` the names below `uri`; `key` is equal for evaluations that must agree.
    """

    uri: str
    key: str
    metrics: dict[str, dict[str, dict[str, float | None]]]
    gate: score.Gate
    clips: int
    items: int
    files: tuple[str, ...]
    seconds: float

    @property
    def passed(self) -> bool:
        return self.gate.passed


class _Worker:
    """What the two kinds of actors share: the data set and their folder. Loading waits for the first batch.

    An error of loading in a constructor would reach the driver as a dead actor instead of as its sentence.
    """

    def __init__(self, spec: EvaluateSpec, folder: str) -> None:
        import torch

        torch.set_num_threads(spec.cpus_per_worker)
        self.spec, self.folder = spec, folder
        self.device = "cuda" if spec.gpus_per_worker > 0 and torch.cuda.is_available() else "cpu"
        self.dataset = ShardDataset(spec.dataset)


class Generator(_Worker):
    """Loads the model once, then animates batches."""

    pipeline: Any = None

    def run(self, batch: Batch) -> None:
        if self.pipeline is None:
            from trip_model.pipeline import TripPipeline

            self.pipeline = TripPipeline.from_folder(storage.local_folder(self.spec.model), device=self.device)
        generate.generate_batch(self.pipeline, self.dataset, batch, self.folder, self.spec.steps, self.spec.guidance)


class Judge(_Worker):
    """Loads the judges once, then scores batches; each clip on its own."""

    judges: Any = None

    def __init__(self, spec: EvaluateSpec, folder: str, generations: str) -> None:
        super().__init__(spec, folder)
        self.generations = generations

    def run(self, batch: Batch) -> None:
        if self.judges is None:
            self.judges = load_judges(self.spec.judges, self.device)
        for item in batch:
            real = generate.real_pixels(self.dataset, item)
            generated = generate.load_generated(self.generations, item)
            arrays = score.judge_clip(self.judges, item, real, generated)
            generate.save_arrays(storage.join(self.folder, generate.file_name(item)), arrays)


def evaluate(spec: EvaluateSpec, progress: Callable[[str], None] = print) -> EvaluateReport:
    """Evaluates a model export, or finishes an evaluation: frames and scores that are there are not made again.

    Runs in the Ray session that is open, else in one of its own. `report.json` is written last; where one of the same
    key stands already, it is the answer.

    Raises:
        UserError: a model, data set, judge or number that cannot be used, or an output that cannot be written.
    """
    start = time.monotonic()
    for name in ("clips", "batch", "bootstrap", "examples", "cpus_per_worker"):
        if getattr(spec, name) < 1:
            raise UserError(f"{name} {getattr(spec, name)}, expected at least 1")
    dataset = ShardDataset(spec.dataset)
    protocol = held_out_protocol(dataset, spec.held_out_fraction, spec.clips, spec.seed)
    judges = identify_judges(spec.judges)
    made = {
        "model_sha256": _model_sha256(spec.model),
        "dataset_manifest_sha256": dataset.manifest_sha256,
        "protocol_sha": protocol.sha,
        "steps": spec.steps,
        "guidance": spec.guidance,
        "batch": spec.batch,
    }
    judged = made | {"judges": [judge.id for judge in judges]}
    summed = judged | {"schema": SCHEMA_VERSION, "bootstrap": spec.bootstrap, "examples": spec.examples}
    key, output = digest(summed), storage.absolute(spec.output)
    found = _finished(output, key, start)
    if found is not None:
        progress(f"evaluate   report of before is up to date: {storage.join(output, 'report.html')}")
        return found
    generations = storage.join(output, "generations", digest(made))
    scores = storage.join(output, "scores", digest(judged))
    plan = generate.batches(protocol.items, spec.batch)
    try:
        _run_stages(spec, plan, generations, scores, progress)
        loaded = [generate.load_arrays(storage.join(scores, generate.file_name(item))) for item in protocol.items]
        summary = score.summarise(protocol.items, loaded, judges, spec.bootstrap)
        trip = summary.metrics["trip"]
        ratio = trip["motion_ratio"].value if "motion_ratio" in trip else None
        gate = score.gate(ratio, trip["clip_distance_minus_frozen"], summary.clips)
        provenance = summed | _provenance(spec, dataset, judges)
        progress(f"report     writing tables, pictures and {min(spec.examples, len(protocol.items))} videos")
        examples = _examples(dataset, protocol, generations, spec.examples)
        files = report.build(summary, gate, judges[0], examples, provenance, float(dataset.manifest["recipe"]["fps"]))
        for name, content in files.items():
            storage.write_bytes(storage.join(output, name), content)
        content = {
            "schema_version": SCHEMA_VERSION,
            "key": key,
            "rows": {row: {name: asdict(e) for name, e in values.items()} for row, values in summary.metrics.items()},
            "curves": {row: [asdict(point) for point in points] for row, points in summary.curves.items()},
            "gate": asdict(gate),
            "notes": summary.notes,
            "clips": summary.clips,
            "items": len(protocol.items),
            "files": sorted(files),
            "provenance": provenance,
        }
        storage.write_json(storage.join(output, REPORT), content)
    except ConnectionError as error:
        raise UserError(f"no Ray cluster answers at {spec.ray_address!r}; give its address or none") from error
    except OSError as error:
        raise UserError(
            f"the evaluation cannot read or write a file ({error}); free space, or choose another output than {output}"
        ) from error
    done = _finished(output, key, start)
    assert done is not None, f"the report at {output} does not read back"
    verdict = "gate passed" if gate.passed else f"gate not passed: {'; '.join(gate.reasons)}"
    progress(f"evaluate   {summary.clips} clips, {verdict}; {storage.join(output, 'report.html')}")
    return done


def _model_sha256(model: str) -> str:
    try:
        folder = storage.local_folder(model)
    except FileNotFoundError as error:
        raise UserError(f"no model folder at {model!r}; give the folder that training exported") from error
    if not (folder / "trip.json").is_file():
        raise UserError(f"{model} holds no trip.json; give the folder that training exported, not a base or checkpoint")
    return folder_hash(folder)


def _finished(output: str, key: str, start: float) -> EvaluateReport | None:
    """The report at an address, if it is whole and of this key."""
    try:
        content = storage.read_json(storage.join(output, REPORT))
    except (FileNotFoundError, NotADirectoryError, ValueError):
        return None
    if not isinstance(content, dict) or content.get("key") != key:
        return None
    if not all(storage.exists(storage.join(output, name)) for name in content["files"]):
        return None
    return EvaluateReport(
        uri=output,
        key=key,
        metrics=content["rows"],
        gate=score.Gate(content["gate"]["passed"], tuple(content["gate"]["reasons"])),
        clips=content["clips"],
        items=content["items"],
        files=(*content["files"], REPORT),
        seconds=time.monotonic() - start,
    )


def _run_stages(
    spec: EvaluateSpec, plan: list[Batch], generations: str, scores: str, progress: Callable[[str], None]
) -> None:
    missing = generate.unfinished(plan, generations)
    unjudged = generate.unfinished(plan, scores)
    if not missing and not unjudged:
        return
    with ray_session(spec.ray_address):
        _drive("generate", Generator, (generations,), spec, plan, missing, progress)
        _drive("judge", Judge, (scores, generations), spec, plan, unjudged, progress)


def _drive(
    label: str,
    kind: type[_Worker],
    arguments: tuple[str, ...],
    spec: EvaluateSpec,
    plan: list[Batch],
    missing: list[Batch],
    progress: Callable[[str], None],
) -> None:
    """Runs batches over actors, each actor with one batch in hand; one that dies is started again and repeats it."""
    if not missing:
        return
    total, left = (sum(map(len, batches)) for batches in (plan, missing))
    ticks = Ticks(label, total, progress, done=total - left)
    actor_class: Any = ray.remote(
        num_cpus=spec.cpus_per_worker,
        num_gpus=spec.gpus_per_worker,
        max_restarts=_RESTARTS,
        max_task_retries=_RESTARTS,
    )(kind)
    held = ray.cluster_resources()
    for resource, wanted in (("CPU", spec.cpus_per_worker), ("GPU", spec.gpus_per_worker)):
        present = held.get(resource, 0)
        if wanted > present:  # Ray would wait for it without end and without a word
            raise UserError(f"a {label} worker asks for {wanted:g} {resource}, the Ray session has {present:g}")
    fitting = spec.workers or int(held["CPU"]) // spec.cpus_per_worker
    queue = deque(missing)
    actors = [actor_class.remote(spec, *arguments) for _ in range(max(1, min(fitting, len(missing))))]
    in_hand: dict[Any, tuple[Any, Batch]] = {}
    try:
        for actor in actors:
            batch = queue.popleft()
            in_hand[actor.run.remote(batch)] = (actor, batch)
        while in_hand:
            (ready,), _ = ray.wait(list(in_hand), num_returns=1)
            actor, batch = in_hand.pop(ready)
            ray.get(ready)
            ticks.tick(len(batch))
            if queue:
                following = queue.popleft()
                in_hand[actor.run.remote(following)] = (actor, following)
    except ray.exceptions.RayTaskError as error:
        cause = error.cause
        if isinstance(cause, UserError | OSError):
            raise cause from None
        if isinstance(cause, ValueError):  # a sentence for a person, not a worker's stack
            raise UserError(str(cause)) from None
        raise
    except ray.exceptions.ActorDiedError as error:
        raise UserError(
            f"a {label} worker died {_RESTARTS + 1} times; give it more memory, or a smaller batch than {spec.batch}"
        ) from error
    finally:
        for actor in actors:
            ray.kill(actor)


def _examples(dataset: ShardDataset, protocol: Protocol, generations: str, count: int) -> Sequence[report.Example]:
    examples = []
    for item in protocol.items[:count]:
        real = generate.real_pixels(dataset, item)
        shown = generate.shown(generate.load_generated(generations, item), real)
        examples.append(report.Example(item.key, item.caption, real, shown))
    return examples


def _provenance(spec: EvaluateSpec, dataset: ShardDataset, judges: Sequence[JudgeName]) -> dict[str, Any]:
    """Where the numbers come from; no clock and no host, so that equal evaluations give equal reports."""
    return {
        "model": spec.model,
        "dataset": spec.dataset,
        "dataset_recipe": dataset.manifest["recipe_hash"],
        "held_out_fraction": spec.held_out_fraction,
        "seed": spec.seed,
        "judges": {judge.features[0]: asdict(judge) for judge in judges},
        "versions": {"python": platform.python_version()}
        | {name: version(name) for name in ("torch", "diffusers", "open_clip_torch", "numpy", "ray")},
    }
