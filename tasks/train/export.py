"""Exports the model folder: the base with the trained weights."""

from __future__ import annotations

import shutil
import tempfile
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from infra import storage
from infra.redaction import redact
from tasks.shards import ShardDataset
from tasks.train.checkpoints import Tensors
from tasks.train.initial import initial_model
from tasks.train.lora import add_adapters, save_and_merge
from tasks.train.spec import REPORT, TrainReport, TrainSpec, spec_digest
from tasks.train.start import totals, write_training
from trip_model.checkpoint import save_model
from trip_model.config import TripConfig
from trip_model.folders import folder_hash


def export(
    spec: TrainSpec, dataset: ShardDataset, base: Path, config: TripConfig, trained: Tensors, report: TrainReport
) -> TrainReport:
    """Writes the model folder, adapters in their own folder, then the report as the mark of completion.

    Args:
        spec: the training; says where the model goes.
        dataset: the data it was trained on.
        base: folder of the base, whose frozen networks are copied.
        config: the model's configuration.
        trained: the trained weights in full, by their names in the trained model.
        report: the report of the training so far.
    """
    base_sha256 = folder_hash(base)
    lineage: dict[str, Any] = {}
    if spec.start is not None:
        steps, samples = totals(spec)
        lineage = {"parent_sha256": spec.start.parent, "total_steps": steps, "total_samples": samples}
    provenance = {
        "dataset": redact(spec.dataset),
        "dataset_manifest_sha256": dataset.manifest_sha256,
        "base_sha256": base_sha256,
        "spec_digest": spec_digest(spec),
        "steps": spec.steps,
        "seed": spec.seed,
        **lineage,
        **({"latents": "drawn from the posterior"} if spec.sample_posterior else {}),
    }
    trip = initial_model(spec, base, config)
    adapters = add_adapters(trip.unet, spec) if spec.trained == "lora" else None
    unexpected = trip.load_state_dict(trained, strict=False).unexpected_keys
    assert not unexpected, unexpected
    spool = Path(tempfile.mkdtemp(prefix="trip-export-"))
    try:
        if adapters is not None:
            save_and_merge(adapters, spool / "adapter")
        report = replace(report, model_digest=folder_hash(save_model(spool / "model", trip, base, provenance)))
        for folder in sorted(spool.iterdir()):
            storage.delete(storage.join(spec.output, folder.name))
        for path in sorted(p for p in spool.rglob("*") if p.is_file()):
            storage.upload_file(path, storage.join(spec.output, *path.relative_to(spool).parts))
        write_training(spec, report.model_digest, dataset.manifest_sha256, base_sha256)
        storage.write_json(storage.join(spec.output, REPORT), asdict(report))
    finally:
        shutil.rmtree(spool)
    return report
