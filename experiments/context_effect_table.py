"""Table of experiments/context_effect.sh: error rates of two models by test context, on homophones and other words.

    python -m experiments.context_effect_table --results runs/context-effect/results/contexts \\
        --own short=4 long=32 --out effect.json

--results is the output folder of tools/sweep.py for two exports and several contexts. A model is named by its run
folder; --own gives the names of the two models, each with its training context in seconds.
"""

import argparse
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from bestrq.report.comparison import check_same_rules, recording_score
from bestrq.report.result_files import find_results, read_results
from bestrq.report.text import interval, percent
from bestrq.scoring.word_errors import RecordingScore, compare, edit_alignment, score_corpus
from common.config import run_main
from common.errors import UserError
from common.files import write_file
from data.corpora.homophones import homophones, word_lists

Cell = tuple[str, float]
"""name of a model, test context in seconds (0: whole recordings)"""


@dataclass(frozen=True)
class HomophoneScore:
    """Error rates of one model with one test context, separately for homophones and other words."""

    wer: float | None
    wer_interval: tuple[float, float] | None
    homophone_errors: float
    """share of the reference's homophones that are substituted or deleted in the hypothesis"""
    other_errors: float
    """share of the reference's other words that are substituted or deleted in the hypothesis"""


def read_cells(folder: Path) -> dict[Cell, list[RecordingScore]]:
    """Scores of the recordings of each evaluation in the folder."""
    cells: dict[Cell, list[RecordingScore]] = {}
    evaluations = {str(path): read_results(path) for path in find_results([folder])}
    check_same_rules(evaluations)
    for results in evaluations.values():
        cell = Path(results["export"]).parent.name, float(results["context_seconds"])
        cells[cell] = [recording_score(row) for row in results["recordings"]]
    return cells


def score_homophones(scores: Sequence[RecordingScore], num_resamples: int) -> HomophoneScore:
    """Scores of one model with one test context. Raises UserError if the references have no homophones."""
    homophone_words = {word for topic in word_lists()["topic"] for word in homophones(topic)}
    is_homophone = [word in homophone_words for score in scores for word in score.reference.split()]
    if not any(is_homophone):
        raise UserError("the evaluated recordings have no homophones: give results on the corpus homophones")
    marks = (mark for score in scores for mark in edit_alignment(score.reference, score.hypothesis))
    correct = [word in homophone_words for mark in marks if mark.kind == "equal" for word in mark.reference.split()]
    total, num_correct = sum(is_homophone), sum(correct)
    others, others_correct = len(is_homophone) - total, len(correct) - num_correct
    corpus = score_corpus(scores, num_resamples)
    return HomophoneScore(
        corpus.words.rate, corpus.wer_interval, 1 - num_correct / total, 1 - others_correct / max(others, 1)
    )


def parse_own(values: Sequence[str]) -> list[Cell]:
    """Models and contexts of `NAME=SECONDS` arguments."""
    matches = [re.fullmatch(r"([^=]+)=(\d+(?:\.\d+)?)", value) for value in values]
    for match, value in zip(matches, values, strict=True):
        if match is None:
            raise UserError(f"--own {value}: write NAME=SECONDS, such as short=4")
    return [(match[1], float(match[2])) for match in matches if match]


def effect(cells: Mapping[Cell, list[RecordingScore]], own: Sequence[Cell], num_resamples: int) -> dict[str, Any]:
    """Numbers of the table: error rates of each model with each context; differences between the two models with each
    common context, and with their own training contexts.
    """
    if missing := [cell for cell in own if cell not in cells]:
        evaluated = ", ".join(f"{name}={seconds:g}" for name, seconds in cells)
        raise UserError(f"--own {missing[0][0]}={missing[0][1]:g} was not evaluated; evaluated are {evaluated}")
    (first, _), (second, _) = own

    def difference(cell: Cell, baseline: Cell) -> dict[str, Any]:
        return compare(cells[cell], cells[baseline], num_resamples).summary()

    contexts = sorted({seconds for _, seconds in cells}, key=lambda seconds: seconds or float("inf"))
    return {
        "cells": [
            {"model": name, "context_seconds": seconds, **asdict(score_homophones(scores, num_resamples))}
            for (name, seconds), scores in cells.items()
        ],
        "differences": {
            f"{seconds:g}": difference((second, seconds), (first, seconds))
            for seconds in contexts
            if (first, seconds) in cells and (second, seconds) in cells
        },
        "own": {"first": own[1], "second": own[0], **difference(own[1], own[0])},
    }


def bounds(ends: Sequence[float] | None) -> str:
    return "" if ends is None else f" ({interval(ends)})"


def table(numbers: Mapping[str, Any]) -> str:
    """Markdown table: a row per context, columns for both models."""
    models = [numbers["own"][place][0] for place in ("second", "first")]
    by_cell = {(cell["model"], cell["context_seconds"]): cell for cell in numbers["cells"]}
    columns = [f"{name}: {measure}" for name in models for measure in ("WER", "homophones wrong", "other words wrong")]
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


def verdict(numbers: Mapping[str, Any]) -> str:
    """Difference of the two models, each with its training context, in one line."""
    own = numbers["own"]
    (first, seconds), (second, second_seconds) = own["first"], own["second"]
    wer, p_value = own["wer"], own["matched_pairs"]["p_value"]
    return (
        f"{first} at {seconds:g} s minus {second} at {second_seconds:g} s: {100 * wer['difference']:+.1f} points of WER"
        f"{bounds(wer['interval'])}, MAPSSWE p = {p_value:.1g}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, required=True, help="output folder of tools/sweep.py")
    parser.add_argument(
        "--own", nargs=2, required=True, metavar="NAME=SECONDS", help="the two models with their training contexts"
    )
    parser.add_argument("--out", type=Path, required=True, help="JSON file to write")
    parser.add_argument("--resamples", type=int, default=10_000, help="bootstrap resamples for the intervals")
    arguments = parser.parse_args()
    numbers = effect(read_cells(arguments.results), parse_own(arguments.own), arguments.resamples)
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    write_file(arguments.out, json.dumps(numbers, indent=1, allow_nan=False))
    print(f"{table(numbers)}\n\n{verdict(numbers)}\nnumbers: {arguments.out}")


if __name__ == "__main__":
    run_main(main)
