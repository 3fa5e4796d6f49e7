"""A number of one's own: set by its name or in a file, checked in one sentence, and part of every address."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from flows import layout
from flows.cli.app import main, parse
from flows.recipe_values import REFUSED, settable
from flows.recipes import RECIPES, Recipe, find_recipe
from flows.source import DEFAULT
from flows.train_trip import train_trip
from tasks.records import Artifact, UserError, digest


def with_set(*values: str, name: str = "demo") -> Recipe:
    return find_recipe(name, None, values)


def test_a_value_is_set_by_its_name_and_read_as_toml() -> None:
    recipe = with_set("train.steps=200", "train.model.fusion.width = 32", "train.trained=lora", "train.cosine=false")
    train = recipe.train
    assert (train.steps, train.model.fusion.width, train.trained, train.cosine) == (200, 32, "lora", False)
    assert train.model.fusion.heads == find_recipe("demo").train.model.fusion.heads
    assert with_set("train.micro_batch=none", name="paper").train.micro_batch is None
    assert with_set("train.learning_rate_unet=1").train.learning_rate_unet == 1.0
    assert with_set("prepare.filters={least_side = 3}").prepare.filters.least_side == 3


def test_the_name_says_what_is_different() -> None:
    assert with_set("train.steps=420", "train.seed=2").name == "demo, train.seed=2"
    assert with_set("train.steps=420").identity() == find_recipe("demo").identity()


@pytest.mark.parametrize(
    ("value", "sentence"),
    [
        ("train.step=1", "no field 'train.step', did you mean 'train.steps'?"),
        ("steps=1", "no field 'steps', did you mean 'train.steps'?"),
        ("train.steps=many", "train.steps 'many', expected a valid integer"),
        ("train.steps=2.5", "train.steps 2.5, expected a valid integer"),
        ("train.cosine=True", "train.cosine 'True', expected a valid boolean"),
        ("train.trained=lor", "train.trained 'lor', expected 'all', 'temporal' or 'lora'"),
        ("train.micro_batch=a", "train.micro_batch 'a', expected a valid integer or none"),
        ("train.clip_norm=nan", "train.clip_norm nan, expected a finite number"),
        ("train=1", "train is a group of values; set one of them, such as train.steps"),
        ("train.steps.x=1", "train.steps is a single value and has no 'x'"),
        ("train.steps=0", "values of train: steps 0, expected at least 1"),
        ("train.learning_rate_unet=-1", "values of train: learning_rate_unet -1, expected at least 0"),
        ("evaluate.clips=0", "values of evaluate: clips 0, expected at least 1"),
        ("train.model.fusion.residual_error=0", "train.model.fusion.residual_error 0.0, expected a number above 0"),
        ("prepare.size=128", "train.model.size 64 and prepare.size 128, expected equal values; set both"),
        ("train.steps", "--set 'train.steps', expected FIELD=VALUE such as train.steps=200"),
    ],
)
def test_an_unusable_value_is_one_sentence(value: str, sentence: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["recipes", "show", "demo", "--set", value]) == 2
    output = capsys.readouterr().err
    assert output.startswith(f"error: {sentence}") and output.count("\n") == 1


def fields_of(value: Any, path: str = "") -> list[str]:
    names = []
    for name, inner in value.items():
        names.append(f"{path}{name}")
        names += fields_of(inner, f"{path}{name}.") if isinstance(inner, dict) else []
    return names


@pytest.mark.parametrize("name", REFUSED)
def test_an_address_is_no_value_and_the_sentence_names_its_flag(name: str) -> None:
    assert name in fields_of(asdict(find_recipe("demo")))
    with pytest.raises(UserError, match=f"{name} is no value of a recipe; "):
        with_set(f"{name}=x")


def test_no_hash_and_no_address_is_a_value() -> None:
    """They identify a result, or locate it; a value from the command line would make its record wrong."""
    last = {name.rpartition(".")[2] for name in settable(find_recipe("demo"))}
    assert not [name for name in last if re.search(r"(sha256|hash|digest|fingerprint|uri|address|output|base)$", name)]


def test_a_number_of_frames_needs_no_list_of_deviations() -> None:
    recipe = with_set("train.model.num_frames=8", "prepare.num_frames=8")
    assert len(recipe.train.model.residual_std) == 8
    with pytest.raises(UserError, match=r"num_frames 8 and prepare\.num_frames 16"):
        with_set("train.model.num_frames=8")


@pytest.mark.parametrize("name", RECIPES)
def test_an_exported_recipe_is_the_same_recipe(name: str, tmp_path: Path) -> None:
    recipe, file = find_recipe(name), tmp_path / f"{name}.toml"
    assert main(["recipes", "export", name, "-o", str(file)]) == 0
    assert find_recipe(str(file), recipe.train.base) == recipe


def test_a_file_names_its_parent_and_may_have_a_file_as_parent(tmp_path: Path) -> None:
    (tmp_path / "short.toml").write_text('from = "demo"\n[train]\nsteps = 30\n[train.model.fusion]\nwidth = 32\n')
    (tmp_path / "shorter.toml").write_text('from = "short.toml"\nabout = "a try"\ntrain.steps = 20\n')
    recipe = find_recipe(str(tmp_path / "shorter.toml"), None, ["train.seed=1"])
    assert (recipe.train.steps, recipe.train.model.fusion.width, recipe.train.seed) == (20, 32, 1)
    assert (recipe.name, recipe.about) == ("shorter, train.seed=1", "a try")


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        ("train.steps = 3", "names no parent; begin it with a line such as from"),
        ('from = "dema"', "no recipe 'dema', did you mean 'demo'"),
        ('from = "my.toml"', "is its own parent"),
        ('from = "demo"\n[train', "is no TOML"),
        ('from = "demo"\n[train]\nstep = 3', "no field 'train.step', did you mean 'train.steps'"),
        ('from = "demo"\n#' + " " * (1 << 20), "more than 1048576 bytes"),
    ],
)
def test_an_unusable_file_is_one_sentence(content: str, sentence: str, tmp_path: Path) -> None:
    (tmp_path / "my.toml").write_text(content)
    with pytest.raises(UserError, match=sentence):
        find_recipe(str(tmp_path / "my.toml"))
    with pytest.raises(UserError, match="no recipe file"):
        find_recipe(str(tmp_path / "none.toml"))


def printed(arguments: Sequence[str], capsys: pytest.CaptureFixture[str]) -> list[str]:
    assert main(["recipes", *arguments]) == 0
    return capsys.readouterr().out.splitlines()


def test_the_command_recipes_prints_values_and_differences(capsys: pytest.CaptureFixture[str]) -> None:
    assert len(printed([], capsys)) == len(printed(["list"], capsys)) == len(RECIPES)
    shown = printed(["show", "demo", "--set", "train.steps=7"], capsys)
    assert "[train.model.fusion]" in shown and "steps = 7" in shown
    assert printed(["diff", "demo", "demo-trip-c"], capsys) == ['train.model.condition = "head"  ->  "channel"']
    assert main(["recipes", "diff", "demo"]) == 2
    assert "expected: recipes diff NAME NAME" in capsys.readouterr().err


def test_the_schema_accepts_what_is_exported_and_nothing_else(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    schema = json.loads("\n".join(printed(["schema"], capsys)))
    jsonschema.Draft202012Validator.check_schema(schema)
    accepts = jsonschema.Draft202012Validator(schema).is_valid
    values: dict[str, Any] = {"from": "demo"}
    for name, value in settable(find_recipe("demo-filtered")).items():
        *groups, last = name.split(".")
        table = values
        for group in groups:
            table = table.setdefault(group, {})
        table[last] = "none" if value is None else list(value) if isinstance(value, tuple) else value
    assert accepts(values) and accepts({"from": "demo", "train": {"micro_batch": 2}})
    for wrong in ({}, {"from": "demo", "train": {"step": 1}}, {"from": "demo", "train": {"base": "x"}}):
        assert not accepts(wrong)


def test_a_value_is_part_of_the_addresses_it_changes(tmp_path: Path, tiny_base: Path) -> None:
    data = Artifact(str(tmp_path / "data" / "set"), "0" * 64)

    def addresses(*values: str) -> tuple[str, str]:
        run = layout.resolve("demo", None, str(tmp_path), str(tiny_base), DEFAULT, values)
        return run.prepare.output, run.train(data).output

    plain = addresses()
    assert addresses("train.steps=420", "train.tick_every=5") == plain  # no other value, and a means
    longer, wider = addresses("train.steps=641"), addresses("prepare.windows_per_clip=2")
    assert longer[0] == plain[0] and longer[1] != plain[1] and wider[0] != plain[0]


def test_a_flow_takes_values_from_the_command_line_and_from_a_deployment(tmp_path: Path) -> None:
    given = parse(["train-trip", "--set", "train.steps=3", "--set", "train.seed=1"])
    assert given["values"] == ["train.steps=3", "train.seed=1"]
    assert train_trip.validate_parameters({"values": ["train.steps=3"]})["values"] == ["train.steps=3"]
    # A value is rejected before a server is started.
    assert main(["train-trip", "--root", str(tmp_path / "run"), "--set", "train.step=3"]) == 2
    assert not (tmp_path / "run").exists()
    assert digest(with_set("train.steps=3").identity()) != digest(find_recipe("demo").identity())
