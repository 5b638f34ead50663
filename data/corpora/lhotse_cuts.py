"""Lines of lhotse's manifests as cuts: which stretch of which channel of which file, and the supervisions in it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common.errors import UserError
from data.corpora.base import Unreadable
from data.corpora.json_lines import (
    audio_path,
    json_lines,
    json_lines_or_faults,
    seconds_field,
    shorten,
    text_field,
)


@dataclass(frozen=True)
class Audio:
    """A recording as its manifest describes it."""

    id: str
    duration: float
    files: list[tuple[Path, list[int]]]
    """Each with the channels that it holds, in their order."""


@dataclass(frozen=True)
class Cut:
    """A stretch of one channel of a recording."""

    id: str
    audio: Audio
    channel: int
    start: float
    duration: float
    supervisions: Sequence[tuple[str, Mapping[str, Any]]]
    """(place, fields) each; starts count from the cut's start."""
    where: str


def read_cuts(manifest: Path, base: Path) -> Iterator[Cut | Unreadable]:
    """Lines of a cut manifest, as cuts or Unreadable. Raises UserError if the file cannot be read."""
    for where, fields in json_lines_or_faults(manifest):
        try:
            if isinstance(fields, UserError):
                raise fields
            yield read_cut(fields, where, base)
        except UserError as error:
            yield Unreadable(where, str(error))


def read_cut(fields: Mapping[str, Any], where: str, base: Path) -> Cut:
    """A line of a cut manifest. Raises UserError naming the place."""
    kind = fields.get("type")
    if kind != "MonoCut":
        raise UserError(
            f"{where}: a cut of type {shorten(kind)}, only MonoCut is read: take its tracks or channels apart with "
            "lhotse, or save it as audio (save_audios) and read that"
        )
    if not isinstance(fields.get("recording"), dict):
        raise UserError(f"{where}: a cut without its recording; cuts of features alone are not read")
    supervisions = fields.get("supervisions") or []
    if not isinstance(supervisions, list) or not all(isinstance(item, dict) for item in supervisions):
        raise UserError(f"{where}: supervisions is {shorten(supervisions)}, expected a list of objects")
    start, duration = (_needed(fields, name, where) for name in ("start", "duration"))
    audio = _audio(fields["recording"], f"{where}: recording", base)
    channel = fields.get("channel")
    if isinstance(channel, bool) or not isinstance(channel, int) or not any(channel in f[1] for f in audio.files):
        raise UserError(f"{where}: channel is {shorten(channel)}, the recording has none such")
    numbered = [(f"{where}: supervisions[{n}]", item) for n, item in enumerate(supervisions)]
    return Cut(_id(fields, where), audio, channel, start, duration, numbered, where)


def whole_recordings(recordings: Path, supervisions: Path | None, base: Path) -> Iterator[Cut | Unreadable]:
    """Every channel of every recording, with its supervisions.

    Raises UserError if a file or a line of the supervisions cannot be read: a recording without one of its supervisions
    would have incomplete text.
    """
    owned: dict[str, list[tuple[str, Mapping[str, Any]]]] = {}
    if supervisions is not None:
        for where, fields in json_lines(supervisions):
            owner = text_field(fields, "recording_id", where)
            if owner is None:
                raise UserError(f"{where}: no recording_id; is this a supervision manifest?")
            owned.setdefault(owner, []).append((where, fields))
    unreadable = 0
    for where, line in json_lines_or_faults(recordings):
        try:
            if isinstance(line, UserError):
                raise line
            audio = _audio(line, where, base)
        except UserError as error:
            unreadable += 1
            yield Unreadable(where, str(error))
            continue
        channels = [channel for _, held in audio.files for channel in held]
        mine = owned.pop(audio.id, [])
        for channel in channels:
            id = audio.id if len(channels) == 1 else f"{audio.id}-{channel}"
            yield Cut(id, audio, channel, 0.0, audio.duration, mine, where)
    if len(owned) > unreadable:  # else they belong to unreadable recordings
        owner, ((where, _), *_) = next(iter(owned.items()))
        raise UserError(f"{where}: recording_id is {owner!r}, and {recordings} has no such recording")


def _audio(fields: Mapping[str, Any], where: str, base: Path) -> Audio:
    """The description of a recording. Raises UserError where it is more than files to be read as they are."""
    transforms = fields.get("transforms") or []
    for transform in transforms if isinstance(transforms, list) else [transforms]:
        name = transform.get("name") if isinstance(transform, dict) else transform
        if name != "Resample":  # the files have another rate then, and the same sound
            raise UserError(f"{where}: transform {shorten(name)} is not applied here: save the audio with lhotse first")
    entries = fields.get("sources")
    if not isinstance(entries, list) or not entries:
        raise UserError(f"{where}: no list of sources; is this a recording?")
    files = []
    for entry in entries:
        kind, channels = (entry.get("type"), entry.get("channels")) if isinstance(entry, dict) else (None, None)
        if kind != "file":
            raise UserError(f"{where}: an audio source of type {shorten(kind)}, only 'file' is read: save it as files")
        if not isinstance(channels, list) or not channels or not all(type(c) is int for c in channels):
            raise UserError(f"{where}: channels of a source are {shorten(channels)}, expected a list of numbers")
        files.append((audio_path(text_field(entry, "source", where) or "", base, where), channels))
    return Audio(_id(fields, where), _needed(fields, "duration", where), files)


def channels_of(fields: Mapping[str, Any], where: str) -> list[int]:
    """The channels of a supervision."""
    value = fields.get("channel", 0)
    channels = value if isinstance(value, list) else [value]
    if not all(type(channel) is int for channel in channels):
        raise UserError(f"{where}: channel is {shorten(value)}, expected a number or a list of numbers")
    return channels


def stretch(fields: Mapping[str, Any], where: str) -> tuple[float, float]:
    """(Start, end) of a supervision, which may begin before its cut."""
    start = seconds_field(fields, "start", where, negative=True)
    if start is None:
        raise UserError(f"{where}: no 'start'")
    return start, start + _needed(fields, "duration", where)


def _needed(fields: Mapping[str, Any], name: str, where: str) -> float:
    value = seconds_field(fields, name, where)
    if value is None:
        raise UserError(f"{where}: no {name!r}")
    return value


def _id(fields: Mapping[str, Any], where: str) -> str:
    id = text_field(fields, "id", where)
    if not id:
        raise UserError(f"{where}: no 'id'")
    return id
