"""lhotse manifests: cuts, or recordings with supervisions, as JSON lines, plain or gzipped; without lhotse itself.

A supervision's start counts from the start of its cut; the times of its alignment (`alignment.word`, a list of
[symbol, start, duration, score]) count from the start of the *recording*, as lhotse itself counts them. An audio path
is taken as the manifest says it, absolute or with `..`: the user gives the manifest, and only sound is read through it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from common.errors import UserError
from data.corpora.base import (
    SPLITS,
    FileSource,
    MissingText,
    SegmentSource,
    Source,
    Unreadable,
    check_choice,
    mostly_readable,
)
from data.corpora.channels import ChannelSource
from data.corpora.json_lines import is_file, label_field, text_field
from data.corpora.lhotse_cuts import Cut, channels_of, read_cuts, stretch, whole_recordings
from data.corpora.text_files import summary
from data.format.schema import Recording
from data.names import escaped
from data.skipped import NO_WORD_TIMES
from data.transcripts import TOLERANCE, Word
from data.word_times.alignments import lhotse_words

# An alignment further outside of its supervision than this, in seconds, counts from somewhere else.
_STRAY_SECONDS = 1.0

_Source = FileSource | SegmentSource | ChannelSource | Unreadable


@dataclass(frozen=True)
class LhotseSettings:
    """lhotse manifests: --cuts, or --recordings with --supervisions."""

    cuts: str = ""
    """Cut manifest (.jsonl or .jsonl.gz) of MonoCuts: the training part, or everything."""
    dev_cuts: str = ""
    """Cut manifest of the dev split."""
    test_cuts: str = ""
    """Cut manifest of the test split."""
    recordings: str = ""
    """Recording manifest, instead of cuts: every recording whole, each of its channels by itself."""
    supervisions: str = ""
    """Supervision manifest of those recordings; may be empty with --text none."""
    split: Literal["train", "dev", "test"] = "train"
    """Split of --cuts or --recordings."""
    unit: Literal["cuts", "supervisions"] = "cuts"
    """cuts: a cut (or a whole recording) with all of its supervisions, in the order of time, is a recording of the
    dataset. supervisions: each supervision's stretch is one, under the supervision's id."""
    text: Literal["required", "optional", "none"] = "required"
    """Transcripts: required (one that is missing is an error), optional, or none (for pretraining)."""
    audio_folder: str = ""
    """Folder that relative audio paths count from; empty: the working directory, as in lhotse."""
    language: str = ""
    """Language of supervisions that do not tell theirs, such as en."""

    def __post_init__(self) -> None:
        check_choice("split", self.split, SPLITS)
        check_choice("unit", self.unit, ["cuts", "supervisions"])
        check_choice("text", self.text, ["required", "optional", "none"])
        if bool(self.recordings) == bool(self.cuts or self.dev_cuts or self.test_cuts):
            raise UserError("give either --cuts FILE (with --dev_cuts, --test_cuts), or --recordings FILE")
        if self.supervisions and not self.recordings:
            raise UserError("supervisions is given without recordings: cuts have their own")
        if self.recordings and not self.supervisions and (self.text != "none" or self.unit == "supervisions"):
            raise UserError("supervisions is empty: give --supervisions FILE, or say --text none with --unit cuts")


def sources(settings: LhotseSettings) -> list[Source]:
    """All recordings and unreadable lines, sorted by id.

    Raises UserError naming file and line if half or more of a manifest's lines are unreadable, or naming missing audio
    files.
    """
    base = Path(settings.audio_folder).expanduser()
    listed: list[_Source] = []
    if settings.recordings:
        supervisions = Path(settings.supervisions).expanduser() if settings.supervisions else None
        listed += _listed(
            whole_recordings(Path(settings.recordings).expanduser(), supervisions, base), settings, settings.split
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
    there = {source.path: is_file(source.path) for source in listed if not isinstance(source, Unreadable)}
    missing = [str(path) for path, found in there.items() if not found]
    if missing:
        raise UserError(
            f"{len(missing)} of {len(there)} audio files of the manifests do not exist: {summary(missing)}. Relative "
            f"paths count from {base.absolute()}: see --audio_folder"
        )
    return sorted(listed, key=lambda source: source.id)


def _listed(cuts: Iterable[Cut | Unreadable], settings: LhotseSettings, split: str) -> list[_Source]:
    """Sources of a manifest's cuts: of each cut, or of each of its supervisions."""
    listed: list[_Source] = []
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


def _source(cut: Cut, settings: LhotseSettings, split: str) -> FileSource | SegmentSource | ChannelSource:
    """Source of a cut: its segment of the audio, and its labels. Raises UserError."""
    recording, warnings = _recording(cut, settings, split)
    path, channels = next(file for file in cut.audio.files if cut.channel in file[1])
    whole = cut.start < TOLERANCE / 10 and abs(cut.duration - cut.audio.duration) < TOLERANCE / 10
    if len(channels) > 1:
        start, duration = (0.0, None) if whole else (cut.start, cut.duration)
        return ChannelSource(recording, path, channels.index(cut.channel), start, duration, warnings)
    if whole:
        return FileSource(recording, path, warnings)
    return SegmentSource(recording, path, cut.start, cut.duration, warnings)


def _recording(cut: Cut, settings: LhotseSettings, split: str) -> tuple[Recording, tuple[str, ...]]:
    """Text, words and names from the cut's supervisions, and warnings about unusable alignments.

    Raises UserError, or MissingText if text is required and not available.
    """
    warnings: list[str] = []
    texts: list[str | None] = []
    words: list[Word] | None = []
    languages, speakers = set(), set()
    for where, fields in _in_time(cut):
        languages.add(label_field(fields, "language", where) or settings.language)
        speakers.add(label_field(fields, "speaker", where))
        if settings.text == "none":
            continue
        text, aligned = _said(fields, where, cut, warnings)
        texts.append(text)
        if text and words is not None:
            words = None if aligned is None else words + aligned
        if text is None and _is_last(cut) and stretch(fields, where)[1] > cut.duration + TOLERANCE:
            raise UserError(f"{where}: ends after its recording of {cut.audio.duration} s")
    complete = bool(texts) and None not in texts
    if settings.text == "required" and not complete:
        raise MissingText(
            f"{cut.where}: {cut.id!r} has no supervision with text within it, or one that reaches beyond it and has no "
            "word alignment. Cut at supervisions (lhotse's trim_to_supervisions), or say --text optional"
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


def _in_time(cut: Cut) -> list[tuple[str, Mapping[str, Any]]]:
    """The supervisions of the cut's channel that lie in it at least partly, in the order of time."""
    found = []
    for where, fields in cut.supervisions:
        start, end = stretch(fields, where)
        if cut.channel in channels_of(fields, where) and (start < cut.duration or _is_last(cut)) and end > 0:
            found.append((start, end, where, fields))
    return [(where, fields) for _, _, where, fields in sorted(found, key=lambda item: item[:2])]


def _said(fields: Mapping[str, Any], where: str, cut: Cut, warnings: list[str]) -> tuple[str | None, list[Word] | None]:
    """(Text within the cut, None if unknown; its words with times from the cut's start, or None).

    An unusable alignment gives no times and a warning. It raises UserError if only the alignment gives the text: the
    supervision extends beyond the cut or has no text.
    """
    text = text_field(fields, "text", where)
    start, end = stretch(fields, where)
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
    """Words of a supervision from `start` to `end` that are within the cut, with times from the cut's start."""
    words = []
    for word, begin, finish, confidence in lhotse_words(items, where):
        begin, finish = begin - cut.start, finish - cut.start
        if begin < start - _STRAY_SECONDS or finish > end + _STRAY_SECONDS:
            raise UserError(
                f"{where}: the word {word!r} is aligned at {begin:.2f} s of the cut, its supervision at {start:.2f} to "
                f"{end:.2f} s; alignments count from the start of the recording"
            )
        if 0 <= (begin + finish) / 2 < cut.duration:
            words.append(Word(word, round(max(0.0, begin), 6), round(max(0.0, finish), 6), confidence))
    return words


def _is_last(cut: Cut) -> bool:
    """Whether the cut ends with the recording: a supervision that ends later is an error."""
    return cut.start + cut.duration > cut.audio.duration - TOLERANCE / 10


def _supervision_cuts(cut: Cut) -> list[Cut | Unreadable]:
    """Each supervision of the cut's channel as a cut of its own, as far as it lies in the cut."""
    found: list[Cut | Unreadable] = []
    for where, fields in cut.supervisions:
        try:
            found += _supervision_cut(replace(cut, supervisions=[(where, fields)]))
        except UserError as error:
            found.append(Unreadable(where, str(error)))
    return found


def _supervision_cut(cut: Cut) -> list[Cut]:
    """The only supervision of a cut as a cut; empty if it is in another channel or outside. Raises UserError."""
    found = []
    for where, fields in _in_time(cut):
        id = text_field(fields, "id", where)
        if id is None:
            raise UserError(f"{where}: a supervision without an id")
        start, end = stretch(fields, where)
        first, last = max(0.0, start), end if _is_last(cut) else min(cut.duration, end)
        if last <= first:
            raise UserError(f"{where}: the supervision {id!r} has no length within its recording")
        moved = {**fields, "start": start - first}
        found.append(
            replace(
                cut, id=id, start=cut.start + first, duration=last - first, supervisions=[(where, moved)], where=where
            )
        )
    return found
