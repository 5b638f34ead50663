"""Files of an evaluation: `results.json` (all numbers) and `transcripts.jsonl` (words with times, and alignments)."""

import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from common.errors import UserError
from common.files import read_json_object
from common.json_checks import (
    count,
    fields,
    finite,
    list_of,
    mapping_of,
    number,
    one_of,
    or_null,
    positive_or_zero,
    row_of,
    scalar,
    text,
)
from common.json_lines import read_strict_json_lines

FORMAT_VERSION = 3
SCORING = "scoring rules"
"""key in `versions` for `normalisers.RULES_VERSION`; results without it have version 1"""
RESULTS, TRANSCRIPTS, TABLE, REPORT = "results.json", "transcripts.jsonl", "results.csv", "report.html"


_INTERVAL = or_null(row_of(number, number))
_COUNTS = fields(dict.fromkeys(("hits", "substitutions", "deletions", "insertions"), count))
_SCORE = fields({
    "num_recordings": count, "seconds": positive_or_zero, "wer": or_null(positive_or_zero), "wer_interval": _INTERVAL,
    "cer": or_null(positive_or_zero), "cer_interval": _INTERVAL, "interval_method": scalar, "words": _COUNTS,
    "characters": _COUNTS,
})  # fmt: skip
_BIN = fields({"low": number, "high": or_null(number), "wer": or_null(positive_or_zero), "interval": _INTERVAL})
_RULE = fields(dict.fromkeys(("pattern", "replacement", "reason"), text))
_RECORDING = fields({
    **dict.fromkeys(("id", "language", "speaker", "normaliser", "reference", "hypothesis"), text),
    "seconds": positive_or_zero, "wer": or_null(positive_or_zero), "cer": or_null(positive_or_zero),
    **{f"{unit}_{kind}": count for unit in ("word", "char")
       for kind in ("hits", "substitutions", "deletions", "insertions")},
})  # fmt: skip
_RESULTS = fields(
    {
        **dict.fromkeys(("name", "label", "export", "export_hash", "command"), text),
        "context_seconds": positive_or_zero,
        "dataset": fields(dict.fromkeys(("name", "path", "split", "fingerprint", "feature_hash"), text)),
        "inference": fields({"mode": text, "context_seconds": number, "overlap": number, "precision": text}),
        "encoder": mapping_of(scalar),
        "decoder": fields({"description": text}),
        "versions": mapping_of(text),
        "decoding": fields(
            dict.fromkeys(("real_time_factor", "audio_seconds_per_second", "peak_mb"), or_null(positive_or_zero))
        ),
        "scores": mapping_of(_SCORE),
        "speakers": mapping_of(_SCORE),
        "durations": mapping_of(_SCORE),
        "positions": list_of(_BIN),
        "edge_distances": list_of(_BIN),
        "confusions": fields(
            {
                "substitutions": list_of(row_of(text, text, count)),
                "deletions": list_of(row_of(text, count)),
                "insertions": list_of(row_of(text, count)),
            }
        ),
        "normalisers": mapping_of(fields({"description": text, "rules": list_of(_RULE)}, {"note": text})),
        "recordings": list_of(_RECORDING, shortest=1),
        "segments": or_null(mapping_of(_SCORE)),
    }
)
_WORDS = list_of(row_of(text, number, number, or_null(number)))
_TRANSCRIPT = {"id": text, "seconds": positive_or_zero, "text": text, "words": _WORDS}
check_transcript = fields(_TRANSCRIPT)
"""check of a transcript as it is in partial-RANK.jsonl"""
_ALIGNED = fields({**_TRANSCRIPT, "alignment": list_of(row_of(one_of("=", "S", "D", "I"), text, text, number))})


def read_results(folder: str | Path) -> dict[str, Any]:
    """Content of `results.json`.

    Raises UserError, which names file and field, if it is missing, invalid or of another format version.
    """
    path = Path(folder) / RESULTS
    try:
        results = read_json_object(path)
    except UserError as error:
        raise UserError(f"{error}. Run evaluate.py with --out {folder} first") from error
    if "scores" not in results or "recordings" not in results:
        raise UserError(f"{path} was not written by evaluate.py: scores or recordings are missing")
    if results.get("format_version") != FORMAT_VERSION:
        raise UserError(
            f"{path} has format version {results.get('format_version')!r}, this code reads {FORMAT_VERSION}: "
            "evaluate again"
        )
    try:
        _RESULTS(results, str(path))
        finite(results, str(path))
        for name in ("scores", "segments"):
            if results[name] is not None and "all" not in results[name]:
                raise UserError(f"{path}: {name}.all is missing")
        if not re.fullmatch(r"[0-9]{1,9}", results["versions"].get(SCORING, "1")):
            raise UserError(f"{path}: versions.{SCORING} is {results['versions'][SCORING]!r}, expected digits")
        ids = [row["id"] for row in results["recordings"]]
        if len(set(ids)) < len(ids):
            raise UserError(f"{path}: two recordings have the same id")
        for index, row in enumerate(results["recordings"]):
            if row["reference"] and row["cer"] is None:
                raise UserError(f"{path}: recordings[{index}].cer is null, but the reference is not empty")
    except UserError as error:
        raise UserError(f"{error}. The file was changed: evaluate again") from error
    return results


def folders_by_name(option: str, pairs: Sequence[str]) -> dict[str, list[str]]:
    """Folders by name, from NAME=FOLDER[,FOLDER...]. Raises UserError for another form or a name given twice.

    Args:
        option: name of the option, for messages.
    """
    folders: dict[str, list[str]] = {}
    for pair in pairs:
        name, _, paths = pair.partition("=")
        if not name or not paths or name in folders:
            raise UserError(f"{option} {pair!r}: write NAME=FOLDER[,FOLDER...], with each name once")
        folders[name] = paths.split(",")
    return folders


def read_transcripts(folder: str | Path) -> list[dict[str, Any]]:
    """Lines of `transcripts.jsonl`, sorted by recording id. Raises UserError if it is missing or invalid."""
    path = Path(folder) / TRANSCRIPTS
    transcripts = []
    try:
        for line, place in read_strict_json_lines(path):
            _ALIGNED(line, place)
            transcripts.append(line)
    except UserError as error:
        raise UserError(f"cannot read {path}: {error}. Run evaluate.py with --out {folder} again") from error
    return transcripts


def find_results(folders: Iterable[str | Path]) -> list[Path]:
    """Folders that hold a `results.json`, at any depth below the given ones: in the given order, then sorted by path.

    Raises UserError for a given folder without any.
    """
    evaluations: dict[Path, None] = {}
    for folder in folders:
        matches = sorted(path.parent for path in Path(folder).rglob(RESULTS))
        if not matches:
            raise UserError(f"{folder}: no {RESULTS} at any depth; give a folder that evaluate.py wrote (its --out)")
        evaluations |= dict.fromkeys(matches)
    return list(evaluations)
