"""Report of the quickstart: pretraining, and several fine-tuned systems side by side.

    python launch/quickstart_report.py --pretrain runs/pretrain \\
        --systems pretrained=results/pretrained scratch=results/scratch --out report.html

A system is NAME=FOLDER, where FOLDER is an output of evaluate.py; all systems must be evaluated on the same recordings.
Fine-tuning curves are read from the run folder that contains a system's export, pretraining curves from --pretrain.
"""

import argparse
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from markupsafe import Markup
from safetensors import SafetensorError
from safetensors.numpy import load_file

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from bestrq.report import charts
from bestrq.report.comparison import Results, compare_systems
from bestrq.report.page import Section, figure, figure_grid, paragraph, write_page
from bestrq.report.result_files import read_results, read_transcripts
from bestrq.report.sections import (
    breakdowns_section,
    comparison_section,
    cost_section,
    examples_section,
    provenance_section,
    recordings_section,
    results_section,
)
from bestrq.report.text import percent
from bestrq.training.metrics_file import read_metrics
from common.config import run_main
from common.errors import UserError
from common.json_checks import LARGEST


def read_series(rows: Sequence[Mapping[str, Any]], key: str) -> charts.Series | None:
    """Values of a key over steps; None if no row has a number under the key."""
    pairs = [(row["step"], row[key]) for row in rows if type(row.get(key)) in (int, float) and abs(row[key]) < LARGEST]
    return charts.Series(*zip(*pairs, strict=True)) if pairs else None


def line_figure(title: str, lines: Mapping[str, charts.Series | None], y_label: str, caption: str = "",
                from_zero: bool = True) -> list[Markup]:  # fmt: skip
    """One figure of the lines that have data; empty if none has."""
    drawn = {name: line for name, line in lines.items() if line is not None}
    return [figure(title, charts.line_chart(title, drawn, y_label, from_zero), caption)] if drawn else []


def pretraining_section(run: Path) -> Section:
    rows = read_metrics(run / "metrics.jsonl")
    figures = line_figure(
        "Loss",
        {
            "training": read_series(rows, "loss"),
            "held-out": read_series(rows, "dev_loss"),
            "unigram entropy of the targets": read_series(rows, "unigram_entropy"),
        },
        "nats per target",
        "The entropy is the loss of predicting each target by its frequency. Held-out masks are fixed.",
        from_zero=False,
    )
    accuracy = {"training": read_series(rows, "accuracy"), "held-out": read_series(rows, "dev_accuracy")}
    caption = "Share of the codes of masked frames that are predicted correctly."
    figures += line_figure("Masked accuracy", accuracy, "accuracy", caption)
    body = figure_grid(figures) if figures else paragraph("No metrics were recorded.", "note")
    pictures = run / "pictures"
    if (example := read_tensors(pictures / "mask_example.safetensors", "log_mel", "mask")) is not None:
        log_mel, mask = example
        if log_mel.ndim != 2 or not log_mel.size or mask.shape != log_mel.shape[:1] or not np.isfinite(log_mel).all():
            raise UserError(
                f"{pictures / 'mask_example.safetensors'}: not the frames and the mask of a crop: remove it"
            )
        image = charts.spectrogram_chart(log_mel, mask.astype(bool))
        caption = "Normalised log-mel of a crop. Shaded spans are replaced by noise; the model predicts their codes."
        body += figure("Masked spans", image, caption)
    if (usage := read_tensors(pictures / "codebook_usage.safetensors", "counts")) is not None:
        (counts,) = usage
        if counts.ndim != 2 or not counts.size or counts.dtype != np.int64 or counts.min() < 0:
            raise UserError(f"{pictures / 'codebook_usage.safetensors'}: not the counts of the codes: remove it")
        used = "; ".join(describe_usage(book) for book in counts)
        perplexity = {"perplexity": read_series(rows, "perplexity")}
        caption = "Number of equally frequent codes with the same entropy."
        body += figure_grid(
            [
                figure("Codebook usage", charts.usage_chart(counts), used),
                *line_figure("Perplexity of the targets", perplexity, "codes", caption),
            ]
        )
    return Section("Pretraining", body)


def read_tensors(path: Path, *names: str) -> list[np.ndarray] | None:
    """Tensors of a small safetensors file by name; None if it does not exist. Raises UserError if it cannot be read."""
    if not path.exists():
        return None
    try:
        tensors = load_file(path)
        return [tensors[name] for name in names]
    except (OSError, SafetensorError, KeyError) as error:
        raise UserError(f"cannot read {path}: {error}. Remove it to make the page without this picture") from error


def describe_usage(counts: np.ndarray) -> str:
    """Number of codes in use and perplexity of one codebook, from int `[V]`."""
    share = counts[counts > 0] / max(int(counts.sum()), 1)
    perplexity = np.exp(-(share * np.log(share)).sum())
    return f"{len(share):,} of {len(counts):,} codes in use, perplexity {perplexity:,.0f}, {counts.sum():,} targets"


def fine_tuning_section(systems: Results) -> Section:
    rows = {name: read_metrics(Path(results["export"]).parent / "metrics.jsonl") for name, results in systems.items()}

    def lines(key: str) -> dict[str, charts.Series | None]:
        return {name: read_series(metrics, key) for name, metrics in rows.items()}

    figures = line_figure("Training loss", lines("loss"), "nats per label")
    figures += line_figure("CER on the dev set", lines("dev_cer"), "CER")
    body = figure_grid(figures) if figures else paragraph("No metrics were recorded.", "note")
    return Section("Fine-tuning", body)


def parse_systems(values: Sequence[str]) -> dict[str, Path]:
    """Folders by name, from `NAME=FOLDER` arguments. Raises UserError for an argument of another form."""
    pairs = [value.partition("=") for value in values]
    for (name, equals, folder), value in zip(pairs, values, strict=True):
        if not (name and equals and folder):
            raise UserError(f"--systems {value}: write NAME=FOLDER, such as pretrained=results/pretrained")
    return {name: Path(folder) for name, _, folder in pairs}


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--systems", nargs="+", required=True, metavar="NAME=FOLDER", help="outputs of evaluate.py")
    parser.add_argument("--pretrain", type=Path, help="run folder of pretrain.py, for the pretraining section")
    parser.add_argument("--title", default="From speech to word error rate", help="heading of the page")
    parser.add_argument("--out", type=Path, default=Path("report.html"), help="page to write")
    arguments = parser.parse_args(argv)
    folders = parse_systems(arguments.systems)
    systems = {name: read_results(folder) for name, folder in folders.items()}
    totals = {name: results["scores"]["all"] for name, results in systems.items()}
    cards = {f"WER, {name}": percent(total["wer"]) for name, total in totals.items()}
    cards |= {f"CER, {name}": percent(total["cer"]) for name, total in totals.items()}
    total, split = next(iter(totals.values())), next(iter(systems.values()))["dataset"]["split"]
    decoding = "; ".join(f"{name}: {results['decoder']['description']}" for name, results in systems.items())
    lead = (
        f"{len(systems)} {'systems' if len(systems) > 1 else 'system'} on {total['num_recordings']:,} recordings "
        f"({total['seconds'] / 60:.1f} minutes) of the {split} split. Decoding: {decoding}."
    )
    sections = [results_section(systems)]
    if len(systems) > 1:
        sections.append(comparison_section(systems, compare_systems(systems)))
    if arguments.pretrain is not None:
        sections.append(pretraining_section(arguments.pretrain))
    transcripts = {name: read_transcripts(folder) for name, folder in folders.items()}
    sections += [
        fine_tuning_section(systems),
        breakdowns_section(systems),
        cost_section(systems, "Speed and memory"),
        recordings_section(systems, transcripts, {}),
        examples_section(systems),
        provenance_section(systems, arguments.pretrain),
    ]
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    write_page(arguments.out, arguments.title, lead, cards, sections)
    print(f"report: {arguments.out}")


if __name__ == "__main__":
    run_main(main)
