"""Every file in configs/ belongs to a script, holds only what that script knows, and trains."""

import dataclasses
import importlib
import signal
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import yaml
from tiny import DATA, ENCODER, RUN, make_dataset

from bestrq.model.presets import PRESETS
from bestrq.model.settings import FREE_ENCODER_FIELDS
from common.config import parse
from tests.paths import REPOSITORY

RECIPES = sorted((REPOSITORY / "configs").glob("*.yaml"))
# The experiment of experiments/context_effect.sh has an encoder of its own.
OF_PRESETS = [recipe for recipe in RECIPES if recipe.stem != "context-effect-ctc"]


def script_of(recipe: Path) -> ModuleType:
    """The script that a recipe is for, by its name: -ctc, -rnnt or -evaluate, and all others pretraining."""
    words = recipe.stem.split("-")
    names = {"ctc": "finetune_ctc", "rnnt": "finetune_rnnt", "evaluate": "evaluate"}
    return importlib.import_module(next((script for word, script in names.items() if word in words), "pretrain"))


@pytest.fixture
def signals() -> Iterator[None]:
    """A training script takes the signals over; give them back."""
    numbers = (signal.SIGTERM, signal.SIGINT)
    handlers = [signal.getsignal(number) for number in numbers]
    yield
    for number, handler in zip(numbers, handlers, strict=True):
        signal.signal(number, handler)


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_dataset(tmp_path_factory.mktemp("recipes") / "dataset")


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_recipe_holds_only_what_its_script_knows(recipe: Path) -> None:
    lines = recipe.read_text().splitlines()
    assert lines[0].startswith("# "), "the first line says what the recipe is for"
    parse(script_of(recipe).Config, ["--config", str(recipe)])
    dataset = yaml.safe_load(recipe.read_text()).get("data", {}).get("dataset", "")
    assert not dataset.startswith("/"), "a recipe names no place on one machine"


@pytest.mark.parametrize("recipe", OF_PRESETS, ids=lambda path: path.stem)
def test_recipe_has_the_shape_of_its_preset(recipe: Path) -> None:
    """quickstart-ctc and quickstart-pretrain have the encoder of the preset quickstart, and so on."""
    config = parse(script_of(recipe).Config, ["--config", str(recipe)])
    preset = next(encoder for name, encoder in PRESETS.items() if recipe.stem.startswith(name))
    free = {name: getattr(preset, name) for name in FREE_ENCODER_FIELDS}
    assert dataclasses.replace(config.encoder, **free) == preset


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_recipe_trains(recipe: Path, dataset: Path, tmp_path: Path, signals: None) -> None:
    """Two updates with all its settings but the sizes."""
    script = script_of(recipe)
    small = [*ENCODER, *DATA, *RUN, "--run.steps=2", "--data.num_workers=0"]
    if script.__name__ != "pretrain":
        small.append("--finetune.tokenizer=char")  # a few words do not make a thousand byte pairs
    places = [f"--data.dataset={dataset}", f"--run.folder={tmp_path / 'run'}"]
    script.train(parse(script.Config, ["--config", str(recipe), *small, *places]))
    assert (tmp_path / "run/export/model.safetensors").is_file()
