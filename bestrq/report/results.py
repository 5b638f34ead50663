"""What evaluate.py leaves in a folder: `results.json`, every number; `transcripts.jsonl`, every word and its time."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from common.errors import UserError

FORMAT_VERSION = 3
SCORING = "scoring rules"
"""key in `versions` of `normalisers.RULES_VERSION`; results without it have version 1"""
RESULTS, TRANSCRIPTS, TABLE, REPORT = "results.json", "transcripts.jsonl", "results.csv", "report.html"


def read_results(folder: str | Path) -> dict[str, Any]:
    """`results.json` of an evaluation. Raises UserError where it is not there, or another version's."""
    path = Path(folder) / RESULTS
    try:
        results = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read {path}: {error}. Run evaluate.py with --out {folder} first") from error
    if not isinstance(results, dict) or "scores" not in results or "recordings" not in results:
        raise UserError(f"{path} is not what evaluate.py writes: it lacks scores or recordings")
    if results.get("format_version") != FORMAT_VERSION:
        raise UserError(
            f"{path} has format version {results.get('format_version')!r}, and {FORMAT_VERSION} is read here: "
            "evaluate again"
        )
    return results


def read_transcripts(folder: str | Path) -> list[dict[str, Any]]:
    """The lines of `transcripts.jsonl` of an evaluation, in the order of ids. Raises UserError."""
    path = Path(folder) / TRANSCRIPTS
    try:
        return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read {path}: {error}. Run evaluate.py with --out {folder} again") from error


def find_results(folders: Iterable[str | Path]) -> list[Path]:
    """The folders with a `results.json`, at any depth of the given ones, in their order and by name within each.

    Raises UserError for a folder without any.
    """
    found: dict[Path, None] = {}
    for folder in folders:
        there = sorted(path.parent for path in Path(folder).rglob(RESULTS))
        if not there:
            raise UserError(f"{folder}: there is no {RESULTS} at any depth; give what evaluate.py --out was given")
        found |= dict.fromkeys(there)
    return list(found)
