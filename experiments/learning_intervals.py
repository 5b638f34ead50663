"""Relative reduction of CER or WER between two systems trained with several seeds, with a 95 % interval over both seeds
and recordings.

    python -m experiments.learning_intervals --baseline results/scratch-* --system results/pretrained-* --out gain.json

Folders are those of evaluate.py, one per seed and system; seed s of the system is paired with seed s of the baseline,
in the order given. Recordings are grouped by language, in the same or in different folders, and languages have equal
weight. Method and coverage: `bestrq/scoring/seeds.py`. In code: `reduction(baseline, system)` returns the keys value,
low, high and seeds, among others.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np

from bestrq.report.comparison import check_same_rules, recording_score
from bestrq.report.result_files import read_results
from bestrq.report.text import interval, percent
from bestrq.scoring.seeds import SeedErrors, relative_reduction
from bestrq.scoring.word_errors import RecordingScore
from common.config import run_main
from common.errors import UserError
from common.files import write_json

Rate = Literal["cer", "wer"]
Scores = dict[str, list[dict[str, RecordingScore]]]
"""by language: for each seed, the scores by recording id"""


def reduction(
    baseline: Sequence[str | Path], system: Sequence[str | Path], rate: Rate = "cer", num_resamples: int = 10_000
) -> dict[str, Any]:
    """Relative reduction from results folders, one per seed (and language) of each system.

    Returns:
        `Reduction.summary()`: value, low, high, seeds, ...; with "rate", and "languages" with a summary of each.

    Raises:
        UserError: languages, numbers of seeds, recordings, references or scoring rules differ.
    """
    results = {str(folder): read_results(Path(folder)) for folder in [*baseline, *system]}
    check_same_rules(results)
    first, second = (read_scores([results[str(folder)] for folder in folders]) for folders in (baseline, system))
    if first.keys() != second.keys() or not first:
        raise UserError(f"the baseline has results in {sorted(first)}, the system in {sorted(second)}: give the same")
    groups = {language: seed_errors(language, first[language], second[language], rate) for language in sorted(first)}
    languages = {name: relative_reduction([group], num_resamples).summary() for name, group in groups.items()}
    return {**relative_reduction(list(groups.values()), num_resamples).summary(), "rate": rate, "languages": languages}


def read_scores(evaluations: Sequence[dict[str, Any]]) -> Scores:
    """Scores by language and seed; an evaluation is one seed of every language that it has."""
    scores: Scores = {}
    for results in evaluations:
        by_language: dict[str, dict[str, RecordingScore]] = {}
        for row in results["recordings"]:
            by_language.setdefault(row["language"], {})[row["id"]] = recording_score(row)
        for language, by_id in by_language.items():
            scores.setdefault(language, []).append(by_id)
    return scores


def seed_errors(
    language: str, baseline: list[dict[str, RecordingScore]], system: list[dict[str, RecordingScore]], rate: Rate
) -> SeedErrors:
    """Errors of both systems in one language. Raises UserError if seeds, recordings or references differ."""
    if len(baseline) != len(system):
        raise UserError(
            f"language {language!r}: {len(baseline)} seeds of the baseline and {len(system)} of the system: give the "
            "same number"
        )
    ids = sorted(baseline[0])
    references = [baseline[0][id].reference for id in ids]
    unit = "characters" if rate == "cer" else "words"
    errors = []
    for by_id in [*baseline, *system]:
        if sorted(by_id) != ids or [by_id[id].reference for id in ids] != references:
            raise UserError(f"language {language!r}: recordings or references differ: evaluate all seeds on the same")
        errors.append([getattr(by_id[id], unit).errors for id in ids])
    lengths = np.array([getattr(baseline[0][id], unit).reference_length for id in ids])
    return SeedErrors(np.array(errors[: len(baseline)]), np.array(errors[len(baseline) :]), lengths)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--baseline", nargs="+", required=True, metavar="FOLDER", help="results, one folder per seed")
    parser.add_argument("--system", nargs="+", required=True, metavar="FOLDER", help="results, one folder per seed")
    parser.add_argument("--rate", choices=("cer", "wer"), default="cer")
    parser.add_argument("--resamples", type=int, default=10_000, help="resamples of the hierarchical bootstrap")
    parser.add_argument("--out", type=Path, help="JSON file to write")
    arguments = parser.parse_args()
    numbers = reduction(arguments.baseline, arguments.system, arguments.rate, arguments.resamples)
    name = arguments.rate.upper()
    for language, entry in [*numbers["languages"].items(), ("mean", numbers)]:
        bounds = "no interval" if entry["low"] is None else f"95 % {interval((entry['low'], entry['high']))}"
        rates = f"{percent(entry['baseline_rate'])} -> {percent(entry['system_rate'])}"
        reduced = f"relative reduction {percent(entry['value'])} ({bounds})"
        print(f"{language or '-':<6} {name} {rates}, {reduced}, {entry['seeds']} seeds")
    if arguments.out:
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        write_json(arguments.out, numbers)
        print(f"numbers: {arguments.out}")


if __name__ == "__main__":
    run_main(main)
