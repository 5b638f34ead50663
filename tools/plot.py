"""Comparison of training runs: curves by optimizer step, run time and hours of audio heard, in one HTML page.

    python -m tools.plot runs/*
    python -m tools.plot runs/first runs/second --out results/plot.html --names small large

Reads metrics.jsonl, config.yaml and run.json of every run folder, at any depth of the given ones. Runs may be of
different kinds, unfinished or empty. The page is one file that works offline: charts of all metrics with smoothing,
restarts marked, and a table of the last values with the settings in which the runs differ.
"""

import json
import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from jsonargparse.typing import PositiveInt

from bestrq.report.curves_page import write_curves
from bestrq.report.run_curves import RunRecord
from bestrq.training.metrics_file import read_metrics, totals_of
from common.config import load_yaml, parse, run_main
from common.errors import UserError
from common.files import read_json_object
from tools.compare import join_lists, name_folders

METRICS, RECORD, SETTINGS = "metrics.jsonl", "run.json", "config.yaml"
WITHOUT_RUNS = ("checkpoints", "export", "tensorboard", "averaging", "pictures", "profile", "tracking")
"""folders of a run that hold no other run"""


@dataclass
class Config:
    """Comparison of training runs."""

    runs: list[str] = field(default_factory=list)
    """run folders, or parents of run folders; their names may also be given without --runs, as the first arguments"""
    out: str = "runs/plot.html"
    """page to write"""
    names: list[str] = field(default_factory=list)
    """names of the runs, in their order; empty takes the parts of their paths that differ"""
    title: str = "Training runs"
    """heading of the page"""
    points: PositiveInt = 500
    """points of a curve; lines of a longer record are averaged in groups"""

    def __post_init__(self) -> None:
        if not self.runs:
            raise UserError("runs is missing: give run folders, as python -m tools.plot runs/*")


def arguments(argv: Sequence[str]) -> list[str]:
    """Command line in which the words before the first option are those of --runs."""
    first = next((i for i, word in enumerate(argv) if word.startswith("--")), len(argv))
    runs = ["--runs", json.dumps(list(argv[:first]))] if first else []
    return [*runs, *join_lists(argv[first:], ("--runs", "--names"))]


def find_runs(folders: Sequence[str]) -> list[Path]:
    """Run folders among these and below them: in the given order, then sorted by path. Others give a warning.

    Raises UserError if there is none at all.
    """
    found: dict[Path, None] = {}
    for folder in folders:
        runs = sorted(runs_below(Path(folder)))
        found |= dict.fromkeys(runs)
        if not runs:
            print(f"no run in {folder}: neither {METRICS} nor {RECORD}", file=sys.stderr)
    if not found:
        raise UserError(
            f"runs = {', '.join(folders)}: no run folder at any depth; give a run.folder of a training script"
        )
    return list(found)


def runs_below(folder: Path) -> Iterator[Path]:
    """Run folders at any depth of a folder, itself included."""
    for parent, folders, files in os.walk(folder):
        if METRICS in files or RECORD in files:
            yield Path(parent)
            folders[:] = [name for name in folders if name not in WITHOUT_RUNS]


def read_run(name: str, folder: Path) -> RunRecord:
    """Record of a run folder, without the files that cannot be read: they are among its problems."""
    problems: list[str] = []
    rows: list[dict[str, Any]] = []
    settings: dict[str, Any] = {}
    starts = 0
    try:
        if (folder / METRICS).exists():
            rows = read_metrics(folder / METRICS)
    except (OSError, UserError) as error:
        problems.append(f"{METRICS}: {error}")
    try:
        if (folder / SETTINGS).exists():
            settings = load_yaml(folder / SETTINGS)
    except (OSError, UserError, RecursionError) as error:
        problems.append(f"{SETTINGS}: {error}")
    try:
        if (folder / RECORD).exists():
            entries = read_json_object(folder / RECORD).get("starts")
            starts = len(entries) if isinstance(entries, list) else 0
    except UserError as error:
        problems.append(f"{RECORD}: {error}")
    return RunRecord(name, rows, totals_of(rows), settings, starts, problems)


def main(argv: Sequence[str] | None = None) -> None:
    config = parse(Config, arguments(sys.argv[1:] if argv is None else argv), description=__doc__)
    folders = name_folders(find_runs(config.runs), config.names)
    records = [read_run(name, folder) for name, folder in folders.items()]
    out = Path(config.out)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        write_curves(out, records, config.points, config.title)
    except OSError as error:
        raise UserError(f"cannot write {out}: {error}; give another --out") from error
    width = max(len(record.name) for record in records)
    for record in records:
        print(f"{record.name:<{width}}  {record.script or '?':<11}  {record.state}")
    print(f"wrote {out}")


if __name__ == "__main__":
    run_main(main)
