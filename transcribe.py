"""Transcripts of audio files from an exported recogniser.

    python transcribe.py --export runs/ctc/export --audio talk.mp3
    python transcribe.py --export runs/ctc/export --audio talks --out transcripts --formats txt,json,srt
    torchrun --nproc-per-node 8 transcribe.py --export runs/ctc/export --audio talks --out transcripts

--audio is a file that libsndfile reads, or a folder, which is searched for such files at any depth. Without --out, a
line "path<TAB>text" per recording is written to stdout. With --out, talks/day1/a.mp3 becomes transcripts/day1/a.txt and
so on, in each of the formats: txt, json (words with times and confidence), ctm, srt, vtt, TextGrid.

After Ctrl-C the same command continues; finished recordings are transcribed again only if audio, model or a setting has
changed. Files that cannot be read, or whose transcript cannot be written, are skipped, and listed at the end and in
failed.jsonl; the exit status is then 1.
"""

import errno
import json
import os
import sys
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Literal, TextIO

import numpy as np
import torch
from jsonargparse.typing import NonNegativeInt
from torch import Tensor
from tqdm import tqdm

from bestrq.long_form.decoders import Decoder, DecoderSettings, decode_recordings
from bestrq.long_form.inference import InferenceSettings, RecordingSource
from bestrq.training.export_reading import Export, read_export
from bestrq.training.process import World
from bestrq.transcripts.formats import WRITERS, TimedTranscript
from bestrq.transcripts.subtitles import SubtitleSettings
from common.config import parse, run_main, to_dict
from common.errors import UserError
from common.files import hash_of_file, write_file
from common.json_lines import read_json_lines
from data.audio.files import AudioFile, list_audio
from data.corpora.audio_files import FileSource
from data.features import FeatureSettings
from data.format.dataset import STD_FLOOR, mean_and_std, normalisation_scale, normalise_into
from data.names import escaped
from data.prepare.extraction import Extracted, extract_all
from data.recording import Recording
from data.skipped import Skipped
from pipelines.recogniser import (
    EncoderChanges,
    Recogniser,
    hash_of_export,
    load_recogniser,
    make_decoder,
    resolve_inference,
    share_out,
    start_inference,
    timed_transcript,
)

FORMAT_VERSION = 1
STATE, FAILED = "transcribed.jsonl", "failed.jsonl"
BATCHES_HELD = 16
"""number of batches whose features are in memory at a time; larger groups fill batches better"""
FATAL_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EROFS)
"""errors that affect every file in --out"""


@dataclass
class Config:
    """Transcription of audio files by an exported recogniser."""

    export: str = ""
    """folder of the model, RUN_FOLDER/export of finetune_ctc.py or finetune_rnnt.py"""
    audio: str = ""
    """audio file, or folder with audio files at any depth"""
    out: str = ""
    """folder for the transcripts; empty writes a line "path<TAB>text" per recording to stdout"""
    formats: str = "txt,json"
    """formats to write, separated by commas: txt, json, ctm, srt, vtt, TextGrid"""
    subtitles: SubtitleSettings = field(default_factory=SubtitleSettings)
    """line lengths and pauses of srt and vtt"""
    inference: InferenceSettings = field(default_factory=InferenceSettings)
    """context, overlap, batches, precision"""
    encoder: EncoderChanges = field(default_factory=EncoderChanges)
    """changes to the encoder's settings in the export; null keeps the trained value"""
    decoder: DecoderSettings = field(default_factory=DecoderSettings)
    """greedy or beam, CTC or transducer, language model"""
    workers: NonNegativeInt = 0
    """worker processes per process that read audio and compute features; 1 uses no workers: the process alternates
    between features and model; 0 is 1 on a CPU and the number of threads on a GPU"""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto uses CUDA if a GPU is available"""
    threads: NonNegativeInt = 0
    """CPU threads per process; 0 divides the cores among the processes of a machine"""

    def __post_init__(self) -> None:
        for name, kind in (("export", "FOLDER"), ("audio", "FILE_OR_FOLDER")):
            if not getattr(self, name):
                raise UserError(f"{name} is missing: give it as --{name} {kind}")
        unknown = [name for name in self.format_names if name not in WRITERS]
        if unknown or not self.format_names:
            raise UserError(f"formats = {self.formats!r}: give one or more of {','.join(WRITERS)}, separated by commas")
        audio = Path(self.audio).expanduser()
        if self.out and Path(self.out).resolve() == (audio if audio.is_dir() else audio.parent).resolve():
            raise UserError(
                f"out = {self.out} is the folder of the audio files, where X.txt may be the reference of X.wav; choose "
                "another folder"
            )

    @property
    def format_names(self) -> list[str]:
        return [name.strip() for name in self.formats.split(",") if name.strip()]


@dataclass(frozen=True)
class Outcome:
    """Transcript of a file, or the reason for its absence."""

    file: AudioFile
    transcript: TimedTranscript | None
    reason: str = ""


def transcribe(config: Config, world: World) -> int:
    """Transcribe all files. All processes call it. Returns the number of files without a transcript, 0 on other ranks.

    Only rank 0 returns that number: a launcher kills the remaining ranks as soon as one fails, perhaps before rank 0
    has printed the failures.
    """
    # Errors in the settings are raised here, before any work.
    if world.size > 1 and not config.out:
        raise UserError(f"out is missing: {world.size} processes cannot share stdout, give --out FOLDER")
    config = replace(config, inference=resolve_inference(config.inference, world))
    export = read_export(config.export)
    recogniser = load_recogniser(export, config.encoder)
    decoder = make_decoder(recogniser, config.decoder, config.export)
    check_statistics(recogniser, export)
    # Only rank 0 lists the folder: on a network file system, other ranks may get an outdated list.
    listed = list_audio(config.audio, key_of(config, hash_of_export(export))) if world.is_main else []
    fields = world.broadcast([{**vars(file), "path": str(file.path)} for file in listed])
    files = [AudioFile(**{**values, "path": Path(values["path"])}) for values in fields]
    done = set(world.broadcast(finished_files(files, config) if world.is_main and config.out else []))
    failed = {name: reason for name, reason in clashes(files, config).items() if name not in done}
    remaining = [number for number, file in enumerate(files) if file.name not in done and file.name not in failed]
    if done and world.is_main:
        print(f"continuing: {len(done)} of {len(files)} files are already transcribed")
    lengths = np.array([round(1000 * file.seconds) for file in files])
    rank_files = [files[number] for number in share_out(remaining, lengths, world)]
    with (
        closing(outcomes(recogniser, decoder, rank_files, config, world)) as results,
        open_log(config.out, world.rank) as log,
    ):
        for name, reason in failed.items() if world.is_main else ():
            log.write(json.dumps({"name": name, "key": "", "reason": reason}) + "\n")
        for outcome in progress(results, rank_files, world):
            file, reason = outcome.file, outcome.reason
            if outcome.transcript is not None:
                # An empty key matches no file: a transcript that was only partly replaced is not reused.
                log.write(json.dumps({"name": file.name, "key": "", "reason": ""}) + "\n")
                reason = try_to_write(file, outcome.transcript, config)
            if reason:
                failed[file.name] = reason
            log.write(json.dumps({"name": file.name, "key": file.key, "reason": reason}) + "\n")
    world.barrier()
    if config.out and world.is_main:  # the logs also have the failures of the other ranks
        entries = collect_state(Path(config.out))
        reasons = {file.name: entries.get(file.name, {}).get("reason") for file in files}
        failed = {name: reason for name, reason in reasons.items() if reason}
        write_failed(Path(config.out), files, failed)
        print(f"{len(files) - len(failed)} of {len(files)} files are transcribed: {config.out}")
    if failed and world.is_main:
        listing = "".join(f"\n  {escaped(printable(f'{name}: {reason}'))}" for name, reason in failed.items())
        print(f"error: {len(failed)} of {len(files)} audio files could not be transcribed:{listing}", file=sys.stderr)
    return len(failed) if world.is_main else 0


def check_statistics(recogniser: Recogniser, export: Export) -> None:
    """Raise UserError if the model needs statistics of its training data and the export has none."""
    if recogniser.normalisation == "dataset" and recogniser.statistics is None:
        raise UserError(
            f"{export.path} was trained with data.normalisation 'dataset', but has no statistics of its data (it is "
            "an older export, or was trained on a mixture): prepare the audio with data.prepare and use evaluate.py"
        )


def key_of(config: Config, export_hash: str) -> str:
    """Key of everything except the audio that determines the transcripts; the batch size has no effect."""
    settings = {name: to_dict(getattr(config, name)) for name in ("inference", "encoder", "decoder")}
    del settings["inference"]["batch_seconds"]
    for name, value in settings["decoder"].items():  # a language model or list of words counts by content, not path
        if isinstance(value, str) and Path(value).is_file():
            settings["decoder"][name] = hash_of_file(value)
    subtitles = to_dict(config.subtitles) if {"srt", "vtt"} & set(config.format_names) else None
    return json.dumps([FORMAT_VERSION, export_hash, settings, sorted(config.format_names), subtitles], sort_keys=True)


def outcomes(
    recogniser: Recogniser, decoder: Decoder, files: Sequence[AudioFile], config: Config, world: World,
) -> Generator[Outcome, None, None]:  # fmt: skip
    """Outcomes of files, each as soon as it is available. The features of one group are in memory at a time."""
    recogniser.model.to(world.device)
    groups = in_groups(files, BATCHES_HELD * config.inference.batch_seconds)
    workers = config.workers or (1 if world.device.type == "cpu" else torch.get_num_threads())
    with closing(read_features(groups, recogniser.features, workers)) as features:
        for group in groups:
            sources: dict[AudioFile, RecordingSource] = {}
            for file in group:
                result = next(features)
                if isinstance(result, Skipped):
                    yield Outcome(file, None, result.reason)
                else:
                    for warning in result.warnings:
                        print(f"warning: {escaped(printable(warning))}", file=sys.stderr)
                    sources[file] = source_of(result.log_mel, recogniser.statistics, recogniser.std_floor)
                del result  # frees the features, perhaps of hours, before the next are read
            yield from decode(recogniser, decoder, sources, config.inference, world)
            del sources


def decode(
    recogniser: Recogniser, decoder: Decoder, by_file: Mapping[AudioFile, RecordingSource], settings: InferenceSettings,
    world: World,
) -> Iterator[Outcome]:  # fmt: skip
    """Transcripts of files whose features are in memory."""
    files, sources = list(by_file), list(by_file.values())
    rate, stride = recogniser.features.frames_per_second, recogniser.model.encoder.settings.stride
    for index, tokens in decode_recordings(decoder, sources, settings, stride, rate, world.device):
        name = printable(files[index].name)
        yield Outcome(files[index], timed_transcript(recogniser, name, sources[index].num_frames, tokens))


def in_groups(files: Sequence[AudioFile], seconds: float) -> list[list[AudioFile]]:
    """Consecutive groups of files of at most this duration; a longer file is a group of its own."""
    groups: list[list[AudioFile]] = []
    total = 0.0
    for file in files:
        if not groups or total + file.seconds > seconds:
            groups.append([])
            total = 0.0
        groups[-1].append(file)
        total += file.seconds
    return groups


def read_features(
    groups: list[list[AudioFile]], features: FeatureSettings, workers: int
) -> Generator[Extracted | Skipped, None, None]:
    """Log-mel of each file in order, exactly as data.prepare computes it."""
    sources = [[FileSource(Recording(str(number)), file.path) for number, file in enumerate(group)] for group in groups]
    if workers > 1:
        yield from extract_all([source for group in sources for source in group], features, workers)
        return
    for group in sources:
        # A list, because extract_all limits torch to one thread until it has finished.
        yield from list(extract_all(group, features, 1))


def source_of(
    log_mel: np.ndarray, dataset_statistics: tuple[Tensor, Tensor] | None, std_floor: float = STD_FLOOR
) -> RecordingSource:
    """Decoder input from log-mel, float16 [frames, M], normalised like a recording of a dataset."""
    if dataset_statistics is None:
        mean, std = map(torch.from_numpy, mean_and_std(log_mel))
        dataset_statistics = normalisation_scale(mean, std, std_floor)
    mean, inverse_std = dataset_statistics
    return RecordingSource(len(log_mel), partial(read_mel, log_mel, mean, inverse_std))


def read_mel(log_mel: np.ndarray, mean: Tensor, inverse_std: Tensor, start: int, stop: int) -> Tensor:
    """Normalised frames, float32 [stop - start, M]."""
    out = torch.empty(stop - start, log_mel.shape[1])
    # A copy, because torch warns about arrays that are not writable, such as those of a worker process.
    normalise_into(out, log_mel[start:stop].copy(), mean, inverse_std)
    return out


def progress(outcomes: Iterator[Outcome], files: Sequence[AudioFile], world: World) -> Iterator[Outcome]:
    """Outcomes of the files, with a progress bar on rank 0 if stderr is a terminal."""
    label = "transcribing" if world.size == 1 else f"transcribing (process 1 of {world.size})"
    hidden = not world.is_main or not sys.stderr.isatty()
    total = sum(round(file.seconds) for file in files)
    with tqdm(total=total, unit="audio-s", desc=label, disable=hidden) as bar:
        for outcome in outcomes:
            yield outcome
            bar.update(round(outcome.file.seconds))


def transcript_paths(name: str, config: Config) -> dict[str, Path]:
    """Paths of a file's transcripts, by format."""
    return {form: Path(config.out, f"{name}.{form}") for form in config.format_names}


def clashes(files: Sequence[AudioFile], config: Config) -> dict[str, str]:
    """Reason, by name, for files whose transcript would have the path of a folder of other transcripts.

    If `a.wav` is next to a folder `a.txt`, `a.wav` fails, and the files in the folder do not.
    """
    folders = {parent.as_posix() for file in files for parent in Path(file.name).parents}
    paths = {file.name: [f"{file.name}.{form}" for form in config.format_names if config.out] for file in files}
    return {
        name: f"its transcript and a folder of other transcripts would both be {path!r}: rename one of them"
        for name, file_paths in paths.items()
        for path in file_paths
        if path in folders
    }


def try_to_write(file: AudioFile, transcript: TimedTranscript, config: Config) -> str:
    """Write a transcript. Returns "", or the reason for which it cannot be written.

    Raises UserError for an error that affects every file.
    """
    try:
        write_transcript(file, transcript, config)
    except OSError as error:
        if not config.out:
            raise
        if error.errno in FATAL_ERRORS:
            raise UserError(f"out = {config.out}: {error}; free some space and run the same command again") from error
        return f"its transcript cannot be written: {error.filename2 or error.filename}: {error.strerror}"
    return ""


def write_transcript(file: AudioFile, transcript: TimedTranscript, config: Config) -> None:
    """Write a transcript in all formats, each atomically, into --out, or as a line to stdout."""
    if not config.out:
        print(f"{escaped(printable(str(file.path)))}\t{transcript.text}", flush=True)
        if getattr(sys.stdout, "vanished", False):
            raise UserError("out is not set and stdout is closed: give a folder as --out FOLDER")
        return
    for form, path in transcript_paths(file.name, config).items():
        path.parent.mkdir(parents=True, exist_ok=True)
        write_file(path, WRITERS[form](transcript, config.subtitles))


def printable(name: str) -> str:
    """File name with bytes that are not UTF-8 replaced."""
    return os.fsencode(name).decode(errors="replace")


def open_log(out: str, rank: int) -> TextIO:
    """Log of a rank's outcomes. Line-buffered: an interruption loses only the recordings of the current batch."""
    return open(Path(out) / f"transcribed-{rank:05d}.jsonl" if out else os.devnull, "a", buffering=1, encoding="utf-8")


def finished_files(files: Sequence[AudioFile], config: Config) -> list[str]:
    """Names of files that an earlier run has transcribed under the same key. Creates --out."""
    out = Path(config.out)
    try:
        out.mkdir(parents=True, exist_ok=True)
        entries = collect_state(out)
    except OSError as error:
        raise UserError(f"out = {config.out}: cannot write into this folder ({error}); choose another one") from error
    done = {name for name, entry in entries.items() if not entry["reason"]}
    return [
        file.name
        for file in files
        if file.name in done
        and entries[file.name]["key"] == file.key
        and all(os.path.isfile(path) for path in transcript_paths(file.name, config).values())
    ]


def collect_state(out: Path) -> dict[str, dict[str, str]]:
    """Last entry (key, and reason if it failed) of each file, by name. Merges the logs of all ranks into one file."""
    entries: dict[str, dict[str, str]] = {}
    parts = sorted(out.glob("transcribed-*.jsonl"))
    for path in [path for path in (out / STATE, *parts) if path.exists()]:
        for entry in read_json_lines(path):
            values = {name: entry[name] for name in ("name", "key", "reason") if isinstance(entry.get(name), str)}
            if len(values) == 3:  # else the file is transcribed again
                entries[values["name"]] = values
    write_file(out / STATE, "".join(json.dumps(entry) + "\n" for entry in entries.values()))
    for path in parts:
        path.unlink()
    return entries


def write_failed(out: Path, files: Sequence[AudioFile], failed: Mapping[str, str]) -> None:
    """Write failed.jsonl with path and reason of each file without a transcript; delete it if all have one."""
    lines = [{"path": printable(str(f.path)), "reason": failed[f.name]} for f in files if f.name in failed]
    if lines:
        write_file(out / FAILED, "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))
    else:
        (out / FAILED).unlink(missing_ok=True)


def main() -> int:
    config = parse(Config, description=__doc__)
    world = start_inference(config.device, config.threads, config.inference)
    failed = transcribe(config, world)
    world.close()
    return 1 if failed else 0


if __name__ == "__main__":
    run_main(main, console_may_vanish=True)
