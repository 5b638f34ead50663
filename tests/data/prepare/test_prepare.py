"""Preparation: independent of interruptions and the number of workers, with clear errors."""

import ctypes
import json
import os
import resource
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch

from common.errors import UserError
from data.corpora.base import Utterance
from data.corpora.folder import FolderSettings
from data.corpora.registry import CORPORA
from data.features import FeatureSettings
from data.format.dataset import open_dataset
from data.prepare import extraction
from data.prepare.extraction import Extracted, extract, extract_all
from data.prepare.prepare import PrepareSettings, main, parse, prepare
from data.prepare.progress import Progress
from data.recording import Recording
from data.shards.derive import stored_recording
from data.skipped import Skipped
from tests.paths import REPOSITORY
from tests.patience import wait_until


@pytest.fixture
def audio(tmp_path: Path) -> Path:
    """Twelve recordings of 0.5 s."""
    return write_audio(tmp_path / "audio", 12)


def write_audio(folder: Path, count: int) -> Path:
    folder.mkdir()
    generator = np.random.default_rng(0)
    for number in range(count):
        soundfile.write(folder / f"{number:02}.wav", generator.uniform(-0.5, 0.5, 8000), 16000)
        (folder / f"{number:02}.txt").write_text(f"number {number}")
    return folder


def run(folder: Path, out: Path, *arguments: str) -> int:
    return main(["folder", "--folder", str(folder), "--out", str(out), "--workers", "1", *arguments])


def fingerprint(out: Path) -> str:
    return open_dataset(out).fingerprint


def test_a_corpus_becomes_a_dataset_with_its_text_and_splits(audio: Path, tmp_path: Path) -> None:
    assert run(audio, tmp_path / "out", "--dev-share=0.2", "--test_share", "0.2", "--language=en") == 0
    dataset = open_dataset(tmp_path / "out")
    assert len(dataset) == 12 and dataset.text(3) == "number 3" and stored_recording(dataset, 3).language == "en"
    assert set(dataset.totals("split")) == {"train", "dev", "test"}
    assert not (tmp_path / "out/skipped.jsonl").exists()


def test_the_dataset_does_not_depend_on_the_number_of_workers(
    audio: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run(audio, tmp_path / "one")
    settings = FolderSettings(folder=str(audio))
    prepare("folder", settings, FeatureSettings(), PrepareSettings(out=str(tmp_path / "two"), workers=2))
    assert fingerprint(tmp_path / "one") == fingerprint(tmp_path / "two")
    shards = [(tmp_path / name / "shard-00000.safetensors").read_bytes() for name in ("one", "two")]
    assert shards[0] == shards[1]  # the order is that of the corpus, not that in which workers finish
    assert "12/12 recordings" in capsys.readouterr().out


def test_workers_end_with_a_killed_main_process(tmp_path: Path) -> None:
    program = (
        "import os, time\n"
        "from data.prepare.extraction import extract_all\n"
        "from data.features import FeatureSettings\n"
        "from data.corpora.synthetic import SyntheticSettings, sources\n"
        "results = extract_all(sources(SyntheticSettings(train_long_share=0))[:600], FeatureSettings(), 2)\n"
        "next(results)\n"
        "print('working', flush=True)\n"
        "time.sleep(60)\n"
    )
    # The processes share a session, which identifies them.
    process = subprocess.Popen(
        [sys.executable, "-c", program], cwd=REPOSITORY, stdout=subprocess.PIPE, start_new_session=True
    )
    assert process.stdout is not None and process.stdout.readline() == b"working\n"
    assert len(session(process.pid)) >= 3
    process.kill()
    process.wait()
    process.stdout.close()
    wait_until(lambda: not session(process.pid), lambda: f"left behind: {session(process.pid)}")


def session(leader: int) -> list[int]:
    """Running processes of a session (Linux)."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, _, _, number = stat.read_text().rsplit(")", 1)[1].split()[:4]
        except OSError:  # it ended in the meantime
            continue
        if int(number) == leader and state not in "ZX":
            found.append(int(stat.parent.name))
    return found


def test_a_finished_dataset_is_not_prepared_again(
    audio: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run(audio, tmp_path / "out")
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").iterdir()}
    assert run(audio, tmp_path / "out") == 0
    assert "is already prepared" in capsys.readouterr().out
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "out").iterdir()} == before


def test_other_settings_in_the_same_folder_are_an_error_with_the_differences(
    audio: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    run(audio, out)

    def complaint(*arguments: str) -> str:
        assert run(audio, out, *arguments) == 2
        return capsys.readouterr().err

    assert "num_mels: 80 != 40" in complaint("--features.num_mels", "40")
    assert "dev_share: 0.05 != 0.1" in complaint("--dev_share=0.1")
    (audio / "00.wav").rename(audio / "zero.wav")
    (audio / "00.txt").rename(audio / "zero.txt")
    assert "recordings of the corpus have changed" in complaint()
    assert main(["synthetic", "--out", str(out), "--workers", "1"]) == 2
    assert "corpus: 'folder' != 'synthetic'" in capsys.readouterr().err


def test_unusable_recordings_are_skipped_counted_and_listed(
    audio: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (audio / "01.wav").write_bytes(b"")
    (audio / "02.wav").write_bytes(b"not audio at all" * 100)
    soundfile.write(audio / "03.wav", np.zeros(0), 16000)
    soundfile.write(audio / "04.wav", np.full(8000, np.nan, np.float32), 16000, subtype="FLOAT")
    soundfile.write(audio / "05.wav", np.zeros(100), 16000)
    assert run(audio, tmp_path / "out", "--max_skipped_share", "0.5") == 0
    assert len(open_dataset(tmp_path / "out")) == 7
    skipped = [json.loads(line) for line in (tmp_path / "out/skipped.jsonl").read_text().splitlines()]
    assert [entry["id"] for entry in skipped] == ["01", "02", "03", "04", "05"]
    assert all(entry["reason"] for entry in skipped)
    printed = capsys.readouterr().out
    assert "skipped 5 recordings" in printed and "NaN" in printed and "too short" in printed


def test_too_many_unusable_recordings_are_an_error_that_keeps_finished_work(
    audio: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for number in (3, 4):
        (audio / f"{number:02}.wav").write_bytes(b"")
    out = tmp_path / "out"
    assert run(audio, out, "--max_skipped_share", "0.1") == 2
    error = capsys.readouterr().err
    assert "2 of 12 recordings are unusable" in error and "max_skipped_share = 0.1" in error
    assert not (out / "dataset.json").exists() and len((out / "skipped.jsonl").read_text().splitlines()) == 2
    assert run(audio, out, "--max_skipped_share", "0.2") == 0
    assert "continuing: 3 of 12" in capsys.readouterr().out


def test_parts_prepared_apart_are_the_same_dataset(
    audio: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (audio / "02.wav").write_bytes(b"")
    (audio / "11.wav").write_bytes(b"")
    whole, out = tmp_path / "whole", tmp_path / "parts"
    assert run(audio, whole, "--max_skipped_share=0.5") == 0
    for part in (2, 0, 1):
        assert not (out / "dataset.json").exists()
        assert run(audio, out, f"--part={part}/3", "--max_skipped_share=0.5") == 0
        printed = capsys.readouterr().out
        assert ("2 of 3 parts are not finished: --part 0/3, 1/3" in printed) == (part == 2)
    assert "prepare: finished" in printed  # printed by the last part, without --merge
    merged, single = open_dataset(out), open_dataset(whole)
    assert merged.fingerprint == single.fingerprint and len(merged) == 10
    for i in range(10):
        assert stored_recording(merged, i) == stored_recording(single, i)
        assert np.array_equal(merged.read(i, verify=True), single.read(i))
    assert (out / "skipped.jsonl").read_bytes() == (whole / "skipped.jsonl").read_bytes()
    assert {path.name for path in out.iterdir()} == {path.name for path in whole.iterdir()} | {
        "shard-00001.safetensors",
        "shard-00002.safetensors",
    }
    assert run(audio, out, "--part=1/3") == 0 and "is already prepared" in capsys.readouterr().out


def test_more_parts_than_recordings_are_allowed(audio: Path, tmp_path: Path) -> None:
    for part in range(16):
        assert run(audio, tmp_path / "parts", f"--part={part}/16") == 0
    assert fingerprint(tmp_path / "parts") == fingerprint(out_of(audio, tmp_path / "whole"))


def test_a_merge_names_the_parts_that_are_missing(
    audio: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert run(audio, out, "--merge") == 2
    assert "no prepared parts to merge" in capsys.readouterr().err
    run(audio, out, "--part", "1/4")
    assert run(audio, out, "--merge") == 2
    assert "3 of 4 parts are not finished: --part 0/4, 2/4, 3/4" in capsys.readouterr().err
    for part in (0, 2):
        run(audio, out, "--part", f"{part}/4")
    kept = (out / "part-00002.json").read_bytes()
    (out / "part-00002.json").unlink()  # the last two finish without seeing each other, as on a slow shared disk
    run(audio, out, "--part", "3/4")
    assert not (out / "dataset.json").exists()
    (out / "part-00002.json").write_bytes(kept)
    assert run(audio, out, "--merge") == 0
    assert fingerprint(out) == fingerprint(out_of(audio, tmp_path / "whole"))


def test_a_part_with_other_settings_is_refused(audio: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    run(audio, out, "--part=0/3")

    def complaint(*arguments: str) -> str:
        assert run(audio, out, *arguments) == 2
        return capsys.readouterr().err

    before = sorted(path.name for path in out.iterdir())
    assert "num_mels: 80 != 40" in complaint("--part=1/3", "--features.num_mels=40")
    assert "dev_share: 0.05 != 0.1" in complaint("--part=1/3", "--dev_share=0.1")
    assert "parts: 3 != 4" in complaint("--part=1/4") and "parts: 3 != 1" in complaint()
    assert sorted(path.name for path in out.iterdir() if path.suffix != ".lock") == [
        name for name in before if not name.endswith(".lock")
    ]
    for part in ("3/3", "-1/3", "1", "a/b", "0/0"):
        assert f"part is '{part}'" in complaint(f"--part={part}")


def test_a_continued_part_lists_all_that_it_skipped_and_leaves_finished_work_alone(
    audio: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for number in (1, 7):
        (audio / f"{number:02}.wav").write_bytes(b"")
    out = tmp_path / "out"
    assert run(audio, out, "--part=0/2", "--max_skipped_share=0") == 2
    run(audio, out, "--part=1/2", "--max_skipped_share=0.5")
    run(audio, out, "--part=0/2", "--max_skipped_share=0.5")
    skipped = [json.loads(line) for line in (out / "skipped.jsonl").read_text().splitlines()]
    assert [entry["id"] for entry in skipped] == ["01", "07"] and len(open_dataset(out)) == 10
    assert not list(out.glob("skipped-*"))


def test_warnings_are_counted_and_listed_and_are_the_same_in_parts_and_after_a_stop(
    audio: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for number in (1, 4, 5, 11):
        (audio / f"{number:02}.TextGrid").write_text("none")
    assert run(audio, tmp_path / "whole") == 0
    whole = (tmp_path / "whole/warnings.jsonl").read_bytes()
    warnings = [json.loads(line) for line in whole.splitlines()]
    assert [warning["id"] for warning in warnings] == ["01", "04", "05", "11"]
    assert all(warning["reason"].startswith("kept without word times: ") for warning in warnings)
    assert "prepare: 4 warnings, listed in" in capsys.readouterr().out
    assert len(open_dataset(tmp_path / "whole")) == 12 and not (tmp_path / "whole/skipped.jsonl").exists()
    for part in range(3):
        assert run(audio, tmp_path / "parts", f"--part={part}/3") == 0
    assert (tmp_path / "parts/warnings.jsonl").read_bytes() == whole and not list(
        (tmp_path / "parts").glob("warnings-*")
    )
    (audio / "07.wav").rename(tmp_path / "07.wav")
    (audio / "07.wav").write_bytes(b"")
    assert run(audio, tmp_path / "out", "--max_skipped_share=0", "--shard_minutes=1e-9") == 2
    with open(tmp_path / "out/warnings.jsonl", "ab") as file:  # as a kill leaves it
        file.write(b'{"id": "09", "reason": "of a recording that is in no shard"}\n{"id": "01", "rea')
    (tmp_path / "07.wav").replace(audio / "07.wav")
    assert run(audio, tmp_path / "out") == 0 and "continuing: 7 of 12" in capsys.readouterr().out
    assert (tmp_path / "out/warnings.jsonl").read_bytes() == whole


def test_a_merge_killed_among_the_lists_of_skipped_recordings_is_completed(audio: Path, tmp_path: Path) -> None:
    """Killed after dataset.json and before the merged list, and after it and before the lists of parts are removed."""
    for number in (1, 7):
        (audio / f"{number:02}.wav").write_bytes(b"")
    out = tmp_path / "out"
    for part in (0, 1):
        run(audio, out, f"--part={part}/2", "--max_skipped_share=0.5")
    whole = (out / "skipped.jsonl").read_bytes()
    first, second = whole.splitlines(keepends=True)
    (out / "skipped.jsonl").unlink()
    (out / "skipped-00000.jsonl").write_bytes(first)
    (out / "skipped-00001.jsonl").write_bytes(second)
    for _ in range(2):
        assert run(audio, out, "--merge", "--max_skipped_share=0.5") == 0
        assert (out / "skipped.jsonl").read_bytes() == whole and not list(out.glob("skipped-*"))
        (out / "skipped-00001.jsonl").write_bytes(second)


def test_shards_are_closed_after_some_time_of_work(audio: Path, tmp_path: Path) -> None:
    run(audio, tmp_path / "out", "--shard_minutes=1e-9")
    assert len(list((tmp_path / "out").glob("shard-*.safetensors"))) == 12
    assert fingerprint(tmp_path / "out") == fingerprint(out_of(audio, tmp_path / "whole"))


@dataclass(frozen=True)
class Fault:
    """Source whose reading fails like a decoder; the file `once` marks that it has failed already."""

    id: str
    kind: str
    once: Path | None = None

    def load(self, features: FeatureSettings) -> Utterance:
        if self.once is not None and self.once.exists():
            return Utterance(Recording(self.id), torch.zeros(16000))
        if self.once is not None:
            self.once.touch()
        if self.kind == "segfault":
            ctypes.string_at(0)
        if self.kind == "exit":
            os._exit(3)
        if self.kind == "bug":
            raise KeyError("a mistake of the program")
        raise MemoryError


def test_a_recording_that_crashes_its_worker_is_named_and_skipped(tmp_path: Path) -> None:
    def good(name: str) -> Fault:
        (tmp_path / name).touch()
        return Fault(name, "", tmp_path / name)

    kinds = {"b": "segfault", "d": "memory"}
    sources = [Fault(name, kinds[name]) if name in kinds else good(name) for name in "abcdef"]
    sources.append(Fault("g", "exit", tmp_path / "killed once, for want of memory perhaps"))
    results = list(extract_all(sources, FeatureSettings(), 2))
    assert [result.id for result in results if isinstance(result, Skipped)] == ["b", "d"]
    assert [result.recording.id for result in results if isinstance(result, Extracted)] == list("acefg")
    reasons = [result.reason for result in results if isinstance(result, Skipped)]
    assert "SIGSEGV" in reasons[0] and "not enough memory" in reasons[1]


def test_an_unexpected_exception_is_raised_with_recording_and_traceback() -> None:
    with pytest.raises(RuntimeError, match=r"(?s)recording 'x'.*KeyError: 'a mistake of the program'"):
        list(extract_all([Fault("x", "bug"), Fault("y", "bug")], FeatureSettings(), 2))


def test_the_backlog_behind_a_slow_recording_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """The backlog is bounded in bytes: results behind a slow recording do not accumulate in memory."""
    monkeypatch.setattr(extraction, "_WAITING_BYTES", 3 * 101 * 160)
    seen: list[int] = []

    class Quick:
        def __init__(self, features: FeatureSettings) -> None:
            self.stopped = False

        def extract(self, source: Fault) -> Extracted:
            if source.id == "000":
                time.sleep(0.5)
            seen.append(int(source.id))
            return Extracted(Recording(source.id), np.zeros((101, 80), np.float16))

        def stop(self) -> None:
            pass

    monkeypatch.setattr(extraction, "_Worker", Quick)
    results = extract_all([Fault(f"{n:03}", "") for n in range(100)], FeatureSettings(), 2)
    first = next(results)
    assert isinstance(first, Extracted) and first.recording.id == "000" and len(seen) <= 7
    assert len(list(results)) == 99 and sorted(seen) == list(range(100))


def test_progress_shows_hours_speed_time_left_and_reasons() -> None:
    progress = Progress(10)
    progress.started -= 60
    for _ in range(3):
        progress.update(3600)
    progress.skip("the audio file is empty (N bytes)")
    progress.skip("the audio file is empty (N bytes)")
    assert str(progress) == (
        "3.00 audio-hours, 180 x real time, 0:01:00 left, 2 skipped (2 the audio file is empty (N bytes))"
    )


@pytest.mark.parametrize(("rate", "channels"), [(8000, 1), (44100, 2)])
def test_sample_rate_and_channels_do_not_change_the_features(tmp_path: Path, rate: int, channels: int) -> None:
    """A tone of 1 kHz is in the same mel bin; the mean of a tone and silence is the tone, 6 dB down."""
    features = FeatureSettings()
    peaks = []
    for name, sample_rate, count in (("a", 16000, 1), ("b", rate, channels)):
        tone = 0.5 * np.sin(2 * np.pi * 1000 * np.arange(sample_rate) / sample_rate)
        (tmp_path / name).mkdir()
        soundfile.write(tmp_path / name / "x.wav", np.stack([tone, 0 * tone][:count], axis=1), sample_rate)
        settings = FolderSettings(folder=str(tmp_path / name), text="none")
        result = extract(CORPORA["folder"].sources(settings)[0], features)
        assert isinstance(result, Extracted) and len(result.log_mel) == 101
        peaks.append((result.log_mel[50].argmax(), float(result.log_mel[50].max())))
    assert peaks[0][0] == peaks[1][0]
    assert peaks[0][1] - peaks[1][1] == pytest.approx(2 * np.log(channels), abs=0.05)


def test_a_full_disk_is_a_clear_error_that_keeps_finished_work(
    audio: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A limit of the file size simulates a full disk: the write that exceeds it fails in the middle of a shard."""
    out, limits = tmp_path / "out", resource.getrlimit(resource.RLIMIT_FSIZE)
    before = open_dataset(out_of(audio, tmp_path / "undisturbed")).fingerprint
    resource.setrlimit(resource.RLIMIT_FSIZE, (120_000, limits[1]))  # Python ignores the signal SIGXFSZ
    try:
        assert run(audio, out, "--shard_mb", "1") == 2
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    error = capsys.readouterr().err
    assert error.startswith("error:") and "the disk is full" in error and "run the same command again" in error
    assert not (out / "dataset.json").exists() and list(out.glob("*.tmp")) == []
    assert run(audio, out) == 0
    assert fingerprint(out) == before


def out_of(audio: Path, out: Path) -> Path:
    assert run(audio, out) == 0
    return out


def test_the_help_lists_the_corpora_and_every_setting(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    printed = capsys.readouterr().out
    assert all(name in printed for name in CORPORA)
    for name in CORPORA:
        with pytest.raises(SystemExit) as caught:
            main([name, "--help"])
        assert caught.value.code == 0
        printed = capsys.readouterr().out
        assert "--out" in printed and "--features.num_mels" in printed
    assert "Transcripts: required" in printed  # the folder's own, from the string under the field


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["syntetic", "--out", "x"], "Did you mean 'synthetic'?"),
        (["synthetic", "--out", "x", "--train-hour", "1"], "did you mean 'train_hours'?"),
        (["synthetic", "--out", "x", "--features.num_mel", "8"], "did you mean 'features.num_mels'?"),
        (["synthetic", "--out", "x", "--train_hours", "many"], "train_hours"),
        (["synthetic", "--out", "x", "--workers", "0"], "workers is 0"),
        (["synthetic"], "out"),
        (["folder", "--out", "x", "--folder", "/no/where"], "no such folder"),
    ],
)
def test_mistakes_on_the_command_line_are_named_before_any_work(
    arguments: list[str],
    complaint: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and complaint in error
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(
    "arguments",
    [
        ["--languages", "fr,cs"],
        ["--languages=fr,cs"],
        ["--languages", "[fr, cs]"],
        ["--languages+=fr", "--languages+=cs"],
    ],
)
def test_lists_can_be_written_with_commas(arguments: list[str]) -> None:
    settings, features, preparation = parse(
        "synthetic", CORPORA["synthetic"], ["--out", "x", *arguments, "--train-hours", "1e-1"]
    )
    assert settings.languages in (["fr", "cs"], ["en", "de", "es", "cs", "fr", "cs"])
    assert (settings.train_hours, preparation.out, features) == (0.1, "x", FeatureSettings())


def test_an_empty_corpus_and_repeated_ids_are_errors(audio: Path, tmp_path: Path) -> None:
    (audio / "00.flac").write_bytes(b"")
    with pytest.raises(UserError, match="1 recordings share their id.*'00'"):
        prepare(
            "folder", FolderSettings(folder=str(audio)), FeatureSettings(), PrepareSettings(out=str(tmp_path / "x"))
        )
    assert not (tmp_path / "x").exists()


def test_a_recording_with_unsorted_word_times_is_kept_without_them_and_reported_by_name() -> None:
    class Unsorted:
        id = "unsorted"

        def load(self, features: FeatureSettings) -> Utterance:
            words = [("b", 0.5, 0.6), ("a", 0.1, 0.2)]
            return Utterance(Recording(self.id, "b a", words), np.zeros(features.sample_rate, np.float32))

    kept = extract(Unsorted(), FeatureSettings())
    assert isinstance(kept, Extracted) and (kept.recording.text, kept.recording.words) == ("b a", None)
    assert "kept without word times: recording 'unsorted', word 1 'a'" in kept.warnings[0]


def test_a_corpus_is_the_same_for_any_spelling_of_its_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another folder is another corpus even with the same file names, since its audio may differ."""
    for name in ("talks", "others"):
        (tmp_path / name).mkdir()
        soundfile.write(tmp_path / name / "a.wav", np.ones(1600) / 2, 16000)
        (tmp_path / name / "a.txt").write_text("one")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "link").symlink_to("talks")
    settings = PrepareSettings(out=str(tmp_path / "out"), workers=1)
    assert prepare("folder", FolderSettings(folder=str(tmp_path / "talks")), FeatureSettings(), settings)
    for place in (f"{tmp_path}/talks/", "talks", "./link"):
        assert not prepare("folder", FolderSettings(folder=place), FeatureSettings(), settings)
    with pytest.raises(UserError, match="prepared from another corpus .*folder: .*talks' != 'others'"):
        prepare("folder", FolderSettings(folder="others"), FeatureSettings(), settings)
