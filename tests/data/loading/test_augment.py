"""Augmentation of labelled crops: lengths known before reading, values by definition, independence of the loading."""

from pathlib import Path

import numpy as np
import pytest
import torch

from common.errors import UserError
from data.features import FeatureSettings
from data.format.dataset import Dataset
from data.loading.augment import (
    AugmentedCrops,
    AugmentSettings,
    SupervisedSettings,
    augmented,
    hz_to_mel,
    mel_to_hz,
    warped_bins,
)
from data.loading.loader import RowLoader
from data.loading.supervised import supervised_crops
from tests.made_datasets import make_dataset

BOTH = AugmentSettings(speed=0.2, frequency_warp=0.2)


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    lengths = np.random.default_rng(0).integers(100, 396, 40).tolist()
    return make_dataset(tmp_path_factory.mktemp("data") / "noise", [*lengths, 400])


def make_loader(dataset: Dataset, augment: AugmentSettings, rank: int = 0, size: int = 1, **more: object) -> RowLoader:
    values = {"rows": 4, "row_frames": 400, "num_workers": 0, "min_seconds": 0.5, "max_seconds": 4.0, **more}
    accumulation, state = values.pop("accumulation", 1), values.pop("state", None)
    settings = SupervisedSettings(augment=augment, **values)
    crops = supervised_crops(dataset, np.arange(len(dataset)), 400, 50, 3)
    crops = augmented(crops, settings, dataset.features)
    options = {"rank": rank, "world_size": size, "accumulation": accumulation, "state": state}
    return RowLoader(dataset, crops, settings, multiple=4, row_gap=4, **options)


Segment = tuple[str, int, torch.Tensor]


def read(loader: RowLoader, steps: int) -> list[list[Segment]]:
    """Per step, id, seed and frames of all segments, sorted."""
    found = []
    for _, batches in zip(range(steps), loader, strict=False):
        segments = []
        for batch in batches:
            ids = [id for row_ids in batch.ids for id in row_ids]
            for id, (row, slot, start, stop) in zip(ids, batch.segments.used(), strict=True):
                segments.append((id, int(batch.segments.seed[row, slot]), batch.log_mel[row, start:stop].clone()))
        found.append(sorted(segments, key=lambda segment: segment[:2]))
    return found


def assert_same(first: list[list[Segment]], second: list[list[Segment]]) -> None:
    for a, b in zip(first, second, strict=True):
        assert [segment[:2] for segment in a] == [segment[:2] for segment in b]
        assert all(torch.equal(x[2], y[2]) for x, y in zip(a, b, strict=True))


def test_rows_have_the_length_after_the_change_of_speed_and_never_more_than_a_row(dataset: Dataset) -> None:
    loader = make_loader(dataset, BOTH)
    ratios = []
    for step in read(loader, 15):
        for id, _, frames in step:
            start, stop = map(int, id.rpartition(":")[2].split("-"))
            assert len(frames) <= 400
            if stop < 330:
                ratios.append((stop - start) / len(frames))
    assert 0.79 < min(ratios) < 0.83 and 1.17 < max(ratios) < 1.21
    assert np.mean(ratios) == pytest.approx(1, abs=0.02)


def test_frames_are_those_of_the_naive_definition(dataset: Dataset) -> None:
    """Loops in float64: first time, then frequency."""
    loader = make_loader(dataset, BOTH)
    crops = loader.crops
    for id, seed, frames in read(loader, 1)[0]:
        recording = [dataset.id(i) for i in range(len(dataset))].index(id.rpartition(":")[0])
        original = dataset.read_normalised(recording, 0, int(dataset.frames[recording])).astype(np.float64)
        assert isinstance(crops, AugmentedCrops)
        factor = crops.factor("frequency_warp", seed)
        bins = warped_bins(dataset.features, factor)
        expected = np.empty(frames.shape)
        for t in range(len(frames)):
            source = (t + 0.5) * len(original) / len(frames) - 0.5
            resampled = [np.interp(source, np.arange(len(original)), original[:, b]) for b in range(80)]
            expected[t] = np.interp(bins, np.arange(80), resampled)
        np.testing.assert_allclose(frames.numpy(), expected, rtol=1e-4, atol=1e-4)
        assert len(frames) == max(1, min(400, round(len(original) / crops.factor("speed", seed))))


def test_segments_depend_neither_on_world_size_nor_accumulation_nor_workers_nor_packing(dataset: Dataset) -> None:
    expected = read(make_loader(dataset, BOTH), 6)
    ranks = [read(make_loader(dataset, BOTH, rank, 2), 6) for rank in range(2)]
    assert_same([sorted(a + b, key=lambda s: s[:2]) for a, b in zip(*ranks, strict=True)], expected)
    assert_same(read(make_loader(dataset, BOTH, accumulation=2), 6), expected)
    assert_same(read(make_loader(dataset, BOTH, num_workers=2), 6), expected)
    longer = {s[1]: s[2] for step in read(make_loader(dataset, BOTH, row_frames=800), 6) for s in step}
    shared = [s for step in expected for s in step if s[1] in longer and len(s[2]) < 400]
    assert len(shared) > 20 and all(torch.equal(s[2], longer[s[1]]) for s in shared)


def test_a_resumed_run_reads_the_same_and_other_settings_are_refused(dataset: Dataset) -> None:
    expected = read(make_loader(dataset, BOTH), 9)
    loader = make_loader(dataset, BOTH)
    first = read(loader, 4)
    assert_same(first + read(make_loader(dataset, BOTH, state=loader.state), 5), expected)
    with pytest.raises(UserError, match=r"augment.speed x 10\^6: 200000 != 100000"):
        make_loader(dataset, AugmentSettings(0.1, 0.2), state=loader.state)


def test_every_epoch_changes_a_crop_in_another_way(dataset: Dataset) -> None:
    lengths: dict[str, set[int]] = {}
    for step in read(make_loader(dataset, AugmentSettings(speed=0.2)), 40):
        for id, _, frames in step:
            lengths.setdefault(id, set()).add(len(frames))
    assert np.median([len(values) for values in lengths.values()]) >= 3


def test_without_augmentation_the_order_is_unchanged(dataset: Dataset) -> None:
    crops = supervised_crops(dataset, np.arange(len(dataset)), 400, 50, 3)
    assert augmented(crops, SupervisedSettings(), dataset.features) is crops


def test_a_replacement_of_an_unreadable_crop_is_not_augmented(dataset: Dataset, tmp_path: Path) -> None:
    own = make_dataset(tmp_path / "own", [300, 300, 200])
    broken = own.read_into

    def fail_for_the_first(recording: int, start: int, out: np.ndarray) -> None:
        if recording == 0:
            raise UserError("damaged")
        broken(recording, start, out)

    own.read_into = fail_for_the_first  # type: ignore[method-assign]
    loader = make_loader(own, AugmentSettings(speed=0.3), rows=1)
    lengths = [(id, len(frames)) for step in read(loader, 8) for id, _, frames in step]
    assert loader.quarantined.keys() == {"r000"}
    assert {length for id, length in lengths if id == "r002:0-200"} & {200}


@pytest.mark.parametrize("scale", ["htk", "slaney"])
def test_warped_bins_follow_the_definition_and_keep_both_ends(scale: str) -> None:
    features = FeatureSettings(mel_scale=scale)  # type: ignore[arg-type]
    assert np.allclose(warped_bins(features, 1.0), np.arange(80))
    hz = np.array([0.0, 300.0, 999.0, 1001.0, 7900.0])
    assert np.allclose(mel_to_hz(hz_to_mel(hz, scale), scale), hz)
    edges = np.linspace(*hz_to_mel(np.array([20.0, 8000.0]), scale).tolist(), 82)
    centres = mel_to_hz(edges[1:-1], scale)
    for factor in (0.8, 1.2):
        read_at = mel_to_hz(edges[0] + (warped_bins(features, factor) + 1) * (edges[1] - edges[0]), scale)
        low = centres < 4800 * min(factor, 1) / factor
        assert np.allclose(read_at[low], factor * centres[low])
        line = np.polyfit(centres[~low], read_at[~low], 1)
        assert np.allclose(np.polyval(line, centres[~low]), read_at[~low]) and np.polyval(line, 8000) == pytest.approx(
            8000
        )


def test_changes_above_a_half_are_refused() -> None:
    with pytest.raises(UserError, match=r"data.augment.speed is 0.7: give 0 to 0.5, such as 0.1"):
        AugmentSettings(speed=0.7)
