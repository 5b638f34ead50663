"""Tables of the long-context recipe, from the available results of experiments/long_context.sh.

    python -m experiments.long_context_table --folder runs/long-context

FOLDER/results/SET/MODEL holds the evaluation of a model with its training context, FOLDER/cross/SET those of all models
with all contexts. Prints and writes FOLDER/table.md, and writes FOLDER/table.csv with one row per evaluation.
"""

import argparse
import csv
import io
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from bestrq.report.comparison import check_same_rules
from bestrq.report.result_files import find_results, read_results
from common.config import run_main
from common.errors import UserError
from common.files import write_file

TEST_SETS = {
    "tedlium": "TED-LIUM test",
    "earnings22": "Earnings-22, 6-call test",
    "earnings22-full": "Earnings-22, all calls",
}


@dataclass(frozen=True)
class Cell:
    """Word error rate of a model with a test context on a test set."""

    test_set: str
    """folder name, key of `TEST_SETS`"""
    scored_by: str
    """'recordings' or, with words aligned within the segments of an STM, 'segments'"""
    trained_frames: int
    """frames of context in training"""
    context_seconds: float
    """context in the evaluation; 0 for the whole recording"""
    wer: float
    lower: float
    upper: float
    """95 % interval"""
    num_errors: int
    num_words: int
    num_recordings: int
    audio_seconds_per_second: float
    decoding: str
    """other settings of the evaluation: mode, overlap, decoder"""

    @property
    def column(self) -> str:
        name = TEST_SETS.get(self.test_set, self.test_set)
        return f"{name}, by segments" if self.scored_by == "segments" else name


def cells_of(test_set: str, folder: Path) -> list[Cell]:
    """Error rates of one results.json. Raises UserError if its model is not one of the recipe."""
    results = read_results(folder)
    trained = re.search(r"context-(\d+)$", Path(results["export"]).parent.name)
    if trained is None:
        raise UserError(f"{folder}: the model {results['export']} is not of this recipe; move these results elsewhere")
    inference = results["inference"]
    decoding = f"{inference['mode']}, overlap {inference['overlap']:g}, {results['decoder']['description']}"
    scores = {"recordings": results["scores"]["all"]}
    if results.get("segments"):
        scores["segments"] = results["segments"]["all"]
    cells = []
    for scored_by, score in scores.items():
        if score["wer"] is not None:
            lower, upper = score["wer_interval"] or (score["wer"], score["wer"])
            num_errors, num_words = counts(score["words"])
            cells.append(
                Cell(
                    test_set, scored_by, int(trained[1]), results["context_seconds"], score["wer"], lower, upper,
                    num_errors, num_words, score["num_recordings"],
                    results["decoding"]["audio_seconds_per_second"], decoding,
                )
            )  # fmt: skip
    return cells


def counts(words: Mapping[str, int]) -> tuple[int, int]:
    """Number of errors, and of reference words."""
    not_recognised = words["substitutions"] + words["deletions"]
    return not_recognised + words["insertions"], not_recognised + words["hits"]


def read_cells(folder: Path) -> list[Cell]:
    """All results in subfolders FOLDER/SET, sorted by test set, training context and test context."""
    sets = [name for name in TEST_SETS if (folder / name).is_dir()]
    folders = [(name, path) for name in sets for path in find_results([folder / name])]
    check_same_rules({str(path): read_results(path) for _, path in folders})
    cells = [cell for name, path in folders for cell in cells_of(name, path)]
    return sorted(cells, key=lambda cell: (sets.index(cell.test_set), cell.trained_frames, cell.context_seconds))


def length(seconds: float) -> str:
    """Duration such as "5.1 s" or "2.7 min"; "whole" for 0."""
    if seconds == 0:
        return "whole"
    return f"{seconds:.3g} s" if seconds < 120 else f"{seconds / 60:.3g} min"


def rate(cell: Cell) -> str:
    return f"{cell.wer:.2%} ({cell.lower:.1%} to {cell.upper:.1%})"


def markdown(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [f"| {' | '.join(row)} |" for row in (header, ["---"] * len(header), *rows)]
    return "\n".join(lines) + "\n"


def own_table(cells: Sequence[Cell]) -> str:
    """Table of each model with its training context: a row per context, a column per test set."""
    columns = list(dict.fromkeys(cell.column for cell in cells))
    rates = {(cell.trained_frames, cell.column): rate(cell) for cell in cells}
    contexts = sorted({cell.trained_frames for cell in cells})
    rows = [
        [f"{frames:,}", length(frames / 100), *(rates.get((frames, column), "") for column in columns)]
        for frames in contexts
    ]
    return markdown(["Frames", "Context", *columns], rows)


def cross_tables(cells: Sequence[Cell]) -> str:
    """One table per test set, with a row per model and a column per context."""
    parts = []
    for column in dict.fromkeys(cell.column for cell in cells):
        column_cells = [cell for cell in cells if cell.column == column]
        contexts = sorted({cell.context_seconds for cell in column_cells}, key=lambda seconds: seconds or math.inf)
        rates = {(cell.trained_frames, cell.context_seconds): f"{cell.wer:.2%}" for cell in column_cells}
        rows = [
            [f"{frames:,}", *(rates.get((frames, seconds), "") for seconds in contexts)]
            for frames in sorted({cell.trained_frames for cell in column_cells})
        ]
        parts.append(f"\n{column}\n\n" + markdown(["Trained with", *map(length, contexts)], rows))
    return "".join(parts)


def page(own: Sequence[Cell], cross: Sequence[Cell]) -> str:
    """All tables, followed by the settings of the evaluations."""
    decoding = "; ".join(dict.fromkeys(cell.decoding for cell in [*own, *cross]))
    text = ""
    if own:
        text += f"Word error rate and 95 % interval, each model at its training context.\n\n{own_table(own)}"
    if cross:
        text += f"\nWord error rate of each model at each context.\n{cross_tables(cross)}"
    return f"{text}\nDecoding: {decoding}.\n"


def table_csv(groups: Mapping[str, Sequence[Cell]]) -> str:
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(["table", *(field.name for field in fields(Cell))])
    for name, cells in groups.items():
        writer.writerows([name, *asdict(cell).values()] for cell in cells)
    return file.getvalue()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True, help="--folder of experiments/long_context.sh")
    folder: Path = parser.parse_args().folder
    groups: dict[str, list[Any]] = {name: read_cells(folder / name) for name in ("results", "cross")}
    if not any(groups.values()):
        raise UserError(f"{folder} has no results: run experiments/long_context.sh evaluate")
    text = page(groups["results"], groups["cross"])
    write_file(folder / "table.md", text)
    write_file(folder / "table.csv", table_csv(groups))
    print(f"{text}\ntables: {folder / 'table.md'}, {folder / 'table.csv'}")


if __name__ == "__main__":
    run_main(main)
