"""NeMo manifests: one JSON object a line, for a file or for a stretch of one.

`audio_filepath` (a relative one counts from the manifest's folder), `duration` in seconds, `text`, and optionally
`offset` (seconds: the line is then that stretch of the file), `lang` or `language`, `speaker`, `split`. Word times come
from the CTM that NeMo's forced aligner names (`words_level_ctm_filepath`), or from a field `words`, a list of
[word, start, end, confidence]; both count from the start of the line's stretch.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

from common.errors import UserError
from data.corpora.base import SPLITS, FileSource, MissingText, SegmentSource, Unreadable, mostly_readable
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
from data.format.schema import Recording
from data.skipped import NO_WORD_TIMES
from data.transcripts import Word
from data.word_times.alignments import nemo_words
from data.word_times.base import in_order, probability, seconds, word_text

SPLIT_NAMES = {"train": "train", "dev": "dev", "valid": "dev", "validation": "dev", "val": "dev", "test": "test"}
# `manifest__OP_0..127_CL_.json` and `{0..127}`: how NeMo writes a family of files as one name.
_FAMILY = re.compile(r"_OP_.*_CL_|\{\d+\.\.\d+\}")
_SUFFIX = re.compile(r"\.\w+$")

TextRule = Literal["required", "optional", "none"]


def manifest_sources(
    manifest: Path, text: TextRule, language: str, split: Callable[[str | None, str], str]
) -> list[FileSource | SegmentSource | Unreadable]:
    """Sources of a manifest in its order, with an Unreadable for every unreadable line.

    Args:
        text: whether lines need a transcript; "none" leaves out those that there are.
        language: of lines that do not tell theirs.
        split: (the split that the line tells, or None; its text or id) -> its split.
    Raises:
        UserError: naming file and line if half or more of the lines are unreadable, or naming missing audio files.
    """
    if _FAMILY.search(manifest.name):
        raise UserError(
            f"manifest {manifest} stands for many files of a tarred dataset, which is not read: give a manifest of "
            "plain audio files (audio_filepath), or prepare them from where the tar files were made"
        )
    base = manifest.parent
    listed: list[FileSource | SegmentSource | Unreadable] = []
    places: dict[str, str] = {}
    for where, fields in json_lines_or_faults(manifest):
        try:
            if isinstance(fields, UserError):
                raise fields
            listed.append(_with_own_id(_entry(fields, where, base, text, language, split), where, places))
        except MissingText:
            raise
        except UserError as error:
            listed.append(Unreadable(where, str(error)))
    mostly_readable(listed)
    if not listed:
        raise UserError(f"manifest {manifest} is empty: a JSON object with audio_filepath, duration and text a line")
    there: dict[Path, bool] = {}
    for source in listed:
        if not isinstance(source, Unreadable) and source.path not in there:
            there[source.path] = is_file(source.path)
    missing = [str(path) for path, found in there.items() if not found]
    if missing:
        raise UserError(
            f"{len(missing)} of {len(there)} audio files of {manifest} do not exist: {summary(missing)}. A relative "
            f"audio_filepath counts from {base}"
        )
    return listed


def _entry(
    fields: Mapping[str, Any],
    where: str,
    base: Path,
    text_rule: TextRule,
    language: str,
    split: Callable[[str | None, str], str],
) -> FileSource | SegmentSource:
    """One line of a manifest. Raises UserError naming the file and the line."""
    if "shard_id" in fields:
        raise UserError(
            f"{where}: shard_id {shorten(fields['shard_id'])}: a line of a tarred dataset, which is not read: give the "
            "manifest of the plain audio files that it was made from"
        )
    name = text_field(fields, "audio_filepath", where)
    if name is None:
        raise UserError(f"{where}: no 'audio_filepath': add it")
    text = text_field(fields, "text", where)
    if text is None and text_rule == "required":
        raise MissingText(f"{where}: no 'text': add it (or say --text optional or --text none)")
    text = None if text_rule == "none" else text
    start = seconds_field(fields, "offset", where)
    duration = seconds_field(fields, "duration", where)
    if start is not None and not duration:
        raise UserError(f"{where}: an entry with an offset needs its duration too")
    told = text_field(fields, "split", where)
    if told is not None and told not in SPLIT_NAMES:
        raise UserError(f"{where}: split is {shorten(told)}, known are {', '.join(SPLITS)}")
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
            split=split(told and SPLIT_NAMES[told], text or id),
        )
    except UserError as error:
        raise error if str(error).startswith(where) else UserError(f"{where}: {error}") from error
    if start is None:
        return FileSource(recording, path, tuple(warnings))
    assert duration is not None
    return SegmentSource(recording, path, start, duration, tuple(warnings))


def _with_own_id(source: FileSource | SegmentSource, where: str, places: dict[str, str]) -> FileSource | SegmentSource:
    """A source whose id is none of `places` (id -> place), which it is put into.

    Speakers begin at the same time: then the duration is a part of the id too. Raises UserError where that is the same,
    or the line is for the whole of a file that has one.
    """
    id = source.id
    longer = f"{id}+{source.duration:.3f}" if isinstance(source, SegmentSource) else id
    if id in places:
        id = longer
    if longer in places:
        raise UserError(f"{where}: {places[longer]} is the same stretch of a file of this name: leave one of them out")
    places[id] = places[longer] = where
    return source if id == source.id else replace(source, recording=replace(source.recording, id=id))


def _words(fields: Mapping[str, Any], base: Path, where: str, duration: float | None) -> list[Word] | None:
    """Words of a line: of its field `words`, else of the CTM that it names, else None."""
    most = math.inf if duration is None else duration
    items = fields.get("words")
    if items is None:
        return nemo_words(fields, base, where, most)
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
    return in_order(words, lambda i: places[i], most)
