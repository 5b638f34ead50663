"""The table that experiments/context_effect.sh ends with: two models over test contexts, with and without homophones.

    python experiments/context_effect_table.py --results runs/context-effect/results/contexts \\
        --own short=4 long=32 --out effect.json

--results is what the grid of `evaluate.py` wrote, of two exports and several contexts. A model is called by its run's
folder; --own names the two models, each with the context in seconds that it was trained with.
"""

import argparse
import json
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from bestrq.report.comparison import check_same_rules, recording_score
from bestrq.report.result_files import find_results, read_results
from bestrq.report.text import interval, percent
from bestrq.scoring.word_errors import RecordingScore, compare, edit_alignment, score_corpus
from common.config import run_main
from common.errors import UserError
from common.files import write_file
from data.corpora.homophones import homophones, word_lists

Cell = tuple[str, float]
"""name of a model, context in seconds that it was tested with (0: whole recordings)"""


@dataclass(frozen=True)
class HomophoneScore:
    """Of one model at one context: what of its errors is spelling."""

    wer: float | None
    wer_interval: tuple[float, float] | None
    homophone_errors: float
    """share of the reference's homophones that are not written as they should be, heard or not"""
    other_errors: float
    """share of the reference's other words that are not written as they should be"""


def read_cells(folder: Path) -> dict[Cell, list[RecordingScore]]:
    """The recordings of every evaluation in the folder."""
    cells: dict[Cell, list[RecordingScore]] = {}
    found = {str(path): read_results(path) for path in find_results([folder])}
    check_same_rules(found)
    for results in found.values():
        cell = Path(results["export"]).parent.name, float(results["context_seconds"])
        cells[cell] = [recording_score(row) for row in results["recordings"]]
    return cells


def score_homophones(scores: Sequence[RecordingScore], num_resamples: int) -> HomophoneScore:
    """Scores of one cell. Raises UserError where the references hold no homophone."""
    alike = {word for topic in word_lists()["topic"] for word in homophones(topic)}
    said = [word in alike for score in scores for word in score.reference.split()]
    if not any(said):
        raise UserError("the evaluated recordings hold no homophone: give results on the corpus homophones")
    marks = (mark for score in scores for mark in edit_alignment(score.reference, score.hypothesis))
    right = [word in alike for mark in marks if mark.kind == "equal" for word in mark.reference.split()]
    total, num_right = sum(said), sum(right)
    others, others_right = len(said) - total, len(right) - num_right
    corpus = score_corpus(scores, num_resamples)
    return HomophoneScore(
        corpus.words.rate, corpus.wer_interval, 1 - num_right / total, 1 - others_right / max(others, 1)
    )


def parse_own(values: Sequence[str]) -> list[Cell]:
    """`NAME=SECONDS` arguments."""
    found = [re.fullmatch(r"([^=]+)=(\d+(?:\.\d+)?)", value) for value in values]
    for match, value in zip(found, values, strict=True):
        if match is None:
            raise UserError(f"--own {value}: write NAME=SECONDS, such as short=4")
    return [(match[1], float(match[2])) for match in found if match]


def effect(cells: Mapping[Cell, list[RecordingScore]], own: Sequence[Cell], num_resamples: int) -> dict[str, Any]:
    """All numbers of the table: every cell by itself, both models paired at every context and each at its own."""
    if missing := [cell for cell in own if cell not in cells]:
        known = ", ".join(f"{name}={seconds:g}" for name, seconds in cells)
        raise UserError(f"--own {missing[0][0]}={missing[0][1]:g} was not evaluated; there are {known}")
    (first, _), (second, _) = own

    def paired(one: Cell, other: Cell) -> dict[str, Any]:
        return compare(cells[one], cells[other], num_resamples).summary()

    contexts = sorted({seconds for _, seconds in cells}, key=lambda seconds: seconds or float("inf"))
    return {
        "cells": [
            {"model": name, "context_seconds": seconds, **asdict(score_homophones(scores, num_resamples))}
            for (name, seconds), scores in cells.items()
        ],
        "differences": {
            f"{seconds:g}": paired((second, seconds), (first, seconds))
            for seconds in contexts
            if (first, seconds) in cells and (second, seconds) in cells
        },
        "own": {"first": own[1], "second": own[0], **paired(own[1], own[0])},
    }


def bounds(ends: Sequence[float] | None) -> str:
    return "" if ends is None else f" ({interval(ends)})"


def table(found: Mapping[str, Any]) -> str:
    """Markdown: a line a context, columns of both models."""
    models = [found["own"][which][0] for which in ("second", "first")]
    by_cell = {(cell["model"], cell["context_seconds"]): cell for cell in found["cells"]}
    columns = [f"{name}: {what}" for name in models for what in ("WER", "homophones wrong", "other words wrong")]
    lines = ["| test context | " + " | ".join(columns) + " |", "|" + "---|" * (len(columns) + 1)]
    for seconds in sorted({cell[1] for cell in by_cell}, key=lambda seconds: seconds or float("inf")):
        line = [f"{seconds:g} s" if seconds else "whole recording"]
        for name in models:
            cell = by_cell.get((name, seconds))
            line += ["-"] * 3 if cell is None else [
                percent(cell["wer"]) + bounds(cell["wer_interval"]),
                percent(cell["homophone_errors"]),
                percent(cell["other_errors"]),
            ]  # fmt: skip
        lines.append("| " + " | ".join(line) + " |")
    return "\n".join(lines)


def verdict(found: Mapping[str, Any]) -> str:
    """One sentence on the two models, each at the context it was trained with."""
    own = found["own"]
    (first, seconds), (second, others) = own["first"], own["second"]
    wer, p_value = own["wer"], own["matched_pairs"]["p_value"]
    return (
        f"{first} at {seconds:g} s less {second} at {others:g} s: {100 * wer['difference']:+.1f} points of WER"
        f"{bounds(wer['interval'])}, MAPSSWE p = {p_value:.1g}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, required=True, help="folder of the grid that evaluate.py wrote")
    parser.add_argument("--own", nargs=2, required=True, metavar="NAME=SECONDS", help="the models, and their contexts")
    parser.add_argument("--out", type=Path, required=True, help="the JSON file to write")
    parser.add_argument("--resamples", type=int, default=10_000, help="bootstrap resamples of the intervals")
    arguments = parser.parse_args()
    found = effect(read_cells(arguments.results), parse_own(arguments.own), arguments.resamples)
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    write_file(arguments.out, json.dumps(found, indent=1, allow_nan=False))
    print(f"{table(found)}\n\n{verdict(found)}\nnumbers: {arguments.out}")


if __name__ == "__main__":
    run_main(main)
