"""Table of experiments/objectives.sh: mean CER of every objective, and its relative reduction against one of them.

    python -m experiments.objectives_table --results random-1024=a/results-0,a/results-1 pca=b/results-0,b/results-1 \\
        --baseline random-1024 --out objectives.json

The folders of an objective are evaluations, one per seed of the fine-tuning; seed s of two objectives is paired.
Intervals cover the seeds and the test recordings (`bestrq/scoring/seeds.py`), not the seed of the pretraining.
"""

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from bestrq.report.result_files import folders_by_name
from bestrq.report.text import interval, percent
from common.config import run_main
from common.errors import UserError
from common.files import write_json
from experiments.learning_intervals import reduction


def table(rows: Mapping[str, Mapping[str, Any]], baseline: str) -> str:
    """Markdown table, the lowest CER first."""
    lines = [f"| Objective | CER | relative reduction against `{baseline}` |", "|---|---|---|"]
    for name, row in sorted(rows.items(), key=lambda item: item[1]["system_rate"]):
        bounds = "no interval" if row["low"] is None else f"95 % {interval((row['low'], row['high']))}"
        gain = "" if name == baseline else f"{percent(row['value'])} ({bounds})"
        lines.append(f"| `{name}` | {percent(row['system_rate'])} | {gain} |")
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", nargs="+", required=True, metavar="NAME=FOLDER", help="results of an objective")
    parser.add_argument("--baseline", required=True, metavar="NAME", help="objective to compare with")
    parser.add_argument("--out", type=Path, required=True, help="JSON file to write")
    arguments = parser.parse_args(argv)
    folders = folders_by_name("--results", arguments.results)
    if arguments.baseline not in folders:
        raise UserError(f"--baseline {arguments.baseline}: give one of {', '.join(folders)}")
    rows = {name: reduction(folders[arguments.baseline], system) for name, system in folders.items()}
    print(table(rows, arguments.baseline))
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    write_json(arguments.out, {"baseline": arguments.baseline, "objectives": rows})
    print(f"numbers: {arguments.out}")


if __name__ == "__main__":
    run_main(main)
