"""Evaluations side by side: the curve of WER against context, differences with intervals, every error to look at.

    python -m tools.compare --results results/a results/b results/sweep --out results/compare

Takes every results.json at any depth of the folders, all of them on the same recordings; the first is what the others
are compared to. Prints a table, and writes into --out: report.html, report.json with every number, and curve.svg where
there are two contexts or more.
"""

import json
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from bestrq.report.reports import CURVE, NUMBERS, write_comparison
from bestrq.report.result_files import REPORT, find_results, read_results
from bestrq.report.text import comparison_table
from common.config import parse, run_main
from common.errors import UserError
from data.audio.files import find_audio


@dataclass
class Config:
    """Comparison of evaluations."""

    results: list[str] = field(default_factory=list)
    """folders that evaluate.py wrote, or that hold some; the first evaluation is what the others are compared to"""
    out: str = "results/compare"
    """folder for the report"""
    names: list[str] = field(default_factory=list)
    """what the evaluations are called, in their order; empty takes the parts of their paths that differ"""
    title: str = "Comparison of recognisers"
    """heading of the page"""
    audio: str = ""
    """folder with the recordings, at any depth, named as their ids: the report plays them; empty for none"""
    resamples: int = 10_000
    """bootstrap resamples of the intervals"""

    def __post_init__(self) -> None:
        if not self.results:
            raise UserError("results is missing: give folders that evaluate.py wrote, as --results FOLDER FOLDER")
        if self.resamples < 100:
            raise UserError(f"resamples = {self.resamples}: give at least 100, or an interval means nothing")


def join_lists(argv: Sequence[str]) -> list[str]:
    """`--results a b` as the one value `--results ["a", "b"]` that the parser takes; likewise `--names`."""
    joined: list[str] = []
    values: list[str] | None = None
    for word in [*argv, "--"]:
        if values is not None and word.startswith("--"):
            joined.append(values[0] if len(values) == 1 and values[0].startswith("[") else json.dumps(values))
            values = None
        if values is not None:
            values.append(word)
        else:
            joined.append(word)
            values = [] if word in ("--results", "--names") else None
    return joined[:-1]


def name_folders(folders: Sequence[Path], names: Sequence[str] = ()) -> dict[str, Path]:
    """Folders by name: the given names, or of each path what it does not share with the others.

    Raises UserError where names are too many, too few or the same.
    """
    if names:
        if len(names) != len(folders) or len(set(names)) != len(names):
            there = ", ".join(map(str, folders))
            raise UserError(f"names = {', '.join(names)}: give {len(folders)} different ones, for {there}")
        return dict(zip(names, folders, strict=True))
    whole = [folder.resolve() for folder in folders]
    shared = Path(os.path.commonpath(whole)) if len(whole) > 1 else whole[0].parent
    # A folder that holds the others has nothing left of its path.
    return {
        (one.name if one == shared else one.relative_to(shared).as_posix()): folder
        for one, folder in zip(whole, folders, strict=True)
    }


def main(argv: Sequence[str] | None = None) -> None:
    config = parse(Config, join_lists(sys.argv[1:] if argv is None else argv), description=__doc__)
    systems = name_folders(find_results(config.results), config.names)
    out = Path(config.out)
    ids = [row["id"] for row in read_results(next(iter(systems.values())))["recordings"]]
    audio = {id: path.resolve().as_uri() for id, path in find_audio(config.audio, ids).items()}
    numbers = write_comparison(out, systems, audio, config.resamples, config.title)
    print(comparison_table(numbers))
    written = [name for name in (REPORT, NUMBERS, CURVE) if (out / name).exists()]
    print("wrote " + ", ".join(str(out / name) for name in written))


if __name__ == "__main__":
    run_main(main)
