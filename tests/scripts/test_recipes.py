"""Every recipe in configs/ belongs to a script, has only fields of that script, and trains."""

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
# Experiments have their own encoders.
EXPERIMENTS = ("context-effect", "learning-", "pretraining-context")
OF_PRESETS = [recipe for recipe in RECIPES if not recipe.stem.startswith(EXPERIMENTS)]


def script_of(recipe: Path) -> ModuleType:
    """Script of a recipe, by its name: -ctc, -rnnt or -evaluate; pretraining without any of these."""
    words = recipe.stem.split("-")
    names = {"ctc": "finetune_ctc", "rnnt": "finetune_rnnt", "evaluate": "evaluate"}
    return importlib.import_module(next((script for word, script in names.items() if word in words), "pretrain"))


@pytest.fixture
def signals() -> Iterator[None]:
    """Restore the signal handlers that a training script has replaced."""
    numbers = (signal.SIGTERM, signal.SIGINT)
    handlers = [signal.getsignal(number) for number in numbers]
    yield
    for number, handler in zip(numbers, handlers, strict=True):
        signal.signal(number, handler)


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_dataset(tmp_path_factory.mktemp("recipes") / "dataset")


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_recipe_has_only_fields_of_its_script(recipe: Path) -> None:
    lines = recipe.read_text().splitlines()
    assert lines[0].startswith("# "), "the first line describes the purpose of the recipe"
    parse(script_of(recipe).Config, ["--config", str(recipe)])
    dataset = yaml.safe_load(recipe.read_text()).get("data", {}).get("dataset", "")
    assert not dataset.startswith("/"), "a recipe names no path of a particular machine"


@pytest.mark.parametrize("recipe", OF_PRESETS, ids=lambda path: path.stem)
def test_recipe_has_the_shape_of_its_preset(recipe: Path) -> None:
    """For example, quickstart-ctc and quickstart-pretrain have the encoder of the preset quickstart."""
    config = parse(script_of(recipe).Config, ["--config", str(recipe)])
    preset = next(encoder for name, encoder in PRESETS.items() if recipe.stem.startswith(name))
    free = {name: getattr(preset, name) for name in FREE_ENCODER_FIELDS}
    assert dataclasses.replace(config.encoder, **free) == preset


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_recipe_trains(recipe: Path, dataset: Path, tmp_path: Path, signals: None) -> None:
    """Two optimizer steps with all settings of the recipe except the sizes."""
    script = script_of(recipe)
    small = [*ENCODER, *DATA, *RUN, "--run.steps=2", "--data.num_workers=0"]
    if script.__name__ != "pretrain":
        small.append("--finetune.tokenizer=char")  # a few words do not make a thousand byte pairs
    if yaml.safe_load(recipe.read_text()).get("curriculum"):
        small.append("--curriculum=[{after_step: 1, row_frames: 400, max_seconds: 4}]")
    places = [f"--data.dataset={dataset}", f"--run.folder={tmp_path / 'run'}"]
    script.train(parse(script.Config, ["--config", str(recipe), *small, *places]))
    assert (tmp_path / "run/export/model.safetensors").is_file()
