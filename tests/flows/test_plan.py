"""Do the planner's counts agree with torch's own, does a plan fit, and is a failure at step 1 reported before?"""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed._tools.mem_tracker import MemTracker
from torch.utils.flop_counter import FlopCounterMode

from flows.cli.app import main
from flows.cli.plan import parse_count
from flows.planning.base import PUBLISHED, read_base
from flows.planning.counting import Kernels, ModelCounts, StepCounts, count_model, count_pass, new_inputs, new_trip
from flows.planning.hardware import GPUS, Device
from flows.planning.measuring import measured_device
from flows.planning.memory import MemoryPlan, plan_memory, shortfall
from flows.planning.options import REACHED, compute_seconds, find_options, link_seconds
from flows.planning.preflight import check_gpu_memory
from tasks.records import UserError
from tasks.shards import Sample, open_dataset, publish_dataset, write_shard
from tasks.train.optimizer import choose_trained, trained_parameters, trained_weights
from tasks.train.preflight import preflight
from tasks.train.spec import TrainSpec
from trip_model.config import FusionConfig, TripConfig
from trip_model.folders import folder_hash
from trip_model.model import Trip

SMALL = TripConfig(size=64, fusion=FusionConfig(width=16, heads=2))


def test_counts_of_the_full_size_unet() -> None:
    with FakeTensorMode(allow_non_fake_inputs=True):
        config = TripConfig(fusion=FusionConfig(kind="none"))
        trip = new_trip(PUBLISHED, config)
        counts = count_pass(trip, new_inputs(PUBLISHED, config, 1), gpu=True, bfloat16=True)
    assert sum(p.numel() for p in trip.parameters()) == 1_411_233_860
    # Diffusers' forward on meta tensors, 17 x 32 x 32 latents and 77 x 1024 text, attention as two products. A forward
    # may compute the text's keys once (1.2 % less), fused attention computes one product again going back (0.7 % more).
    assert counts.forward_flops == pytest.approx(5.193e12, rel=0.015)
    assert counts.flops == pytest.approx(15.51e12, rel=0.015)


def test_counts_are_those_of_a_real_step(tiny_base: Path) -> None:
    base, batch = read_base(str(tiny_base)), 3
    planned = count_model(base, TrainSpec("", "", "", model=SMALL), gpu=False)
    with FakeTensorMode(allow_non_fake_inputs=True):
        kept = count_pass(new_trip(base, SMALL), new_inputs(base, SMALL, batch)).saved_bytes

    trip, inputs = new_trip(base, SMALL), new_inputs(base, SMALL, batch)
    owned = {p.data_ptr() for p in trip.parameters()}
    saved: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.untyped_storage().data_ptr() not in owned:
            saved[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    tracker = MemTracker()
    tracker.track_external(trip)
    with tracker, FlopCounterMode(display=False) as counter:
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            loss = trip(*inputs).square().mean()
        loss.backward()
    weights = sum(4 * p.numel() for p in trip.parameters())
    peak = tracker.get_tracker_snapshot("peak")[torch.device("cpu")]["Total"]

    assert planned.parameters == sum(p.numel() for p in trip.parameters())
    assert batch * planned.kept.flops == pytest.approx(counter.get_total_flops(), rel=1e-3)
    assert kept == pytest.approx(sum(saved.values()), rel=0.01)
    # Weights and gradients are separate rows of a plan.
    assert 2 * weights + planned.kept.fixed_bytes + batch * planned.kept.activation_bytes == pytest.approx(
        peak, rel=0.05
    )


@pytest.mark.slow
def test_counts_of_adapters_and_of_shards(tiny_base: Path) -> None:
    base, train = read_base(str(tiny_base)), TrainSpec("", "", "", model=SMALL, precision="bfloat16", workers=2)
    full = count_model(base, train, gpu=True)
    adapted = count_model(base, replace(train, trained="lora", lora_rank=2), gpu=True)
    sharded = count_model(base, replace(train, sharding="fsdp2"), gpu=True)
    assert adapted.trained < 0.2 * adapted.parameters and adapted.kept.flops < 0.9 * full.kept.flops
    assert adapted.forward_flops > full.forward_flops
    assert sharded.kept.activation_bytes == pytest.approx(full.kept.activation_bytes, rel=1e-3)
    # Weights gathered in bfloat16 need no copies by autocast.
    assert full.kept.fixed_bytes - sharded.kept.fixed_bytes > full.parameters


COUNTS = ModelCounts(
    1_400_000_000, 1_400_000_000, 60_000_000, 5,
    StepCounts(15, 12 * 10**9, 3 * 10**9), StepCounts(20, 2 * 10**9, 10**9),
)  # fmt: skip
PAPER = TrainSpec("", "", "", global_batch=96, workers=8, precision="bfloat16")


@pytest.mark.parametrize("device", [GPUS["h200"], GPUS["h100"], GPUS["a100-40"]], ids=lambda d: d.name)
@pytest.mark.parametrize("recompute", [False, True])
def test_a_step_fits_up_to_the_largest_batch(device: Device, recompute: bool) -> None:
    def planned(micro_batch: int) -> MemoryPlan:
        return plan_memory(
            replace(PAPER, recompute_activations=recompute, micro_batch=micro_batch), COUNTS, 340_000_000, device
        )

    memory = planned(1)
    largest = memory.largest_recomputed if recompute else memory.largest
    for micro_batch in (1, 2, 5, 12):
        memory = planned(micro_batch)
        assert memory.fits == (micro_batch <= largest) == (memory.size_bytes <= device.memory_bytes)
        problem = shortfall(memory, device)
        assert (problem is None) == memory.fits and memory.accumulation == -(-12 // micro_batch)
        remedy = f"micro_batch of {largest} fits" if largest else "recompute_activations a micro_batch of"
        assert problem is None or remedy in problem or not memory.largest_recomputed


def test_shards_divide_the_state_and_adapters_have_little() -> None:
    train, device = replace(PAPER, micro_batch=1), GPUS["h100"]

    def sizes(train: TrainSpec, counts: ModelCounts) -> dict[str, float]:
        return {part.what: part.size_bytes for part in plan_memory(train, counts, 0, device).parts}

    copies, shards = sizes(train, COUNTS), sizes(replace(train, sharding="fsdp2"), COUNTS)
    adapters = sizes(train, replace(COUNTS, trained=14_000_000))
    for what in ("weights", "gradients", "AdamW's two moments"):
        assert shards[what] == copies[what] / 8
    assert "gathered layers" not in copies and shards["gathered layers"] < 1e9
    assert adapters["weights"] == copies["weights"] and adapters["gradients"] == copies["gradients"] / 100


def test_options_are_ranked_by_what_a_step_computes_moves_and_sends() -> None:
    def kernels(clips: int, more: float = 1.0) -> tuple[Kernels, ...]:
        """Half of the time is bounded by operations, half by bytes, and some bytes are moved whatever the batch."""
        flops, moved = int(more * clips * 4e12), int(more * clips * 1.34e10)
        return (Kernels(flops, 0, 3), Kernels(0, moved, 3), Kernels(0, 10**10, 1))

    steps = [
        replace(step, kernels=(kernels(1, m), kernels(2, m)))
        for step, m in ((COUNTS.kept, 1.0), (COUNTS.recomputed, 1.3))
    ]
    counts, device = replace(COUNTS, kept=steps[0], recomputed=steps[1]), GPUS["h100"]
    alone = replace(PAPER, workers=1, global_batch=12)
    options = find_options(alone, PUBLISHED, counts, 340_000_000, device)
    assert {option.micro_batch for option in options} == {1, 2, 4, 8, 12} and len(options) == 10
    fitting = [option for option in options if option.fits]
    assert fitting == list(options[: len(fitting)]) and 0 < len(fitting) < len(options)
    assert fitting[0].micro_batch == max(option.micro_batch for option in fitting if not option.recompute)
    assert not fitting[0].recompute and not any(option.link_seconds for option in options)
    for option in options:
        step = replace(alone, recompute_activations=option.recompute, micro_batch=option.micro_batch)
        assert option.fits == plan_memory(step, counts, 340_000_000, device).fits

    # Twice as many passes of half the clips: bytes that do not depend on the batch move twice, and gradients add up.
    four, eight = (compute_seconds(replace(alone, global_batch=8, micro_batch=m), counts, device) for m in (4, 8))
    extra = 1e10 / device.bytes_per_second / REACHED + 12 * counts.trained / device.bytes_per_second
    assert four - eight == pytest.approx(extra, rel=1e-6)
    # Copies send the gradients once; shards also the weights, twice for each pass.
    copies = link_seconds(PAPER, counts, device)
    shards = link_seconds(replace(PAPER, sharding="fsdp2", micro_batch=4), counts, device)
    assert copies == pytest.approx(2 * 7 / 8 * 4 * 1.4e9 / 450e9)
    assert shards == pytest.approx(3 * 7 / 8 * (2 * 2 + 4) * 1.4e9 / 450e9)


def test_the_options_of_this_machine_are_measured(capsys: pytest.CaptureFixture[str]) -> None:
    values = ["--set", "train.global_batch=4", "--set", "train.workers=1"]
    assert main(["plan", "--gpu", "here", "--options", "--json", *values]) == 0
    plan = json.loads(capsys.readouterr().out)
    rows = {(row["part"], row["quantity"]): row for row in plan["rows"]}
    assert rows["time", "peak of one device"]["how"] == "float32; measured: matrix product on this machine"
    found = plan["options"]
    assert [sum(option["chosen"] for option in found), len(found)] == [1, 6]
    kept, recomputed = ([o for o in found if o["recompute"] == how] for how in (False, True))
    assert min(o["seconds"] for o in recomputed) > min(o["seconds"] for o in kept) > 0
    assert max(o["size_bytes"] for o in recomputed) < max(o["size_bytes"] for o in kept)


@pytest.mark.slow
def test_the_exchange_between_workers_is_measured() -> None:
    device = measured_device(2, 1)
    assert 1e7 < device.link_bytes_per_second < 1e11 and device.link_bytes_per_second != 1e9


def test_a_gpu_too_small_for_the_step_is_reported_before(tiny_base: Path) -> None:
    train = TrainSpec("", "", str(tiny_base), model=replace(SMALL, size=128), global_batch=8, gpus_per_worker=1)
    check_gpu_memory(train, 10e9)
    with pytest.raises(UserError, match=r"does not fit: 8 clips at once need .* a micro_batch of [1-7] fits"):
        check_gpu_memory(train, 80e6)


def test_the_plan_of_the_demo_as_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "--price", "0.5", "--json"]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert plan["fits"] and plan["spec"]["question"]["clips"] == 520
    rows = {(row["part"], row["quantity"]): row["value"] for row in plan["rows"]}
    memory = [value for (part, name), value in rows.items() if part == "memory" and name not in ("sum", "of one cpu")]
    assert rows["memory", "sum"] == pytest.approx(sum(memory))
    assert rows["cost", "training"] == pytest.approx(0.5 * rows["cost", "training, device hours"])


@pytest.mark.slow
def test_the_plan_of_the_paper_as_a_table_without_its_base(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "--recipe", "paper", "--gpus", "8", "--gpu", "h200", "--clips", "10.7M"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(": ")[0] for line in lines[:3]] == ["fits", "time", "cost"]
    assert max(map(len, lines)) <= 120
    assert any("published: data sheet" in line for line in lines)
    assert any("assumed, not measured; --mfu" in line for line in lines)


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--gpus", "9"], "a global batch of 8 leaves some of 9 workers without a sample"),
        (["--gpu", "tpu"], "no device 'tpu' in the table; known are h200, h100"),
        (["--clips", "many"], "count 'many', expected a number above 0 such as 520, 2k or 10.7M"),
        (["--mfu", "1.5"], "mfu 1.5, expected a share of the peak"),
        (["--base", "nowhere/at/all"], "'nowhere/at/all' is not a folder"),
    ],
)
def test_a_plan_that_cannot_be_made_says_why(
    words: list[str], sentence: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["plan", *words]) == 2
    assert sentence in capsys.readouterr().err


def test_counts_parse_with_suffixes() -> None:
    assert [parse_count(text) for text in ("520", "2k", "10.7M", "1,000")] == [520, 2000, 10_700_000, 1000]


@pytest.fixture
def spec(tiny_base: Path, tmp_path: Path) -> TrainSpec:
    """A training that would start: a data set of one clip, 4 frames of 4x4 latents, prepared with the tiny base."""
    uri, recipe = str(tmp_path / "set"), {"vae_sha256": folder_hash(tiny_base, "vae")}
    sample = Sample(
        key="clip_000",
        caption="a red circle",
        latents=np.zeros((4, 4, 4, 4), np.float16),
        first=np.zeros((32, 32, 3), np.uint8),
        tokens=np.ones(32, np.int32),
        meta={},
    )
    open_dataset(uri, recipe)
    publish_dataset(uri, recipe, "hash", {}, [write_shard(uri, 0, (0, 1), [[sample]], "hash").summary()])
    model = TripConfig(size=32, num_frames=4, residual_std=(0.0, 0.5, 0.5, 0.5))
    return TrainSpec(dataset=uri, output=str(tmp_path / "run"), base=str(tiny_base), model=model, global_batch=4)


def test_what_would_fail_at_step_1_is_reported_before(spec: TrainSpec, tmp_path: Path) -> None:
    assert preflight(spec) == []
    window = TripConfig(size=32, num_frames=3, residual_std=(0.0, 0.5, 0.5))
    assert preflight(replace(spec, model=window)) == []
    for change, sentence in (
        ({"workers": 5}, "a global batch of 4 leaves some of 5 workers without a sample"),
        ({"workers": 3, "sharding": "fsdp2"}, "needs equal shares, and a global batch of 4 cannot be split over 3"),
        ({"workers": 4, "least_workers": 2, "sharding": "fsdp2"}, "cannot be split over 3 workers evenly"),
        ({"dataset": str(tmp_path / "none")}, "no finished data set at .*none"),
        ({"model": replace(spec.model, size=64)}, r"latents of .* are \(4, 4, 4, 4\) .* expects \(4, 4, 8, 8\)"),
        ({"model": TripConfig(size=32)}, r"expects \(16, 4, 4, 4\) or more frames: 16 of 32 pixels"),
    ):
        with pytest.raises(UserError, match=sentence):
            preflight(replace(spec, **change))


@pytest.mark.parametrize("trained", ["all", "temporal", "lora"])
def test_what_is_trained_is_counted_from_shapes(spec: TrainSpec, tiny_base: Path, trained: Any) -> None:
    spec = replace(spec, trained=trained, lora_rank=3)
    trip = Trip.from_base(tiny_base, spec.model)
    shapes = {name: tensor.shape for name, tensor in trip.unet.state_dict().items()}
    choose_trained(trip, spec)
    counted = sum(p.numel() for name, p in trained_weights(trip).items() if name.startswith("unet."))
    assert trained_parameters(shapes, spec) == counted


def test_a_full_disk_and_a_small_memory_are_reported_before(spec: TrainSpec, monkeypatch: pytest.MonkeyPatch) -> None:
    with safe_open(Path(spec.base) / "unet" / "diffusion_pytorch_model.safetensors", "numpy") as file:
        parameters = sum(file.get_tensor(name).size for name in file.keys())  # noqa: SIM118, safetensors' file cannot be iterated
    free = 12 * parameters  # a checkpoint
    pages = 2 * 16 * parameters - 1  # not quite the weights, gradients and moments of two workers
    sizes = {"SC_PAGE_SIZE": 1, "SC_PHYS_PAGES": pages}
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: SimpleNamespace(free=free))
    monkeypatch.setattr(os, "sysconf", sizes.__getitem__)
    two = replace(spec, workers=2)
    assert preflight(replace(two, workers=1)) == [] == preflight(replace(two, sharding="fsdp2"))
    (warning,) = preflight(two)
    assert "moments of 2 workers take" in warning
    assert preflight(replace(two, trained="temporal")) == []
    with pytest.raises(UserError, match="GB left, a checkpoint takes"):
        preflight(replace(spec, average_decay=0.9))
    assert preflight(replace(spec, average_decay=0.9, trained="lora", lora_rank=1)) == []


def test_a_base_that_does_not_belong_to_the_data_is_reported(spec: TrainSpec) -> None:
    other = Path(spec.output).parent / "other"
    shutil.copytree(spec.base, other)
    (other / "vae" / "config.json").write_text((other / "vae" / "config.json").read_text() + "\n")
    assert preflight(replace(spec, base=str(other))) == [
        f"{spec.dataset} was prepared with another vae than the one in {other}"
    ]
    text = other / "text_encoder" / "config.json"
    settings = json.loads(text.read_text())
    text.write_text(json.dumps(settings | {"max_position_embeddings": 16}))
    with pytest.raises(UserError, match="have 32 tokens, the base's text encoder takes 16"):
        preflight(replace(spec, base=str(other)))
    text.write_text(json.dumps(settings | {"hidden_size": 24}))
    with pytest.raises(UserError, match="is 24 wide, its 3D-UNet expects 16"):
        preflight(replace(spec, base=str(other)))
