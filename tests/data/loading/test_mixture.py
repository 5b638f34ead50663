"""Mixtures: every group has its share, everything stays a pure function, each dataset keeps its own statistics."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch

from common.config import from_dict
from common.errors import UserError
from data.features import FeatureSettings
from data.format.dataset import Dataset, open_dataset
from data.format.writer import DatasetWriter
from data.loading.loader import DataState, LoaderSettings, MixturePart, RowLoader
from data.loading.mixture import DatasetGroup, MixedCrops, groups
from data.loading.order import CropOrder
from data.loading.supervised import FixedCrops
from data.recording import Recording
from tests.made_datasets import noise

RNG = np.random.default_rng(0)
LANGUAGES = {"en": 60, "pl": 12, "pt": 6}


def make(folder: Path, languages: dict[str, int], seed: int, features: FeatureSettings | None = None) -> Dataset:
    rng = np.random.default_rng(seed)
    with DatasetWriter(folder, features or FeatureSettings()) as writer:
        for language, count in languages.items():
            for number in range(count):
                recording = Recording(f"{language}-{number:03d}", f"{language} {number}", language=language)
                writer.add(recording, noise(int(rng.integers(60, 390)), seed * 1000 + number) + seed)
        writer.finish()
    return open_dataset(folder)


@pytest.fixture(scope="module")
def one(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    return make(tmp_path_factory.mktemp("mixture") / "one", LANGUAGES, 1)


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    return make(tmp_path_factory.mktemp("mixture") / "two", {"en": 8, "de": 8}, 5)


def settings(*parts: tuple[Dataset, float], **changed: object) -> LoaderSettings:
    mixture = [MixturePart(dataset.location, weight) for dataset, weight in parts]
    base = LoaderSettings(
        mixture=mixture, row_frames=400, rows=4, min_seconds=0.5, max_seconds=3.9, num_workers=0, block_crops=40
    )
    return replace(base, **changed)  # type: ignore[arg-type]


def shares(chosen: LoaderSettings, epochs: int = 30) -> Counter[str]:
    """Share of the audio of every dataset and language, over many epochs."""
    dataset = chosen.open()
    order = chosen.crop_order(dataset)
    frames: Counter[str] = Counter()
    for epoch in range(epochs):
        crops = order.crops(epoch, np.arange(len(order)))
        for recording, length in zip(crops.recording.tolist(), (crops.stop - crops.start).tolist(), strict=True):
            frames[dataset.id(recording).rsplit("-", 1)[0]] += length
    total = sum(frames.values())
    return Counter({name: count / total for name, count in frames.items()})


def hours(dataset: Dataset) -> dict[str, float]:
    total = {name: frames for name, (_, frames) in dataset.totals("language").items()}
    return {name: frames / sum(total.values()) for name, frames in total.items()}


def test_weights_are_shares_of_the_audio(one: Dataset, two: Dataset) -> None:
    found = shares(settings((one, 1.0), (two, 3.0)))
    assert sum(share for name, share in found.items() if name.startswith("two/")) == pytest.approx(0.75, abs=0.02)
    inside = {name[4:]: share / 0.25 for name, share in found.items() if name.startswith("one/")}
    assert inside == pytest.approx(hours(one), abs=0.03)


@pytest.mark.parametrize("temperature", [0.0, 0.5, 1.0])
def test_temperature_increases_the_share_of_small_languages(one: Dataset, temperature: float) -> None:
    chosen = LoaderSettings(dataset=one.location, row_frames=400, max_seconds=3.9, language_temperature=temperature)
    expected = {name: share**temperature for name, share in hours(one).items()}
    expected = {name: share / sum(expected.values()) for name, share in expected.items()}
    found = shares(replace(chosen, min_seconds=0.5))
    assert dict(found) == pytest.approx(expected, abs=0.02)


def test_temperature_counts_a_language_over_all_datasets(one: Dataset, two: Dataset) -> None:
    group = DatasetGroup([one, two], [0.0, 0.0])
    found = groups(group, group.select(), 0.0)
    by_language: Counter[str] = Counter()
    for part in found:
        by_language[group.language(int(part.recordings[0]))] += part.weight
    assert dict(by_language) == pytest.approx(dict.fromkeys(("de", "en", "pl", "pt"), 0.25))
    assert sorted(np.concatenate([part.recordings for part in found]).tolist()) == list(range(len(group)))


def test_without_weights_and_temperature_a_mixture_is_one_order(one: Dataset, two: Dataset) -> None:
    dataset = settings((one, 0.0), (two, 0.0)).open()
    assert isinstance(settings((one, 0.0), (two, 0.0)).crop_order(dataset), CropOrder)


def test_a_group_uses_all_its_crops_before_repeating_any() -> None:
    small, large = CropOrder(np.full(7, 100), 100, 10, 1), CropOrder(np.full(50, 100), 100, 10, 2)
    mixed = MixedCrops([small, large], [1.0, 1.0], 3)
    seen = np.concatenate([mixed.crops(epoch, np.arange(len(mixed))).item for epoch in range(6)])
    counts = np.bincount(seen, minlength=57)
    assert counts[:7].sum() / counts.sum() == pytest.approx(0.5, abs=0.02)
    assert np.ptp(counts[:7]) <= 1 and np.ptp(counts[7:]) <= 1


def test_a_mixed_crop_is_a_pure_function_of_epoch_and_number() -> None:
    tables = [CropOrder(RNG.integers(50, 500, n), 200, 20, n) for n in (5, 40)]
    mixed = MixedCrops(tables, [2.0, 1.0], 9)
    whole = mixed.crops(4, np.arange(len(mixed)))
    for k in range(0, len(mixed), 7):
        fields = (whole.recording[k], whole.start[k], whole.stop[k], whole.seed[k])
        assert mixed.crop(4, k) == tuple(map(int, fields))


def test_texts_stay_with_their_crops() -> None:
    tables = [FixedCrops(np.arange(n), np.zeros(n), np.full(n, 50), [f"{n}:{i}" for i in range(n)], n) for n in (3, 11)]
    mixed = MixedCrops(tables, [1.0, 1.0], 0)
    seen = set()
    for epoch in range(8):
        crops = mixed.crops(epoch, np.arange(len(mixed)))
        texts = [mixed.text(item) for item in crops.item.tolist()]
        assert all(int(text.split(":")[1]) == r for text, r in zip(texts, crops.recording.tolist(), strict=True))
        seen.update(texts)
    assert mixed.labelled and seen == set(mixed.texts)
    found = {mixed.substitute(seed, 60, 0)[3] for seed in range(200)}  # type: ignore[index]
    assert found == set(range(14))


def test_batches_of_a_mixture_are_normalised_by_their_dataset(one: Dataset, two: Dataset) -> None:
    chosen = settings((one, 1.0), (two, 1.0))
    dataset = chosen.open()
    batches = [u[0] for u in islice(RowLoader(dataset, chosen.crop_order(dataset), chosen, multiple=4, row_gap=4), 10)]
    by_name = {d.name: d for d in (one, two)}
    seen = set()
    for batch in batches:
        for row, ids in enumerate(batch.ids):
            for slot, name in enumerate(ids):
                place, crop = name.rsplit(":", 1)
                folder, id = place.split("/")
                start, stop = map(int, crop.split("-"))
                source = by_name[folder]
                expected = source.read_normalised(int(source.select(ids=[id])[0]), start, stop)
                first_frame = int(batch.segments.start[row, slot])
                values = batch.log_mel[row, first_frame : first_frame + stop - start]
                assert np.array_equal(values.numpy(), expected)
                seen.add(folder)
    assert seen == {"one", "two"}


def test_a_mixture_is_resumed_exactly_and_not_with_other_weights(one: Dataset, two: Dataset) -> None:
    chosen = settings((one, 1.0), (two, 1.0))
    dataset = chosen.open()

    def loader(state: DataState | None = None, loader_settings: LoaderSettings = chosen) -> RowLoader:
        return RowLoader(
            dataset,
            loader_settings.crop_order(loader_settings.open()),
            loader_settings,
            multiple=4,
            row_gap=4,
            state=state,
        )

    whole = [step[0] for step in islice(loader(), 12)]
    rest = [step[0] for step in islice(loader(whole[4].state), 7)]
    assert all(torch.equal(a.log_mel, b.log_mel) for a, b in zip(whole[5:], rest, strict=True))
    with pytest.raises(UserError, match="share of group 0"):
        loader(whole[4].state, settings((one, 1.0), (two, 2.0)))


def test_invalid_mixtures_are_refused_by_name(one: Dataset, two: Dataset, tmp_path: Path) -> None:
    other = make(tmp_path / "other", {"en": 2}, 2, FeatureSettings(log_floor=1e-5))
    for chosen, message in (
        (settings((one, 1.0), (other, 1.0)), "log_floor"),
        (settings((one, 1.0), (one, 1.0)), "same dataset twice"),
        (settings((one, 1.0), (two, 0.0)), "weight above 0 to every part"),
        (settings((one, 1.0), dataset="x"), "give one of them"),
        (LoaderSettings(), "give one of them"),
    ):
        with pytest.raises(UserError, match=message):
            chosen.open()
    with pytest.raises(UserError, match="weight of x is -1"):
        MixturePart("x", -1)
    with pytest.raises(UserError, match="language_temperature is 2: expected a number from 0 to 1"):
        from_dict(LoaderSettings, {"language_temperature": 2})
