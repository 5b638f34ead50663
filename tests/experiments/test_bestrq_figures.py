"""Figures of docs/bestrq.md: the script on a small dataset, its numbers, and the files and tables of the page."""

import json
import re
from pathlib import Path

import pytest
import torch
from tiny import make_dataset

from bestrq.pretraining.quantizer import QuantizerSettings, RandomProjectionQuantizer
from common.errors import UserError
from data.format.dataset import open_dataset
from experiments import bestrq_figures as script
from tests.made_datasets import make_dataset as make_noise
from tests.paths import REPOSITORY

PAGE = (REPOSITORY / "docs/bestrq.md").read_text(encoding="utf-8")
FIGURES = REPOSITORY / "docs/figures"


@pytest.fixture(scope="module")
def speech(tmp_path_factory: pytest.TempPathFactory) -> script.Speech:
    return script.choose_speech(open_dataset(str(make_dataset(tmp_path_factory.mktemp("figures") / "dataset"))), 0.01)


def test_the_script_writes_its_figures_and_numbers(
    speech: script.Speech, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(script, "CODEBOOK_SIZES", (16, 32))
    arguments = ["bestrq_figures", "--dataset", speech.dataset.location, "--out", str(tmp_path / "out")]
    monkeypatch.setattr("sys.argv", [*arguments, "--hours", "0.01", "--mask-frames", "40000"])
    script.main()
    written = {path.name for path in (tmp_path / "out").iterdir()}
    assert written == {path.name for path in FIGURES.glob("bestrq*")}
    numbers = json.loads((tmp_path / "out/bestrq.json").read_text())
    assert 0 < numbers["hours"] < 0.02 and numbers["stacks"] > 500
    assert len(numbers["entropy"]) == 2 * len(script.CODEBOOK_DIMS)
    assert all(row["share"] == pytest.approx(row["share_formula"], abs=0.04) for row in numbers["masks"])
    assert all(row["share"] == pytest.approx(row["share_formula"], abs=0.04) for row in numbers["targets"])
    printed = capsys.readouterr().out
    assert all(table in printed for table in script.marked_tables(numbers).values())


def test_recordings_are_cut_to_whole_stacks_and_limited_to_the_hours(speech: script.Speech) -> None:
    features = speech.log_mel("recording")
    assert all(len(recording) % script.STRIDE == 0 and len(recording) >= 196 for recording in features)
    assert 0.01 * 360_000 <= sum(map(len, features)) + 4 * len(features) < 0.01 * 360_000 + 1000
    assert len(script.stacks_of(features)) == sum(map(len, features)) // script.STRIDE


def test_stored_values_are_not_normalised(speech: script.Speech) -> None:
    normalised, stored = speech.log_mel("recording")[0], speech.log_mel(None)[0]
    assert normalised.mean(dim=0).abs().max() < 0.1 < stored.mean(dim=0).abs().max()


def test_the_reference_variant_has_the_codes_of_training(speech: script.Speech) -> None:
    settings = QuantizerSettings(codebook_size=64)
    codes, figures = script.usage_of_variants(speech, settings)
    stacks = script.stacks_of(speech.log_mel("recording"))
    expected = RandomProjectionQuantizer(settings, stacks.shape[1])(stacks)[:, 0]
    assert torch.equal(codes["normalised per recording"], expected)
    differing = [name for name, values in codes.items() if not torch.equal(values, expected)]
    assert len(differing) == len(codes) - 1, "every other variant has other codes"
    assert figures["normalised per recording"]["perplexity"] <= 64


def test_runs_of_codes_end_with_their_recording() -> None:
    codes = torch.tensor([5, 5, 2, 2, 2, 2, 7])
    assert script.code_runs(codes, [4, 3]).tolist() == [2, 2, 2, 1]


def test_a_dataset_without_long_recordings_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no recording of the train split lasts two seconds"):
        script.choose_speech(make_noise(tmp_path / "short", [100, 150]), 1.0)


def test_the_page_shows_the_figures_and_the_tables_of_the_numbers() -> None:
    """If this fails, copy the output of `python -m experiments.bestrq_figures` into docs/bestrq.md."""
    shown = set(re.findall(r"!\[[^\]]+\]\(figures/(bestrq-[\w-]+\.svg)\)", PAGE))
    assert shown == {path.name for path in FIGURES.glob("bestrq-*.svg")}
    numbers = json.loads((FIGURES / "bestrq.json").read_text(encoding="utf-8"))
    for table in script.marked_tables(numbers).values():
        assert table in PAGE


def test_the_page_names_existing_tests() -> None:
    """Every mistake on the page is followed by the tests that catch it, as [`test_name`](../tests/FILE.py)."""
    named = re.findall(r"\[`(test_\w+)`\]\(\.\./(tests/[\w/]+\.py)\)", PAGE)
    assert len(named) >= 12
    for name, path in named:
        assert re.search(rf"^def {name}\(", (REPOSITORY / path).read_text(encoding="utf-8"), re.MULTILINE), (name, path)


def test_the_page_names_existing_functions() -> None:
    """Every link to a function, as [`name`](../FILE.py), is a definition or a field of that file."""
    named = re.findall(r"\[`([\w.]+)`\]\(\.\./((?:bestrq|data|pipelines|experiments|benchmarks)/[\w/]+\.py)\)", PAGE)
    assert len(named) >= 12
    for name, path in named:
        last = name.split(".")[-1]
        text = (REPOSITORY / path).read_text(encoding="utf-8")
        assert re.search(rf"^\s*(def|class) {last}\b|^\s*{last}\b[:=]", text, re.MULTILINE), (name, path)
