"""Where every result of a run lies: each address is resolved here once, from what goes in, and then passed on.

A result lies in a folder named after everything that changes it, contents by their hash, so a changed recipe never
meets old files and the same command resumes. Asking for an address runs nothing, draws nothing and opens no port.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from flows.recipes import Recipe, find_recipe
from flows.source import SourceOptions, named_source
from infra import storage
from infra.redaction import redact
from infra.settings import CHECKOUT
from tasks.encode.fingerprint import fingerprint_of
from tasks.encode.spec import PrepareSpec
from tasks.evaluate.protocol.presets import load_preset
from tasks.evaluate.spec import EvaluateSpec
from tasks.ingest.demo import demo_table
from tasks.ingest.sources import opened, source_name
from tasks.ingest.spec import SourceSpec
from tasks.model_folder import local_model
from tasks.records import Artifact, UserError, digest
from tasks.shards import ShardDataset, version_of
from tasks.train.spec import NO_CLUSTER, Start, TrainSpec, finished_report, spec_digest
from tasks.train.start import goals, last_of
from trip_model.folders import folder_hash, resolve_base

EXPERIMENT = "trip"  # of MLflow


@dataclass(frozen=True)
class Run:
    """A recipe on a source below a root: what every address follows from.

    Attributes:
        recipe: the numbers.
        source: the table or folder that is named; None for the corpus that the demo draws.
        root: absolute address that everything is written below.
    """

    recipe: Recipe
    source: SourceSpec | None
    root: str

    @cached_property
    def prepare(self) -> PrepareSpec:
        """The spec of prepare, with its source opened and its fingerprint taken.

        Raises:
            UserError: the source or the base cannot be read, or the recipe has no clips of its own.
        """
        spec = replace(self.recipe.prepare, source=self._opened_source())
        identity = fingerprint_of(spec)
        output = address(self.root, "data", {"samples": identity, "source": source_name(spec.source)})
        return replace(spec, output=output, fingerprint=identity)

    def _opened_source(self) -> SourceSpec:
        if self.source is not None:
            return opened(self.source)
        if self.recipe.demo_clips is None:
            raise UserError(
                f"recipe {self.recipe.name!r} has no clips of its own; name a table or a folder: --source TABLE.csv"
            )
        if storage.local_path(self.root) is None:
            raise UserError(
                f"the demo corpus is drawn into a local folder, not {self.root}; name a table: --source TABLE.csv"
            )
        table, sha256 = demo_table(storage.join(self.root, "corpus"), self.recipe.demo_clips, self.recipe.prepare.size)
        return replace(self.recipe.prepare.source, table=table, format="csv", sha256=sha256)

    def prepared(self) -> Artifact:
        """The newest version of this run's data set. Raises UserError if it is not finished."""
        return data_set(self.prepare.output)

    def train(self, data: Artifact, start: Start | None = None) -> TrainSpec:
        """The spec of a training on a data set; the recipe's steps come after those that `start` continues from."""
        spec = replace(self.recipe.train, dataset=data.uri, dataset_sha256=data.sha256, start=start)
        spec = replace(spec, base_sha256=base_hash(spec.base))
        spec = replace(spec, steps=spec.steps + (start.step if start is not None else 0))
        return replace(spec, output=address(self.root, "train", spec_digest(spec)))

    def trained(self, data: Artifact) -> Artifact:
        """The model that this run trained on a data set: from the base, or of what continues a model the last one.

        Raises:
            UserError: no finished training.
        """
        spec = self.train(data)
        report = finished_report(spec)
        if report is not None:
            return report.exported
        outputs = storage.join(self.root, "train")
        parent = last_of(outputs, lambda r: r.dataset_sha256 == data.sha256 and r.goals == goals(spec))
        if parent is None:
            raise UserError(
                f"no finished training of recipe {self.recipe.name!r} below {self.root};"
                " run the command train-trip first"
            )
        return parent.model

    def evaluate(
        self, model: Artifact, data: Artifact, protocol: str | None = None, foreign: bool = False
    ) -> EvaluateSpec:
        """The spec of an evaluation. Data that are `foreign` were never trained on: all of them are held out.

        The recipe's protocol is for foreign data; without `protocol`, the data that was trained on is evaluated by
        "held-out". The address follows from what decides TRIP's own clips: further feature extractors and baselines are
        columns and rows of the same report.
        """
        spec = replace(
            items_of(self.recipe, data, protocol, foreign),
            model=model.uri,
            model_sha256=model.sha256,
            # The drawn corpus declares it; of other clips nobody has.
            deterministic_motion=self.recipe.evaluate.deterministic_motion and self.source is None and not foreign,
        )
        identity = {
            "model": model.sha256,
            "dataset": data.sha256,
            "numbers": [spec.clips, spec.held_out_fraction, spec.steps, spec.guidance, spec.seed, spec.batch],
            "protocol": spec.protocol,
        }
        return replace(spec, output=address(self.root, "evaluate", identity))

    def lineage(self, data: Artifact, code_version: str) -> dict[str, str]:
        """Where a model comes from, as tags of its version."""
        base = resolve_base(self.recipe.train.base)
        inside = base.is_relative_to(CHECKOUT)
        return {
            "recipe": self.recipe.name,
            "recipe_hash": digest(self.recipe.identity()),
            "data_uri": redact(data.uri),
            "data_digest": data.sha256,
            "base": str(base.relative_to(CHECKOUT)) if inside else redact(self.recipe.train.base),
            "base_hash": base_hash(self.recipe.train.base),
            "code_version": code_version,
        }


def resolve(
    recipe: str,
    source: str | None,
    root: str,
    base: str | None,
    options: SourceOptions,
    values: Sequence[str] | None = None,
) -> Run:
    """The run that the flags of a command ask for.

    Raises:
        UserError: an unknown recipe, unusable options, or values that the recipe does not have.
    """
    return Run(find_recipe(recipe, base, values), named_source(source, options), storage.absolute(root))


def check_cluster(run: Run) -> None:
    """Raises UserError, before work begins, if the training is to be detached and no Ray cluster is named."""
    if run.recipe.train.detached and not os.environ.get("RAY_ADDRESS"):
        raise UserError(NO_CLUSTER)


def items_of(recipe: Recipe, data: Artifact, protocol: str | None, foreign: bool) -> EvaluateSpec:
    """The recipe's evaluation with all that decides its items; data that are `foreign` were never trained on."""
    spec = recipe.evaluate
    return replace(
        spec,
        dataset=data.uri,
        held_out_fraction=1.0 if foreign else recipe.train.held_out_fraction,
        protocol=protocol or (spec.protocol if foreign else "held-out"),
    )


def held_out_run(run: Run, source: str | None, options: SourceOptions) -> Run | None:
    """The same recipe on a second source to evaluate on; None where the first one's frames are stored.

    Raises:
        UserError: no second source, and a recipe that keeps no frames of the first.
    """
    if source is not None:
        return replace(run, source=named_source(source, options))
    if not run.recipe.prepare.keep_pixels:
        raise UserError(
            f"recipe {run.recipe.name!r} keeps no frames to evaluate on; name a second table:"
            " --held-out-source TABLE.csv"
        )
    return None


def data_set(uri: str) -> Artifact:
    """A finished data set by its address; of a name its newest version. Raises UserError if there is none."""
    data = ShardDataset(uri)
    return Artifact(version_of(data.uri, data.manifest_sha256), data.manifest_sha256)


def model_folder(uri: str) -> Artifact:
    """A model folder that a command names. Raises UserError if there is none."""
    return Artifact(storage.absolute(uri), folder_hash(local_model(uri)))


def prepared_for(spec: PrepareSpec, protocol: str | None) -> PrepareSpec:
    """The spec with the frames that a protocol asks for, stored as well; what it leaves open stays the recipe's.

    Frames are squares: an evaluation compares squares, whatever the training has.
    """
    spec = replace(spec, frame_sizes=())
    if protocol is None:
        return replace(spec, keep_pixels=True)
    preset = load_preset(protocol)
    values = {"num_frames": preset.frames} | {n: getattr(preset, n) for n in ("fps", "stride", "size", "fit")}
    return replace(spec, keep_pixels=True, **{name: value for name, value in values.items() if value is not None})


def address(root: str, stage: str, identity: Any) -> str:
    """The folder of a stage's result: `<root>/<stage>/<digest of everything that changes the result>`."""
    return storage.join(storage.absolute(root), stage, digest(identity))


@functools.cache
def base_hash(base: str) -> str:
    """sha256 of a base's files, read once a process."""
    return folder_hash(resolve_base(base))
