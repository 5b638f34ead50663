"""lhotse manifests: cuts, or recordings with supervisions, as plain or gzipped JSON lines.

The package lhotse is not used: its loader stops at the first bad line without naming it, has no limits for damaged
files, and runs shell commands that a manifest gives as audio sources.

The start of a supervision is relative to its cut; the times of its alignment (`alignment.word`, a list of
[symbol, start, duration, score]) are relative to the start of the *recording*, as in lhotse. Audio paths are used as
written, absolute or with `..`: the manifest comes from the user, and files are only decoded as audio.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from common.errors import UserError
from data.corpora.audio_files import FileSource
from data.corpora.base import MissingText, Source, Split, Unreadable, mostly_readable
from data.corpora.json_lines import is_file, label_field, text_field
from data.corpora.lhotse_cuts import Cut, read_cuts, recording_cuts, supervision_channels, supervision_interval
from data.corpora.text_files import summary
from data.names import escaped
from data.recording import Recording
from data.skipped import NO_WORD_TIMES
from data.transcripts import TOLERANCE, Word
from data.word_times.alignments import lhotse_words

# An alignment further outside its supervision than this, in seconds, has another origin.
_STRAY_SECONDS = 1.0


@dataclass(frozen=True)
class LhotseSettings:
    """lhotse manifests: --cuts, or --recordings with --supervisions."""

    cuts: str = ""
    """Cut manifest (.jsonl or .jsonl.gz) of MonoCuts, in the split of --split."""
    dev_cuts: str = ""
    """Cut manifest of the dev split."""
    test_cuts: str = ""
    """Cut manifest of the test split."""
    recordings: str = ""
    """Recording manifest, instead of cuts: every channel of every whole recording."""
    supervisions: str = ""
    """Supervision manifest of these recordings; may be empty with --text none."""
    split: Split = "train"
    """Split of --cuts or --recordings."""
    unit: Literal["cuts", "supervisions"] = "cuts"
    """Recordings of the dataset. cuts: a cut (or a whole recording) with all of its supervisions, ordered by time.
    supervisions: the segment of a supervision, with the supervision's id."""
    text: Literal["required", "optional", "none"] = "required"
    """Transcripts: required (a missing one is an error), optional, or none (for pretraining)."""
    audio_folder: str = ""
    """Folder of relative audio paths; empty: the working directory, as in lhotse."""
    language: str = ""
    """Default language, such as en, for supervisions without a language."""

    def __post_init__(self) -> None:
        if bool(self.recordings) == bool(self.cuts or self.dev_cuts or self.test_cuts):
            raise UserError("give either --cuts FILE (with --dev_cuts, --test_cuts), or --recordings FILE")
        if self.supervisions and not self.recordings:
            raise UserError("supervisions is given without recordings: cuts contain their supervisions")
        if self.recordings and not self.supervisions and (self.text != "none" or self.unit == "supervisions"):
            raise UserError("supervisions is empty: give --supervisions FILE, or use --text none with --unit cuts")


def sources(settings: LhotseSettings) -> list[Source]:
    """List all recordings and unreadable lines, sorted by id.

    Raises UserError naming file and line if half or more of a manifest's lines are unreadable, or naming missing audio
    files.
    """
    base = Path(settings.audio_folder).expanduser()
    listed: list[FileSource | Unreadable] = []
    if settings.recordings:
        supervisions = Path(settings.supervisions).expanduser() if settings.supervisions else None
        listed += _listed(
            recording_cuts(Path(settings.recordings).expanduser(), supervisions, base), settings, settings.split
        )
    else:
        for split, manifest in (
            (settings.split, settings.cuts),
            ("dev", settings.dev_cuts),
            ("test", settings.test_cuts),
        ):
            if manifest:
                listed += _listed(read_cuts(Path(manifest).expanduser(), base), settings, split)
    if not listed:
        raise UserError("the manifests hold no cut or recording")
    exists = {source.path: is_file(source.path) for source in listed if not isinstance(source, Unreadable)}
    missing = [str(path) for path, exist in exists.items() if not exist]
    if missing:
        raise UserError(
            f"{len(missing)} of {len(exists)} audio files of the manifests do not exist: {summary(missing)}. Relative "
            f"paths start at {base.absolute()}: see --audio_folder"
        )
    return sorted(listed, key=lambda source: source.id)


def _listed(cuts: Iterable[Cut | Unreadable], settings: LhotseSettings, split: str) -> list[FileSource | Unreadable]:
    """Sources of the cuts of a manifest, or of their supervisions."""
    listed: list[FileSource | Unreadable] = []
    for cut in cuts:
        if isinstance(cut, Unreadable):
            listed.append(cut)
            continue
        parts: Iterable[Cut | Unreadable] = [cut] if settings.unit == "cuts" else _supervision_cuts(cut)
        for part in parts:
            if isinstance(part, Unreadable):
                listed.append(part)
                continue
            try:
                listed.append(_source(part, settings, split))
            except MissingText:
                raise
            except UserError as error:
                reason = str(error) if str(error).startswith(part.where) else f"{part.where}: {error}"
                listed.append(Unreadable(f"{part.where}: {escaped(part.id)}", reason))
    mostly_readable(listed)
    return listed


def _source(cut: Cut, settings: LhotseSettings, split: str) -> FileSource:
    """Segment of the audio of a cut, and its labels. Raises UserError."""
    recording, warnings = _recording(cut, settings, split)
    path, channels = next(file for file in cut.audio.files if cut.channel in file[1])
    is_whole = cut.start < TOLERANCE / 10 and abs(cut.duration - cut.audio.duration) < TOLERANCE / 10
    channel = channels.index(cut.channel) if len(channels) > 1 else None
    start, duration = (0.0, None) if is_whole else (cut.start, cut.duration)
    return FileSource(recording, path, start, duration, channel, warnings)


def _recording(cut: Cut, settings: LhotseSettings, split: str) -> tuple[Recording, tuple[str, ...]]:
    """Labels from the supervisions of a cut, and warnings about unusable alignments.

    Raises UserError, or MissingText if text is required and not available.
    """
    warnings: list[str] = []
    texts: list[str | None] = []
    words: list[Word] | None = []
    languages, speakers = set(), set()
    for where, fields in _supervisions(cut):
        languages.add(label_field(fields, "language", where) or settings.language)
        speakers.add(label_field(fields, "speaker", where))
        if settings.text == "none":
            continue
        text, aligned = _text_and_words(fields, where, cut, warnings)
        texts.append(text)
        if text and words is not None:
            words = None if aligned is None else words + aligned
        if text is None and _is_last(cut) and supervision_interval(fields, where)[1] > cut.duration + TOLERANCE:
            raise UserError(f"{where}: ends after its recording of {cut.audio.duration} s")
    complete = bool(texts) and None not in texts
    if settings.text == "required" and not complete:
        raise MissingText(
            f"{cut.where}: {cut.id!r} has no supervision with text, or one that extends beyond the cut and has no word "
            "alignment. Cut at supervisions (lhotse's trim_to_supervisions), or use --text optional"
        )
    recording = Recording(
        id=cut.id,
        text=" ".join(text for text in texts if text) if complete else None,
        words=sorted(words, key=lambda word: word.start) if complete and words else None,
        language=languages.pop() if len(languages) == 1 else settings.language,
        speaker=speakers.pop() if len(speakers) == 1 else "",
        split=split,
    )
    return recording, tuple(warnings)


def _supervisions(cut: Cut) -> list[tuple[str, Mapping[str, Any]]]:
    """Supervisions of the cut's channel that overlap with the cut, ordered by time."""
    overlapping = []
    for where, fields in cut.supervisions:
        start, end = supervision_interval(fields, where)
        if cut.channel in supervision_channels(fields, where) and (start < cut.duration or _is_last(cut)) and end > 0:
            overlapping.append((start, end, where, fields))
    return [(where, fields) for _, _, where, fields in sorted(overlapping, key=lambda item: item[:2])]


def _text_and_words(
    fields: Mapping[str, Any], where: str, cut: Cut, warnings: list[str]
) -> tuple[str | None, list[Word] | None]:
    """Text within the cut, None if unknown, and its words with times from the start of the cut, or None.

    An unusable alignment gives no times and a warning. Raises UserError if the text needs the alignment, because the
    supervision extends beyond the cut or has no text.
    """
    text = text_field(fields, "text", where)
    start, end = supervision_interval(fields, where)
    inside = start >= -TOLERANCE and end <= cut.duration + TOLERANCE
    known = " ".join(text.split()) if text is not None and inside else None
    alignment = fields.get("alignment")
    items = alignment.get("word") if isinstance(alignment, dict) else None
    if not items:
        return known, None
    try:
        words = _aligned(items, where, cut, start, end)
    except UserError as error:
        if known is None:
            raise
        warnings.append(f"{NO_WORD_TIMES}: {error}")
        return known, None
    return " ".join(word.word for word in words) if known is None else known, words


def _aligned(items: Any, where: str, cut: Cut, start: float, end: float) -> list[Word]:
    """Words within the cut of a supervision from `start` to `end`, with times from the start of the cut."""
    words = []
    for word, word_start, word_end, confidence in lhotse_words(items, where):
        word_start, word_end = word_start - cut.start, word_end - cut.start
        if word_start < start - _STRAY_SECONDS or word_end > end + _STRAY_SECONDS:
            raise UserError(
                f"{where}: the word {word!r} is aligned at {word_start:.2f} s of the cut, but its supervision is at "
                f"{start:.2f} to {end:.2f} s; alignments must be relative to the start of the recording"
            )
        if 0 <= (word_start + word_end) / 2 < cut.duration:
            words.append(Word(word, round(max(0.0, word_start), 6), round(max(0.0, word_end), 6), confidence))
    return words


def _is_last(cut: Cut) -> bool:
    """True if the cut ends with the recording: a supervision that ends later is then an error."""
    return cut.start + cut.duration > cut.audio.duration - TOLERANCE / 10


def _supervision_cuts(cut: Cut) -> list[Cut | Unreadable]:
    """Cuts of the supervisions of the cut's channel, limited to the cut."""
    cuts: list[Cut | Unreadable] = []
    for where, fields in cut.supervisions:
        try:
            cuts += _supervision_cut(replace(cut, supervisions=[(where, fields)]))
        except UserError as error:
            cuts.append(Unreadable(where, str(error)))
    return cuts


def _supervision_cut(cut: Cut) -> list[Cut]:
    """Cut of the only supervision of a cut; empty if it is outside or in another channel. Raises UserError."""
    cuts = []
    for where, fields in _supervisions(cut):
        id = text_field(fields, "id", where)
        if id is None:
            raise UserError(f"{where}: a supervision without an id")
        start, end = supervision_interval(fields, where)
        cut_start, cut_end = max(0.0, start), end if _is_last(cut) else min(cut.duration, end)
        if cut_end <= cut_start:
            raise UserError(f"{where}: the supervision {id!r} has no length within its recording")
        moved = [(where, {**fields, "start": start - cut_start})]
        start, duration = cut.start + cut_start, cut_end - cut_start
        cuts.append(replace(cut, id=id, start=start, duration=duration, supervisions=moved, where=where))
    return cuts
