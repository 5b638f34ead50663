"""Grids of evaluate.py: each cell is the evaluation that it would be alone, and is done once; scoring by STM; audio."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

import evaluate as script
from bestrq.config import ConfigError, from_dict, to_dict
from bestrq.model.conformer import EncoderSettings
from bestrq.recognition.decoders import DecoderSettings
from bestrq.recognition.inference import InferenceSettings
from bestrq.recognition.results import find_results, read_results, read_transcripts
from bestrq.recognition.transducer import TransducerModel, TransducerSettings
from bestrq.training.export import read_export, write_export
from bestrq.training.process import World
from data.audio_files import find_audio
from data.errors import DataError
from data.features import FeatureSettings
from data.shards import open_dataset
from evaluation import GridSettings
from evaluation_results import read_segments
from recogniser import EncoderChanges
from tests.test_evaluate import make_export
from tests.tiny import make_dataset


def make_transducer_export(folder: Path) -> Path:
    """That of `make_export` with a transducer for the head."""
    made = read_export(make_export(folder.with_name("ctc"), FeatureSettings()))
    settings = TransducerSettings(prediction_dim=8, joint_dim=8)
    model = TransducerModel(from_dict(EncoderSettings, made.config["encoder"]), settings, made.config["vocab_size"])
    config = made.config | {"kind": "rnnt", "transducer": to_dict(settings)}
    ours = ("model.safetensors", "config.json", "README.md", "export.json")
    files = {path.name: path.read_bytes() for path in made.path.iterdir() if path.name not in ours}
    write_export(folder, model.state_dict(), config, "a card", files)
    return folder


@pytest.fixture(scope="module")
def setup(tmp_path_factory: pytest.TempPathFactory) -> script.Config:
    folder = tmp_path_factory.mktemp("grid")
    make_dataset(folder / "data", recordings=10)
    (folder / "run").mkdir()
    make_export(folder / "run" / "export", FeatureSettings())
    return script.Config(
        export=str(folder / "run" / "export"),
        data=script.DataSettings(dataset=str(folder / "data"), split="train"),
        inference=InferenceSettings(context_seconds=2.0, batch_seconds=8.0),
        resamples=100,
        device="cpu",
    )


def evaluate(config: script.Config, out: Path, **changed: object) -> None:
    script.evaluate(replace(config, out=str(out), **changed), World())  # type: ignore[arg-type]


GRID = GridSettings(
    contexts=[2.0, 0.0],
    overlaps=[0.0, 0.5],
    modes=["buffered", "averaged", "windowed"],
    decoders=[DecoderSettings(), DecoderSettings(beam=2)],
)


def test_every_combination_is_evaluated_once_and_is_what_it_would_be_alone(
    setup: script.Config, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "results" / "sweep"
    evaluate(setup, out, grid=GRID)
    cells = {read_results(folder)["label"]: read_results(folder) for folder in find_results([out])}
    # A whole recording has neither window nor overlap, and windowed attention no overlap.
    ways = ["buffered 2 s", "buffered 2 s, overlap 0.5", "averaged 2 s", "averaged 2 s, overlap 0.5", "windowed 2 s"]
    expected = {f"{way}, {decoder}" for way in [*ways, "whole"] for decoder in ("greedy", "beam 2")}
    assert set(cells) == expected
    rows = [json.loads(line) for line in (tmp_path / "results" / "rows.jsonl").read_text().splitlines()]
    assert len(rows) == len(expected) and {row["label"] for row in rows} == expected
    for row in rows:
        alike = cells[row["label"]]
        assert row["scores"] == alike["scores"]["all"] and row["export_hash"] == alike["export_hash"]
        assert row["dataset"]["fingerprint"] == open_dataset(setup.data.dataset).fingerprint and row["command"]
    assert f"all {len(expected)} evaluations" in capsys.readouterr().out and (out / "report.json").exists()

    alone = tmp_path / "alone"
    inference = replace(setup.inference, mode="averaged", overlap=0.5)
    evaluate(setup, alone / "averaged", inference=inference, decoder=DecoderSettings(beam=2))
    # 2 s are 200 mel frames, or 50 of the encoder: 25 to either side.
    inference = replace(setup.inference, mode="whole")
    evaluate(setup, alone / "window", inference=inference, encoder=EncoderChanges(mask="window", window=25))
    for folder, label in (("averaged", "averaged 2 s, overlap 0.5, beam 2"), ("window", "windowed 2 s, greedy")):
        one = read_results(alone / folder)
        assert one["recordings"] == cells[label]["recordings"] and one["scores"] == cells[label]["scores"]
    assert cells["windowed 2 s, greedy"]["recordings"] != cells["whole, greedy"]["recordings"]
    assert [cells[label]["context_seconds"] for label in ("windowed 2 s, greedy", "whole, greedy")] == [2.0, 0.0]


def test_a_larger_grid_decodes_what_is_new_alone(setup: script.Config, tmp_path: Path, monkeypatch) -> None:
    evaluate(setup, tmp_path, grid=GridSettings(contexts=[2.0, 0.0]))
    decoded = []
    original = script.decode_recordings
    monkeypatch.setattr(script, "decode_recordings", lambda *a: decoded.append(a[2]) or original(*a))
    evaluate(setup, tmp_path, grid=GridSettings(contexts=[2.0, 3.0, 0.0]))
    assert [one.context_seconds for one in decoded] == [3.0]


def test_a_key_names_all_that_decides_the_outcome_and_nothing_else(setup: script.Config, tmp_path: Path) -> None:
    for name, content in (("a.stm", "a 1 x 0 1 ana"), ("b.stm", "a 1 x 0 1 bela"), ("words", "ana")):
        (tmp_path / name).write_text(content)
    [cell] = script.cells_of(setup, read_export(setup.export), 100.0)
    beam = replace(cell, decoder=DecoderSettings(beam=2))
    hot = replace(cell, decoder=DecoderSettings(beam=2, hot_words=str(tmp_path / "words")))
    inference = {"context_seconds": 3.0, "overlap": 0.5, "mode": "averaged", "precision": "bfloat16"}
    cells = [cell, beam, hot, replace(cell, name="other"), replace(cell, encoder=EncoderChanges(mask="causal"))]
    cells += [replace(cell, inference=replace(cell.inference, **{name: value})) for name, value in inference.items()]
    data = {"split": "dev", "language": "en", "max_recordings": 3}
    configs = [replace(setup, data=replace(setup.data, **{name: value})) for name, value in data.items()]
    configs += [replace(setup, resamples=500), *(replace(setup, stm=str(tmp_path / f"{n}.stm")) for n in "ab")]
    keys = [script.key_of(one, setup, "hash", "data") for one in cells]
    keys += [script.key_of(cell, config, "hash", "data") for config in configs]
    keys += [script.key_of(cell, setup, "another", "data"), script.key_of(cell, setup, "hash", "another")]
    assert len(set(keys)) == len(keys) == 17
    (tmp_path / "words").write_text("bela")
    assert script.key_of(hot, setup, "hash", "data") not in keys
    larger = replace(cell, inference=replace(cell.inference, batch_seconds=60.0))
    moved = replace(setup, data=replace(setup.data, dataset="elsewhere"), out="elsewhere", formats="ctm", threads=2)
    assert script.key_of(larger, moved, "hash", "data") == keys[0]


def test_parts_of_a_grid_share_it_out_and_the_last_one_reports(
    setup: script.Config, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    grid = GridSettings(contexts=[2.0, 3.0, 0.0])
    evaluate(setup, tmp_path, grid=replace(grid, part="1/2"))
    assert len(find_results([tmp_path])) == 1 and not (tmp_path / "report.html").exists()
    assert "1 of 3 evaluations are there" in capsys.readouterr().out
    evaluate(setup, tmp_path, grid=replace(grid, part="0/2"))
    assert len(find_results([tmp_path])) == 3 and (tmp_path / "report.html").exists()
    for part in ("2/2", "1", "0/0", "-1/2"):
        with pytest.raises(ConfigError, match="grid.part = "):
            GridSettings(part=part)


def test_models_of_one_name_are_told_apart(setup: script.Config, tmp_path: Path) -> None:
    exports = []
    for name in ("a", "b"):
        (tmp_path / name / "ctc").mkdir(parents=True)
        exports.append(str(make_export(tmp_path / name / "ctc" / "export", FeatureSettings())))
    out = tmp_path / "out"
    evaluate(setup, out, export=exports[0], grid=GridSettings(exports=exports[1:]))
    assert sorted(read_results(folder)["name"] for folder in find_results([out])) == ["a-ctc", "b-ctc"]


def test_what_does_not_go_together_is_an_error_before_any_work(setup: script.Config, tmp_path: Path) -> None:
    out = tmp_path / "out"
    with pytest.raises(ConfigError, match="inference.mode = 'streaming'|mask"):
        evaluate(setup, out, grid=GridSettings(modes=["buffered", "streaming"]))
    with pytest.raises(ConfigError, match="inference.context_seconds = 0.01"):
        evaluate(setup, out, grid=GridSettings(contexts=[2.0, 0.01]))
    (tmp_path / "rnnt").mkdir()
    transducer = str(make_transducer_export(tmp_path / "rnnt" / "export"))
    with pytest.raises(ConfigError, match="'averaged' takes the mean of CTC probabilities"):
        evaluate(setup, out, grid=GridSettings(exports=[transducer], modes=["buffered", "averaged"]))
    with pytest.raises(ConfigError, match="there is no export at"):
        evaluate(setup, out, grid=GridSettings(exports=[str(tmp_path / "nothing")]))
    assert not out.exists()


def test_a_grid_is_given_on_the_command_line_or_in_a_file() -> None:
    values = {"export": "x", "data": {"dataset": "y"}, "grid": {"contexts": [5, 0], "decoders": [{"beam": 8}]}}
    config = from_dict(script.Config, values)
    assert config.grid.contexts == [5.0, 0.0] and config.grid.decoders == [DecoderSettings(beam=8)]


def test_words_in_ignored_segments_never_count(setup: script.Config, tmp_path: Path) -> None:
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
        said = [[word.word for word in words if (word.end <= middle) == first] for first in (True, False)]
        # The first half counts, the second does not; TED-LIUM's names within may differ from the file's.
        (stm / f"{id}.stm").write_text(
            f"{id}_B 1 ana {middle} {end} <o,f0> ignore_time_segment_in_scoring\n"
            f"{id}_B 1 ana 0.0 {middle} <o,f0> {' '.join(said[0])}\n"
        )
        expected[id] = (" ".join(said[0]), middle)
    evaluate(setup, tmp_path / "stm-scored", stm=str(stm))
    plain = {line["id"]: line for line in read_transcripts(tmp_path / "plain")}
    results = read_results(tmp_path / "stm-scored")
    for row in results["recordings"]:
        reference, middle = expected[row["id"]]
        heard = [word for word, start, end, _ in plain[row["id"]]["words"] if (start + end) / 2 < middle]
        assert row["reference"] == reference and row["hypothesis"] == " ".join(heard)
    total = results["scores"]["all"]["words"]
    assert results["segments"]["all"]["words"] == total
    for name, count in total.items():
        assert sum(one["words"][name] for one in results["positions"]) == count
    assert read_results(tmp_path / "plain")["segments"] is None
    with pytest.raises(ConfigError, match=r"no segments of 1 of 1 recordings, such as 'another'"):
        read_segments(str(stm), ["another"])
    with pytest.raises(ConfigError, match="there is no such file"):
        read_segments(str(tmp_path / "no"), ids)


def test_audio_is_found_by_id_at_any_depth(tmp_path: Path) -> None:
    for name in ("day/a.wav", "b.mp3", "c.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    found = find_audio(str(tmp_path), ["a", "day/a", "b", "c"])
    assert found == {"a": tmp_path / "day/a.wav", "day/a": tmp_path / "day/a.wav", "b": tmp_path / "b.mp3"}
    assert find_audio("", ["a"]) == {}
    with pytest.raises(DataError, match="no audio file there is named as a recording, such as 'x'"):
        find_audio(str(tmp_path), ["x"])
    with pytest.raises(DataError, match="there is no such folder"):
        find_audio(str(tmp_path / "none"), ["x"])
