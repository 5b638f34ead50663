"""NeMo manifests: one JSON object per line, for an audio file or a segment of it.

Fields: `audio_filepath` (relative to the manifest's folder), `duration` in seconds, `text`, and optionally `offset`
(start of a segment, in seconds), `lang` or `language`, `speaker`, `split`. Word times come from the CTM file of NeMo's
forced aligner (`words_level_ctm_filepath`), or from a field `words`, a list of [word, start, end, confidence]; both are
relative to the start of the segment.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

from common.errors import UserError
from data.corpora.audio_files import FileSource
from data.corpora.base import SPLITS, MissingText, Unreadable, mostly_readable
from data.corpora.json_lines import (
    audio_path,
    is_file,
    json_lines_or_faults,
    label_field,
    seconds_field,
    shorten,
    text_field,
)
from data.corpora.text_files import summary
from data.recording import Recording
from data.skipped import NO_WORD_TIMES
from data.transcripts import Word
from data.word_times.alignments import nemo_words
from data.word_times.base import in_order, probability, seconds, word_text

SPLIT_NAMES = {"train": "train", "dev": "dev", "valid": "dev", "validation": "dev", "val": "dev", "test": "test"}
# `manifest__OP_0..127_CL_.json` and `{0..127}`: NeMo's notation for a family of files.
_FAMILY = re.compile(r"_OP_.*_CL_|\{\d+\.\.\d+\}")
_SUFFIX = re.compile(r"\.\w+$")

TextRule = Literal["required", "optional", "none"]


def manifest_sources(
    manifest: Path, text: TextRule, language: str, split: Callable[[str | None, str], str]
) -> list[FileSource | Unreadable]:
    """List the sources of a manifest in its order, with an Unreadable for every unreadable line.

    Args:
        text: "required": every line needs a transcript; "none": transcripts are ignored.
        language: default for lines without a language.
        split: (split of the line or None, text or id) -> split of the recording.
    Raises:
        UserError: naming file and line if half or more of the lines are unreadable, or naming missing audio files.
    """
    if _FAMILY.search(manifest.name):
        raise UserError(
            f"manifest {manifest} stands for many files of a tarred dataset, which is not supported: give a manifest "
            "of plain audio files (audio_filepath)"
        )
    base = manifest.parent
    listed: list[FileSource | Unreadable] = []
    places: dict[str, str] = {}
    for where, fields in json_lines_or_faults(manifest):
        try:
            if isinstance(fields, UserError):
                raise fields
            listed.append(_with_unique_id(_entry(fields, where, base, text, language, split), where, places))
        except MissingText:
            raise
        except UserError as error:
            listed.append(Unreadable(where, str(error)))
    mostly_readable(listed)
    if not listed:
        raise UserError(
            f"manifest {manifest} is empty: expected one JSON object with audio_filepath, duration and text per line"
        )
    exists: dict[Path, bool] = {}
    for source in listed:
        if not isinstance(source, Unreadable) and source.path not in exists:
            exists[source.path] = is_file(source.path)
    missing = [str(path) for path, exist in exists.items() if not exist]
    if missing:
        raise UserError(
            f"{len(missing)} of {len(exists)} audio files of {manifest} do not exist: {summary(missing)}. A relative "
            f"audio_filepath starts at {base}"
        )
    return listed


def _entry(
    fields: Mapping[str, Any],
    where: str,
    base: Path,
    text_rule: TextRule,
    language: str,
    split: Callable[[str | None, str], str],
) -> FileSource:
    """Source of a line. Raises UserError naming file and line."""
    if "shard_id" in fields:
        raise UserError(
            f"{where}: shard_id {shorten(fields['shard_id'])}: a line of a tarred dataset, which is not supported: "
            "give the manifest of the original audio files"
        )
    name = text_field(fields, "audio_filepath", where)
    if name is None:
        raise UserError(f"{where}: no 'audio_filepath': add it")
    text = text_field(fields, "text", where)
    if text is None and text_rule == "required":
        raise MissingText(f"{where}: no 'text': add it (or use --text optional or --text none)")
    text = None if text_rule == "none" else text
    start = seconds_field(fields, "offset", where)
    duration = seconds_field(fields, "duration", where)
    if start is not None and not duration:
        raise UserError(f"{where}: an entry with an offset needs its duration too")
    line_split = text_field(fields, "split", where)
    if line_split is not None and line_split not in SPLIT_NAMES:
        raise UserError(f"{where}: split is {shorten(line_split)}, expected one of {', '.join(SPLITS)}")
    path = audio_path(name, base, where)
    id = _SUFFIX.sub("", name) + ("" if start is None else f"@{start:.3f}")
    words, warnings = None, []
    if text_rule != "none":
        try:
            words = _words(fields, base, where, duration)
        except UserError as error:
            warnings.append(f"{NO_WORD_TIMES}: {error}")
    try:
        recording = Recording(
            id=id,
            text=text,
            words=words,
            language=text_field(fields, "lang", where) or text_field(fields, "language", where) or language,
            speaker=label_field(fields, "speaker", where),
            split=split(line_split and SPLIT_NAMES[line_split], text or id),
        )
    except UserError as error:
        raise error if str(error).startswith(where) else UserError(f"{where}: {error}") from error
    if start is None:
        return FileSource(recording, path, warnings=tuple(warnings))
    return FileSource(recording, path, start, duration, warnings=tuple(warnings))


def _with_unique_id(source: FileSource, where: str, places: dict[str, str]) -> FileSource:
    """Return the source with an id that is not in `places` (id -> location), and add the id to it.

    If two segments have the same start, the duration becomes part of the id. Raises UserError for a repeated segment or
    file.
    """
    id = source.id
    longer = f"{id}+{source.duration:.3f}" if source.duration is not None else id
    if id in places:
        id = longer
    if longer in places:
        raise UserError(f"{where}: {places[longer]} is the same segment of a file of this name: remove one of them")
    places[id] = places[longer] = where
    return source if id == source.id else replace(source, recording=replace(source.recording, id=id))


def _words(fields: Mapping[str, Any], base: Path, where: str, duration: float | None) -> list[Word] | None:
    """Words of a line: from its field `words`, else from its CTM file, else None."""
    longest = math.inf if duration is None else duration
    items = fields.get("words")
    if items is None:
        return nemo_words(fields, base, where, longest)
    if not isinstance(items, list):
        raise UserError(f"{where}: words is {shorten(items)}, expected a list of [word, start, end]")
    words, places = [], []
    for number, item in enumerate(items):
        at = f"{where}: words[{number}]"
        values = [item.get(field) for field in Word._fields] if isinstance(item, dict) else item
        if not isinstance(values, list) or len(values) not in (3, 4):
            raise UserError(f"{at}: {shorten(item)} is not [word, start, end] or [word, start, end, confidence]")
        word, start, end = word_text(values[0], at), seconds(values[1], at), seconds(values[2], at)
        if word:
            words.append(Word(word, start, end, probability(values[3], at) if len(values) == 4 else None))
            places.append(at)
    return in_order(words, lambda i: places[i], longest)
