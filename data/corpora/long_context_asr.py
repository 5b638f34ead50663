"""Layout of long-context-asr (Flynn and Ragni 2024): spectrograms of whole recordings, and word times from Google.

`audio_txt_pairs.json` is `{ID: {"audio": PATH, "txt": PATH, "duration": SECONDS}}`. Beside each audio file X.ogg is
X.spec.pt, written by torch.save: float16 [1, 80, T], power mel of the left channel without a logarithm, each bin with
zero mean and unit standard deviation over the recording. `txt` is the JSON output of Google's recogniser.

A file of torch.save holds a pickle. The archive is checked before torch reads it with its restricted loader: it has no
compressed records, is not larger than the duration of the recording allows, and its pickle has only the names that a
half-precision tensor needs.
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
from data.corpora.audio_files import FileSource
from data.corpora.base import FeatureUtterance, MissingText, Split, Unreadable, Utterance, mostly_readable
from data.corpora.json_lines import audio_path, is_file, seconds_field, shorten, text_field
from data.corpora.text_files import summary
from data.features import FeatureSettings, difference
from data.recording import Recording
from data.word_times.base import read_json
from data.word_times.google import read_google_words

PAIRS_FILE = "audio_txt_pairs.json"
MELS = 80
FRAMES_PER_SECOND = 100
# Durations in the pairs file come from ffprobe; the decoded length may differ slightly.
_SLACK_SECONDS = 2.0
_SLACK_BYTES = 1 << 16  # of the archive's own records
_LARGEST_PICKLE = 1 << 12  # of one tensor: some 300 bytes
_TENSOR_NAMES = frozenset(
    ("torch._utils _rebuild_tensor_v2", "torch HalfStorage", "collections OrderedDict")
)  # fmt: skip
# Opcodes other than GLOBAL that import or build objects; torch.save writes none of them.
_REFUSED_OPCODES = frozenset(("STACK_GLOBAL", "INST", "OBJ", "EXT1", "EXT2", "EXT4", "NEWOBJ", "NEWOBJ_EX"))


@dataclass(frozen=True)
class LongContextAsrSettings:
    """Corpus in the layout of long-context-asr."""

    pairs: str = ""
    """File audio_txt_pairs.json or its folder, at which relative paths in it start."""
    read: Literal["spectrogram", "audio"] = "spectrogram"
    """spectrogram: the stored X.spec.pt, with fixed feature settings. audio: the audio files, with features computed as
    for any other corpus."""
    text: Literal["required", "none"] = "required"
    """Transcripts with word times: required, or none (for pretraining)."""
    language: str = "en"
    """Language of all recordings."""
    split: Split = "train"
    """Split of all recordings."""


def spectrogram_features() -> FeatureSettings:
    """Settings of the features in a .spec.pt."""
    return FeatureSettings(low_hz=0.0, logarithm=False, standardized=True, channels="first")


def features(settings: LongContextAsrSettings) -> FeatureSettings:
    """Default feature settings of a preparation."""
    return spectrogram_features() if settings.read == "spectrogram" else FeatureSettings()


@dataclass(frozen=True)
class SpectrogramSource:
    """Recording with a stored spectrogram."""

    recording: Recording
    path: Path
    duration: float
    """Seconds, according to the pairs file."""
    words: Path | None
    """Output of Google's recogniser; read with the recording, as there are 105,000 files."""

    @property
    def id(self) -> str:
        return self.recording.id

    def load(self, features: FeatureSettings) -> FeatureUtterance:
        """Read the spectrogram. Raises UserError for other feature settings or an invalid file."""
        stored = spectrogram_features()
        differences = difference(features, stored)
        if differences:
            raise UserError(
                f"{self.path}: the stored spectrogram has other features (requested != stored): "
                f"{'; '.join(differences)}. Use the stored settings (--features.FIELD VALUE), or --read audio"
            )
        log_mel = read_spectrogram(self.path, self.duration)
        return FeatureUtterance(_with_words(self.recording, self.words, self.duration), log_mel)


@dataclass(frozen=True)
class AudioSource:
    """Recording whose audio file is read."""

    file: FileSource
    duration: float
    words: Path | None

    @property
    def id(self) -> str:
        return self.file.id

    def load(self, features: FeatureSettings) -> Utterance:
        utterance = self.file.load(features)
        recording = _with_words(utterance.recording, self.words, self.duration)
        return Utterance(recording, utterance.audio, utterance.warnings)


def _with_words(recording: Recording, path: Path | None, duration: float) -> Recording:
    if path is None:
        return recording
    words = read_google_words(path, duration + _SLACK_SECONDS)
    return replace(recording, text=" ".join(word.word for word in words), words=words)


def sources(settings: LongContextAsrSettings) -> list[SpectrogramSource | AudioSource | Unreadable]:
    """List all recordings and unreadable entries, sorted by id.

    Raises UserError naming entry and field if half or more of the entries are unreadable, or naming missing files.
    """
    if not settings.pairs:
        raise UserError(f"pairs is empty: give the path of {PAIRS_FILE} with --pairs FILE")
    path = Path(settings.pairs).expanduser()
    path = path / PAIRS_FILE if path.is_dir() else path
    pairs = read_json(path)
    if not isinstance(pairs, dict) or not pairs:
        raise UserError(f"{path}: expected an object of recordings by id, with audio, txt and duration each")
    listed: list[SpectrogramSource | AudioSource | Unreadable] = []
    files: list[Path] = []
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
        files += [audio] if words is None else [audio, words]
        if settings.read == "audio":
            listed.append(AudioSource(FileSource(recording, audio), duration, words))
        else:
            listed.append(SpectrogramSource(recording, audio, duration, words))
    mostly_readable(listed)
    missing = [str(file) for file in files if not is_file(file)]
    if missing:
        raise UserError(f"{path}: {len(missing)} of {len(files)} files do not exist: {summary(missing)}")
    return listed


def _entry(fields: object, where: str, base: Path, settings: LongContextAsrSettings) -> tuple[Path, Path | None, float]:
    """File to read, transcript or None, and seconds. Raises UserError naming the entry."""
    if not isinstance(fields, Mapping):
        raise UserError(f"{where}: {shorten(fields)} is not an object with audio, txt and duration")
    duration = seconds_field(fields, "duration", where)
    if not duration:
        raise UserError(f"{where}: no 'duration' in seconds")
    names = {name: text_field(fields, name, where) for name in ("audio", "txt")}
    if names["audio"] is None:
        raise UserError(f"{where}: no 'audio'")
    if names["txt"] is None and settings.text == "required":
        raise MissingText(f"{where}: no 'txt': add it, or use --text none")
    audio = audio_path(names["audio"], base, where)
    if settings.read == "spectrogram" and not audio.name.endswith(".spec.pt"):
        audio = audio.with_suffix(".spec.pt")
    words = audio_path(names["txt"], base, where) if names["txt"] and settings.text == "required" else None
    return audio, words, duration


def read_spectrogram(path: Path, duration: float) -> Tensor:
    """Read a .spec.pt as float16 [T, 80].

    Args:
        duration: of the recording in seconds, which limits the size of the file.
    Raises:
        UserError: naming the file and its fault.
    """
    max_frames = math.ceil((duration + _SLACK_SECONDS) * FRAMES_PER_SECOND)
    _check_archive(path, 2 * MELS * max_frames + _SLACK_BYTES)
    try:
        tensor = torch.load(path, map_location="cpu", weights_only=True)  # noqa: TID251 - foreign files, checked above
    except Exception as error:  # a damaged archive can raise any exception in torch
        raise UserError(f"{path}: torch cannot read it ({str(error)[:200]})") from error
    if not isinstance(tensor, Tensor) or tensor.layout != torch.strided or tensor.dtype != torch.float16:
        raise UserError(f"{path}: holds {_described(tensor)}, expected a tensor of float16")
    if tensor.ndim != 3 or tensor.shape[:2] != (1, MELS) or not 0 < tensor.shape[2] <= max_frames:
        raise UserError(f"{path}: holds {_described(tensor)}, expected [1, {MELS}, T] with 1 <= T <= {max_frames}")
    values = tensor[0].T.contiguous()
    if not torch.isfinite(values).all():
        raise UserError(f"{path}: NaN or infinite values in the spectrogram")
    return values


def _described(value: object) -> str:
    return f"{value.dtype} {list(value.shape)}" if isinstance(value, Tensor) else type(value).__name__


def _check_archive(path: Path, max_bytes: int) -> None:
    """Raise UserError unless a file is an archive of torch.save with the storage and pickle of a single tensor.

    torch checks that the size of the storage matches the pickle.
    """
    try:
        if path.stat().st_size > max_bytes:
            raise UserError(f"{path}: larger than the {max_bytes} bytes that the duration of its recording allows")
        with zipfile.ZipFile(path) as archive:
            records = archive.infolist()
            if any(record.compress_type != zipfile.ZIP_STORED for record in records):
                raise UserError(f"{path}: a compressed record, which torch.save does not write")
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
    """Raise UserError if a pickle names anything that a half-precision tensor does not need. Does not unpickle."""
    try:
        for opcode, argument, _ in pickletools.genops(pickled):
            if opcode.name in _REFUSED_OPCODES or (opcode.name == "GLOBAL" and argument not in _TENSOR_NAMES):
                raise UserError(f"{path}: its pickle imports {shorten(argument)}, which no spectrogram needs; refused")
    except (ValueError, IndexError, UnicodeDecodeError, OverflowError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{path}: a damaged pickle ({error})") from error
