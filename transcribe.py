"""Audio files to text, with an exported recogniser.

    python transcribe.py --export runs/ctc/export --audio talk.mp3
    python transcribe.py --export runs/ctc/export --audio talks --out transcripts --formats txt,json,srt
    torchrun --nproc-per-node 8 transcribe.py --export runs/ctc/export --audio talks --out transcripts

--audio is a file that libsndfile reads, or a folder with such files at any depth. Without --out a line a recording goes
to stdout, "path<TAB>text". With it, talks/day1/a.mp3 becomes transcripts/day1/a.txt and so on, in every format asked
for: txt, json (words with times and confidence), ctm, srt, vtt, TextGrid.

After Ctrl-C the same command goes on where it was; finished recordings are done again only if audio, model or a setting
has changed. Files that cannot be read, or whose transcript cannot be written, are skipped and listed at the end and in
failed.jsonl; the exit status is then 1.
"""

import errno
import json
import os
import sys
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import closing, suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Literal, TextIO

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from bestrq.long_form.decoders import Decoder, DecoderSettings, decode_recordings
from bestrq.long_form.inference import InferenceSettings, Source
from bestrq.training.export import Export, read_export
from bestrq.training.precision import warn_of_emulation
from bestrq.training.process import DistributedSettings, World, start_world
from bestrq.transcripts.formats import WRITERS, TimedTranscript
from bestrq.transcripts.subtitles import SubtitleSettings
from common.config import parse, run_main, to_dict
from common.errors import UserError
from common.files import hash_of_file, write_file
from data.audio.files import AudioFile, list_audio
from data.corpora.base import FileSource
from data.features import FeatureSettings
from data.format.index import Recording, statistics
from data.format.normalisation import normalise_into, scale_of
from data.names import escaped
from data.prepare.extraction import Extracted, Skipped, extract_all
from pipelines.recogniser import (
    EncoderChanges,
    Recogniser,
    hash_of_export,
    load_recogniser,
    make_decoder,
    share_out,
    timed_transcript,
)

FORMAT_VERSION = 1
STATE, FAILED = "transcribed.jsonl", "failed.jsonl"
BATCHES_HELD = 16
"""recordings of so many batches are held as features at a time, so that few batches are not full"""
NO_FILE_MORE = (errno.ENOSPC, errno.EDQUOT, errno.EROFS)
"""errors that concern all of --out, not one file in it"""


@dataclass
class Config:
    """Transcription of audio files by an exported recogniser."""

    export: str = ""
    """folder of the model, RUN_FOLDER/export of finetune_ctc.py or finetune_rnnt.py"""
    audio: str = ""
    """audio file, or folder with audio files at any depth"""
    out: str = ""
    """folder for the transcripts; empty writes lines "path<TAB>text" to stdout"""
    formats: str = "txt,json"
    """which files are written, separated by commas: txt, json, ctm, srt, vtt, TextGrid"""
    subtitles: SubtitleSettings = field(default_factory=SubtitleSettings)
    """lines and pauses of srt and vtt"""
    inference: InferenceSettings = field(default_factory=InferenceSettings)
    """context, overlap, batches, precision"""
    encoder: EncoderChanges = field(default_factory=EncoderChanges)
    """what the encoder sees, in place of what it was trained with"""
    decoder: DecoderSettings = field(default_factory=DecoderSettings)
    """greedy or beam, CTC or transducer, language model"""
    workers: int = 0
    """processes, for every process, that read audio and compute features; 1 is the process itself, while the model
    waits. 0 is that on a CPU, and as many as there are threads on a GPU"""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto takes CUDA where there is a GPU"""
    threads: int = 0
    """CPU threads of every process; 0 shares the cores among the processes of a machine"""

    def __post_init__(self) -> None:
        for name, what in (("export", "FOLDER"), ("audio", "FILE_OR_FOLDER")):
            if not getattr(self, name):
                raise UserError(f"{name} is missing: give it as --{name} {what}")
        unknown = [name for name in self.format_names if name not in WRITERS]
        if unknown or not self.format_names:
            raise UserError(f"formats = {self.formats!r}: give some of {','.join(WRITERS)}, separated by commas")
        audio = Path(self.audio).expanduser()
        if self.out and Path(self.out).resolve() == (audio if audio.is_dir() else audio.parent).resolve():
            raise UserError(f"out = {self.out}: X.txt beside X.wav may be what was said; choose another folder")
        if self.workers < 0:
            raise UserError(f"workers = {self.workers}: give 1 or more, or 0 (automatic)")

    @property
    def format_names(self) -> list[str]:
        return [name.strip() for name in self.formats.split(",") if name.strip()]


@dataclass(frozen=True)
class Outcome:
    """What became of a file: a transcript, or the reason why there is none."""

    file: AudioFile
    transcript: TimedTranscript | None
    reason: str = ""


def transcribe(config: Config, world: World) -> int:
    """Transcribe all files; every process calls it. Returns, on rank 0, the number of files without a transcript."""
    # Everything that a user can get wrong comes before any work.
    export = read_export(config.export)
    recogniser = load_recogniser(export, config.encoder)
    decoder = make_decoder(recogniser, config.decoder, config.export)
    check_statistics(recogniser, export)
    if world.size > 1 and not config.out:
        raise UserError(f"out is missing: {world.size} processes cannot share stdout, give --out FOLDER")
    # By rank 0 alone: a network file system may show a new file to some first.
    listed = list_audio(config.audio, key_of(config, hash_of_export(export))) if world.is_main else []
    fields = world.broadcast([{**vars(file), "path": str(file.path)} for file in listed])
    files = [AudioFile(**{**one, "path": Path(one["path"])}) for one in fields]
    done = set(world.broadcast(finished_files(files, config) if world.is_main and config.out else []))
    failed = {name: reason for name, reason in clashes(files, config).items() if name not in done}
    left = [number for number, file in enumerate(files) if file.name not in done and file.name not in failed]
    if done and world.is_main:
        print(f"going on: {len(done)} of {len(files)} files are transcribed already")
    lengths = np.array([round(1000 * file.seconds) for file in files])
    mine = [files[number] for number in share_out(left, lengths, world)]
    with (
        closing(outcomes(recogniser, decoder, mine, config, world)) as found,
        open_log(config.out, world.rank) as log,
    ):
        for name, reason in failed.items() if world.is_main else ():
            log.write(json.dumps({"name": name, "key": "", "reason": reason}) + "\n")
        for one in progress(found, mine, world):
            reason = one.reason
            if one.transcript is not None:
                # No key is empty: of a stop while the files are replaced, none counts as done.
                log.write(json.dumps({"name": one.file.name, "key": "", "reason": ""}) + "\n")
                reason = try_to_write(one.file, one.transcript, config)
            if reason:
                failed[one.file.name] = reason
            log.write(json.dumps({"name": one.file.name, "key": one.file.key, "reason": reason}) + "\n")
    world.barrier()
    if config.out and world.is_main:  # what the other processes met, too
        entries = collect_state(Path(config.out))
        reasons = {file.name: entries.get(file.name, {}).get("reason") for file in files}
        failed = {name: reason for name, reason in reasons.items() if reason}
        write_failed(Path(config.out), files, failed)
        print(f"{len(files) - len(failed)} of {len(files)} files are transcribed: {config.out}")
    if failed and world.is_main:
        listing = "".join(f"\n  {escaped(printable(f'{name}: {reason}'))}" for name, reason in failed.items())
        print(f"error: {len(failed)} of {len(files)} audio files could not be transcribed:{listing}", file=sys.stderr)
    # A launcher that saw another rank fail would stop this one before it has told.
    return len(failed) if world.is_main else 0


def check_statistics(recogniser: Recogniser, export: Export) -> None:
    """Raises UserError where the model wants statistics of its training data, and they are missing."""
    if recogniser.normalisation == "dataset" and recogniser.statistics is None:
        raise UserError(
            f"{export.path} was trained with data.normalisation 'dataset', but holds no statistics of its data (it is "
            "an older export, or was trained on a mixture): prepare the audio with data.prepare and use evaluate.py"
        )


def key_of(config: Config, export_hash: str) -> str:
    """Names how files are transcribed: outputs under one key are the same. Batches are no part of it."""
    settings = {name: to_dict(getattr(config, name)) for name in ("inference", "encoder", "decoder")}
    del settings["inference"]["batch_seconds"]
    for name, value in settings["decoder"].items():  # a language model, a list of words: their content counts
        if isinstance(value, str) and Path(value).is_file():
            settings["decoder"][name] = hash_of_file(value)
    subtitles = to_dict(config.subtitles) if {"srt", "vtt"} & set(config.format_names) else None
    return json.dumps([FORMAT_VERSION, export_hash, settings, sorted(config.format_names), subtitles], sort_keys=True)


def outcomes(
    recogniser: Recogniser, decoder: Decoder, mine: Sequence[AudioFile], config: Config, world: World,
) -> Generator[Outcome, None, None]:  # fmt: skip
    """Those of this rank's files, each as soon as it is there. Features of one group are in memory at a time."""
    recogniser.model.to(world.device)
    groups = in_groups(mine, BATCHES_HELD * config.inference.batch_seconds)
    workers = config.workers or (1 if world.device.type == "cpu" else torch.get_num_threads())
    with closing(read_features(groups, recogniser.features, workers)) as features:
        for group in groups:
            heard: dict[AudioFile, Source] = {}
            for file in group:
                result = next(features)
                if isinstance(result, Skipped):
                    yield Outcome(file, None, result.reason)
                else:
                    for warning in result.warnings:
                        print(f"warning: {escaped(printable(warning))}", file=sys.stderr)
                    heard[file] = source_of(result.log_mel, recogniser.statistics)
                del result  # hours of features, while the next are read
            yield from decode(recogniser, decoder, heard, config.inference, world)
            del heard


def decode(
    recogniser: Recogniser, decoder: Decoder, heard: Mapping[AudioFile, Source], settings: InferenceSettings,
    world: World,
) -> Iterator[Outcome]:  # fmt: skip
    """Transcripts of files whose features are in memory."""
    files, sources = list(heard), list(heard.values())
    rate, stride = recogniser.features.frames_per_second, recogniser.model.encoder.settings.stride
    for index, tokens in decode_recordings(decoder, sources, settings, stride, rate, world.device):
        name = printable(files[index].name)
        yield Outcome(files[index], timed_transcript(recogniser, name, sources[index].num_frames, tokens))


def in_groups(files: Sequence[AudioFile], seconds: float) -> list[list[AudioFile]]:
    """Files in their order, as many together as last for so long; at least one."""
    groups: list[list[AudioFile]] = []
    held = 0.0
    for file in files:
        if not groups or held + file.seconds > seconds:
            groups.append([])
            held = 0.0
        groups[-1].append(file)
        held += file.seconds
    return groups


def read_features(
    groups: list[list[AudioFile]], features: FeatureSettings, workers: int
) -> Generator[Extracted | Skipped, None, None]:
    """Log-mel of every file in order, exactly as data.prepare computes it."""
    sources = [[FileSource(Recording(str(number)), file.path) for number, file in enumerate(group)] for group in groups]
    if workers > 1:
        yield from extract_all([source for group in sources for source in group], features, workers)
        return
    for group in sources:
        # A list: the function keeps torch to one thread until it is through.
        yield from list(extract_all(group, features, 1))


def source_of(log_mel: np.ndarray, dataset_statistics: tuple[Tensor, Tensor] | None) -> Source:
    """A recording for the decoder, normalised as a dataset of it would be. log_mel: float16 [frames, M]."""
    mean, inverse_std = dataset_statistics or scale_of(*map(torch.from_numpy, statistics(log_mel)))
    return Source(len(log_mel), partial(read_mel, log_mel, mean, inverse_std))


def read_mel(log_mel: np.ndarray, mean: Tensor, inverse_std: Tensor, start: int, stop: int) -> Tensor:
    """Normalised frames, float32 [stop - start, M]."""
    out = torch.empty(stop - start, log_mel.shape[1])
    # A copy: what comes from a worker cannot be written to, and torch warns of that.
    normalise_into(out, log_mel[start:stop].copy(), mean, inverse_std)
    return out


def progress(found: Iterator[Outcome], mine: Sequence[AudioFile], world: World) -> Iterator[Outcome]:
    """A bar while the files are done, on a terminal and of rank 0."""
    label = "transcribing" if world.size == 1 else f"transcribing (process 1 of {world.size})"
    hidden = not world.is_main or not sys.stderr.isatty()
    total = sum(round(file.seconds) for file in mine)
    with tqdm(total=total, unit="audio-s", desc=label, disable=hidden) as bar:
        for one in found:
            yield one
            bar.update(round(one.file.seconds))


def transcript_paths(name: str, config: Config) -> dict[str, Path]:
    """Where the transcripts of a file lie, by format."""
    return {form: Path(config.out, f"{name}.{form}") for form in config.format_names}


def clashes(files: Sequence[AudioFile], config: Config) -> dict[str, str]:
    """Files whose transcript would have the path of a folder of other transcripts: reason by name.

    With `a.wav` beside a folder `a.txt`, `a.wav` fails and the files in the folder do not.
    """
    folders = {parent.as_posix() for file in files for parent in Path(file.name).parents}
    places = {file.name: [f"{file.name}.{form}" for form in config.format_names if config.out] for file in files}
    return {
        name: f"its transcript and a folder of other transcripts would both be {place!r}: rename one of them"
        for name, own in places.items()
        for place in own
        if place in folders
    }


def try_to_write(file: AudioFile, transcript: TimedTranscript, config: Config) -> str:
    """Write a transcript. Returns the reason if it cannot be written, else "".

    Raises UserError if no transcript can be written any more.
    """
    try:
        write_transcript(file, transcript, config)
    except OSError as error:
        if not config.out:
            raise
        if error.errno in NO_FILE_MORE:
            raise UserError(f"out = {config.out}: {error}; free some space and run the same command again") from error
        return f"its transcript cannot be written: {error.filename2 or error.filename}: {error.strerror}"
    return ""


def write_transcript(file: AudioFile, transcript: TimedTranscript, config: Config) -> None:
    """All formats into --out, each complete or not there; or a line to stdout."""
    if not config.out:
        print(f"{escaped(printable(str(file.path)))}\t{transcript.text}", flush=True)
        if getattr(sys.stdout, "vanished", False):
            raise UserError("out is not set and stdout is closed: give a folder as --out FOLDER")
        return
    for form, path in transcript_paths(file.name, config).items():
        path.parent.mkdir(parents=True, exist_ok=True)
        write_file(path, WRITERS[form](transcript, config.subtitles))


def printable(name: str) -> str:
    """A file's name as Unicode: bytes in it that are none are replaced."""
    return os.fsencode(name).decode(errors="replace")


def open_log(out: str, rank: int) -> TextIO:
    """Where a process writes what became of its files, line by line, so that a stop costs those in hand alone."""
    return open(Path(out) / f"transcribed-{rank:05d}.jsonl" if out else os.devnull, "a", buffering=1, encoding="utf-8")


def finished_files(files: Sequence[AudioFile], config: Config) -> list[str]:
    """Names of those that an earlier start has transcribed in the same way. Makes --out."""
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
    """The last entry (key, and a reason if it failed) of every file, by name. Puts those of all processes together."""
    entries: dict[str, dict[str, str]] = {}
    parts = sorted(out.glob("transcribed-*.jsonl"))
    for path in (out / STATE, *parts):
        for line in path.read_text(encoding="utf-8", errors="replace").splitlines() if path.exists() else ():
            with suppress(ValueError, TypeError, LookupError):  # the line that was being written at a stop
                entry = json.loads(line)
                entries[entry["name"]] = {"name": entry["name"], "key": entry["key"], "reason": entry["reason"]}
    write_file(out / STATE, "".join(json.dumps(entry) + "\n" for entry in entries.values()))
    for path in parts:
        path.unlink()
    return entries


def write_failed(out: Path, files: Sequence[AudioFile], failed: Mapping[str, str]) -> None:
    """Write failed.jsonl with path and reason of every file without a transcript; no file if all have one."""
    lines = [{"path": printable(str(f.path)), "reason": failed[f.name]} for f in files if f.name in failed]
    if lines:
        write_file(out / FAILED, "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))
    else:
        (out / FAILED).unlink(missing_ok=True)


def main() -> int:
    config = parse(Config, description=__doc__)
    # Who has done his share waits for the others.
    distributed = DistributedSettings(
        device=config.device, threads=config.threads, precision="float32", timeout_minutes=24 * 60
    )
    world = start_world(distributed)
    warn_of_emulation("inference.precision", config.inference.precision, world)
    failed = transcribe(config, world)
    world.close()
    return 1 if failed else 0


if __name__ == "__main__":
    run_main(main, console_may_vanish=True)
