"""The page that the quickstart ends with: pretraining and several fine-tuned systems side by side.

    python launch/quickstart_report.py --pretrain runs/pretrain \\
        --systems pretrained=results/pretrained scratch=results/scratch --out report.html

A system is NAME=FOLDER, the folder being what `evaluate.py --out` wrote; all of them on the same recordings. The
curves of its fine-tuning are taken from the run folder that its export lies in, the pretraining's from --pretrain.
"""

import argparse
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from bestrq.report import charts, report
from bestrq.report.comparison import Results, compare_systems
from bestrq.report.recording_table import recordings_section
from bestrq.report.results import read_results, read_transcripts
from bestrq.report.sections import (
    breakdowns_section,
    cells_section,
    comparison_section,
    facts_section,
    results_section,
    transcripts_section,
)
from bestrq.report.tables import percent
from bestrq.training.meters import read_metrics
from common.config import run_main
from common.errors import UserError


def series(rows: Sequence[Mapping[str, Any]], key: str) -> charts.Series | None:
    """The rows that have a number under `key`, or None where there are none."""
    pairs = [(row["step"], row[key]) for row in rows if isinstance(row.get(key), (int, float))]
    return charts.Series(*zip(*pairs, strict=True)) if pairs else None


def curve(title: str, lines: Mapping[str, charts.Series | None], y_label: str, caption: str = "",
          from_zero: bool = True) -> list[str]:  # fmt: skip
    """One figure, or nothing where no line has data."""
    there = {name: line for name, line in lines.items() if line is not None}
    if not there:
        return []
    return [report.figure(title, charts.line_chart(title, there, y_label, from_zero), caption)]


def pretraining_section(run: Path) -> report.Section:
    rows = read_metrics(run / "metrics.jsonl")
    figures = curve(
        "Loss",
        {
            "training": series(rows, "loss"),
            "held-out": series(rows, "dev_loss"),
            "unigram entropy of the targets": series(rows, "unigram_entropy"),
        },
        "nats per target",
        "The entropy is the loss of a model that knows only the frequency of every code. Held-out masks are fixed.",
        from_zero=False,
    )
    accuracy = {"training": series(rows, "accuracy"), "held-out": series(rows, "dev_accuracy")}
    figures += curve("Masked accuracy", accuracy, "share correct", "Codes of masked frames.")
    body = report.chart_grid(figures) if figures else report.paragraph("No metrics were recorded.", "note")
    pictures = run / "pictures"
    if (example := read_tensors(pictures / "mask_example.safetensors")) is not None:
        image = charts.spectrogram_chart(example["log_mel"], example["mask"].astype(bool))
        caption = "Normalised log-mel of a crop. The veiled spans become noise; the model predicts their codes."
        body += report.figure("What is hidden", image, caption)
    if (usage := read_tensors(pictures / "codebook_usage.safetensors")) is not None:
        counts = usage["counts"]
        image = charts.usage_chart(counts)
        used = "; ".join(describe_usage(book) for book in counts)
        body += report.chart_grid(
            [
                report.figure("Use of the codebook", image, used),
                *curve("Perplexity of the targets", {"perplexity": series(rows, "perplexity")}, "codes",
                       "How many equally frequent codes would be as hard to guess."),
            ]
        )  # fmt: skip
    return report.Section("Pretraining", body)


def read_tensors(path: Path) -> dict[str, np.ndarray] | None:
    """A small safetensors file, or None where there is none."""
    if not path.exists():
        return None
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise UserError(f"cannot read {path}: {error}. Remove it to go on without this picture") from error


def describe_usage(counts: np.ndarray) -> str:
    """Share of codes in use and perplexity of one codebook, int `[V]`."""
    share = counts[counts > 0] / max(int(counts.sum()), 1)
    perplexity = np.exp(-(share * np.log(share)).sum())
    return f"{len(share):,} of {len(counts):,} codes in use, perplexity {perplexity:,.0f}, {counts.sum():,} targets"


def fine_tuning_section(systems: Results) -> report.Section:
    rows = {name: read_metrics(Path(results["export"]).parent / "metrics.jsonl") for name, results in systems.items()}

    def lines(key: str) -> dict[str, charts.Series | None]:
        return {name: series(one, key) for name, one in rows.items()}

    figures = curve("Loss in training", lines("loss"), "nats a label")
    figures += curve("CER on the dev set", lines("dev_cer"), "CER")
    body = report.chart_grid(figures) if figures else report.paragraph("No metrics were recorded.", "note")
    return report.Section("Fine-tuning", body)


def parse_systems(values: Sequence[str]) -> dict[str, Path]:
    """`NAME=FOLDER` arguments."""
    pairs = [value.partition("=") for value in values]
    for (name, equals, folder), value in zip(pairs, values, strict=True):
        if not (name and equals and folder):
            raise UserError(f"--systems {value}: write NAME=FOLDER, such as pretrained=results/pretrained")
    return {name: Path(folder) for name, _, folder in pairs}


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--systems", nargs="+", required=True, metavar="NAME=FOLDER", help="outputs of evaluate.py")
    parser.add_argument("--pretrain", type=Path, help="run folder of pretrain.py; left out: no pretraining section")
    parser.add_argument("--title", default="From speech to word error rate", help="heading of the page")
    parser.add_argument("--out", type=Path, default=Path("report.html"), help="the page to write")
    arguments = parser.parse_args(argv)
    folders = parse_systems(arguments.systems)
    systems = {name: read_results(folder) for name, folder in folders.items()}
    totals = {name: results["scores"]["all"] for name, results in systems.items()}
    cards = {f"WER, {name}": percent(total["wer"]) for name, total in totals.items()}
    cards |= {f"CER, {name}": percent(total["cer"]) for name, total in totals.items()}
    total, split = next(iter(totals.values())), next(iter(systems.values()))["dataset"]["split"]
    decoding = "; ".join(f"{name}: {results['decoder']['description']}" for name, results in systems.items())
    lead = (
        f"{len(systems)} {'systems' if len(systems) > 1 else 'system'} on {total['num_recordings']:,} recordings, "
        f"{total['seconds'] / 60:.1f} minutes, of the {split} split. Decoding: {decoding}."
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
        cells_section(systems, "Speed and memory"),
        recordings_section(systems, transcripts, {}),
        transcripts_section(systems),
        facts_section(systems, arguments.pretrain),
    ]
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    report.write_report(arguments.out, arguments.title, lead, cards, sections)
    print(f"report: {arguments.out}")


if __name__ == "__main__":
    run_main(main)
