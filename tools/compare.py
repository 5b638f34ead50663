"""Comparison of evaluations: curve of WER over context, paired differences with intervals, all errors in one report.

    python -m tools.compare --results results/a results/b results/sweep --out results/compare

Reads all results.json files at any depth of the folders; the evaluations must be on the same recordings. The first one
is the baseline. Prints a table and writes report.html and report.json (all numbers) to --out, and curve.svg if the
evaluations have two contexts or more.
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
    """folders that evaluate.py wrote, or parents of such folders; the first evaluation is the baseline"""
    out: str = "results/compare"
    """folder for the report"""
    names: list[str] = field(default_factory=list)
    """names of the evaluations, in their order; empty takes the parts of their paths that differ"""
    title: str = "Comparison of recognisers"
    """heading of the page"""
    audio: str = ""
    """folder with the audio of the recordings, at any depth, named by their ids, for playback; empty for no playback"""
    resamples: int = 10_000
    """bootstrap resamples of the intervals, at least 100"""

    def __post_init__(self) -> None:
        if not self.results:
            raise UserError("results is missing: give folders that evaluate.py wrote, as --results FOLDER FOLDER")
        if self.resamples < 100:
            raise UserError(f"resamples = {self.resamples}: give at least 100, or the intervals are meaningless")


def join_lists(argv: Sequence[str], options: Sequence[str] = ("--results", "--names")) -> list[str]:
    """Rewrite `--results a b` to `--results ["a", "b"]`, the form that the parser accepts; likewise all `options`."""
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
            values = [] if word in options else None
    return joined[:-1]


def name_folders(folders: Sequence[Path], names: Sequence[str] = ()) -> dict[str, Path]:
    """Folders by name: the given names, or the path of each below the common parent.

    Raises UserError if the given names are not distinct, or not one per folder.
    """
    if names:
        if len(names) != len(folders) or len(set(names)) != len(names):
            listed = ", ".join(map(str, folders))
            raise UserError(f"names = {', '.join(names)}: give {len(folders)} different ones, for {listed}")
        return dict(zip(names, folders, strict=True))
    paths = [folder.resolve() for folder in folders]
    shared = Path(os.path.commonpath(paths)) if len(paths) > 1 else paths[0].parent
    # A folder that contains the others is the shared path: it keeps its own name.
    return {
        (path.name if path == shared else path.relative_to(shared).as_posix()): folder
        for path, folder in zip(paths, folders, strict=True)
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
