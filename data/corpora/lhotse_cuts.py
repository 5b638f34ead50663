"""Cuts from the lines of lhotse manifests: segments of a channel of an audio file, with their supervisions."""

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
    """Recording, as described in its manifest."""

    id: str
    duration: float
    files: list[tuple[Path, list[int]]]
    """Audio files with their channels, in order."""


@dataclass(frozen=True)
class Cut:
    """Segment of a channel of a recording."""

    id: str
    audio: Audio
    channel: int
    start: float
    duration: float
    supervisions: Sequence[tuple[str, Mapping[str, Any]]]
    """(location, fields) of each; starts are relative to the start of the cut."""
    where: str


def read_cuts(manifest: Path, base: Path) -> Iterator[Cut | Unreadable]:
    """Yield the cuts of a manifest, or an Unreadable for a bad line. Raises UserError if the file cannot be read."""
    for where, fields in json_lines_or_faults(manifest):
        try:
            if isinstance(fields, UserError):
                raise fields
            yield read_cut(fields, where, base)
        except UserError as error:
            yield Unreadable(where, str(error))


def read_cut(fields: Mapping[str, Any], where: str, base: Path) -> Cut:
    """Cut of a line of a manifest. Raises UserError naming the place."""
    kind = fields.get("type")
    if kind != "MonoCut":
        raise UserError(
            f"{where}: a cut of type {shorten(kind)}, only MonoCut is supported: split its tracks or channels with "
            "lhotse, or save it as audio (save_audios) and give the new manifest"
        )
    if not isinstance(fields.get("recording"), dict):
        raise UserError(f"{where}: a cut without a recording; cuts of features alone are not supported")
    supervisions = fields.get("supervisions") or []
    if not isinstance(supervisions, list) or not all(isinstance(item, dict) for item in supervisions):
        raise UserError(f"{where}: supervisions is {shorten(supervisions)}, expected a list of objects")
    start, duration = (_required_seconds(fields, name, where) for name in ("start", "duration"))
    audio = _audio(fields["recording"], f"{where}: recording", base)
    channel = fields.get("channel")
    if isinstance(channel, bool) or not isinstance(channel, int) or not any(channel in f[1] for f in audio.files):
        raise UserError(f"{where}: channel is {shorten(channel)}, which the recording does not have")
    numbered = [(f"{where}: supervisions[{n}]", item) for n, item in enumerate(supervisions)]
    return Cut(_id(fields, where), audio, channel, start, duration, numbered, where)


def recording_cuts(recordings: Path, supervisions: Path | None, base: Path) -> Iterator[Cut | Unreadable]:
    """Yield a cut of every channel of every recording, with its supervisions.

    Raises UserError if a file or a line of the supervisions cannot be read: a recording without one of its supervisions
    would have incomplete text.
    """
    supervised: dict[str, list[tuple[str, Mapping[str, Any]]]] = {}
    if supervisions is not None:
        for where, fields in json_lines(supervisions):
            recording_id = text_field(fields, "recording_id", where)
            if recording_id is None:
                raise UserError(f"{where}: no recording_id; is this a supervision manifest?")
            supervised.setdefault(recording_id, []).append((where, fields))
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
        channels = [channel for _, file_channels in audio.files for channel in file_channels]
        audio_supervisions = supervised.pop(audio.id, [])
        for channel in channels:
            id = audio.id if len(channels) == 1 else f"{audio.id}-{channel}"
            yield Cut(id, audio, channel, 0.0, audio.duration, audio_supervisions, where)
    if len(supervised) > unreadable:  # otherwise they may belong to unreadable recordings
        recording_id, ((where, _), *_) = next(iter(supervised.items()))
        raise UserError(f"{where}: recording_id is {recording_id!r}, and {recordings} has no such recording")


def _audio(fields: Mapping[str, Any], where: str, base: Path) -> Audio:
    """Description of a recording. Raises UserError unless its audio is plain files."""
    transforms = fields.get("transforms") or []
    for transform in transforms if isinstance(transforms, list) else [transforms]:
        name = transform.get("name") if isinstance(transform, dict) else transform
        if name != "Resample":  # changes the sample rate, not the audio
            raise UserError(f"{where}: transform {shorten(name)} is not supported: save the audio with lhotse first")
    entries = fields.get("sources")
    if not isinstance(entries, list) or not entries:
        raise UserError(f"{where}: no list of sources; is this a recording?")
    files = []
    for entry in entries:
        kind, channels = (entry.get("type"), entry.get("channels")) if isinstance(entry, dict) else (None, None)
        if kind != "file":
            raise UserError(
                f"{where}: an audio source of type {shorten(kind)}, only 'file' is supported: save it as files"
            )
        if not isinstance(channels, list) or not channels or not all(type(c) is int for c in channels):
            raise UserError(f"{where}: channels of a source are {shorten(channels)}, expected a list of numbers")
        files.append((audio_path(text_field(entry, "source", where) or "", base, where), channels))
    return Audio(_id(fields, where), _required_seconds(fields, "duration", where), files)


def supervision_channels(fields: Mapping[str, Any], where: str) -> list[int]:
    """Channels of a supervision. Raises UserError."""
    value = fields.get("channel", 0)
    channels = value if isinstance(value, list) else [value]
    if not all(type(channel) is int for channel in channels):
        raise UserError(f"{where}: channel is {shorten(value)}, expected a number or a list of numbers")
    return channels


def supervision_interval(fields: Mapping[str, Any], where: str) -> tuple[float, float]:
    """Start and end of a supervision in seconds; it may start before its cut. Raises UserError."""
    start = seconds_field(fields, "start", where, negative=True)
    if start is None:
        raise UserError(f"{where}: no 'start'")
    return start, start + _required_seconds(fields, "duration", where)


def _required_seconds(fields: Mapping[str, Any], name: str, where: str) -> float:
    value = seconds_field(fields, name, where)
    if value is None:
        raise UserError(f"{where}: no {name!r}")
    return value


def _id(fields: Mapping[str, Any], where: str) -> str:
    id = text_field(fields, "id", where)
    if not id:
        raise UserError(f"{where}: no 'id'")
    return id
