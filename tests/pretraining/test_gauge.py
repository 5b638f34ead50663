"""Figures of the gauge on planted targets with known answers."""

import math
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bestrq.pretraining.gauge import (
    UNKNOWN,
    FrameLabels,
    codebook_figures,
    corrected_entropy,
    entropy,
    held_out_accuracy,
    information,
    judge,
    mutual_information,
    purities,
    repeat_share,
    run_lengths,
    silent_frames,
)

RECORDINGS, FRAMES, PHONES, SPEAKERS = 120, 60, 20, 5
RECORDING = np.repeat(np.arange(RECORDINGS), FRAMES)
N = len(RECORDING)


@pytest.fixture(scope="module")
def labels() -> FrameLabels:
    """Phones of two to four frames, phone 0 in a fifth of the places as the pause; speakers by recording."""
    rng = np.random.default_rng(0)
    phones = rng.choice(PHONES, N, p=[0.2, *[0.8 / (PHONES - 1)] * (PHONES - 1)])
    phone = np.repeat(phones, rng.integers(2, 5, N))[:N]
    speaker = rng.integers(0, SPEAKERS, RECORDINGS)[RECORDING]
    return FrameLabels(RECORDING, phone == 0, 40.0, phone, 0, speaker, speaker % 2)


def figures(codes: np.ndarray, num_codes: int, labels: FrameLabels) -> dict:
    return judge(codes.reshape(N, -1), num_codes, labels)


def test_mutual_information_equals_the_sum_over_all_pairs() -> None:
    rng = np.random.default_rng(1)
    a = rng.integers(0, 4, 500)
    b = (a + rng.integers(0, 3, 500)) % 5
    expected = 0.0
    for code in range(4):
        for label in range(5):
            joint = np.mean((a == code) & (b == label))
            if joint:
                expected += joint * math.log(joint / np.mean(a == code) / np.mean(b == label))
    assert mutual_information(a, b) == pytest.approx(expected, abs=1e-12)
    assert entropy(np.array([1, 1, 2, 0])) == pytest.approx(1.5 * math.log(2))


def test_the_corrected_entropy_has_less_bias_than_the_plug_in() -> None:
    rng = np.random.default_rng(2)
    samples = [np.bincount(rng.integers(0, 50, 200), minlength=80) for _ in range(200)]
    plain = np.mean([entropy(counts) for counts in samples]) - math.log(50)
    corrected = np.mean([corrected_entropy(counts) for counts in samples]) - math.log(50)
    assert plain < -0.1 and abs(corrected) < 0.03


def test_the_phones_themselves_have_all_phone_information(labels: FrameLabels) -> None:
    found = figures(labels.phone, PHONES, labels)
    for name in ("pnmi", "pnmi_adjusted", "speech_pnmi_adjusted", "phone_purity", "cluster_purity", "phone_accuracy"):
        assert found[name] == pytest.approx(1.0, abs=1e-9), name
    assert found["warnings"] == []
    assert found["run_ms"] == pytest.approx(found["phone_run_ms"])


@pytest.mark.parametrize("num_codes, run", [(10, 1), (300, 1), (4000, 1), (10, 8), (300, 8)])
def test_random_codes_have_no_information_within_the_interval(labels: FrameLabels, num_codes: int, run: int) -> None:
    """Also with runs, for which a shuffle of single frames would find information."""
    codes = np.repeat(np.random.default_rng(3).integers(0, num_codes, N), run)[:N]
    found = figures(codes, num_codes, labels)
    for name in ("pnmi", "speech_pnmi", "speaker_nmi", "language_nmi"):
        assert found[f"{name}_adjusted_low"] <= 0.005 and found[f"{name}_adjusted_high"] >= -0.005, name
        assert abs(found[f"{name}_adjusted"]) < (0.03 if run == 1 else 0.06), name
    assert found["phone_accuracy"] < found["phone_accuracy_chance"] + 0.02
    assert any(warning.startswith("no phones") for warning in found["warnings"])


def test_the_plain_pnmi_of_many_random_codes_is_large_and_its_baseline_equals_it(labels: FrameLabels) -> None:
    found = figures(np.random.default_rng(4).integers(0, 4000, N), 4000, labels)
    assert found["pnmi"] > 0.5 and found["pnmi_shuffled"] == pytest.approx(found["pnmi"], abs=0.01)


def test_figures_do_not_depend_on_the_numbering_of_codes_and_phones(labels: FrameLabels) -> None:
    rng = np.random.default_rng(5)
    codes = (labels.phone * 3 + rng.integers(0, 3, N) + (rng.random(N) < 0.2) * 7) % 70
    renamed = FrameLabels(
        labels.recording, labels.silent, 40.0, rng.permutation(PHONES)[labels.phone], UNKNOWN,
        rng.permutation(SPEAKERS)[labels.speaker], labels.language,
    )  # fmt: skip
    first = figures(codes, 70, FrameLabels(*[*vars(labels).values()][:4], UNKNOWN, labels.speaker, labels.language))
    second = figures(rng.permutation(70)[codes], 70, renamed)
    assert {name: value for name, value in first.items() if name not in ("codebooks", "warnings")} == pytest.approx(
        {name: value for name, value in second.items() if name not in ("codebooks", "warnings")}, abs=1e-9
    )


def test_merging_codes_never_adds_plain_information(labels: FrameLabels) -> None:
    codes = np.random.default_rng(6).integers(0, 60, N) * 2 + labels.phone % 2
    assert mutual_information(codes // 2, labels.phone) <= mutual_information(codes, labels.phone) + 1e-12


def test_speakers_as_codes_are_flagged(labels: FrameLabels) -> None:
    found = figures(labels.speaker, SPEAKERS, labels)
    assert found["speaker_nmi_adjusted"] == pytest.approx(1.0) and found["speaker_accuracy"] == 1.0
    assert any(warning.startswith("dominated by speakers") for warning in found["warnings"])
    assert any(warning.startswith("too slow") for warning in found["warnings"])


def test_codes_with_the_speaker_are_flagged_even_if_they_have_all_phones(labels: FrameLabels) -> None:
    found = figures(labels.phone * SPEAKERS + labels.speaker, PHONES * SPEAKERS, labels)
    assert found["pnmi_adjusted"] == pytest.approx(1.0)
    assert any(warning.startswith("dominated by speakers") for warning in found["warnings"])


def test_silence_as_codes_is_flagged(labels: FrameLabels) -> None:
    found = figures(labels.silent.astype(np.int64), 2, labels)
    assert found["silence_information"] == pytest.approx(1.0)
    assert any(warning.startswith("dominated by silence") for warning in found["warnings"])


def test_codes_spent_within_silence_are_flagged(labels: FrameLabels) -> None:
    """One code for all speech, and a hundred for the noise of pauses."""
    codes = np.where(labels.silent, 1 + np.random.default_rng(7).integers(0, 100, N), 0)
    found = figures(codes, 101, labels)
    assert found["silence_codes"] > 0.98
    assert any(warning.startswith("dominated by silence") for warning in found["warnings"])


def test_a_collapsed_codebook_is_flagged(labels: FrameLabels) -> None:
    codes = np.where(np.random.default_rng(8).random(N) < 0.001, labels.phone, 500)
    assert figures(codes, 1024, labels)["warnings"][0].startswith("collapse")


def test_healthy_codes_are_not_flagged(labels: FrameLabels) -> None:
    """Three variants of each phone, which change within it now and then."""
    variant = np.repeat(np.random.default_rng(9).integers(0, 3, N), 3)[:N]
    found = figures(labels.phone * 3 + variant, 3 * PHONES, labels)
    assert found["warnings"] == [] and found["pnmi_adjusted"] == pytest.approx(1.0)


def test_independent_draws_are_too_fast(labels: FrameLabels) -> None:
    codes = labels.phone * 200 + np.random.default_rng(10).integers(0, 200, N)
    assert any(warning.startswith("too fast") for warning in figures(codes, 200 * PHONES, labels)["warnings"])


def test_the_interval_covers_the_figure_of_the_whole_population() -> None:
    """19 of 20 samples of recordings, within binomial bounds; the population has a known share of 0.5 codes = phone."""
    rng = np.random.default_rng(11)
    phone = rng.integers(0, 8, (4000, 30))
    codes = np.where(rng.random(phone.shape) < 0.6, phone, rng.integers(0, 8, phone.shape))
    truth = mutual_information(codes.ravel(), phone.ravel()) / math.log(8)
    covered = 0
    for draw in range(60):
        chosen = np.random.default_rng(draw).choice(4000, 80, replace=False)
        found = information(codes[chosen].ravel(), phone[chosen].ravel(), np.repeat(np.arange(80), 30), draw)
        assert found is not None
        covered += found.low <= truth <= found.high
    assert covered >= 51  # 57 expected; fewer than 51 has a probability below 0.5 %


def test_held_out_accuracy_equals_chance_for_memorised_labels() -> None:
    """Unique codes determine the label of their frame, but predict nothing on other recordings."""
    rng = np.random.default_rng(12)
    labels, codes = rng.integers(0, 4, 2000), np.arange(2000)[:, None]
    accuracy, chance = held_out_accuracy(codes, labels, np.arange(2000), np.arange(2000) // 100 % 2, 2000)
    assert purities(codes[:, 0], labels)[0] == 1.0
    assert accuracy == pytest.approx(chance, abs=0.001)


def test_two_codebooks_predict_more_than_one() -> None:
    rng = np.random.default_rng(13)
    labels = rng.integers(0, 4, 4000)
    codes = np.stack([labels // 2, labels % 2], axis=1)
    folds = np.arange(4000) % 2
    assert held_out_accuracy(codes, labels, np.arange(4000), folds, 2)[0] == 1.0
    assert held_out_accuracy(codes[:, :1], labels, np.arange(4000), folds, 2)[0] < 0.6


def test_the_halves_of_a_recording_identify_it_by_its_channel() -> None:
    rng = np.random.default_rng(14)
    recording = np.repeat(np.arange(30), 100)
    own = (recording[:, None] * 3 + rng.integers(0, 3, (3000, 1))) % 90
    labels = FrameLabels(recording, np.zeros(3000, bool), 40.0)
    assert judge(own, 90, labels)["recording_accuracy"] == 1.0
    assert judge(rng.integers(0, 90, (3000, 1)), 90, labels)["recording_accuracy"] < 0.2


@settings(max_examples=50, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 2), st.integers(0, 2)), min_size=1, max_size=40))
def test_runs_end_with_their_recording(pairs: list[tuple[int, int]]) -> None:
    recording = np.sort(np.array([r for r, _ in pairs]))
    labels = np.array([label for _, label in pairs])
    runs = [1]
    for (r, a), (s, b) in pairwise(zip(recording, labels, strict=True)):
        if (r, a) == (s, b):
            runs[-1] += 1
        else:
            runs.append(1)
    assert run_lengths(labels, recording).tolist() == runs
    repeated = [a == b for (r, a), (s, b) in pairwise(zip(recording, labels, strict=True)) if r == s]
    assert repeat_share(labels, recording) == pytest.approx(np.mean(repeated) if repeated else math.nan, nan_ok=True)


def test_pauses_are_silent_and_speech_and_even_noise_are_not() -> None:
    energy = np.where(np.arange(200) % 50 < 10, -8.0, 2.0) + np.random.default_rng(15).normal(0, 0.5, 200)
    assert (silent_frames(energy) == (np.arange(200) % 50 < 10)).all()
    assert not silent_frames(np.random.default_rng(16).normal(0, 0.3, 200)).any()


def test_frames_of_unknown_phones_do_not_count(labels: FrameLabels) -> None:
    unknown = np.random.default_rng(17).random(N) < 0.3
    phone = np.where(unknown, UNKNOWN, labels.phone)
    wrong = np.where(unknown, (labels.phone + 1) % PHONES, labels.phone)
    partly = FrameLabels(labels.recording, labels.silent, 40.0, phone, 0)
    found = codebook_figures(wrong, PHONES, partly)
    assert found["pnmi"] == pytest.approx(1.0) and found["phone_purity"] == 1.0


def test_a_single_recording_has_no_intervals_and_no_undefined_figures() -> None:
    labels = FrameLabels(np.zeros(50, np.int64), np.zeros(50, bool), 40.0, np.arange(50) % 3, 0, np.zeros(50, np.int64))
    found = judge(np.arange(50)[:, None] % 5, 5, labels)
    assert "pnmi" not in found and "phone_accuracy" not in found
    assert all(math.isfinite(value) for value in found.values() if isinstance(value, float))


def test_labels_of_another_length_are_an_error(labels: FrameLabels) -> None:
    with pytest.raises(ValueError, match="do not fit"):
        judge(np.zeros((N - 1, 1), np.int64), 2, labels)
