"""TED-LIUM releases 1, 2 and 3: TED talks, as whole talks or as utterances.

FOLDER/{train,dev,test}/{sph,stm}/TALK.{sph,stm}; release 3 has this twice, under legacy/ (dev and test as in releases 1
and 2) and under speaker-adaptation/ (another partition). The audio is NIST SPHERE, which libsndfile reads.

STM gives the times of segments, not of words: the words of a talk have no times until it is aligned.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from common.errors import UserError
from data.corpora.base import SPLITS, FileSource, SegmentSource, Unreadable, check_choice, mostly_readable
from data.corpora.text_files import existing_folder, listed_names, summary
from data.format.schema import Recording
from data.splits import published_split
from data.word_times.stm import StmSegment, plain_text, read_stm

_PARTITIONS = ("legacy", "speaker-adaptation")


@dataclass(frozen=True)
class TedliumSettings:
    """TED-LIUM, any release."""

    folder: str = ""
    """TEDLIUM_release1, TEDLIUM_release2 or TEDLIUM_release-3; or any folder with {train,dev,test}/{sph,stm}."""
    unit: Literal["talks", "segments"] = "talks"
    """talks: a recording is a whole talk, and what the STM ignores stays in the audio but is neither trained on nor
    scored. segments: a recording is an utterance of the STM; ignored and wordless ones are left out."""
    partition: Literal["legacy", "speaker-adaptation"] = "legacy"
    """Which partition of release 3."""
    splits: list[str] = field(default_factory=lambda: list(SPLITS))
    """Which of train, dev and test."""
    incomplete: bool = False
    """Accept a dev or test set without all of its published talks (8 and 11); its error rate is another one."""

    def __post_init__(self) -> None:
        check_choice("unit", self.unit, ["talks", "segments"])
        check_choice("partition", self.partition, _PARTITIONS)
        if not self.splits:
            raise UserError(f"splits is empty: name at least one of {', '.join(SPLITS)}")
        for split in self.splits:
            check_choice("splits", split, SPLITS)


def sources(settings: TedliumSettings) -> list[FileSource | SegmentSource | Unreadable]:
    """All talks or utterances and the talks with an unreadable STM, sorted by id.

    Raises UserError naming missing files, or file and line of an STM: of any talk of dev and test, and of train if half
    or more of its talks are unreadable.
    """
    folder = existing_folder("folder", settings.folder)
    if (folder / settings.partition).is_dir():
        folder = folder / settings.partition
    partition = folder.resolve().name
    listed: list[FileSource | SegmentSource | Unreadable] = []
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
                listed.append(FileSource(_whole(talk, segments, split), audio))
            else:
                listed += _utterances(talk, segments, split, audio)
        mostly_readable([*unreadable, *talks[len(unreadable) :]])
        listed += unreadable
    return sorted(listed, key=lambda source: source.id)


def _talks(folder: Path, split: str) -> list[str]:
    """The talks of a split, each with audio and STM. Raises UserError where one of the two is missing."""
    if not (folder / split).is_dir():
        raise UserError(f"folder {folder} has no folder {split!r}; say which there are with --splits, or give another")
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
            f"{folder / split} lacks {len(missing)} of the {len(published)} published talks: {summary(missing)}. Fetch "
            f"them, leave {split} out of --splits, or say --incomplete true"
        )


def _segments(stm: Path, talk: str) -> list[StmSegment]:
    """The segments of a talk in the order of time. Raises UserError where the STM is empty or of another talk."""
    segments = read_stm(stm)
    if not segments:
        raise UserError(f"{stm}: holds no segment")
    # A few talks' files have the name's ending (such as _2009P) in another form: that the file is this talk's is told
    # by its own name, and one STM with several recordings is none of TED-LIUM's.
    names = {segment.recording for segment in segments}
    if len(names) > 1:
        raise UserError(f"{stm}: segments of {len(names)} recordings ({summary(sorted(names))}), expected {talk} alone")
    return segments


def _whole(talk: str, segments: list[StmSegment], split: str) -> Recording:
    """A talk: the text of its scored segments in the order of time, and the stretches that are not scored."""
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


def _joined(stretches: Iterator[tuple[float, float]]) -> list[tuple[float, float]]:
    """Stretches in the order of their starts, those that touch as one, those of no length left out."""
    joined: list[tuple[float, float]] = []
    for start, end in stretches:
        if joined and start <= joined[-1][1]:
            joined[-1] = (joined[-1][0], max(joined[-1][1], end))
        elif end > start:
            joined.append((start, end))
    return joined


def _utterances(talk: str, segments: list[StmSegment], split: str, audio: Path) -> Iterator[SegmentSource]:
    """The scored segments with words. Their ids tell the times in hundredths of a second: TALK-0001782-0002881."""
    for segment in segments:
        text = plain_text(segment.text)
        if segment.ignored or not text or segment.end <= segment.start:
            continue
        id = f"{talk}-{round(100 * segment.start):07d}-{round(100 * segment.end):07d}"
        recording = Recording(id, text, language="en", speaker=segment.speaker, split=split)
        yield SegmentSource(recording, audio, segment.start, segment.end - segment.start)
