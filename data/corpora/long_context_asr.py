"""The layout of long-context-asr (Flynn and Ragni 2024): spectrograms of whole recordings, and Google's word times.

`audio_txt_pairs.json` is `{ID: {"audio": PATH, "txt": PATH, "duration": SECONDS}}`; beside each audio file X.ogg lies
X.spec.pt, written by torch.save: float16 [1, 80, T], power mel of the left channel without a logarithm, each bin with
zero mean and unit standard deviation over the recording. `txt` is the answer of Google's recogniser in JSON.

A file of torch.save holds a pickle. Before torch sees it, the archive is checked: nothing compressed, no larger than
the recording's duration allows, and a pickle that names nothing but what a half-precision tensor needs. Then torch's
restricted loader reads it.
"""

from __future__ import annotations

import math
import pickletools
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from common.errors import UserError
from data.corpora.base import (
    SPLITS,
    FeatureUtterance,
    FileSource,
    MissingText,
    Unreadable,
    Utterance,
    check_choice,
    mostly_readable,
)
from data.corpora.json_lines import audio_path, is_file, seconds_field, shorten, text_field
from data.corpora.text_files import summary
from data.features import FeatureSettings, difference
from data.format.schema import Recording
from data.word_times.base import read_json
from data.word_times.google import read_google_words

PAIRS_FILE = "audio_txt_pairs.json"
MELS = 80
FRAMES_PER_SECOND = 100
# Their duration is that of the ogg as ffprobe tells it; the decoder may give a little more or less.
_SLACK_SECONDS = 2.0
_SLACK_BYTES = 1 << 16  # of the archive's own records
_LARGEST_PICKLE = 1 << 12  # of one tensor: some 300 bytes
_TENSOR_NAMES = frozenset(
    ("torch._utils _rebuild_tensor_v2", "torch HalfStorage", "collections OrderedDict")
)  # fmt: skip
# Opcodes that name or make anything else than GLOBAL does; torch.save writes none of them.
_REFUSED_OPCODES = frozenset(("STACK_GLOBAL", "INST", "OBJ", "EXT1", "EXT2", "EXT4", "NEWOBJ", "NEWOBJ_EX"))


@dataclass(frozen=True)
class LongContextAsrSettings:
    """A corpus in the layout of long-context-asr."""

    pairs: str = ""
    """The file audio_txt_pairs.json, or the folder that holds it; relative paths in it count from there."""
    read: Literal["spectrogram", "audio"] = "spectrogram"
    """spectrogram: the stored X.spec.pt as they are; the dataset's features say so, and no other can be asked for.
    audio: the audio files, with features computed as for any other corpus."""
    text: Literal["required", "none"] = "required"
    """Transcripts with word times: required, or none (for pretraining)."""
    language: str = "en"
    """Language of all recordings."""
    split: Literal["train", "dev", "test"] = "train"
    """Split of all recordings."""

    def __post_init__(self) -> None:
        check_choice("read", self.read, ["spectrogram", "audio"])
        check_choice("text", self.text, ["required", "none"])
        check_choice("split", self.split, SPLITS)


def spectrogram_features() -> FeatureSettings:
    """What the numbers in a .spec.pt are."""
    return FeatureSettings(low_hz=0.0, logarithm=False, standardized=True, channels="first")


def features(settings: LongContextAsrSettings) -> FeatureSettings:
    """What a preparation computes, or finds computed, unless it is told otherwise."""
    return spectrogram_features() if settings.read == "spectrogram" else FeatureSettings()


@dataclass(frozen=True)
class SpectrogramSource:
    """A recording of which the spectrogram is stored."""

    recording: Recording
    path: Path
    duration: float
    """Seconds, as the pairs file tells."""
    words: Path | None
    """Google's answer; read when the recording is, as there are 105,000 of them."""

    @property
    def id(self) -> str:
        return self.recording.id

    def load(self, features: FeatureSettings) -> FeatureUtterance:
        """Raises UserError where other features are asked for, or the file is not such a spectrogram."""
        stored = spectrogram_features()
        differences = difference(features, stored)
        if differences:
            raise UserError(
                f"{self.path}: the stored spectrogram has other features (asked for != stored): "
                f"{'; '.join(differences)}. Ask for the stored ones (--features.FIELD VALUE), or say --read audio"
            )
        log_mel = read_spectrogram(self.path, self.duration)
        return FeatureUtterance(_with_words(self.recording, self.words, self.duration), log_mel)


@dataclass(frozen=True)
class AudioSource:
    """A recording of the layout, by its audio."""

    file: FileSource
    duration: float
    words: Path | None

    @property
    def id(self) -> str:
        return self.file.id

    def load(self, features: FeatureSettings) -> Utterance:
        utterance = self.file.load(features)
        recording = _with_words(utterance.recording, self.words, self.duration)
        return Utterance(recording, utterance.sound, utterance.warnings)


def _with_words(recording: Recording, path: Path | None, duration: float) -> Recording:
    if path is None:
        return recording
    words = read_google_words(path, duration + _SLACK_SECONDS)
    return replace(recording, text=" ".join(word.word for word in words), words=words)


def sources(settings: LongContextAsrSettings) -> list[SpectrogramSource | AudioSource | Unreadable]:
    """All recordings and unreadable entries, sorted by id.

    Raises UserError naming entry and field if half or more of the entries are unreadable, or naming missing files.
    """
    if not settings.pairs:
        raise UserError(f"pairs is empty: say where {PAIRS_FILE} lies with --pairs FILE")
    path = Path(settings.pairs).expanduser()
    path = path / PAIRS_FILE if path.is_dir() else path
    pairs = read_json(path)
    if not isinstance(pairs, dict) or not pairs:
        raise UserError(f"{path}: expected an object of recordings by id, with audio, txt and duration each")
    listed: list[SpectrogramSource | AudioSource | Unreadable] = []
    wanted: list[Path] = []
    for id in sorted(pairs):
        where = f"{path}: {shorten(id)}"
        try:
            audio, words, duration = _entry(pairs[id], where, path.parent, settings)
            recording = Recording(id, language=settings.language, split=settings.split)
        except MissingText:
            raise
        except UserError as error:
            reason = str(error) if str(error).startswith(where) else f"{path}: {error}"
            listed.append(Unreadable(where, reason))
            continue
        wanted += [audio] if words is None else [audio, words]
        if settings.read == "audio":
            listed.append(AudioSource(FileSource(recording, audio), duration, words))
        else:
            listed.append(SpectrogramSource(recording, audio, duration, words))
    mostly_readable(listed)
    missing = [str(file) for file in wanted if not is_file(file)]
    if missing:
        raise UserError(f"{path}: {len(missing)} of {len(wanted)} files do not exist: {summary(missing)}")
    return listed


def _entry(fields: object, where: str, base: Path, settings: LongContextAsrSettings) -> tuple[Path, Path | None, float]:
    """(The file to read, the transcript or None, seconds). Raises UserError naming the entry."""
    if not isinstance(fields, Mapping):
        raise UserError(f"{where}: {shorten(fields)} is no object with audio, txt and duration")
    duration = seconds_field(fields, "duration", where)
    if not duration:
        raise UserError(f"{where}: no 'duration' in seconds")
    names = {name: text_field(fields, name, where) for name in ("audio", "txt")}
    if names["audio"] is None:
        raise UserError(f"{where}: no 'audio'")
    if names["txt"] is None and settings.text == "required":
        raise MissingText(f"{where}: no 'txt' (or say --text none)")
    audio = audio_path(names["audio"], base, where)
    if settings.read == "spectrogram" and not audio.name.endswith(".spec.pt"):
        audio = audio.with_suffix(".spec.pt")
    words = audio_path(names["txt"], base, where) if names["txt"] and settings.text == "required" else None
    return audio, words, duration


def read_spectrogram(path: Path, duration: float) -> Tensor:
    """A .spec.pt as float16 [T, 80].

    Args:
        duration: of the recording, in seconds: the file may not hold much more.
    Raises:
        UserError: naming the file and what is wrong with it.
    """
    most = math.ceil((duration + _SLACK_SECONDS) * FRAMES_PER_SECOND)
    _check_archive(path, 2 * MELS * most + _SLACK_BYTES)
    try:
        tensor = torch.load(path, map_location="cpu", weights_only=True)  # noqa: TID251 - other people's files, checked
    except Exception as error:  # torch raises whatever the archive's damage leads to, and there is no list of it
        raise UserError(f"{path}: torch cannot read it ({str(error)[:200]})") from error
    if not isinstance(tensor, Tensor) or tensor.layout != torch.strided or tensor.dtype != torch.float16:
        raise UserError(f"{path}: holds {_described(tensor)}, expected a tensor of float16")
    if tensor.ndim != 3 or tensor.shape[:2] != (1, MELS) or not 0 < tensor.shape[2] <= most:
        raise UserError(f"{path}: holds {_described(tensor)}, expected [1, {MELS}, T] with T of 1 to {most} frames")
    values = tensor[0].T.contiguous()
    if not torch.isfinite(values).all():
        raise UserError(f"{path}: NaN or infinite values in the spectrogram")
    return values


def _described(value: object) -> str:
    return f"{value.dtype} {list(value.shape)}" if isinstance(value, Tensor) else type(value).__name__


def _check_archive(path: Path, most_bytes: int) -> None:
    """Raise UserError unless a file is an archive of torch.save with one tensor's storage and pickle, and no more.

    That the storage is as large as the pickle claims is seen by torch.
    """
    try:
        if path.stat().st_size > most_bytes:
            raise UserError(f"{path}: larger than the {most_bytes} bytes that its recording's duration allows")
        with zipfile.ZipFile(path) as archive:
            records = archive.infolist()
            if any(record.compress_type != zipfile.ZIP_STORED for record in records):
                raise UserError(f"{path}: a compressed record; torch.save writes none")
            folders = {name.filename.split("/", 1)[0] for name in records}
            inside = {record.filename.split("/", 1)[-1]: record for record in records}
            if len(folders) != 1 or len(inside) != len(records) or "data.pkl" not in inside:
                raise UserError(f"{path}: not an archive of torch.save")
            if inside["data.pkl"].file_size > _LARGEST_PICKLE:
                raise UserError(f"{path}: a pickle of {inside['data.pkl'].file_size} bytes is not that of one tensor")
            pickled = archive.read(inside["data.pkl"])
    except (OSError, zipfile.BadZipFile, NotImplementedError, RuntimeError, ValueError, EOFError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{path}: not an archive of torch.save ({error})") from error
    _check_pickle(pickled, path)
    storages = [name for name in inside if name.startswith("data/")]
    if len(storages) != 1:
        raise UserError(f"{path}: holds {len(storages)} storages, expected that of one tensor")


def _check_pickle(pickled: bytes, path: Path) -> None:
    """Raise UserError where a pickle names anything that a half-precision tensor does not need. Nothing is run."""
    try:
        for opcode, argument, _ in pickletools.genops(pickled):
            if opcode.name in _REFUSED_OPCODES or (opcode.name == "GLOBAL" and argument not in _TENSOR_NAMES):
                raise UserError(f"{path}: its pickle asks for {shorten(argument)}, which no spectrogram needs; refused")
    except (ValueError, IndexError, UnicodeDecodeError, OverflowError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{path}: a damaged pickle ({error})") from error
