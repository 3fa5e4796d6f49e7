"""Recipes: every number of a run in one place; the paper's, the demo's, and the variants of Tables 5 and 6."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import Any

from flows.recipe_values import differences, flatten, format_toml, parse_assignments, read_toml, settable, with_values
from infra import storage
from infra.settings import CHECKOUT
from tasks.encode.spec import FilterSpec, PrepareSpec
from tasks.evaluate.spec import EvaluateSpec
from tasks.evaluate.spec import check_spec as check_evaluate
from tasks.ingest.spec import SourceSpec
from tasks.records import UserError
from tasks.train.spec import TrainSpec, ValidationSpec, identity
from tasks.train.spec import check_spec as check_train
from tasks.video.frame_sizes import common_frame_sizes, parse_frame_sizes
from trip_model.config import FusionConfig, ObjectiveConfig, ScheduleConfig, TripConfig

PAPER_BASE = "damo-vilab/text-to-video-ms-1.7b"  # a hub name; or a local folder of the same layout
# The small base model in this repository, in the same layout.
DEMO_BASE = str(CHECKOUT / "examples" / "demo_base" / "weights")
# Recipes have no addresses: the flows derive them from the root.
OPEN = ""


@dataclass(frozen=True)
class Recipe:
    """The specs of all stages, their addresses left open."""

    name: str
    about: str
    prepare: PrepareSpec
    train: TrainSpec
    evaluate: EvaluateSpec
    demo_clips: int | None = None  # how many clips are drawn where no table is given

    def identity(self) -> dict[str, Any]:
        """The configuration without the base's address: the same on every machine."""
        open_base = replace(self, prepare=replace(self.prepare, base=OPEN), train=replace(self.train, base=OPEN))
        return identity(open_base)


def paper() -> Recipe:
    """Section 4.1: 16 frames at 4 fps and 256 pixels from WebVid-10M, on the weights of text-to-video-ms-1.7b.

    The model is the paper's: TNF's output is the predicted noise (Equation 11) and no statistic of the data enters it.
    docs/paper-and-ours.md lists for every field whether its value is the paper's.
    The frames of ten million clips are not stored; the evaluation reads a second table, WebVid's validation split.
    """
    return Recipe(
        name="paper",
        about="the paper's TRIP and numbers (Section 4.1) on text-to-video-ms-1.7b; needs GPUs and two tables of links",
        prepare=PrepareSpec(
            source=SourceSpec(table=OPEN),
            output=OPEN,
            base=PAPER_BASE,
            workers=8,
            cpus_per_worker=4,
            gpus_per_worker=1.0,
        ),
        train=TrainSpec(
            dataset=OPEN,
            output=OPEN,
            base=PAPER_BASE,
            held_out_fraction=0.0001,
            global_batch=64,
            warmup_steps=500,
            precision="bfloat16",
            micro_batch=2,  # 80 GB hold three, 141 GB nine; see `python -m flows plan`
            validation=ValidationSpec(every=1000, clips=64, animated=4),
            workers=8,
            cpus_per_worker=4,
            gpus_per_worker=1,
        ),
        evaluate=EvaluateSpec(
            model=OPEN,
            dataset=OPEN,
            output=OPEN,
            protocol="webvid-2048",
            clips=2048,
            cpus_per_worker=4,
            gpus_per_worker=1.0,
        ),
    )


def paper_shrinkage() -> Recipe:
    """`paper` with our fusion: Equation 9 with its best weight, corrected by TNF (docs/decisions/fusion.md)."""
    base = paper()
    fusion = replace(base.train.model.fusion, prediction="shrinkage")
    return _variant(base, "shrinkage", "our fusion: the prior's weight in closed form, corrected by TNF", fusion=fusion)


def demo() -> Recipe:
    """The same stages in minutes on two cores: 64 pixels, the small base, generated clips, our fusion."""
    base = paper()
    return replace(
        base,
        name="demo",
        about="all stages in minutes on two cores without a GPU, on generated clips",
        prepare=replace(
            base.prepare,
            base=DEMO_BASE,
            size=64,
            keep_pixels=True,
            windows_per_clip=8,  # drawn clips give one; long real ones give several
            clips_per_shard=30,
            workers=2,
            cpus_per_worker=1,
            gpus_per_worker=0.0,
        ),
        train=replace(
            base.train,
            base=DEMO_BASE,
            model=TripConfig(
                size=64,
                fusion=FusionConfig(
                    width=64,
                    heads=4,
                    local_shrinkage=True,
                    prediction="shrinkage",
                    residual="noise",  # training starts at the base's own prediction
                    residual_error=0.004,  # of the velocity of the trained TRIP that `make demo` continues
                ),
                schedule=ScheduleConfig(sampling_steps=20),
            ),
            objective=ObjectiveConfig(weighting="unit", text_dropout=0.0),
            steps=420,
            global_batch=8,
            # A small base needs higher learning rates than one of 1.4 B parameters.
            learning_rate_unet=2e-4,
            learning_rate_fusion=1e-3,
            warmup_steps=20,
            cosine=True,
            average_decay=0.99,
            checkpoint_every=60,
            tick_every=20,
            precision="float32",
            micro_batch=None,
            validation=ValidationSpec(every=210, clips=8, animated=1),
            held_out_fraction=0.1,
            # Two workers of one thread are a third faster on two cores than one worker of two threads.
            workers=2,
            cpus_per_worker=1,
            gpus_per_worker=0,
        ),
        evaluate=replace(
            base.evaluate,
            protocol="held-out",
            clips=40,
            deterministic_motion=True,  # a drawn shape moves as its caption says
            cpus_per_worker=1,
            gpus_per_worker=0.0,
        ),
        demo_clips=520,
    )


def trip_c(base: Recipe) -> Recipe:
    """Table 5, TRIP_C: the first frame joined to every noised frame, along the channels."""
    return _variant(base, "trip-c", "Table 5: the first frame along the channels", condition="channel")


def trip_te(base: Recipe) -> Recipe:
    """Table 5, TRIP_TE: the first frame after the noised frames."""
    return _variant(base, "trip-te", "Table 5: the first frame at the tail", condition="tail")


def trip_minus(base: Recipe) -> Recipe:
    """Table 6, TRIP^-: no shortcut path, only the residual path."""
    fusion = replace(base.train.model.fusion, kind="none")
    return _variant(base, "trip-minus", "Table 6: no shortcut path", fusion=fusion)


def trip_w(base: Recipe) -> Recipe:
    """Table 6, TRIP^W: both noises joined by a weight that decays linearly over the frames (Equation 9)."""
    fusion = replace(base.train.model.fusion, kind="linear")
    return _variant(base, "trip-w", "Table 6: linear weights instead of the transformer", fusion=fusion)


def no_skip(base: Recipe) -> Recipe:
    """TNF exactly as in Section 3.4, which names no skip: neither around the attentions nor to the output."""
    fusion = replace(base.train.model.fusion, residual_skip=False)
    return _variant(base, "no-skip", "TNF without any skip", fusion=fusion)


def checkpoint_schedule(base: Recipe) -> Recipe:
    """The betas that the base was trained with instead of the paper's."""
    schedule = replace(base.train.model.schedule, bridge="checkpoint")
    return _variant(base, "checkpoint-schedule", "with the base's own betas", schedule=schedule)


def matched_schedule(base: Recipe) -> Recipe:
    """The paper's betas, at the base's time step of equal signal-to-noise ratio (docs/decisions/schedule.md)."""
    schedule = replace(base.train.model.schedule, bridge="snr")
    about = "the 3D-UNet receives the base's time step of equal signal-to-noise ratio"
    return _variant(base, "matched-schedule", about, schedule=schedule)


def temporal(base: Recipe) -> Recipe:
    """Trains only the weights of the 3D-UNet that mix frames: 39 % of them, and an optimiser of that size."""
    about = f"{base.name}, training only what mixes frames"
    return replace(base, name=f"{base.name}-temporal", about=about, train=replace(base.train, trained="temporal"))


def lora(base: Recipe) -> Recipe:
    """Low-rank adapters on the attentions of the 3D-UNet: an optimiser of a few per cent of its weights.

    Adapters need about ten times the learning rate of all weights (Schulman, LoRA Without Regret, 2025).
    """
    train = replace(base.train, trained="lora", learning_rate_unet=10 * base.train.learning_rate_unet)
    about = f"{base.name}, training low-rank adapters on the 3D-UNet's attentions"
    return replace(base, name=f"{base.name}-lora", about=about, train=train)


def sharded(base: Recipe) -> Recipe:
    """The same training for GPUs of less memory: state in shards (FSDP2), activations recomputed, a clip at once."""
    train = replace(base.train, sharding="fsdp2", recompute_activations=True, micro_batch=1)
    about = f"{base.name}, its state spread over the workers and activations recomputed"
    return replace(base, name=f"{base.name}-sharded", about=about, train=train)


def _variant(base: Recipe, name: str, about: str, **changes: Any) -> Recipe:
    train = replace(base.train, model=replace(base.train.model, **changes))
    return replace(base, name=f"{base.name}-{name}", about=f"{base.name}, {about}", train=train)


def filtered(base: Recipe) -> Recipe:
    """The same without windows that teach little; the bounds were measured, see docs/decisions/filters.md."""
    bounds = FilterSpec(
        least_side=base.prepare.size,
        least_brightness=0.1,
        least_contrast=0.1,
        most_bars=0.05,
        most_cut=0.35,
        least_motion=0.005,
    )
    about = f"{base.name}, without windows that are static, cut, dark, faded, small or barred"
    return replace(base, name=f"{base.name}-filtered", about=about, prepare=replace(base.prepare, filters=bounds))


def tracks(base: Recipe) -> Recipe:
    """The same on complete clips: every frame is stored, and training draws a new window each time."""
    about = f"{base.name}, with all frames of a clip stored and windows drawn in training"
    return replace(base, name=f"{base.name}-tracks", about=about, prepare=replace(base.prepare, clip="track"))


def shots(base: Recipe) -> Recipe:
    """The same on long videos: each shot between two cuts is a clip of its own (docs/decisions/shots.md)."""
    about = f"{base.name}, with long videos split at their cuts, each shot a clip"
    return replace(base, name=f"{base.name}-shots", about=about, prepare=replace(base.prepare, clip="shots"))


def frame_sizes(base: Recipe) -> Recipe:
    """The same with the aspect ratio of each video kept: frames of five sizes of about the square's area.

    A step trains on clips of one frame size; an evaluation compares central squares (docs/decisions/frame-sizes.md).
    """
    sizes = common_frame_sizes(base.prepare.size)
    about = f"{base.name}, with frames of five sizes from 16:9 to 9:16, each video in the nearest"
    return replace(base, name=f"{base.name}-frame-sizes", about=about, prepare=replace(base.prepare, frame_sizes=sizes))


def posterior(base: Recipe) -> Recipe:
    """The same with latents drawn from the VAE's posterior, where the others train on its mean."""
    return replace(
        base,
        name=f"{base.name}-posterior",
        about=f"{base.name}, with latents drawn from the VAE's posterior instead of its mean",
        prepare=replace(base.prepare, keep_logvar=True),
        train=replace(base.train, sample_posterior=True),
    )


def stored_text(base: Recipe) -> Recipe:
    """The same with text features computed once, for training where disks are cheaper than the text encoder."""
    return replace(
        base,
        name=f"{base.name}-stored-text",
        about=f"{base.name}, with the captions' text features stored instead of computed in training",
        prepare=replace(base.prepare, keep_text=True),
        train=replace(base.train, stored_text=True),
    )


# The rows of Tables 5 and 6 by their names in the paper.
VARIANTS: dict[str, Callable[[Recipe], Recipe]] = {
    "TRIP": lambda base: base,
    "TRIP_C": trip_c,
    "TRIP_TE": trip_te,
    "TRIP^-": trip_minus,
    "TRIP^W": trip_w,
}


def _all() -> dict[str, Callable[[], Recipe]]:
    recipes: dict[str, Callable[[], Recipe]] = {}
    # `paper-x` derives from `paper`, `paper-shrinkage-x` from `paper-shrinkage`, `demo-x` from `demo`.
    for base in (paper, paper_shrinkage, demo):
        recipes[base().name] = base
        schedules = (checkpoint_schedule, matched_schedule)
        stored = (filtered, tracks, shots, frame_sizes, posterior, stored_text)
        for variant in (trip_c, trip_te, trip_minus, trip_w, no_skip, temporal, lora, sharded, *schedules, *stored):
            recipes[variant(base()).name] = lambda variant=variant, base=base: variant(base())
    return recipes


RECIPES = _all()


def find_recipe(name: str, base: str | None = None, values: Sequence[str] | None = None) -> Recipe:
    """A recipe with values of one's own.

    Args:
        name: a name of `RECIPES`, or the address of a file that ends in .toml.
        base: another base, instead of the recipe's.
        values: FIELD=VALUE texts; the name of the recipe then says which fields have other values.
    Raises:
        UserError: an unknown name, an unusable file or value, or values that do not agree.
    """
    recipe = _read_recipe(name, ()) if name.endswith(".toml") else _named(name)
    if values:
        recipe = _changed(recipe, parse_assignments(values))
    if base is None:
        return recipe
    base = resolved_base(base)
    return replace(recipe, prepare=replace(recipe.prepare, base=base), train=replace(recipe.train, base=base))


def _named(name: str) -> Recipe:
    if name in RECIPES:
        return RECIPES[name]()
    close = difflib.get_close_matches(name, RECIPES, n=1)
    hint = f", did you mean {close[0]!r}?" if close else ";"
    raise UserError(f"no recipe {name!r}{hint} the known ones are {', '.join(RECIPES)}, or give a file .toml")


def _read_recipe(address: str, children: tuple[str, ...]) -> Recipe:
    """The recipe of a file: its parent with the values of the file."""
    address = storage.absolute(address)
    if address in children:
        raise UserError(f"recipe {address!r} is its own parent; give `from` the name of a recipe, such as demo")
    content = read_toml(address)
    parent = content.pop("from", None)
    if not isinstance(parent, str):
        raise UserError(f'recipe {address!r} names no parent; begin it with a line such as from = "demo"')
    if parent.endswith(".toml"):
        path = storage.local_path(parent)
        relative = path is not None and not path.expanduser().is_absolute()
        beside = storage.join(storage.parent(address), parent) if relative else parent
        base = _read_recipe(beside, (*children, address))
    else:
        base = _named(parent)
    stem = PurePosixPath(address).stem
    return _changed(base, {"name": stem, "about": f"{base.name}, with values of {stem}.toml"} | flatten(content))


def _changed(base: Recipe, values: dict[str, Any]) -> Recipe:
    """A recipe with other values, which agree with each other."""
    frames = values.get("train.model.num_frames")
    recipe = base
    if isinstance(frames, int) and frames > 0:  # one deviation for each frame, until they are measured
        deviations = (0.0, *(0.5,) * (frames - 1))
        model = replace(base.train.model, num_frames=frames, residual_std=deviations)
        recipe = replace(base, train=replace(base.train, model=model))
    recipe = with_values(recipe, values)
    check_recipe(recipe)
    if "name" in values:
        return recipe
    others = {name: value for name, (_, value) in differences(base, recipe).items()}
    words = ", ".join(f"{name}={format_toml(value)}" for name, value in sorted(others.items()))
    return replace(recipe, name=f"{base.name}, {words}") if words else recipe


# What must be equal in two stages.
SHARED = {
    "train.model.num_frames": "prepare.num_frames",
    "train.model.fps": "prepare.fps",
    "train.model.size": "prepare.size",
    "train.sample_posterior": "prepare.keep_logvar",
    "train.stored_text": "prepare.keep_text",
}


def check_recipe(recipe: Recipe) -> None:
    """Raises UserError for values out of bounds, and for stages that do not agree."""
    try:
        parse_frame_sizes(recipe.prepare.frame_sizes)
    except UserError as error:
        raise UserError(f"values of prepare: {error}") from None
    for group, check in (("train", check_train), ("evaluate", check_evaluate)):
        try:
            check(getattr(recipe, group))
        except UserError as error:
            raise UserError(f"values of {group}: {error}") from None
    values = settable(recipe)
    for one, other in SHARED.items():
        if values[one] != values[other]:
            raise UserError(
                f"{one} {format_toml(values[one])} and {other} {format_toml(values[other])}, expected equal values;"
                " set both"
            )


def resolved_base(base: str) -> str:
    """A local folder by its absolute path, since workers have another working directory; a hub name as it is."""
    return str(Path(base).resolve()) if Path(base).is_dir() else base
