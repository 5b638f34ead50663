"""Held-out rows: the same crops and masks for any world size, and errors for invalid settings."""

from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch

from bestrq.pretraining.masking import draw_span_mask
from common.config import parse
from common.errors import UserError
from data.format.dataset import Dataset, open_dataset
from data.loading.batch import Batch
from data.loading.heldout import HeldoutSettings, heldout_batches, split_recordings
from data.loading.loader import LoaderSettings
from tests.tiny import make_dataset

DATA = LoaderSettings(rows=8, row_frames=400, min_seconds=0.5, max_seconds=4, seed=3)
DRAW_MASK = partial(draw_span_mask, span_frames=20, start_probability=0.02)


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    return open_dataset(str(make_dataset(tmp_path_factory.mktemp("data") / "tiny", recordings=100)))


def read(
    dataset: Dataset, settings: HeldoutSettings, rank: int = 0, world_size: int = 1, accumulation: int = 1
) -> list[Batch]:
    _, heldout = split_recordings(dataset, DATA, settings)
    return heldout_batches(
        dataset, heldout, DATA, settings, multiple=4, row_gap=4, rank=rank, world_size=world_size,
        accumulation=accumulation, draw_mask=DRAW_MASK,
    )  # fmt: skip


Row = tuple[torch.Tensor, torch.Tensor, torch.Tensor, list]


def rows_of(batches: list[Batch]) -> list[Row]:
    """Features, mask, seeds and crops of every row."""
    rows: list[Row] = []
    for batch in batches:
        assert batch.mask is not None and batch.segments.seed is not None
        rows += zip(batch.log_mel, batch.mask, batch.segments.seed, batch.crops, strict=True)
    return rows


def same(first: Row, second: Row) -> bool:
    return all(torch.equal(a, b) for a, b in zip(first[:3], second[:3], strict=True)) and first[3] == second[3]


def test_rows_and_masks_depend_neither_on_world_size_nor_on_accumulation(dataset: Dataset) -> None:
    settings = HeldoutSettings(max_seconds=15)
    reference = [row for row in rows_of(read(dataset, settings, accumulation=8)) if row[1].any()]
    assert 3 <= len(reference) <= 4, "batches of one row: no padding rows"
    for world_size, accumulation in ((1, 1), (2, 1), (4, 1), (2, 2), (1, 4)):
        ranks = [read(dataset, settings, rank, world_size, accumulation) for rank in range(world_size)]
        assert len({len(batches) for batches in ranks}) == 1, "all ranks have the same number of batches"
        rows = [row for batches in zip(*ranks, strict=True) for batch in batches for row in rows_of([batch])]
        used = [row for row in rows if row[1].any()]
        assert len(used) == len(reference)
        assert all(same(first, second) for first, second in zip(used, reference, strict=True))
        assert len(rows) % 8 == 0 or accumulation > 1


def test_only_recordings_of_the_split_up_to_the_limit_are_read_and_a_higher_limit_adds_rows(dataset: Dataset) -> None:
    seconds = []
    for limit in (10.0, 20.0, 1e6):
        batches = read(dataset, HeldoutSettings(max_seconds=limit))
        rows = [row for row in rows_of(batches) if row[1].any()]
        assert {dataset.split(crop[0]) for row in rows for crop in row[3]} == {"dev"}
        seconds.append(sum((stop - start) / 100 for row in rows for _, start, stop, _ in row[3]))
        assert seconds[-1] <= limit
    whole = float(dataset.frames[dataset.select(split="dev")].sum()) / 100
    assert seconds[0] < seconds[1] < seconds[2] <= whole and seconds[2] > 0.9 * whole


def test_another_seed_gives_other_masks(dataset: Dataset) -> None:
    first, second = (rows_of(read(dataset, HeldoutSettings(seed=seed, max_seconds=1e6))) for seed in (0, 1))
    crops = [{crop[:3]: int(seed) for row in rows for crop, seed in zip(row[3], row[2], strict=False)}
             for rows in (first, second)]  # fmt: skip
    shared = crops[0].keys() & crops[1].keys()
    assert shared and all(crops[0][crop] != crops[1][crop] for crop in shared)


def test_auto_is_dev_if_training_on_train_and_no_validation_otherwise(dataset: Dataset, tmp_path: Path) -> None:
    training, heldout = split_recordings(dataset, DATA, HeldoutSettings())
    assert np.array_equal(training, dataset.select(split="train"))
    assert np.array_equal(heldout, dataset.select(split="dev"))
    on_test = LoaderSettings(rows=8, row_frames=400, min_seconds=0.5, max_seconds=4, split="test")
    assert len(split_recordings(dataset, on_test, HeldoutSettings())[1]) == 0
    assert len(split_recordings(dataset, DATA, HeldoutSettings(every_steps=0))[1]) == 0
    only_train = open_dataset(str(make_dataset(tmp_path / "train", recordings=4)))
    assert only_train.labels("split")[0] == ["train"]
    assert len(split_recordings(only_train, DATA, HeldoutSettings())[1]) == 0


def test_auto_without_a_long_enough_recording_is_no_validation_and_an_explicit_split_is_refused(
    dataset: Dataset,
) -> None:
    data = LoaderSettings(rows=8, row_frames=400, min_seconds=3.9, max_seconds=4)
    heldout = np.array([i for i in dataset.select(split="dev") if dataset.frames[i] < 390])
    arguments = {"multiple": 4, "row_gap": 4, "rank": 0, "world_size": 1, "accumulation": 1, "draw_mask": DRAW_MASK}
    assert heldout_batches(dataset, heldout, data, HeldoutSettings(), **arguments) == []  # type: ignore[arg-type]
    with pytest.raises(UserError, match=r"validation: .*; lower data.min_seconds"):
        heldout_batches(dataset, heldout, data, HeldoutSettings(split="dev"), **arguments)  # type: ignore[arg-type]


def test_a_share_is_removed_from_training_and_reproducible(dataset: Dataset) -> None:
    settings = HeldoutSettings(share=0.1)
    training, heldout = split_recordings(dataset, DATA, settings)
    everything = dataset.select(split="train")
    assert len(heldout) == round(0.1 * len(everything)) and not set(training) & set(heldout)
    assert np.array_equal(np.sort(np.concatenate([training, heldout])), everything)
    again = split_recordings(dataset, DATA, HeldoutSettings(share=0.1, every_steps=0))
    assert np.array_equal(again[0], training), "switching validation off does not change the training recordings"
    assert not np.array_equal(split_recordings(dataset, DATA, HeldoutSettings(share=0.1, seed=1))[1], heldout)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (HeldoutSettings(split="nowhere"), r"validation.split is 'nowhere': .*\['dev', 'test', 'train'\]"),
        (HeldoutSettings(split="train"), r"validation.split is 'train', the split to train on"),
        (HeldoutSettings(share=0.001), r"validation.share is 0.001: that is 0 of the 80 recordings"),
        (HeldoutSettings(share=1.0), r"validation.share is 1.0: that is 80 of the 80 recordings"),
    ],
)
def test_invalid_choices_are_refused_by_name(dataset: Dataset, settings: HeldoutSettings, message: str) -> None:
    with pytest.raises(UserError, match=message):
        split_recordings(dataset, DATA, settings)


@dataclass
class Config:
    validation: HeldoutSettings = field(default_factory=HeldoutSettings)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--validation.share=1.5"], "validation.share is 1.5: expected a number"),
        (["--validation.every_steps=-1"], "validation.every_steps is -1: expected an integer"),
        (["--validation.max_seconds=0"], "validation.max_seconds is 0: expected a number"),
        (["--validation.share=0.1", "--validation.split=dev"], r"validation.share is 0.1 and validation.split 'dev'"),
    ],
)
def test_values_out_of_range_are_refused_by_the_parser(options: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        parse(Config, options)
