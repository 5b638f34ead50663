"""Table of experiments/pretraining_context.sh: error rates by pretraining and test context, with paired differences.

    python -m experiments.pretraining_context_table --results runs/pretraining-context/seed-0/results/contexts \\
        --baseline context-4 --out effect.json --figure effect.svg

--results are output folders of tools/sweep.py, one per seed. A model is named by its run folder. Errors of a recording
are summed over the seeds before the bootstrap over recordings. That interval does not cover the choice of the seed: the
difference of every seed is listed beside it, with a t-interval of their mean.
"""

import argparse
import json
import math
import re
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from functools import reduce
from operator import add
from pathlib import Path
from typing import Any

from bestrq.report.charts import context_svg
from bestrq.report.comparison import Point
from bestrq.report.text import interval, percent, points
from bestrq.scoring.student import student_quantile
from bestrq.scoring.word_errors import RecordingScore, compare, score_corpus
from common.config import run_main
from common.errors import UserError
from common.files import write_file
from experiments.context_effect_table import Cell, bounds, read_cells, score_homophones

Cells = Mapping[Cell, list[RecordingScore]]


def pool(seeds: Sequence[Cells]) -> dict[Cell, list[RecordingScore]]:
    """Scores of each evaluation, summed over the seeds by recording. Raises UserError if a seed lacks an evaluation."""
    for cells in seeds[1:]:
        if missing := set(seeds[0]) ^ set(cells):
            name, seconds = sorted(missing)[0]
            raise UserError(f"the evaluation of {name} at {seconds:g} s is not in all of --results: evaluate all seeds")
    return {cell: _summed([cells[cell] for cells in seeds]) for cell in seeds[0]}


def _summed(seeds: Sequence[Sequence[RecordingScore]]) -> list[RecordingScore]:
    rows: dict[str, list[RecordingScore]] = {}
    for scores in seeds:
        for score in scores:
            rows.setdefault(score.id, []).append(score)
    return [
        replace(
            of_seeds[0],
            seconds=sum(score.seconds for score in of_seeds),
            reference=" ".join(score.reference for score in of_seeds),
            hypothesis=" ".join(score.hypothesis for score in of_seeds),
            words=reduce(add, (score.words for score in of_seeds)),
            characters=reduce(add, (score.characters for score in of_seeds)),
        )
        for of_seeds in rows.values()
    ]


def effect(seeds: Sequence[Cells], baseline: str, homophones: bool, num_resamples: int) -> dict[str, Any]:
    """Numbers of the table: rates of each model at each test context, and its differences to the baseline there.

    Raises:
        UserError: there is no evaluation of the baseline.
    """
    cells = pool(seeds)
    if baseline not in {name for name, _ in cells}:
        raise UserError(f"--baseline {baseline} was not evaluated; evaluated are {sorted({name for name, _ in cells})}")
    rows = []
    for (name, seconds), scores in sorted(cells.items(), key=lambda item: _order(*item[0])):
        total = score_corpus(scores, num_resamples)
        row: dict[str, Any] = {"model": name, "context_seconds": seconds, "num_recordings": len(scores)}
        row |= {"wer": total.words.rate, "wer_interval": total.wer_interval}
        row |= {"cer": total.characters.rate, "cer_interval": total.cer_interval}
        if homophones:
            by_kind = asdict(score_homophones(scores, num_resamples))
            row |= {kind: by_kind[kind] for kind in ("homophone_errors", "other_errors")}
        if name != baseline and (baseline, seconds) in cells:
            row["difference"] = compare(scores, cells[baseline, seconds], num_resamples).summary()
            for unit in ("words", "characters"):
                pairs = [(of_seed[name, seconds], of_seed[baseline, seconds]) for of_seed in seeds]
                by_seed = [_rate(own, unit) - _rate(other, unit) for own, other in pairs]
                row[f"difference_of_{unit}_by_seed"] = by_seed
                row[f"difference_of_{unit}_over_seeds"] = interval_over_seeds(by_seed)
        rows.append(row)
    return {"baseline": baseline, "seeds": len(seeds), "cells": rows}


def _order(name: str, seconds: float) -> tuple[float, float, str]:
    """Sort key: test context, with whole recordings last; then models by the number in their name."""
    number = re.search(r"\d+", name)
    return seconds or math.inf, int(number[0]) if number else -1, name


def _rate(scores: Sequence[RecordingScore], unit: str) -> float:
    """Error rate of `words` or `characters`; 0 without any in the references."""
    return reduce(add, (getattr(score, unit) for score in scores)).rate or 0.0


def interval_over_seeds(differences: Sequence[float]) -> tuple[float, float] | None:
    """95 % interval of the mean by Student's t; None for one seed."""
    if len(differences) < 2:
        return None
    mean = statistics.mean(differences)
    width = student_quantile(len(differences) - 1) * statistics.stdev(differences) / math.sqrt(len(differences))
    return mean - width, mean + width


def table(numbers: Mapping[str, Any]) -> str:
    """Markdown table: a row per test context and model."""
    baseline = numbers["baseline"]
    columns = f"WER | CER | CER minus {baseline}: over recordings | by seed | over seeds"
    lines = [f"| test context | model | {columns} |", "|" + "---|" * 7]
    for cell in numbers["cells"]:
        difference, seeds, over_seeds = "", "", ""
        if "difference" in cell:
            cer = cell["difference"]["cer"]
            low_high = f" ({interval(cer['interval'], signed=True)})" if cer["interval"] else ""
            difference = f"{points(cer['difference'])}{low_high}"
            seeds = ", ".join(points(value) for value in cell["difference_of_characters_by_seed"])
            ends = cell["difference_of_characters_over_seeds"]
            over_seeds = interval(ends, signed=True) if ends else ""
        context = f"{cell['context_seconds']:g} s" if cell["context_seconds"] else "whole recording"
        rates = [f"{percent(cell[unit])}{bounds(cell[f'{unit}_interval'])}" for unit in ("wer", "cer")]
        lines.append(f"| {context} | {cell['model']} | {' | '.join(rates)} | {difference} | {seeds} | {over_seeds} |")
    return "\n".join(lines)


def figure(numbers: Mapping[str, Any]) -> str:
    """SVG of the character error rate against the test context, a curve per model."""
    curves: dict[str, list[Point]] = {}
    for cell in numbers["cells"]:
        curve = curves.setdefault(cell["model"], [])
        curve.append(Point(cell["context_seconds"], cell["cer"] or 0.0, cell["cer_interval"]))
    return context_svg(curves, "CER")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, nargs="+", required=True, help="output folders of tools/sweep.py")
    parser.add_argument("--baseline", required=True, help="model that the others are compared with")
    parser.add_argument("--homophones", action="store_true", help="count errors on the corpus homophones by kind")
    parser.add_argument("--out", type=Path, required=True, help="JSON file to write")
    parser.add_argument("--figure", type=Path, required=True, help="SVG file to write")
    parser.add_argument("--resamples", type=int, default=10_000, help="bootstrap resamples for the intervals")
    arguments = parser.parse_args()
    seeds = [read_cells(folder) for folder in arguments.results]
    numbers = effect(seeds, arguments.baseline, arguments.homophones, arguments.resamples)
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    write_file(arguments.out, json.dumps(numbers, indent=1, allow_nan=False))
    write_file(arguments.figure, figure(numbers))
    print(f"{table(numbers)}\nnumbers: {arguments.out}\nfigure: {arguments.figure}")


if __name__ == "__main__":
    run_main(main)
