"""The page that the quickstart ends with: pretraining and several fine-tuned systems side by side.

    python launch/quickstart_report.py --pretrain runs/pretrain \\
        --systems pretrained=results/pretrained scratch=results/scratch --out report.html

A system is NAME=FOLDER, the folder being what `evaluate.py --out` wrote; all of them on the same recordings. The
curves of its fine-tuning are taken from the run folder that its export lies in, the pretraining's from --pretrain.
"""

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from bestrq.config import ConfigError, run_main
from bestrq.recognition import charts, report
from bestrq.recognition.scoring import bootstrap_interval
from bestrq.training.meters import read_metrics

Results = dict[str, dict[str, Any]]
"""results.json by system"""


def read_results(folder: Path) -> dict[str, Any]:
    """What evaluate.py wrote."""
    path = folder / "results.json"
    try:
        results = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ConfigError(f"cannot read {path}: {error}. Run evaluate.py with --out {folder} first") from error
    if not isinstance(results, dict) or "scores" not in results or "recordings" not in results:
        raise ConfigError(f"{path} is not what evaluate.py writes: it lacks scores or recordings")
    return results


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


def results_section(systems: Results) -> report.Section:
    body = report.headline_table({name: results["scores"] for name, results in systems.items()})
    body += report.paragraph(
        "Errors of the whole corpus over its reference characters (CER) and words (WER). Intervals: 95 %, from "
        "resampling whole recordings. The bar shows the CER and its interval.",
        "note",
    )
    names = list(systems)
    for other in names[1:]:
        body += report.paragraph(difference(systems, names[0], other))
    rates = {
        name: [row["cer"] for row in results["recordings"] if row["cer"] is not None]
        for name, results in systems.items()
    }
    picture = charts.rates_chart("CER of the recordings", rates, "CER")
    totals = {name: results["scores"]["all"] for name, results in systems.items()}
    kinds = charts.kinds_chart({name: error_shares(total["characters"]) for name, total in totals.items()})
    figures = [
        report.figure("CER of the recordings", picture, "Each recording by itself; further to the left is better."),
        report.figure("Kinds of errors", kinds, "Mostly deletions would be a model that has learnt little."),
    ]
    return report.Section("Results", body + report.chart_grid(figures) + report.error_table(totals))


def error_shares(counts: Mapping[str, int]) -> dict[str, float]:
    """Kinds of errors over the length of the references."""
    length = max(counts["hits"] + counts["substitutions"] + counts["deletions"], 1)
    return {kind: counts[kind] / length for kind in ("substitutions", "deletions", "insertions")}


def difference(systems: Results, first: str, second: str) -> str:
    """A sentence on the paired difference of two systems' CER."""
    rows, others = ({row["id"]: row for row in systems[name]["recordings"]} for name in (first, second))
    if set(rows) != set(others):
        raise ConfigError(f"{first} and {second} were evaluated on different recordings: evaluate both on the same")
    lengths = np.array([char_errors(row)[1] for row in rows.values()])
    errors = np.array([char_errors(rows[id])[0] - char_errors(others[id])[0] for id in rows])
    gain = errors.sum() / max(lengths.sum(), 1)
    bounds = bootstrap_interval(errors, lengths)
    sentence = f"CER of {first} less that of {second}: {100 * gain:+.1f} points"
    if bounds is None:
        return sentence + "."
    clear = "" if bounds[0] > 0 or bounds[1] < 0 else ", so the two cannot be told apart here"
    return f"{sentence} (95 % interval {100 * bounds[0]:+.1f} to {100 * bounds[1]:+.1f}{clear})."


def char_errors(row: Mapping[str, Any]) -> tuple[int, int]:
    """Errors and reference length, in characters."""
    wrong = row["char_substitutions"] + row["char_deletions"]
    return wrong + row["char_insertions"], wrong + row["char_hits"]


def pretraining_section(run: Path) -> report.Section:
    rows = read_metrics(run / "metrics.jsonl")
    figures = curve(
        "Loss",
        {"loss": series(rows, "loss"), "unigram entropy of the targets": series(rows, "unigram_entropy")},
        "nats a target",
        "What counts is the distance between the two: the entropy is what guessing by frequency alone would cost.",
        from_zero=False,
    )
    figures += curve("Masked accuracy", {"accuracy": series(rows, "accuracy")}, "share right",
                     "Of the codes of masked frames.")  # fmt: skip
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
        raise ConfigError(f"cannot read {path}: {error}. Remove it to go on without this picture") from error


def describe_usage(counts: np.ndarray) -> str:
    """Share of codes in use and perplexity of one codebook, int `[V]`."""
    share = counts[counts > 0] / max(int(counts.sum()), 1)
    perplexity = np.exp(-(share * np.log(share)).sum())
    return f"{len(share):,} of {len(counts):,} codes in use, perplexity {perplexity:,.0f}, {counts.sum():,} targets"


def fine_tuning_section(systems: Results) -> report.Section:
    rows = {name: read_metrics(Path(results["export"]).parent / "metrics.jsonl") for name, results in systems.items()}

    def lines(key: str) -> dict[str, charts.Series | None]:
        return {name: series(one, key) for name, one in rows.items()}

    figures = curve("CTC loss in training", lines("loss"), "nats a label")
    figures += curve("CER on the dev set", lines("dev_cer"), "CER")
    body = report.chart_grid(figures) if figures else report.paragraph("No metrics were recorded.", "note")
    return report.Section("Fine-tuning with CTC", body)


def transcripts_section(systems: Results, count: int = 6) -> report.Section:
    """Recordings spread over the range of difficulty, languages in turn, by the CER of the first system."""
    by_system = {name: {row["id"]: row for row in results["recordings"]} for name, results in systems.items()}
    rows = [row for row in next(iter(by_system.values())).values() if row["reference"]]
    rows.sort(key=lambda row: (row["cer"], row["id"]))
    picked = [rows[round(i)] for i in np.linspace(0.1, 0.9, min(count, len(rows))) * (len(rows) - 1)] if rows else []
    samples = [
        report.Sample(
            id=row["id"],
            language=row["language"],
            reference=row["reference"],
            hypotheses={name: one[row["id"]]["hypothesis"] for name, one in by_system.items()},
            rates={name: one[row["id"]]["cer"] for name, one in by_system.items()},
        )
        for row in {row["id"]: row for row in picked}.values()
    ]
    intro = report.paragraph(f"From the easier to the harder ones, by the CER of {next(iter(systems))}.")
    return report.Section("Transcripts", intro + report.transcripts(samples))


def facts_section(systems: Results, pretrain: Path | None) -> report.Section:
    first = next(iter(systems.values()))
    values = {
        "dataset": f"{first['dataset']['path']}, split {first['dataset']['split']}",
        "dataset fingerprint": first["dataset"]["fingerprint"],
        "feature hash": first["dataset"]["feature_hash"],
    }
    if pretrain is not None:
        values["pretraining run"] = str(pretrain)
    for name, results in systems.items():
        values[f"{name}: export"] = f"{results['export']} ({results['export_hash'][:16]})"
    values["versions"] = ", ".join(f"{name} {version}" for name, version in first["versions"].items())
    body = report.facts(values) + report.commands([results["command"] for results in systems.values()])
    return report.Section("How it was made", body)


def parse_systems(values: Sequence[str]) -> dict[str, Path]:
    """`NAME=FOLDER` arguments."""
    pairs = [value.partition("=") for value in values]
    for (name, equals, folder), value in zip(pairs, values, strict=True):
        if not (name and equals and folder):
            raise ConfigError(f"--systems {value}: write NAME=FOLDER, such as pretrained=results/pretrained")
    return {name: Path(folder) for name, _, folder in pairs}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--systems", nargs="+", required=True, metavar="NAME=FOLDER", help="outputs of evaluate.py")
    parser.add_argument("--pretrain", type=Path, help="run folder of pretrain.py; left out: no pretraining section")
    parser.add_argument("--title", default="From speech to word error rate", help="heading of the page")
    parser.add_argument("--out", type=Path, default=Path("report.html"), help="the page to write")
    arguments = parser.parse_args()
    systems = {name: read_results(folder) for name, folder in parse_systems(arguments.systems).items()}
    totals = {name: results["scores"]["all"] for name, results in systems.items()}
    cards = {f"CER, {name}": report.percent(total["cer"]) for name, total in totals.items()}
    cards |= {f"WER, {name}": report.percent(total["wer"]) for name, total in totals.items()}
    total = next(iter(totals.values()))
    lead = (
        f"{len(systems)} {'systems' if len(systems) > 1 else 'system'} on {total['num_recordings']:,} recordings, "
        f"{total['seconds'] / 60:.1f} minutes, unseen in training; greedy CTC decoding, no language model."
    )
    sections = [results_section(systems)]
    if arguments.pretrain is not None:
        sections.append(pretraining_section(arguments.pretrain))
    sections += [fine_tuning_section(systems), transcripts_section(systems), facts_section(systems, arguments.pretrain)]
    write_page(arguments.out, arguments.title, lead, cards, sections)


def write_page(path: Path, title: str, lead: str, cards: Mapping[str, str], sections: Sequence[report.Section]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    report.write_report(path, title, lead, cards, sections)
    print(f"report: {path}")


if __name__ == "__main__":
    run_main(main)
