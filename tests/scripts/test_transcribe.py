"""transcribe.py: same transcripts as evaluate.py for all audio formats; an unreadable file fails alone."""

import json
import os
import shutil
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile

import transcribe as script
from bestrq.long_form.inference import InferenceSettings
from bestrq.scoring.normalisers import normaliser
from bestrq.training.process import World
from common.config import parse
from common.errors import UserError
from data.corpora.folder import FolderSettings
from data.features import FeatureSettings
from data.format.dataset import open_dataset
from data.prepare.prepare import PrepareSettings, prepare
from data.word_times.alignments import read_words_json
from data.word_times.ctm import read_ctm
from data.word_times.textgrid import read_textgrid
from evaluate import evaluate
from pipelines import evaluation
from pipelines.evaluation_settings import Config, DataSettings
from pipelines.finetuning import statistics_of
from tests.gloo import run_distributed
from tests.scripts.test_evaluate import make_export, with_extra_files

FORMATS = "txt,json,ctm,srt,vtt,TextGrid"
NAMES = ["day1/stereo", "day1/talk", "long", "short", "silence", "telephone"]


def make_audio(path: Path, seconds: float, rate: int = 16000, channels: int = 1, seed: int = 0) -> None:
    """Tones that change every 200 ms, and noise."""
    generator = np.random.default_rng(seed)
    time = np.arange(round(seconds * rate)) / rate
    pitch = generator.uniform(100, 3000, size=int(seconds / 0.2) + 1)[(time / 0.2).astype(int)]
    samples = 0.3 * np.sin(2 * np.pi * pitch * time) + 0.02 * generator.normal(size=len(time))
    path.parent.mkdir(exist_ok=True)
    soundfile.write(path, np.stack([samples, samples / 2], axis=1)[:, :channels], rate)


@pytest.fixture(scope="module")
def setup(tmp_path_factory: pytest.TempPathFactory) -> script.Config:
    folder = tmp_path_factory.mktemp("transcribe")
    talks = folder / "talks"
    talks.mkdir()
    make_audio(talks / "day1/talk.wav", 2.3, seed=1)
    make_audio(talks / "day1/stereo.flac", 1.7, 44100, channels=2, seed=2)
    make_audio(talks / "telephone.WAV", 3.1, 8000, seed=3)
    make_audio(talks / "long.wav", 9.0, seed=4)
    make_audio(talks / "short.wav", 0.1, seed=5)
    soundfile.write(talks / "silence.flac", np.zeros(19200), 16000)
    (talks / "notes.md").write_text("no audio")
    (folder / "run").mkdir()
    make_export(folder / "run/export", FeatureSettings())
    return script.Config(
        export=str(folder / "run/export"),
        audio=str(talks),
        formats=FORMATS,
        inference=InferenceSettings(context_seconds=2.0, batch_seconds=8.0),
        device="cpu",
    )


def transcribe(config: script.Config, out: Path, **changes: Any) -> int:
    return script.transcribe(replace(config, out=str(out), **changes), World())


def files_of(out: Path) -> dict[str, bytes]:
    """All files but the list of finished recordings, whose order varies."""
    paths = [path for path in out.rglob("*") if path.is_file() and path.name != script.STATE]
    return {path.relative_to(out).as_posix(): path.read_bytes() for path in paths}


def record_tokens(monkeypatch: pytest.MonkeyPatch, module: Any) -> dict[int, Any]:
    """Tokens that a module decodes, by the length of the recording in frames; filled while it runs."""
    decoded: dict[int, Any] = {}
    original = module.decode_recordings

    def recording_decoder(decoder: Any, sources: Any, *arguments: Any) -> Iterator[Any]:
        for index, tokens in original(decoder, sources, *arguments):
            decoded[sources[index].num_frames] = tokens
            yield index, tokens

    monkeypatch.setattr(module, "decode_recordings", recording_decoder)
    return decoded


@pytest.mark.parametrize("normalisation", ["recording", "dataset"])
def test_transcripts_are_the_hypotheses_of_evaluate(
    setup: script.Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, normalisation: Any
) -> None:
    shutil.copytree(setup.audio, tmp_path / "talks")
    for name in NAMES:
        (tmp_path / "talks" / f"{name}.txt").write_text("something else")
    corpus = FolderSettings(folder=str(tmp_path / "talks"), test_share=1.0, dev_share=0.0)
    prepare("folder", corpus, FeatureSettings(), PrepareSettings(out=str(tmp_path / "data"), workers=1))
    shutil.copytree(setup.export, tmp_path / "export")
    fields = json.loads((tmp_path / "export/config.json").read_text()) | {"normalisation": normalisation}
    fields |= statistics_of(open_dataset(tmp_path / "data"), normalisation)
    (tmp_path / "export/config.json").write_text(json.dumps(fields))

    transcribed, evaluated = record_tokens(monkeypatch, script), record_tokens(monkeypatch, evaluation)
    assert transcribe(setup, tmp_path / "out", export=str(tmp_path / "export")) == 0
    data = DataSettings(str(tmp_path / "data"))
    config = Config(str(tmp_path / "export"), str(tmp_path / "results"), data=data, device="cpu")
    evaluate(replace(config, inference=setup.inference, resamples=100), World())
    assert transcribed == evaluated and len(transcribed) == len(NAMES)
    assert sum(len(tokens.ids) for tokens in transcribed.values()) > 50
    rows = json.loads((tmp_path / "results/results.json").read_text())["recordings"]
    assert [row["id"] for row in rows] == NAMES
    for row in rows:
        text = json.loads((tmp_path / "out" / f"{row['id']}.json").read_text())["text"]
        assert normaliser("").clean(text) == row["hypothesis"]


def test_every_format_has_the_same_words(setup: script.Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    decoded = record_tokens(monkeypatch, script)
    assert transcribe(setup, tmp_path) == 0
    expected = {f"{name}.{form}" for name in NAMES for form in FORMATS.split(",")}
    assert set(files_of(tmp_path)) == expected
    for name in NAMES:
        path = tmp_path / name
        content = json.loads(path.with_suffix(".json").read_text())
        text = " ".join(content["text"].split())
        words = [word["word"] for word in content["words"]]
        assert " ".join(words) == text and content["id"] == name
        tokens = decoded[round(100 * content["seconds"])]  # frames of 10 ms; those of the encoder are of 40
        assert {word["start"] for word in content["words"]} <= {round(0.04 * first, 3) for first in tokens.first_frame}
        ends = {min(round(0.04 * (n + 1), 3), content["seconds"]) for n in tokens.last_frame}
        assert {word["end"] for word in content["words"]} <= ends
        assert " ".join(path.with_suffix(".txt").read_text().split()) == text
        assert [word.word for word in read_words_json(path.with_suffix(".json"))] == words
        assert [word.word for word in read_textgrid(path.with_suffix(".TextGrid"))] == words
        assert [word.word for ctm in read_ctm(path.with_suffix(".ctm")).values() for word in ctm] == words
        for form in (".srt", ".vtt"):
            blocks = [block.split("\n") for block in path.with_suffix(form).read_text().strip().split("\n\n")]
            lines = [line for block in blocks for line in block[1 + (form == ".srt") :] if "-->" not in line]
            assert " ".join(" ".join(line for line in lines if line != "WEBVTT").split()) == text
    assert json.loads((tmp_path / "long.json").read_text())["seconds"] == 9.01


def test_an_unreadable_file_fails_alone(
    setup: script.Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Also with worker processes, which do not change the transcripts."""
    transcribe(setup, tmp_path / "whole")
    talks = shutil.copytree(setup.audio, tmp_path / "talks")
    soundfile.write(talks / "nan.wav", np.array([0.1, np.nan] * 8000), 16000, subtype="FLOAT")
    (talks / "day1/text.mp3").write_text("this is no audio")
    (talks / "empty.wav").touch()
    make_audio(talks / "cut.flac", 9.0)
    os.truncate(talks / "cut.flac", (talks / "cut.flac").stat().st_size // 2)
    make_audio(talks / "blink.wav", 0.01)
    bad = ["blink", "cut", "day1/text", "empty", "nan"]
    out = str(tmp_path / "out")
    command = ["transcribe.py", "--export", setup.export, "--audio", str(talks), "--out", out, "--formats", FORMATS]
    command += ["--inference.context_seconds", "2", "--inference.batch_seconds", "8", "--workers", "2"]
    monkeypatch.setattr(sys, "argv", command)
    monkeypatch.setattr(script, "start_inference", lambda *settings: World())
    assert script.main() == 1
    printed = capsys.readouterr().err
    assert "error: 5 of 11 audio files could not be transcribed:" in printed
    reasons = dict(line.strip().split(": ", 1) for line in printed.splitlines()[1:])
    assert set(reasons) == set(bad) and "no such" not in printed
    for name, reason in {"nan": "NaN", "empty": "0 bytes", "blink": "too short", "cut": "cut.flac"}.items():
        assert reason in reasons[name]
    contents = files_of(tmp_path / "out")
    failed = [json.loads(line) for line in contents.pop(script.FAILED).splitlines()]
    paths = [
        str(path) for path in sorted(talks.rglob("*")) if path.relative_to(talks).with_suffix("").as_posix() in bad
    ]
    assert [entry["path"] for entry in failed] == paths and len(paths) == 5
    assert contents == files_of(tmp_path / "whole")
    # Deleted files are no longer listed as failed.
    for path in paths:
        os.unlink(path)
    assert script.main() == 0 and files_of(tmp_path / "out") == contents


def make_failing_files(talks: Path, out: Path) -> dict[str, str]:
    """Create files that are unreadable or whose transcript's path is. Returns a part of each reason, by name."""
    content = (talks / "short.wav").read_bytes()
    longest = "n" * 251  # with .wav as long as a name can be, with .json too long
    for name in ("taken.wav", f"{longest}.wav", "place.wav", "place.txt/inside.wav", "sub/deep.wav"):
        (talks / name).parent.mkdir(exist_ok=True)
        (talks / name).write_bytes(content)
    (out / "taken.json").mkdir(parents=True)
    (out / "sub").touch()  # in place of a folder, so that not even root can write into it
    os.mkfifo(talks / "pipe.wav")
    (talks / "gone.wav").symlink_to("nothing")
    (talks / "locked.wav").write_bytes(content)
    soundfile.write(talks / "loud.wav", np.full(16000, 1e30), 16000, subtype="DOUBLE")
    return {
        "taken": "Is a directory", longest: "File name too long", "place": "a folder of other transcripts",
        "sub/deep": "cannot be written", "pipe": "not a regular file", "gone": "no such audio file",
        "locked": "Permission denied", "loud": "NaN or infinite",
    }  # fmt: skip


def make_unusual_names(talks: Path) -> list[str]:
    """Create files with unusual but valid names, all of which are transcribed. Returns the names."""
    content = (talks / "short.wav").read_bytes()
    names = ["n" * 250, os.fsdecode(b"caf\xe9"), "new\nline \u3000\u00ad \u65e5\u672c", "-rf", "place.txt/inside"]
    for name in names[:4]:
        (talks / f"{name}.wav").write_bytes(content)
    return names


def transcribe_with_locked_file(world: World, config: script.Config) -> int:
    def refuse_locked(path: Any) -> None:
        if b"locked" in os.fsencode(path):
            raise PermissionError(13, "Permission denied", path)

    with pytest.MonkeyPatch.context() as patch:
        original = soundfile.SoundFile.__init__

        def opened(self: Any, file: Any, *arguments: Any, **options: Any) -> None:
            refuse_locked(os.readlink(f"/proc/self/fd/{file}") if isinstance(file, int) else file)
            original(self, file, *arguments, **options)

        patch.setattr(soundfile.SoundFile, "__init__", opened)
        return script.transcribe(config, world)


@pytest.mark.parametrize("processes", [1, 2])
def test_a_problem_with_a_file_or_its_transcript_path_only_fails_that_file(
    setup: script.Config, tmp_path: Path, processes: int, capsys: pytest.CaptureFixture[str]
) -> None:
    talks, out = shutil.copytree(setup.audio, tmp_path / "talks"), tmp_path / "out"
    failing, unusual = make_failing_files(talks, out), make_unusual_names(talks)
    config = replace(setup, audio=str(talks), out=str(out), formats="txt,json")
    for _ in range(2):  # also when started again
        if processes == 1:
            assert transcribe_with_locked_file(World(), config) == len(failing)
        else:
            assert run_distributed(transcribe_with_locked_file, 2, config) == [len(failing), 0]
        failed = [json.loads(line) for line in (out / script.FAILED).read_text().splitlines()]
        names = [Path(entry["path"]).relative_to(talks).with_suffix("").as_posix() for entry in failed]
        reasons = dict(zip(names, [entry["reason"] for entry in failed], strict=True))
        assert reasons.keys() == failing.keys()
        assert {name for name, part in failing.items() if part not in reasons[name]} == set()
        for name in [*NAMES, *unusual]:
            assert (out / f"{name}.txt").is_file() and json.loads((out / f"{name}.json").read_text())["words"]
        assert not list(out.rglob(".*"))
    printed = capsys.readouterr().err if processes == 1 else "error: 8 of 19 audio files"
    assert f"error: {len(failing)} of {len(failing) + len(NAMES) + len(unusual)} audio files" in printed


def test_a_file_deleted_while_others_are_transcribed_fails_alone(
    setup: script.Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    talks, original = shutil.copytree(setup.audio, tmp_path / "talks"), script.list_audio

    def listed(*arguments: Any) -> list[script.AudioFile]:
        files = original(*arguments)
        (talks / "short.wav").unlink()
        return files

    monkeypatch.setattr(script, "list_audio", listed)
    assert transcribe(setup, tmp_path / "out", audio=str(talks)) == 1
    assert set(files_of(tmp_path / "out")) >= {f"{name}.txt" for name in NAMES if name != "short"}


def test_a_full_disk_ends_the_command_with_a_fix(
    setup: script.Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All other files would fail too, after hours of work."""

    def fail(path: Path, content: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(script, "write_file", lambda path, content: None if path.suffix == ".jsonl" else fail(path, 0))
    with pytest.raises(UserError, match="No space left on device; free some space and run the same command again"):
        transcribe(setup, tmp_path / "out")


def test_suspect_audio_is_transcribed_with_a_warning_and_flac_may_lack_a_sample_count(
    setup: script.Config, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make_audio(tmp_path / "talks/a.flac", 2.0)
    flac = (tmp_path / "talks/a.flac").read_bytes()
    (tmp_path / "talks/b.flac").write_bytes(flac[:21] + bytes([flac[21] & 0xF0]) + bytes(4) + flac[26:])
    samples, _ = soundfile.read(tmp_path / "talks/a.flac")
    soundfile.write(tmp_path / "talks/inverted.wav", np.stack([samples, -samples], axis=1), 16000)
    assert transcribe(setup, tmp_path / "out", audio=str(tmp_path / "talks"), formats="txt,json") == 0
    printed = capsys.readouterr().err
    assert printed.count("warning: ") == 1 and "inverted.wav: the channels cancel" in printed
    assert (tmp_path / "out/inverted.txt").is_file()
    assert (tmp_path / "out/a.txt").read_text() == (tmp_path / "out/b.txt").read_text()
    assert json.loads((tmp_path / "out/b.json").read_text())["seconds"] == 2.01


def test_a_second_run_transcribes_only_what_has_changed(
    setup: script.Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    talks, out = shutil.copytree(setup.audio, tmp_path / "talks"), tmp_path / "out"
    config = replace(setup, audio=str(talks))
    transcribe(config, out)
    first = files_of(out)
    decoded = record_tokens(monkeypatch, script)
    larger = replace(config.inference, batch_seconds=60.0)
    assert transcribe(config, out, inference=larger) == 0 and not decoded and files_of(out) == first
    make_audio(talks / "day1/talk.wav", 2.5, seed=9)  # another recording of that name
    (out / "long.srt").unlink()
    assert transcribe(config, out) == 0 and sorted(decoded) == [251, 901]
    changed = {name for name, content in files_of(out).items() if content != first[name]}
    assert {name.partition(".")[0] for name in changed} == {"day1/talk"}
    transcribe(config, out, inference=replace(config.inference, context_seconds=1.0))
    assert len(decoded) == len(NAMES)


def test_other_files_in_an_export_have_no_effect(
    setup: script.Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    transcribe(setup, tmp_path / "out")
    decoded = record_tokens(monkeypatch, script)
    assert transcribe(setup, tmp_path / "out", export=with_extra_files(setup.export, tmp_path / "export")) == 0
    assert not decoded


def test_an_interrupted_run_continues(setup: script.Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    transcribe(setup, tmp_path / "whole")
    original, written = script.write_transcript, []

    def interrupted(file: script.AudioFile, *arguments: Any) -> None:
        if len(written) == 2:
            raise KeyboardInterrupt
        original(file, *arguments)
        written.append(file.name)

    monkeypatch.setattr(script, "write_transcript", interrupted)
    out = tmp_path / "broken"
    with pytest.raises(KeyboardInterrupt):
        transcribe(setup, out)
    with open(out / "transcribed-00003.jsonl", "w") as file:  # a killed process leaves an incomplete line
        file.write('{"name": "short", "key": "another", "reason": ""}\n{"name": "sil')
    monkeypatch.setattr(script, "write_transcript", original)
    decoded = record_tokens(monkeypatch, script)
    assert transcribe(setup, out) == 0
    assert len(decoded) == len(NAMES) - 2 and files_of(out) == files_of(tmp_path / "whole")
    state = [json.loads(line)["name"] for line in (out / script.STATE).read_text().splitlines()]
    assert sorted(state) == NAMES


def test_a_partly_replaced_transcript_is_not_reused(
    setup: script.Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    transcribe(setup, tmp_path)
    whole, original = files_of(tmp_path), script.write_file

    def interrupted(path: Path, *arguments: Any) -> None:
        original(path, *arguments)
        if path.suffix == ".txt":
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(script, "write_file", interrupted)
        with pytest.raises(KeyboardInterrupt):
            transcribe(setup, tmp_path, inference=replace(setup.inference, context_seconds=0.5))
    assert files_of(tmp_path) != whole
    assert transcribe(setup, tmp_path) == 0
    assert files_of(tmp_path) == whole


def transcribe_on(world: World, config: script.Config) -> tuple[int, list[str]]:
    """Number of failures, and the files that this process has transcribed."""
    original, written = script.write_transcript, []

    def write_and_record(file: script.AudioFile, *arguments: Any) -> None:
        written.append(file.name)
        original(file, *arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(script, "write_transcript", write_and_record)
        return script.transcribe(config, world), written


def test_two_processes_give_the_transcripts_of_one(setup: script.Config, tmp_path: Path) -> None:
    talks = shutil.copytree(setup.audio, tmp_path / "talks")
    (talks / "empty.wav").touch()
    config = replace(setup, audio=str(talks))
    assert transcribe(config, tmp_path / "one") == 1
    ranks = run_distributed(transcribe_on, 2, replace(config, out=str(tmp_path / "two")))
    (first_failed, first), (second_failed, second) = ranks
    assert (first_failed, second_failed) == (1, 0) and first[0] == "long"
    assert sorted(first + second) == NAMES and len(second) > 1
    assert files_of(tmp_path / "two") == files_of(tmp_path / "one")


def test_without_out_a_line_per_recording_is_written_to_stdout(
    setup: script.Config, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    transcribe(setup, tmp_path)
    capsys.readouterr()
    assert script.transcribe(setup, World()) == 0
    lines = dict(line.split("\t") for line in capsys.readouterr().out.splitlines())
    expected = {path.stem: (tmp_path / f"{name}.txt").read_text() for name in NAMES for path in [Path(name)]}
    assert {Path(path).stem: text + "\n" for path, text in lines.items()} == expected
    path = f"{setup.audio}/day1/stereo.flac"
    assert script.transcribe(replace(setup, audio=path), World()) == 0
    assert capsys.readouterr().out == f"{path}\t{expected['stereo']}"


def test_names_are_escaped_on_the_console(
    setup: script.Config, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "a\nb\tc\x1b[31m"
    folder.mkdir()
    shutil.copy(f"{setup.audio}/short.wav", folder / "x.wav")
    (folder / "bad.wav").write_bytes(b"bad")
    assert script.transcribe(replace(setup, audio=str(folder)), World()) == 1
    out, err = capsys.readouterr()
    assert out.split("\t")[:-1] == [f"{tmp_path}/a\\nb\\tc\\x1b[31m/x.wav"] and out.count("\n") == 1
    assert err.count("\n") == 2 and "\x1b" not in err


def test_files_are_grouped_by_duration_so_that_few_features_are_in_memory(setup: script.Config) -> None:
    seconds = [9000.0, 40.0, 30.0, 20.0, 20.0, 0.0]
    files = [script.AudioFile(Path(), str(number), length, "") for number, length in enumerate(seconds)]
    groups = script.in_groups(files, 100.0)
    assert [[file.seconds for file in group] for group in groups] == [[9000.0], [40.0, 30.0, 20.0], [20.0, 0.0]]
    assert script.in_groups([], 100.0) == []


def test_files_that_differ_in_their_suffix_keep_it(tmp_path: Path) -> None:
    for name in ("b.wav", "a.wav", "a.mp3", "sub/a.ogg", "c.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    assert [file.name for file in script.list_audio(str(tmp_path), "")] == ["a.mp3", "a.wav", "b", "sub/a"]
    (tmp_path / "a.wav.flac").touch()
    (tmp_path / "a.wav.flac.ogg").touch()
    names = [file.name for file in script.list_audio(str(tmp_path), "")]
    assert names == ["a.mp3", "a.wav", "a.wav.flac", "a.wav.flac.ogg", "b", "sub/a"]


def test_invalid_settings_are_refused_before_any_work(setup: script.Config, tmp_path: Path) -> None:
    for changes, message in (
        ({"export": ""}, "export is missing: give it as --export FOLDER"),
        ({"audio": ""}, "audio is missing: give it as --audio FILE_OR_FOLDER"),
        ({"formats": "txt,doc"}, "formats = 'txt,doc': give one or more of txt,json,ctm,TextGrid,srt,vtt"),
        ({"formats": ","}, "formats = ','"),
    ):
        with pytest.raises(UserError, match=message):
            replace(setup, **changes)  # type: ignore[arg-type]
    for audio in (setup.audio, f"{setup.audio}/short.wav"):
        with pytest.raises(
            UserError, match="out = .* is the folder of the audio files, where X.txt may be the reference"
        ):
            replace(setup, audio=audio, out=setup.audio)
    with pytest.raises(UserError, match="no such file or folder"):
        transcribe(setup, tmp_path / "out", audio=str(tmp_path / "nothing"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"no audio file in this folder; looked for .*\.wav"):
        transcribe(setup, tmp_path / "out", audio=str(tmp_path / "empty"))
    with pytest.raises(UserError, match="2 processes cannot share stdout"):
        script.transcribe(setup, World(size=2))
    for name in ("workers", "threads"):
        with pytest.raises(UserError, match=f"{name} is -1: expected an integer, 0 or more"):
            parse(script.Config, ["--export=x", "--audio=y", f"--{name}=-1"])
    assert not (tmp_path / "out").exists()
    (tmp_path / "out").touch()
    with pytest.raises(UserError, match="cannot write into this folder"):
        transcribe(setup, tmp_path / "out")


def test_an_export_without_the_statistics_it_needs_is_refused(setup: script.Config, tmp_path: Path) -> None:
    shutil.copytree(setup.export, tmp_path / "export")
    fields = json.loads((tmp_path / "export/config.json").read_text()) | {"normalisation": "dataset"}
    (tmp_path / "export/config.json").write_text(json.dumps(fields))
    with pytest.raises(UserError, match="has no statistics of its data"):
        transcribe(setup, tmp_path / "out", export=str(tmp_path / "export"))
