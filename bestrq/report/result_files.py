"""Files of an evaluation: `results.json` (all numbers) and `transcripts.jsonl` (words with times, and alignments)."""

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from common.errors import UserError
from common.files import read_json

FORMAT_VERSION = 3
SCORING = "scoring rules"
"""key in `versions` for `normalisers.RULES_VERSION`; results without it have version 1"""
RESULTS, TRANSCRIPTS, TABLE, REPORT = "results.json", "transcripts.jsonl", "results.csv", "report.html"


def read_results(folder: str | Path) -> dict[str, Any]:
    """Content of `results.json`. Raises UserError if it is missing, invalid or of another format version."""
    path = Path(folder) / RESULTS
    try:
        results = read_json(path)
    except UserError as error:
        raise UserError(f"{error}. Run evaluate.py with --out {folder} first") from error
    if not isinstance(results, dict) or "scores" not in results or "recordings" not in results:
        raise UserError(f"{path} was not written by evaluate.py: scores or recordings are missing")
    if results.get("format_version") != FORMAT_VERSION:
        raise UserError(
            f"{path} has format version {results.get('format_version')!r}, this code reads {FORMAT_VERSION}: "
            "evaluate again"
        )
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
    try:
        return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read {path}: {error}. Run evaluate.py with --out {folder} again") from error


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
