"""TED-LIUM releases 1, 2 and 3: TED talks, as whole talks or as utterances.

FOLDER/{train,dev,test}/{sph,stm}/TALK.{sph,stm}; release 3 has this tree twice, in legacy/ (dev and test as in releases
1 and 2) and in speaker-adaptation/ (another partition). The audio is NIST SPHERE, which libsndfile reads.

STM files have times of segments, not of words: talks have no word times until they are aligned.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from common.errors import UserError
from data.corpora.audio_files import FileSource
from data.corpora.base import SPLITS, Split, Unreadable, check_not_empty, mostly_readable
from data.corpora.text_files import existing_folder, listed_names, summary
from data.recording import Recording
from data.splits.published import published_split
from data.word_times.stm import StmSegment, plain_text, read_stm


@dataclass(frozen=True)
class TedliumSettings:
    """TED-LIUM, any release."""

    folder: str = ""
    """TEDLIUM_release1, TEDLIUM_release2 or TEDLIUM_release-3; or any folder with {train,dev,test}/{sph,stm}."""
    unit: Literal["talks", "segments"] = "talks"
    """Recordings of the dataset. talks: whole talks; segments that the STM ignores stay in the audio, but are excluded
    from training and scoring. segments: segments of the STM, without ignored and wordless ones."""
    partition: Literal["legacy", "speaker-adaptation"] = "legacy"
    """Partition of release 3."""
    splits: list[Split] = field(default_factory=lambda: ["train", "dev", "test"])
    """Splits to read."""
    incomplete: bool = False
    """Accept a dev or test set with missing talks (of 8 and 11); its error rate is then not comparable."""

    def __post_init__(self) -> None:
        check_not_empty("splits", self.splits, SPLITS)


def sources(settings: TedliumSettings) -> list[FileSource | Unreadable]:
    """List all talks or segments and the talks with an unreadable STM, sorted by id.

    Raises UserError naming missing files, or file and line of a bad STM: in dev and test always, in train if half or
    more of the talks are unreadable.
    """
    folder = existing_folder("folder", settings.folder)
    if (folder / settings.partition).is_dir():
        folder = folder / settings.partition
    partition = folder.resolve().name
    listed: list[FileSource | Unreadable] = []
    for split in dict.fromkeys(settings.splits):
        talks = _talks(folder, split)
        if split != "train" and partition != "speaker-adaptation" and not settings.incomplete:
            _check_complete(split, talks, folder)
        unreadable: list[Unreadable] = []
        for talk in talks:
            stm = folder / split / "stm" / f"{talk}.stm"
            try:
                segments = _segments(stm, talk)
            except UserError as error:
                if split != "train" and not settings.incomplete:
                    raise
                unreadable.append(Unreadable(talk, str(error)))
                continue
            audio = folder / split / "sph" / f"{talk}.sph"
            if settings.unit == "talks":
                listed.append(FileSource(_whole_talk(talk, segments, split), audio))
            else:
                listed += _segment_sources(talk, segments, split, audio)
        mostly_readable([*unreadable, *talks[len(unreadable) :]])
        listed += unreadable
    return sorted(listed, key=lambda source: source.id)


def _talks(folder: Path, split: str) -> list[str]:
    """Talks of a split. Raises UserError if the audio or STM of one is missing."""
    if not (folder / split).is_dir():
        raise UserError(
            f"folder {folder} has no folder {split!r}; name the existing ones with --splits, or give another folder"
        )
    names = {kind: _stems(folder / split / kind, f".{kind}") for kind in ("sph", "stm")}
    for kind, other in (("sph", "stm"), ("stm", "sph")):
        missing = sorted(names[other] - names[kind])
        if missing:
            raise UserError(f"{folder / split / kind} lacks {len(missing)} .{kind} files: {summary(missing)}")
    if not names["sph"]:
        raise UserError(f"{folder / split / 'sph'} holds no .sph file")
    return sorted(names["sph"])


def _stems(folder: Path, suffix: str) -> set[str]:
    return {n.removesuffix(suffix) for n in listed_names(folder) if n.endswith(suffix) and not n.startswith(".")}


def _check_complete(split: str, talks: list[str], folder: Path) -> None:
    published = published_split("tedlium")[split]
    missing = sorted(set(published) - set(talks))
    if missing:
        raise UserError(
            f"{folder / split} lacks {len(missing)} of the {len(published)} published talks: {summary(missing)}. Add "
            f"them, remove {split} from --splits, or use --incomplete true"
        )


def _segments(stm: Path, talk: str) -> list[StmSegment]:
    """Segments of a talk, sorted by time. Raises UserError if the STM is empty or has several recordings."""
    segments = read_stm(stm)
    if not segments:
        raise UserError(f"{stm}: holds no segment")
    # In a few files the ending of the name (such as _2009P) differs from the file name, so names are not compared.
    names = {segment.recording for segment in segments}
    if len(names) > 1:
        raise UserError(f"{stm}: segments of {len(names)} recordings ({summary(sorted(names))}), expected only {talk}")
    return segments


def _whole_talk(talk: str, segments: list[StmSegment], split: str) -> Recording:
    """Whole talk: text of its scored segments, sorted by time, and the intervals that are not scored."""
    scored = [segment for segment in segments if not segment.ignored]
    excluded = _joined((segment.start, segment.end) for segment in segments if segment.ignored)
    speakers = {segment.speaker for segment in scored}
    return Recording(
        id=talk,
        text=" ".join(filter(None, (plain_text(segment.text) for segment in scored))),
        language="en",
        speaker=speakers.pop() if len(speakers) == 1 else "",
        split=split,
        excluded=excluded or None,
    )


def _joined(intervals: Iterator[tuple[float, float]]) -> list[tuple[float, float]]:
    """Join adjacent and overlapping intervals, sorted by start, without empty ones."""
    joined: list[tuple[float, float]] = []
    for start, end in intervals:
        if joined and start <= joined[-1][1]:
            joined[-1] = (joined[-1][0], max(joined[-1][1], end))
        elif end > start:
            joined.append((start, end))
    return joined


def _segment_sources(talk: str, segments: list[StmSegment], split: str, audio: Path) -> Iterator[FileSource]:
    """Sources of the scored segments with words. Ids have times in hundredths of a second: TALK-0001782-0002881."""
    for segment in segments:
        text = plain_text(segment.text)
        if segment.ignored or not text or segment.end <= segment.start:
            continue
        id = f"{talk}-{round(100 * segment.start):07d}-{round(100 * segment.end):07d}"
        recording = Recording(id, text, language="en", speaker=segment.speaker, split=split)
        yield FileSource(recording, audio, segment.start, segment.end - segment.start)
