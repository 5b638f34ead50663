"""tools/gauge.py and tools/gauge_correlation.py on small datasets and exports."""

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import torch

from bestrq.model.conformer import ConformerEncoder, EncoderSettings
from bestrq.pretraining.gauge import UNKNOWN
from bestrq.pretraining.gauge_targets import TargetSettings
from bestrq.pretraining.layer_features import pad_rows
from bestrq.pretraining.objective import MaskedRows, mask_rows
from bestrq.pretraining.quantizer import RandomProjectionQuantizer
from bestrq.report.result_files import FORMAT_VERSION
from bestrq.training.export import write_export
from bestrq.training.process import World
from common.config import parse, to_dict
from common.errors import UserError
from common.text import label_text
from data.corpora.espeak import Phone
from data.format.dataset import Dataset, open_dataset
from data.tokenizer import CharTokenizer
from pipelines.gauge_exports import CTCOutputs, TeacherCodes
from pipelines.gauge_phones import PhoneSettings, _align, find_phones, intervals, warp
from pipelines.gauge_sample import (
    Piece,
    SampleSettings,
    choose_pieces,
    draw_samples,
    frame_labels,
    phone_ids,
    read_log_mel,
)
from pipelines.pretraining import Config as PretrainConfig
from pipelines.pretraining import make_adaptation, open_teacher
from pipelines.probe_data import ProbeDataSettings, read_times
from tests.made_results import completed
from tests.scripts.test_evaluate import make_export
from tests.tiny import make_dataset
from tools import gauge, gauge_correlation

ENCODER = EncoderSettings(dim=16, num_layers=3, num_heads=2, feedforward_dim=24, kernel_size=5, subsampling_channels=4)


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    return open_dataset(make_dataset(tmp_path_factory.mktemp("gauge") / "tiny", recordings=80))


@pytest.fixture(scope="module")
def pretrained(dataset: Dataset, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("exports") / "pretrained"
    torch.manual_seed(0)
    tensors = {f"encoder.{name}": value for name, value in ConformerEncoder(ENCODER).state_dict().items()}
    config = {
        "kind": "pretrained", "encoder": to_dict(ENCODER), "features": dataset.features.to_dict(),
        "feature_hash": dataset.features.hash(), "normalisation": "recording",
    }  # fmt: skip
    write_export(folder, tensors, config, "a card")
    return folder


def whole(dataset: Dataset, *recordings: int) -> list[Piece]:
    return [Piece(i, 0, int(dataset.frames[i])) for i in recordings]


# ---- sample


def test_pieces_cover_each_frame_once_and_stay_together(dataset: Dataset) -> None:
    pieces = choose_pieces(dataset, range(len(dataset)), minutes=1e6, max_seconds=2, seed=0)
    frames = {(piece.recording, frame) for piece in pieces for frame in range(piece.start, piece.stop)}
    assert len(frames) == sum(piece.stop - piece.start for piece in pieces)
    assert len(frames) > 0.9 * dataset.total_frames  # without remainders below half a second
    order = [piece.recording for piece in pieces]
    assert sum(a != b for a, b in zip(order, order[1:], strict=False)) == len(set(order)) - 1
    assert order != sorted(order)


def test_the_sample_is_reproducible_and_has_the_minutes_asked_for(dataset: Dataset) -> None:
    everything = range(len(dataset))
    first = choose_pieces(dataset, everything, 0.5, 30, seed=1)
    assert first == choose_pieces(dataset, everything, 0.5, 30, seed=1)
    assert first != choose_pieces(dataset, everything, 0.5, 30, seed=2)
    assert 30 <= sum(piece.stop - piece.start for piece in first) / 100 <= 30 + 9


def test_no_recording_both_fits_and_judges(dataset: Dataset) -> None:
    settings = SampleSettings(dataset="x", split="", fit_split="", minutes=0.5, fit_minutes=1)
    sample, fitting = draw_samples(dataset, settings, 0)
    assert not {piece.recording for piece in sample} & {piece.recording for piece in fitting}
    with pytest.raises(UserError, match="all its recordings judge"):
        draw_samples(dataset, SampleSettings(dataset="x", split="dev", fit_split="dev", minutes=100), 0)


def test_the_phone_of_a_frame_is_that_at_its_centre() -> None:
    phones = [Phone("a", 1.00, 1.055), Phone("b", 1.055, 1.2), Phone("?", 1.24, 1.3)]
    names: dict[str, int] = {"": 0}
    # Centres of stacks of four frames of 10 ms from frame 100: 1.015, 1.055, ..., 1.255.
    ids = phone_ids(phones, Piece(0, 100, 128), 4, 10.0, names)
    assert ids.tolist() == [1, 2, 2, 2, 2, 0, UNKNOWN] and names == {"": 0, "a": 1, "b": 2}
    assert phone_ids(None, Piece(0, 0, 11), 4, 10.0, names).tolist() == [UNKNOWN] * 2


def test_labels_number_recordings_in_the_order_of_the_sample(dataset: Dataset) -> None:
    pieces = [Piece(7, 0, 90), Piece(7, 90, 100), Piece(2, 0, 41)]
    labels, symbols = frame_labels(dataset, pieces, [[Phone("x", 0.0, 5.0)], None, []], 4)
    assert labels.recording.tolist() == [0] * 24 + [1] * 10
    assert labels.phone is not None and labels.phone.tolist() == [1] * 22 + [UNKNOWN] * 2 + [0] * 10
    assert symbols == ["", "x"] and labels.speaker is None and labels.frame_ms == 40


# ---- phones


def test_the_path_of_least_cost_equals_a_search_over_all_paths() -> None:
    rng = np.random.default_rng(0)

    def best(cost: np.ndarray, i: int, j: int) -> tuple[float, list[tuple[int, int]]]:
        if i == 0 and j == 0:
            return cost[0, 0], [(0, 0)]
        options = []
        for di, dj in ((1, 1), (1, 0), (0, 1)):
            if i >= di and j >= dj:
                total, path = best(cost, i - di, j - dj)
                options.append((total + cost[i, j] * (di + dj), [*path, (i, j)]))
        return min(options)

    for shape in ((4, 4), (5, 3), (3, 6), (1, 4), (4, 1)):
        cost = rng.random(shape)
        _, path = best(cost, shape[0] - 1, shape[1] - 1)  # the band is wider than these matrices
        expected = [np.mean([j for i, j in path if i == row]) for row in range(shape[0])]
        np.testing.assert_allclose(warp(cost), expected)


def test_the_path_follows_a_stretched_copy() -> None:
    rng = np.random.default_rng(1)
    vectors = rng.normal(size=(60, 8))
    places = np.sort(rng.integers(0, 60, 90))
    places[0], places[-1] = 0, 59
    cost = np.square(vectors[places][:, None] - vectors[None]).sum(axis=2)
    # Columns that no row has are shared by their neighbours.
    assert np.abs(warp(cost) - places).max() <= 2 and np.abs(warp(cost) - places).mean() < 0.1


def test_long_low_energy_runs_become_pauses() -> None:
    silent = np.array([0, 0, 1, 1, 1, 1, 0, 1, 1, 0], bool)
    phones = intervals(list("aabbbbbccc"), silent, 1.0, 0.04)
    assert [(p.symbol, round(p.start, 2), round(p.end, 2)) for p in phones] == [
        ("a", 1.0, 1.08), ("", 1.08, 1.24), ("b", 1.24, 1.28), ("c", 1.28, 1.4)
    ]  # fmt: skip


def perfect_outputs(labels: list[int], vocab_size: int) -> torch.Tensor:
    log_probs = torch.full((len(labels), vocab_size), -20.0)
    log_probs[torch.arange(len(labels)), torch.tensor(labels)] = 0.0
    return log_probs


def test_characters_are_aligned_to_their_frames_and_other_texts_are_refused(dataset: Dataset) -> None:
    tokenizer = CharTokenizer(list(" abcdefghijklmnopqrstuvwxyz"))
    model = cast(CTCOutputs, SimpleNamespace(tokenizer=tokenizer))
    piece = whole(dataset, 3)[0]
    text = label_text(dataset.text(3) or "", "en")
    ids = tokenizer.encode(text)
    frames = (piece.stop - piece.start) // 4
    labels = np.zeros(frames, np.int64)
    places = np.linspace(1, frames - 2, len(ids)).astype(int)
    labels[places] = ids
    phones = _align(dataset, piece, perfect_outputs(labels.tolist(), 28), model, 4)
    assert phones is not None
    letters = text.replace(" ", "")
    spoken = [place for place, id in zip(places, ids, strict=True) if id != 1]
    for letter, place in zip(letters, spoken, strict=True):
        inside = [p.symbol for p in phones if p.start <= place * 0.04 + 0.02 < p.end]
        assert inside == [letter] or inside == [""]
    assert {p.symbol for p in phones} <= {*letters, ""}
    assert _align(dataset, piece, perfect_outputs(np.roll(labels, frames // 2).tolist(), 28), model, 4) is None


def test_phones_in_word_times_are_the_default_of_a_dataset_with_words(dataset: Dataset) -> None:
    pieces = whole(dataset, 1, 2)
    phones, origin = find_phones(dataset, pieces, PhoneSettings())
    assert phones is not None and "stretched to the dataset's word times (100% of the sample)" in origin
    words = dataset.words(1) or []
    assert phones[0] is not None
    assert phones[0][0].start == words[0].start and phones[0][-1].end == pytest.approx(words[-1].end)
    assert find_phones(dataset, pieces, PhoneSettings("none")) == (None, "none")


def test_phones_of_synthetic_speech_are_found_by_dynamic_time_warping(tmp_path: Path) -> None:
    """At least three quarters of the frames get the exact phone (measured: 90 %, docs/targets.md)."""
    from data.prepare.prepare import main as prepare

    folder = tmp_path / "synthetic"
    prepare([
        "synthetic", "--languages", '["cs"]', "--train_hours", "0", "--dev_utterances", "3", "--test_utterances", "0",
        "--test_long_recordings", "0", "--out", str(folder),
    ])  # fmt: skip
    dataset = open_dataset(folder)
    pieces = whole(dataset, *range(3))
    exact, origin = find_phones(dataset, pieces, PhoneSettings())
    assert origin.startswith("exact")
    times = read_times(dataset, ProbeDataSettings(phones="exact"), range(3))
    assert exact is not None and times == [[p for p in phones or [] if p.symbol not in ("", "?")] for phones in exact]
    assert times != read_times(dataset, ProbeDataSettings(), range(3)) and all(times)
    warped, _ = find_phones(dataset, pieces, PhoneSettings("synthesis"))
    assert exact is not None and warped is not None
    names: dict[str, int] = {"": 0}
    pairs = [
        (phone_ids(a, piece, 1, 10.0, names), phone_ids(b, piece, 1, 10.0, names))
        for a, b, piece in zip(exact, warped, pieces, strict=True)
    ]
    true, found = (np.concatenate(part) for part in zip(*pairs, strict=True))
    assert (true == found)[true != UNKNOWN].mean() > 0.75
    # Shifted by a fifth of a second, they are wrong: the test can fail.
    assert (np.roll(true, 20) == found).mean() < 0.4


@pytest.mark.parametrize("settings, message", [
    ({"source": "characters"}, "phones.aligner is missing"),
    ({"source": "words", "aligner": "x"}, "no effect"),
])  # fmt: skip
def test_phone_settings_that_do_not_fit_are_errors(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        PhoneSettings(**settings)


# ---- exports


@pytest.mark.parametrize("spec, options", [
    ("random,codebook_size=64,num_codebooks=2", ["--quantizer.codebook_size=64", "--quantizer.num_codebooks=2"]),
    ("pca,codebook_size=64,whitening=0.5,seed=3",
     ["--quantizer.codebook_size=64", "--quantizer.whitening=0.5", "--quantizer.seed=3", "--quantizer.pca_steps=1"]),
    ("refined,codebook_size=32,refinements=2", ["--quantizer.codebook_size=32", "--quantizer.pca_steps=1",
     "--quantizer.refine_steps=[2,3]", "--quantizer.refine_window=1"]),
    ("refined,codebook_size=32,refinements=2,projection=random",
     ["--quantizer.codebook_size=32", "--quantizer.refine_steps=[1,2]", "--quantizer.refine_window=1"]),
])  # fmt: skip
def test_codes_are_those_of_the_quantizer_of_pretraining(spec: str, options: list[str], dataset: Dataset) -> None:
    """The reference is the code of the training loop, every step with all frames of the fitting pieces as targets."""
    fitting, sample = whole(dataset, *range(20)), whole(dataset, *range(20, 30))
    data = SampleSettings(dataset="x")
    (settings,) = gauge.read_targets([spec]).values()
    found = gauge.compute_codes(settings, None, dataset, data, fitting, sample)

    config = parse(PretrainConfig, [f"--data.dataset={dataset.location}", "--run.folder=unused", *options])
    quantizer = RandomProjectionQuantizer(config.quantizer, config.encoder.stride * config.encoder.num_mels)
    adaptation = make_adaptation(config, quantizer)

    def rows_of(pieces: list[Piece]) -> MaskedRows:
        rows, segments = pad_rows([read_log_mel(dataset, piece, "recording") for piece in pieces], 4)
        mask = torch.ones(rows.shape[:2], dtype=torch.bool)
        segments = replace(segments, seed=torch.zeros_like(segments.start))
        return mask_rows(rows, mask, segments, quantizer, 4, noise_std=0.1)

    for step in range(1, 4):
        if adaptation:
            rows = rows_of(fitting)
            adaptation.observe(step, rows.stacks, rows.targets)
            adaptation.update(step, World())
    expected = rows_of(sample).targets.numpy()
    np.testing.assert_array_equal(found.values, expected)
    assert found.num_codes == config.quantizer.codebook_size and len(np.unique(expected)) > 10


@pytest.mark.parametrize("spec, options", [
    ("clusters,layer=2,clusters=20", ["--targets.kind=clusters", "--targets.layer=2", "--targets.clusters=20"]),
    ("clusters,clusters=20,seed=6", ["--targets.kind=clusters", "--targets.clusters=20", "--targets.seed=6"]),
    ("ctc_labels", ["--targets.kind=ctc_labels"]),
    ("ctc_labels,blank=keep", ["--targets.kind=ctc_labels", "--targets.blank=keep"]),
    ("ctc_labels,blank=without", ["--targets.kind=ctc_labels", "--targets.blank=without"]),
])  # fmt: skip
def test_codes_are_those_of_the_teacher_of_pretraining(
    spec: str, options: list[str], dataset: Dataset, pretrained: Path, tmp_path: Path
) -> None:
    fitting, sample = whole(dataset, *range(20)), whole(dataset, *range(20, 30))
    export = make_export(tmp_path / "ctc", dataset.features) if spec.startswith("ctc") else pretrained
    (settings,) = gauge.read_targets([f"{spec},export={export}"]).values()
    data = SampleSettings(dataset="x")
    found = gauge.compute_codes(settings, TeacherCodes(settings, dataset), dataset, data, fitting, sample)

    required = [f"--data.dataset={dataset.location}", "--run.folder=unused", "--targets.source=teacher"]
    config = parse(PretrainConfig, [*required, f"--targets.export={export}", *options])
    teacher = open_teacher(config, dataset, World())
    assert teacher is not None
    if config.targets.kind == "clusters":
        longest_first = sorted(fitting, key=lambda piece: -piece.stop)  # the order of the frames determines the start
        rows = [pad_rows([read_log_mel(dataset, piece, "recording") for piece in longest_first], 4)]
        teacher.estimate(rows, config.targets.seed, World())
    expected = np.concatenate([
        teacher(*pad_rows([read_log_mel(dataset, piece, "recording")], 4))[: (piece.stop - piece.start) // 4].numpy()
        for piece in sample
    ])  # fmt: skip
    # Rows of another shape differ in rounding.
    assert len(found.values) == len(expected) and (found.values[:, 0] == expected).mean() > 0.998
    assert found.num_codes == teacher.classes and len(np.unique(expected)) > 2


def test_missing_layers_and_other_features_are_errors(dataset: Dataset, pretrained: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="targets.layer is 4: the blocks .* are 1 to 3"):
        TeacherCodes(TargetSettings(kind="clusters", export=str(pretrained), layer=4), dataset)
    with pytest.raises(UserError, match="has no CTC head"):
        TeacherCodes(TargetSettings(kind="ctc_labels", export=str(pretrained)), dataset)
    other = open_dataset(make_dataset(tmp_path / "other", recordings=10, high_hz=4000.0))
    with pytest.raises(UserError, match="high_hz"):
        TeacherCodes(TargetSettings(kind="clusters", export=str(pretrained)), other)


# ---- command


def test_one_command_compares_all_kinds_and_writes_the_report(
    dataset: Dataset, pretrained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ctc = make_export(tmp_path / "ctc", dataset.features)
    gauge.main([
        dataset.location, "--data.split=", "--data.minutes=1", "--data.fit_minutes=1", f"--out={tmp_path / 'out'}",
        "--targets", "random,codebook_size=64,num_codebooks=2,name=random 2", "pca,codebook_size=64,whitening=0.5",
        "refined,codebook_size=32,name=refined", "kmeans,clusters=32", "mfcc,clusters=20",
        f"clusters,export={pretrained},layer=2,clusters=20,name=layer 2", f"ctc_labels,export={ctc},name=ctc",
    ])  # fmt: skip
    results = json.loads((tmp_path / "out/gauge.json").read_text())
    names = list(results["targets"])
    assert names[0] == "random 2" and len(names) == 7 and len(results["targets"]["random 2"]["codebooks"]) == 2
    for name, row in results["targets"].items():
        assert 0 <= row["usage"] <= 1 and row["pnmi"] > row["pnmi_adjusted"] - 1e-9, name
    # The words of this dataset are spectra in noise: clusters find their phones, weights at random find less.
    assert results["targets"]["kmeans,clusters=32"]["pnmi_adjusted_low"] > 0.1
    page = (tmp_path / "out/gauge.html").read_text()
    assert "http://" not in page and "https://" not in page.replace("http: https: data:", "")
    assert all(name in page for name in ("random 2", "layer 2", "Predicted trouble"))
    for picture in ("information.png", "usage.png", "example.png", "phones-1.png", "phones-7.png"):
        assert (tmp_path / "out" / picture).read_bytes().startswith(b"\x89PNG")
    printed = capsys.readouterr().out
    assert "PNMI" in printed and "layer 2" in printed


@pytest.mark.parametrize("texts, message", [
    (["pca", "pca"], "given twice"),
    (["pca,whitening"], "write KIND,field=value"),
    (["pca,whitening=2"], "whitening is 2"),
    (["pac"], "expected one of random, pca"),
    (["pca,size=3"], "unknown field"),
    (["clusters"], "lacks its export"),
])  # fmt: skip
def test_wrong_targets_are_quoted(texts: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        gauge.read_targets(texts)


def test_targets_that_do_not_fit_are_errors_before_any_work(
    dataset: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gauge, "find_phones", lambda *_: pytest.fail("work has started"))
    start = [dataset.location, "--data.split=", "--data.minutes=0.5", "--data.fit_minutes=0.1", "--targets", "random"]
    with pytest.raises(UserError, match="'mfcc,clusters=5000' has 5000 codes, but is fitted on"):
        gauge.main([*start, "mfcc,clusters=5000"])
    with pytest.raises(UserError, match="no export"):
        gauge.main([*start, f"clusters,export={tmp_path / 'missing'}"])


def test_a_missing_dataset_is_an_error() -> None:
    with pytest.raises(UserError, match="data.dataset is missing"):
        gauge.main(["--out", "x"])


# ---- correlation with error rates


def planted(tmp_path: Path, count: int = 9) -> list[str]:
    rng = np.random.default_rng(0)
    cer = {f"t{k}": 0.5 - 0.03 * k for k in range(count)}
    targets = {
        f"t{k}": {"pnmi_adjusted": 0.1 * k, "entropy": float(rng.normal()), "warnings": [], "frames": 5, "seconds": k}
        for k in range(count + 1)
    }
    (tmp_path / "gauge.json").write_text(json.dumps({"targets": targets}))
    (tmp_path / "cer.json").write_text(json.dumps(cer))
    return ["--gauge", str(tmp_path / "gauge.json"), "--cer", str(tmp_path / "cer.json")]


def test_the_correlation_of_a_planted_figure_is_found(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    gauge_correlation.main([*planted(tmp_path), "--out", str(tmp_path / "out.json")])
    found = json.loads((tmp_path / "out.json").read_text())
    # A constant has no correlation, and processing time is no property of a target.
    assert set(found["spearman"]) == {"pnmi_adjusted", "entropy"}
    row = found["spearman"]["pnmi_adjusted"]
    assert row["rho"] == pytest.approx(-1.0) and row["high"] <= -0.99
    assert abs(found["spearman"]["entropy"]["rho"]) < 0.8 and len(found["targets"]) == 9
    assert capsys.readouterr().out.splitlines()[1].startswith("pnmi_adjusted")


def test_error_rates_are_means_over_evaluations(tmp_path: Path) -> None:
    gauge_option = planted(tmp_path)[:2]
    pairs = []
    for k in range(8):
        for seed, cer in enumerate((0.1 + 0.01 * k, 0.3)):
            folder = tmp_path / f"{k}-{seed}"
            folder.mkdir()
            results = {"format_version": FORMAT_VERSION, "recordings": [], "scores": {"all": {"cer": cer}}}
            (folder / "results.json").write_text(json.dumps(completed(results)))
        pairs.append(f"t{k}={tmp_path / f'{k}-0'},{tmp_path / f'{k}-1'}")
    gauge_correlation.main([*gauge_option, "--results", *pairs, "--out", str(tmp_path / "out.json")])
    found = json.loads((tmp_path / "out.json").read_text())
    assert found["cer"] == {f"t{k}": pytest.approx(0.2 + 0.005 * k) for k in range(8)}
    assert found["spearman"]["pnmi_adjusted"]["rho"] == pytest.approx(1.0)
    with pytest.raises(UserError, match="results 't1': write NAME=FOLDER"):
        gauge_correlation.main([*gauge_option, "--results", "t1"])
    with pytest.raises(UserError, match="give one of --cer FILE.json and --results"):
        gauge_correlation.main([*planted(tmp_path), "--results", *pairs])


def test_too_few_targets_and_wrong_rates_are_errors(tmp_path: Path) -> None:
    arguments = planted(tmp_path, count=7)
    with pytest.raises(UserError, match="7 targets have figures and an error rate, at least 8"):
        gauge_correlation.main(arguments)
    arguments = planted(tmp_path)
    with pytest.raises(UserError, match="figures: not all targets have wer"):
        gauge_correlation.main([*arguments, "--figures", "wer"])
    (tmp_path / "cer.json").write_text('{"t1": "low"}')
    with pytest.raises(UserError, match="cer.json: t1 is 'low', expected a number"):
        gauge_correlation.main(arguments)
