"""tools/sweep.py: each configuration is evaluated once, as by evaluate.py; keys; scoring by STM; audio files."""

import json
import shutil
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest

from bestrq.long_form.decoders import DecoderSettings
from bestrq.long_form.inference import InferenceSettings
from bestrq.model.conformer import EncoderSettings
from bestrq.recognition.transducer import TransducerModel, TransducerSettings
from bestrq.report.result_files import find_results, read_results, read_transcripts
from bestrq.training.export import write_export
from bestrq.training.export_reading import read_export
from bestrq.training.process import World
from common.config import from_dict, to_dict
from common.errors import UserError
from data.audio.files import find_audio
from data.features import FeatureSettings
from data.format.dataset import open_dataset
from evaluate import evaluate as evaluate_one
from pipelines import evaluation
from pipelines.evaluation_results import file_name, read_segments
from pipelines.evaluation_settings import Config, DataSettings, evaluation_of, with_keys
from pipelines.recogniser import EncoderChanges
from tests.scripts.test_evaluate import make_export
from tests.tiny import make_dataset
from tools import sweep as script
from tools.sweep import GridSettings, distinct_names


def make_transducer_export(folder: Path) -> Path:
    """Export of `make_export` with a transducer in place of the CTC head."""
    made = read_export(make_export(folder.with_name("ctc"), FeatureSettings()))
    settings = TransducerSettings(prediction_dim=8, joint_dim=8)
    model = TransducerModel(from_dict(EncoderSettings, made.config["encoder"]), settings, made.config["vocab_size"])
    config = made.config | {"kind": "rnnt", "transducer": to_dict(settings)}
    written = ("model.safetensors", "config.json", "README.md", "export.json")
    files = {path.name: path.read_bytes() for path in made.path.iterdir() if path.name not in written}
    write_export(folder, model.state_dict(), config, "a card", files)
    return folder


@pytest.fixture(scope="module")
def setup(tmp_path_factory: pytest.TempPathFactory) -> Config:
    folder = tmp_path_factory.mktemp("grid")
    make_dataset(folder / "data", recordings=10)
    (folder / "run").mkdir()
    make_export(folder / "run" / "export", FeatureSettings())
    return Config(
        export=str(folder / "run" / "export"),
        data=DataSettings(dataset=str(folder / "data"), split="train"),
        inference=InferenceSettings(context_seconds=2.0, batch_seconds=8.0),
        resamples=100,
        device="cpu",
    )


def evaluate(config: Config, out: Path, **changed: Any) -> None:
    evaluate_one(replace(config, out=str(out), **changed), World())


def sweep(config: Config, out: Path, grid: GridSettings, **changed: Any) -> None:
    settings = {field.name: getattr(config, field.name) for field in fields(config)} | {"out": str(out)} | changed
    script.sweep(script.Config(**settings, grid=grid), World())


GRID = GridSettings(
    contexts=[2.0, 0.0],
    overlaps=[0.0, 0.5],
    modes=["buffered", "averaged", "windowed"],
    decoders=[DecoderSettings(), DecoderSettings(beam=2)],
)


def test_every_combination_is_evaluated_once_with_the_results_of_evaluate_py(
    setup: Config, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "results" / "sweep"
    sweep(setup, out, grid=GRID)
    cells = {read_results(folder)["label"]: read_results(folder) for folder in find_results([out])}
    # Whole recordings have neither window nor overlap, and windowed attention has no overlap.
    modes = [
        "buffered 2 s",
        "buffered 2 s, overlap 0.5",
        "averaged 2 s",
        "averaged 2 s, overlap 0.5",
        "windowed 2 s",
    ]
    expected = {f"{mode}, {decoder}" for mode in [*modes, "whole"] for decoder in ("greedy", "beam 2")}
    assert set(cells) == expected
    rows = [json.loads(line) for line in (tmp_path / "results" / "rows.jsonl").read_text().splitlines()]
    assert len(rows) == len(expected) and {row["label"] for row in rows} == expected
    for row in rows:
        results = cells[row["label"]]
        assert row["scores"] == results["scores"]["all"] and row["export_hash"] == results["export_hash"]
        assert row["dataset"]["fingerprint"] == open_dataset(setup.data.dataset).fingerprint and row["command"]
    assert f"all {len(expected)} evaluations" in capsys.readouterr().out
    assert len(json.loads((out / "report.json").read_text())["systems"]) == len(expected)

    alone = tmp_path / "alone"
    inference = replace(setup.inference, mode="averaged", overlap=0.5)
    evaluate(setup, alone / "averaged", inference=inference, decoder=DecoderSettings(beam=2))
    # 2 s are 200 mel frames, or 50 of the encoder: 25 to either side.
    inference = replace(setup.inference, mode="whole")
    evaluate(setup, alone / "window", inference=inference, encoder=EncoderChanges(mask="window", window=25))
    for folder, label in (("averaged", "averaged 2 s, overlap 0.5, beam 2"), ("window", "windowed 2 s, greedy")):
        results = read_results(alone / folder)
        assert results["recordings"] == cells[label]["recordings"] and results["scores"] == cells[label]["scores"]
    assert read_results(alone / "window")["label"] == "whole, greedy, mask window, window 25"
    assert cells["windowed 2 s, greedy"]["recordings"] != cells["whole, greedy"]["recordings"]
    assert [cells[label]["context_seconds"] for label in ("windowed 2 s, greedy", "whole, greedy")] == [2.0, 0.0]


def test_a_larger_sweep_decodes_only_new_configurations(setup: Config, tmp_path: Path, monkeypatch) -> None:
    sweep(setup, tmp_path, grid=GridSettings(contexts=[2.0, 0.0]))
    decoded = []
    original = evaluation.decode_recordings
    monkeypatch.setattr(evaluation, "decode_recordings", lambda *a: decoded.append(a[2]) or original(*a))
    sweep(setup, tmp_path, grid=GridSettings(contexts=[2.0, 3.0, 0.0]))
    assert [inference.context_seconds for inference in decoded] == [3.0]


def test_a_sweep_with_a_moved_export_is_not_decoded_again(setup: Config, tmp_path: Path, monkeypatch) -> None:
    grid, out = GridSettings(contexts=[2.0, 0.0]), tmp_path / "out"
    sweep(setup, out, grid=grid)
    folders = find_results([out])
    moved = shutil.copytree(setup.export, tmp_path / "elsewhere" / "best")
    monkeypatch.setattr(evaluation, "decode_recordings", None)
    sweep(setup, out, grid=grid, export=str(moved))
    assert find_results([out]) == folders
    assert {read_results(folder)["name"] for folder in folders} == {"elsewhere"}
    monkeypatch.undo()
    # Two equal models in one sweep have a folder each.
    sweep(setup, out, grid=replace(grid, exports=[str(moved)]))
    assert len(find_results([out])) == 4


def test_keys_depend_on_everything_that_determines_the_results_and_nothing_else(setup: Config, tmp_path: Path) -> None:
    for name, content in (("a.stm", "a 1 x 0 1 ana"), ("b.stm", "a 1 x 0 1 bela"), ("words", "ana")):
        (tmp_path / name).write_text(content)
    cell = evaluation_of(setup, read_export(setup.export), 100.0)
    beam = replace(cell, decoder=DecoderSettings(beam=2))
    hot = replace(cell, decoder=DecoderSettings(beam=2, hot_words=str(tmp_path / "words")))
    inference = {"context_seconds": 3.0, "overlap": 0.5, "mode": "averaged", "precision": "bfloat16"}
    cells = [cell, beam, hot, replace(cell, encoder=EncoderChanges(mask="causal"))]
    cells += [replace(cell, inference=replace(cell.inference, **{name: value})) for name, value in inference.items()]
    keyed = [with_keys(variant, setup, "hash", "data") for variant in cells]
    keyed += [with_keys(cell, setup, "another", "data"), with_keys(cell, setup, "hash", "another")]
    assert len({variant.decode_key for variant in keyed}) == len({variant.key for variant in keyed}) == len(keyed) == 10
    data = {"split": "dev", "language": "en", "max_recordings": 3}
    configs = [replace(setup, data=replace(setup.data, **{name: value})) for name, value in data.items()]
    configs += [replace(setup, resamples=500), *(replace(setup, stm=str(tmp_path / f"{n}.stm")) for n in "ab")]
    scored = [with_keys(cell, config, "hash", "data") for config in configs]
    assert {variant.decode_key for variant in scored} == {keyed[0].decode_key}
    assert len({variant.key for variant in [keyed[0], *scored]}) == 7
    (tmp_path / "words").write_text("bela")
    assert with_keys(hot, setup, "hash", "data").decode_key != keyed[2].decode_key
    larger = replace(cell, inference=replace(cell.inference, batch_seconds=60.0), name="other")
    moved = replace(setup, data=replace(setup.data, dataset="elsewhere"), out="elsewhere", formats="ctm", threads=2)
    assert with_keys(larger, moved, "hash", "data").key == keyed[0].key


def test_other_scoring_rules_change_the_key_of_the_results_only(setup: Config, monkeypatch) -> None:
    cell = evaluation_of(setup, read_export(setup.export), 100.0)
    before = with_keys(cell, setup, "hash", "data")
    monkeypatch.setattr("pipelines.evaluation_settings.RULES_VERSION", "another")
    after = with_keys(cell, setup, "hash", "data")
    assert after.decode_key == before.decode_key and after.key != before.key


def test_transcripts_are_scored_again_without_decoding(setup: Config, tmp_path: Path, monkeypatch) -> None:
    evaluate(setup, tmp_path / "out", data=replace(setup.data, max_recordings=5))
    first = read_results(tmp_path / "out")
    decoded = []
    original = evaluation.decode_recordings
    monkeypatch.setattr(evaluation, "decode_recordings", lambda *a: decoded.extend(a[1]) or original(*a))
    evaluate(setup, tmp_path / "out", name="another", resamples=200)
    second = read_results(tmp_path / "out")
    assert len(decoded) == 3 and second["recordings"][:5] == first["recordings"] and second["name"] == "another"
    evaluate(setup, tmp_path / "out", name="third")
    third = read_results(tmp_path / "out")
    assert len(decoded) == 3 and third["decoding"] == second["decoding"] and third["name"] == "third"
    evaluate(setup, tmp_path / "out", name="fourth")  # nothing else is new
    assert read_results(tmp_path / "out") == {**third, "name": "fourth"}
    rows = [json.loads(line)["key"] for line in (tmp_path / "rows.jsonl").read_text().splitlines()]
    assert rows == [first["key"], second["key"], third["key"]]


def test_an_interruption_while_scoring_loses_no_transcripts(setup: Config, tmp_path: Path, monkeypatch) -> None:
    def stop(*arguments: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(evaluation, "write_results", stop)
        evaluate(setup, tmp_path / "out")
    for _ in range(2):
        evaluate(setup, tmp_path / "out")
    assert read_results(tmp_path / "out")["decoding"]["real_time_factor"] is None


def test_an_export_that_changes_during_the_evaluation_is_refused(setup: Config, tmp_path: Path, monkeypatch) -> None:
    hashes = iter(["before", "after"])
    monkeypatch.setattr(evaluation, "hash_of_export", lambda export: next(hashes))
    evaluation.load.cache_clear()
    with pytest.raises(UserError, match="has changed since this evaluation started"):
        evaluate(setup, tmp_path / "out")


def test_configurations_that_differ_in_one_number_have_their_own_folders(setup: Config, tmp_path: Path) -> None:
    def run(*bonuses: float) -> dict[str, str]:
        decoders = [DecoderSettings(beam=2, label_bonus=bonus) for bonus in bonuses]
        sweep(setup, tmp_path, grid=GridSettings(decoders=decoders))
        systems = json.loads((tmp_path / "report.json").read_text())["systems"]
        return {system["system"]: system["label"] for system in systems}

    assert list(run(0.0, 3.0)) == [
        "buffered 2 s, overlap 0.25, beam 2",
        "buffered 2 s, overlap 0.25, beam 2, label_bonus 3.0",
    ]
    before = {folder: read_results(folder) for folder in find_results([tmp_path])}
    run(3.0, 5.0)
    after = {folder: read_results(folder) for folder in find_results([tmp_path])}
    assert len(after) == 3 and after | before == after


def test_parts_divide_the_evaluations_and_the_last_one_writes_the_report(
    setup: Config, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    grid = GridSettings(contexts=[2.0, 3.0, 0.0])
    sweep(setup, tmp_path, grid=replace(grid, part="1/2"))
    assert len(find_results([tmp_path])) == 1 and not (tmp_path / "report.html").exists()
    assert "1 of 3 evaluations are finished" in capsys.readouterr().out
    sweep(setup, tmp_path, grid=replace(grid, part="0/2"))
    assert len(find_results([tmp_path])) == 3 and (tmp_path / "report.html").exists()
    for part in ("2/2", "1", "0/0", "-1/2"):
        with pytest.raises(UserError, match="grid.part = .*give i/n"):
            GridSettings(contexts=[1.0], part=part)
    with pytest.raises(UserError, match="grid is empty: give grid.contexts or another list, or run evaluate.py"):
        sweep(setup, tmp_path, grid=GridSettings(part="0/2"))


def test_models_with_equal_names_get_distinct_names(setup: Config, tmp_path: Path) -> None:
    exports = []
    for name in ("a", "b"):
        (tmp_path / name / "ctc").mkdir(parents=True)
        exports.append(str(make_export(tmp_path / name / "ctc" / "export", FeatureSettings())))
    made = read_export(exports[1])
    files = {"tokenizer.json": (made.path / "tokenizer.json").read_bytes()}
    tensors = {name: tensor * 1.5 for name, tensor in made.tensors.items()}
    write_export(exports[1], tensors, made.config, "a card", files)
    out = tmp_path / "out"
    sweep(setup, out, export=exports[0], grid=GridSettings(exports=exports[1:]))
    assert sorted(read_results(folder)["name"] for folder in find_results([out])) == ["a-ctc", "b-ctc"]
    assert len(json.loads((out / "report.json").read_text())["systems"]) == 2
    duplicate = f"{exports[0]}/"
    sweep(setup, tmp_path / "same", export=exports[0], grid=GridSettings(exports=[duplicate]))
    assert len(find_results([tmp_path / "same"])) == 1
    config = script.Config(exports[0], data=setup.data, grid=GridSettings(exports=[duplicate]))
    assert config.exports == [duplicate]
    assert distinct_names([("ctc", "/a/b/ctc/e"), ("ctc", "/c/b/ctc/e"), ("x", "/x/e")]) == {
        ("ctc", "/a/b/ctc/e"): "a-b-ctc",
        ("ctc", "/c/b/ctc/e"): "c-b-ctc",
        ("x", "/x/e"): "x",
    }


def test_incompatible_settings_are_an_error_before_any_work(setup: Config, tmp_path: Path) -> None:
    out = tmp_path / "out"
    with pytest.raises(UserError, match="inference.mode = 'streaming'|mask"):
        sweep(setup, out, grid=GridSettings(modes=["buffered", "streaming"]))
    with pytest.raises(UserError, match="inference.context_seconds = 0.01"):
        sweep(setup, out, grid=GridSettings(contexts=[2.0, 0.01]))
    (tmp_path / "rnnt").mkdir()
    transducer = str(make_transducer_export(tmp_path / "rnnt" / "export"))
    with pytest.raises(UserError, match="'averaged' averages CTC probabilities"):
        sweep(setup, out, grid=GridSettings(exports=[transducer], modes=["buffered", "averaged"]))
    with pytest.raises(UserError, match="there is no export at"):
        sweep(setup, out, grid=GridSettings(exports=[str(tmp_path / "nothing")]))
    assert not out.exists()


def test_lists_can_be_given_in_a_configuration_file() -> None:
    values = {"export": "x", "data": {"dataset": "y"}, "grid": {"contexts": [5, 0], "decoders": [{"beam": 8}]}}
    config = from_dict(script.Config, values)
    assert config.grid.contexts == [5.0, 0.0] and config.grid.decoders == [DecoderSettings(beam=8)]


def test_words_in_ignored_segments_are_not_scored(setup: Config, tmp_path: Path) -> None:
    evaluate(setup, tmp_path / "plain")
    dataset = open_dataset(setup.data.dataset)
    stm = tmp_path / "stm"
    stm.mkdir()
    ids = [dataset.id(int(i)) for i in dataset.select("train")]
    expected = {}
    for id in ids:
        i = dataset.index.find(id)
        words, end = dataset.words(i), int(dataset.frames[i]) / 100
        middle = end / 2
        reference = [[word.word for word in words if (word.end <= middle) == first] for first in (True, False)]
        # Only the first half is scored. Names within TED-LIUM files may differ from the file names.
        (stm / f"{id}.stm").write_text(
            f"{id}_B 1 ana {middle} {end} <o,f0> ignore_time_segment_in_scoring\n"
            f"{id}_B 1 ana 0.0 {middle} <o,f0> {' '.join(reference[0])}\n"
        )
        expected[id] = (" ".join(reference[0]), middle)
    evaluate(setup, tmp_path / "stm-scored", stm=str(stm))
    plain = {line["id"]: line for line in read_transcripts(tmp_path / "plain")}
    results = read_results(tmp_path / "stm-scored")
    for row in results["recordings"]:
        reference, middle = expected[row["id"]]
        hypothesis = [word for word, start, end, _ in plain[row["id"]]["words"] if (start + end) / 2 < middle]
        assert row["reference"] == reference and row["hypothesis"] == " ".join(hypothesis)
    total = results["scores"]["all"]["words"]
    assert results["segments"]["all"]["words"] == total
    for name, count in total.items():
        assert sum(part["words"][name] for part in results["positions"]) == count
    assert read_results(tmp_path / "plain")["segments"] is None
    with pytest.raises(UserError, match=r"no segments of 1 of 1 recordings, such as 'another'"):
        read_segments(str(stm), ["another"])
    with pytest.raises(UserError, match="neither a file nor a folder with .stm files"):
        read_segments(str(tmp_path / "no"), ids)


def test_segments_are_matched_by_file_name_and_otherwise_by_recording_name(tmp_path: Path) -> None:
    for name, text in (
        ("call_A", "call A x 2 3 two\ncall A x 0 1 one"),
        ("call_B", "call B y 1 2 three"),
        ("X", "Y 1 x 0 1 by file"),
        ("Z", "X 1 x 0 1 by name"),
    ):
        (tmp_path / f"{name}.stm").write_text(text)
    segments = read_segments(str(tmp_path), ["call", "X", "Y"])
    assert [s.text for s in segments["call"]] == ["one", "three", "two"]
    assert [s.text for s in segments["X"]] == ["by file"] == [s.text for s in segments["Y"]]


def test_file_names_of_ids_are_valid_and_distinct() -> None:
    ids = ["a/b", "a%2Fb", "\u8a9e" * 100, "\u8a9e" * 99 + "x", "..", "a b", "a\nb"]
    names = [file_name(id) for id in ids]
    assert len(set(names)) == len(ids) and names[5] == "a b"
    assert all(len(name.encode()) <= 200 and "/" not in name and name.isprintable() for name in names)


def test_audio_is_found_by_id_at_any_depth(tmp_path: Path) -> None:
    for name in ("day/a.wav", "b.mp3", "c.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    paths = find_audio(str(tmp_path), ["a", "day/a", "b", "c"])
    assert paths == {"a": tmp_path / "day/a.wav", "day/a": tmp_path / "day/a.wav", "b": tmp_path / "b.mp3"}
    assert find_audio("", ["a"]) == {}
    with pytest.raises(UserError, match="no audio file there is named as a recording, such as 'x'"):
        find_audio(str(tmp_path), ["x"])
    with pytest.raises(UserError, match="no such folder"):
        find_audio(str(tmp_path / "none"), ["x"])
    (tmp_path / "a.mp3").touch()
    assert find_audio(str(tmp_path), ["a"]) == {"a": tmp_path / "a.mp3"}  # the exact path has priority
    (tmp_path / "a.mp3").unlink()
    (tmp_path / "night").mkdir()
    (tmp_path / "night/a.ogg").touch()
    with pytest.raises(UserError, match="2 audio files there are named 'a'"):
        find_audio(str(tmp_path), ["a"])
