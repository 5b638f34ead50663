"""Other sounds added to segments: energies, independence of packing and workers, clean features untouched."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from common.errors import UserError
from data.features import FeatureSettings
from data.format.dataset import Dataset, open_dataset
from data.format.writer import DatasetWriter
from data.loading.batch import Batch
from data.loading.loader import LoaderSettings, RowLoader
from data.loading.mixing import Mixer, add, noise
from data.recording import Recording


def write_speakers(folder: Path, **features: Any) -> Dataset:
    """12 recordings of 1.5 s by three speakers, whose mel energies differ by a factor."""
    generator = np.random.default_rng(0)
    settings = FeatureSettings(num_mels=8, **features)
    with DatasetWriter(folder, settings) as writer:
        for number in range(12):
            recording = Recording(
                f"r{number:02d}", "text", None, language="en", split="train", speaker=f"s{number % 3}"
            )
            writer.add(recording, (generator.normal(size=(150, 8)) + number % 3).astype(np.float32))
        writer.finish()
    return open_dataset(folder)


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    return write_speakers(tmp_path_factory.mktemp("data") / "speakers")


SETTINGS = LoaderSettings(rows=2, row_frames=400, max_seconds=2, min_seconds=0.5, num_workers=0, seed=3)


def make_mixer(dataset: Dataset, probability: float = 1.0, noise_share: float = 0.0) -> Mixer:
    return Mixer(dataset, SETTINGS.crop_order(dataset), "recording", probability, noise_share)


def read(dataset: Dataset, mixer: Mixer | None, settings: LoaderSettings = SETTINGS, steps: int = 3) -> list[Batch]:
    crops = settings.crop_order(dataset)
    loader = RowLoader(dataset, crops, settings, multiple=4, row_gap=4, mix=mixer)
    stream: Iterator[list[Batch]] = iter(loader)
    return [batch for _ in range(steps) for batch in next(stream)]


def test_energies_are_added_at_the_ratio() -> None:
    generator = np.random.default_rng(1)
    first, second = (generator.normal(size=(30, 8)).astype(np.float32) for _ in range(2))
    for ratio in (-5.0, 0.0, 12.0):
        added = np.exp(add(first, second, ratio).astype(np.float64)) - np.exp(first.astype(np.float64))
        assert 10 * np.log10(np.exp(first).sum() / added.sum()) == pytest.approx(ratio, abs=1e-4)
        shape = added / np.exp(second)
        np.testing.assert_allclose(shape, shape.mean(), rtol=1e-3)


def test_a_region_of_at_most_half_of_a_segment_changes_and_never_the_clean_features(dataset: Dataset) -> None:
    plain, mixed = read(dataset, None), read(dataset, make_mixer(dataset))
    changed = 0
    for before, after in zip(plain, mixed, strict=True):
        assert before.received is None and after.received is not None
        assert torch.equal(before.log_mel, after.log_mel)
        differs = (after.received != after.log_mel).any(dim=2)
        for row, _, start, stop in after.segments.used():
            inside = differs[row, start:stop].nonzero().flatten()
            assert len(inside) <= (stop - start) // 2
            changed += len(inside) > 0
            differs[row, start:stop] = False
        assert not differs.any(), "gaps stay as they are"
    assert changed == sum(len(batch.segments.used()) for batch in mixed)


def test_a_segment_is_mixed_in_the_same_way_in_any_row_and_by_any_worker(dataset: Dataset) -> None:
    """The sounds are a function of the seed of the segment."""

    def by_seed(settings: LoaderSettings, steps: int) -> dict[tuple[int, str], torch.Tensor]:
        found = {}
        for batch in read(dataset, make_mixer(dataset, noise_share=0.5), settings, steps):
            assert batch.received is not None and batch.segments.seed is not None
            names = [id for row in batch.ids for id in row]
            for (row, slot, start, stop), name in zip(batch.segments.used(), names, strict=True):
                found[int(batch.segments.seed[row, slot]), name] = batch.received[row, start:stop].clone()
        return found

    first = by_seed(SETTINGS, 3)
    for settings, steps in ((replace(SETTINGS, rows=3, row_frames=200), 4), (replace(SETTINGS, num_workers=2), 3)):
        other = by_seed(settings, steps)
        shared = first.keys() & other.keys()
        assert len(shared) >= 8
        assert all(torch.equal(first[key], other[key]) for key in shared)


def test_added_speech_is_another_speakers(dataset: Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    mixer, sources = make_mixer(dataset), []
    read_frames = dataset.read

    def note(recording: int, *place: int) -> np.ndarray:
        sources.append(recording)
        return read_frames(recording, *place)

    monkeypatch.setattr(dataset, "read", note)
    for seed in range(60):
        recording = seed % 12
        mixer(dataset.read_normalised(recording), recording, seed)
        assert dataset.speaker(sources[-1]) != dataset.speaker(recording)
    assert len(set(sources)) > 6


def test_the_sum_is_normalised_as_the_recording(dataset: Dataset) -> None:
    """Outside the normalisation, no energy falls, and the mean and scale are those of the recording."""
    clean = dataset.read_normalised(4)
    mixed = make_mixer(dataset)(clean, 4, seed=11)
    assert mixed is not None
    mean, inverse_std = (x.numpy() for x in dataset.statistics(4, "recording"))
    before, after = clean / inverse_std + mean, mixed / inverse_std + mean
    np.testing.assert_allclose(before, dataset.read(4), atol=1e-5)
    assert (after >= before - 1e-5).all() and (after > before + 1e-3).any()


def test_the_probability_and_the_share_of_noise_are_realised(dataset: Dataset) -> None:
    clean = dataset.read_normalised(0)
    mixer = make_mixer(dataset, probability=0.3)
    mixed = sum(mixer(clean, 0, seed) is not None for seed in range(600))
    assert 0.24 < mixed / 600 < 0.36
    silent = make_mixer(dataset, noise_share=1.0)
    silent.other_speech = lambda *_: pytest.fail("noise needs no other recording")  # type: ignore[method-assign,assignment]
    assert all(silent(clean, 0, seed) is not None for seed in range(50))


def test_noise_has_a_slope_over_the_bins_within_its_limit() -> None:
    slopes = [
        np.polyfit(np.arange(80), noise(np.random.default_rng(seed), 200, 80).mean(axis=0), 1)[0] for seed in range(40)
    ]
    assert max(np.abs(slopes)) < 0.06 and np.std(slopes) > 0.02


def test_features_without_energies_are_refused(tmp_path: Path) -> None:
    dataset = write_speakers(tmp_path / "standardized", standardized=True)
    with pytest.raises(UserError, match=r"masking.mix_probability needs mel energies"):
        make_mixer(dataset)
