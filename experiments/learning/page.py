"""Tables and figure of the experiment on pretraining, from its numbers.

    python -m experiments.learning.page --results results/learning.json --page docs/learning.md \\
        --figure docs/learning.svg

replaces the part of the page between the lines `<!-- results -->` and `<!-- end of results -->`.
"""

import argparse
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib import rc_context
from matplotlib.figure import Figure

from bestrq.report.chart_style import COLOURS, MUTED, STYLE, svg_text
from bestrq.report.text import interval, number, percent
from common.config import run_main
from common.errors import UserError
from common.files import read_json_object, write_file

START, END = "<!-- results -->", "<!-- end of results -->"
REDUCTIONS = {
    "pretrained": "pretraining, equal fine-tuning steps",
    "unlabelled": "best use of unlabelled speech, twice the fine-tuning steps with pseudo-labels",
    "equal_compute": "best use of unlabelled speech, equal processor time",
    "synthetic_supervision": "labelled synthetic speech (the rival)",
}
ROLE_COLOURS = {"scratch": COLOURS[5], "unlabelled": COLOURS[0], "rival": COLOURS[1]}


def tables(document: Mapping[str, Any]) -> str:
    """Markdown: relative reductions, error rates and costs by system, what the grids tried, pending results."""
    parts = [reduction_table(document), system_table(document), choice_table(document), curve_table(document)]
    if document["pending"]:
        parts.append("Pending: " + "; ".join(document["pending"]) + ".")
    machine = document["machine"]
    parts.append(f"`{document['command']}`, commit {document['commit']}, {machine['processor']}.")
    return "\n\n".join(part for part in parts if part) + "\n"


def reduction_table(document: Mapping[str, Any]) -> str:
    """A row per comparison, a column per amount of labels."""
    main = document["main_minutes"]
    amounts = sorted({entry["minutes"] for entry in document["means"]})
    rows = []
    for what, description in REDUCTIONS.items():
        for ending, decoding in (("", "greedy"), ("_ngram", "n-gram")):
            keys = [f"cer_reduction_{what}{'' if m == main else f'_{m:g}min'}{ending}" for m in amounts]
            if any(key in document for key in keys):
                rows.append([f"{description}, {decoding}", *(reduction_cell(document, key) for key in keys)])
    header = ["relative reduction of test CER", *(f"{minutes:g} min of labels" for minutes in amounts)]
    return markdown(header, rows) if rows else ""


def reduction_cell(document: Mapping[str, Any], key: str) -> str:
    if key not in document:
        return ""
    baseline, system = document[f"{key}_systems"]
    low, high = document[f"{key}_low"], document[f"{key}_high"]
    bounds = "no interval" if low is None or high is None else interval((low, high))
    return f"{percent(document[key])} ({bounds}), {document[f'{key}_seeds']} seeds: {system} against {baseline}"


def system_table(document: Mapping[str, Any]) -> str:
    """A row per system and amount of labels: means over languages and seeds; no mean of fewer runs than others have."""
    header = ["labels", "system", "runs", "dev CER", "test CER", "test WER", "CER, n-gram", "WER, n-gram"]
    header += ["processor min: fine-tuning", "with all it needs"]
    rows: list[list[str]] = []
    runs: dict[float, int] = {}
    for entry in document["means"]:
        runs[entry["minutes"]] = max(entry["runs"], runs.get(entry["minutes"], 0))
    for entry in document["means"]:
        if not entry["runs"]:
            continue
        whole = entry["runs"] == runs[entry["minutes"]]
        rates = [with_bounds(entry.get(key)) for key in ("greedy_cer", "greedy_wer", "ngram_cer", "ngram_wer")]
        costs = [number(entry[key] / 60) for key in ("processor_seconds", "total_processor_seconds")]
        name = f"{entry['system']}: {entry['summary']}"
        rates = [percent(entry["dev_cer"]), *rates] if whole else [""] * 5
        rows.append([f"{entry['minutes']:g} min", name, str(entry["runs"]), *rates, *costs])
    return markdown(header, rows) if rows else ""


def choice_table(document: Mapping[str, Any]) -> str:
    """A row per candidate of every grid, also of those that did not help."""
    rows = []
    for name, choice in document["choices"].items():
        for number_, candidate in enumerate(choice.get("candidates", [])):
            settings = ", ".join(f"{key} {value}" for key, value in candidate["settings"].items())
            chosen = "chosen" if number_ == choice["chosen"] else ""
            rows.append([name, settings, percent(candidate["dev_cer"]), chosen])
    return markdown(["choice for", "settings", "dev CER", ""], rows) if rows else ""


def curve_table(document: Mapping[str, Any]) -> str:
    points = document["curve"]
    rows = [[f"{point['steps']:,}", percent(point["dev_cer"])] for point in points]
    return markdown(["pretraining steps", "dev CER after fine-tuning, first seed"], rows) if len(points) > 1 else ""


def with_bounds(values: Sequence[float] | None) -> str:
    return "" if values is None else f"{percent(values[0])} ({interval(values[1:])})"


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def figure(document: Mapping[str, Any]) -> str:
    """SVG: test CER by system with intervals at the main amount of labels, and dev CER against pretraining steps."""
    entries = [e for e in document["means"] if e["minutes"] == document["main_minutes"] and "greedy_cer" in e]
    with rc_context(STYLE | {"axes.grid.axis": "x"}):
        drawing = Figure(figsize=(9.6, 1.4 + 0.36 * max(len(entries), 4)), dpi=150, layout="constrained")
        bars, curve = drawing.subplots(1, 2, width_ratios=[3, 2])
        for place, entry in enumerate(entries):
            rate, low, high = (100 * value for value in entry["greedy_cer"])
            colour = ROLE_COLOURS.get(entry["role"], MUTED)
            bars.errorbar(
                rate, place, xerr=[[max(rate - low, 0)], [max(high - rate, 0)]], fmt="o", color=colour, capsize=3
            )
            bars.annotate(f"{rate:.1f}", (rate, place), (0, 6), textcoords="offset points", ha="center", fontsize=9)
        bars.set_yticks(range(len(entries)), [entry["system"] for entry in entries])
        bars.set_ylim(len(entries) - 0.4, -0.6)
        bars.set_xlabel(f"test CER in %, {document['main_minutes']:g} minutes of labels")
        points = document["curve"]
        curve.plot([p["steps"] for p in points], [100 * p["dev_cer"] for p in points], marker="o", color=COLOURS[0])
        curve.set_xlabel("pretraining steps")
        curve.set_ylabel("dev CER in % after fine-tuning")
        curve.grid(axis="both")
        return svg_text(drawing)


def replace_results(page: Path, text: str) -> None:
    """Put the text between the markers of a page. Raises UserError if it has no markers."""
    content = page.read_text(encoding="utf-8")
    new, count = re.subn(f"{START}.*?{END}", lambda _: f"{START}\n\n{text}\n{END}", content, flags=re.DOTALL)
    if count != 1:
        raise UserError(f"{page}: expected the lines {START} and {END} once")
    write_file(page, new)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, required=True, help="learning.json of the experiment")
    parser.add_argument("--page", type=Path, help="page whose results are replaced")
    parser.add_argument("--figure", type=Path, help="SVG to write")
    options = parser.parse_args()
    document = read_json_object(options.results)
    if options.page:
        replace_results(options.page, tables(document))
    if options.figure:
        write_file(options.figure, figure(document))


if __name__ == "__main__":
    run_main(main)
