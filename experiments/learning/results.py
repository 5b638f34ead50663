"""Numbers of the experiment on pretraining: every system in every cell, and relative reductions of CER with intervals.

Results are collected from what is finished; keys without enough results are absent and listed under "pending".
"""

from __future__ import annotations

import platform
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

import numpy as np

from bestrq.report.comparison import recording_score
from bestrq.report.result_files import read_results
from bestrq.scoring.seeds import SeedErrors, relative_reduction
from bestrq.scoring.word_errors import RecordingScore
from common.errors import UserError
from common.files import read_json_object, write_file, write_json
from common.json_checks import read_number
from experiments.learning.choices import mean
from experiments.learning.intervals import Errors, rate_with_interval
from experiments.learning.page import figure, tables
from experiments.learning.plan import Plan, curve_jobs
from experiments.learning.setup import REPOSITORY, Cell
from experiments.learning.stages import PRETRAINED, PRETRAINING, SCRATCH, SYNTHETIC, fine_tuning

FORMAT_VERSION = 1
Decoding = Literal["greedy", "ngram"]
Unit = Literal["characters", "words"]
DECODINGS: tuple[Decoding, ...] = ("greedy", "ngram")
RATES: tuple[tuple[Unit, str], ...] = (("characters", "cer"), ("words", "wer"))
Scores = dict[tuple[str, float, str, str], dict[int, dict[str, RecordingScore]]]
"""(system, minutes, decoding, language) -> seed -> recording id -> score on test"""


def collect(plan: Plan, facts: Mapping[str, Any], command: str, num_resamples: int = 10_000) -> dict[str, Any]:
    """All numbers so far, as JSON values."""
    setup = plan.setup
    rows, scores = [], Scores()
    for minutes in setup.minutes:
        for system in setup.systems:
            for cell in setup.cells(minutes):
                if row := cell_row(plan, system, cell, scores):
                    rows.append(row)
    document: dict[str, Any] = {"format_version": FORMAT_VERSION}
    pending: list[str] = []
    for minutes in setup.minutes:
        suffix = "" if minutes == setup.main_minutes else f"_{minutes:g}min"
        document |= reductions(plan, rows, scores, minutes, suffix, num_resamples, pending)
    seeds = [value for key, value in document.items() if key.endswith("_seeds")]
    document |= {
        "seeds": min(seeds, default=0),
        "pending": pending,
        "main_minutes": setup.main_minutes,
        "command": command,
        "commit": commit(),
        "machine": machine(),
        "corpus": dict(facts),
        "size": asdict(setup.size) | {"minutes": setup.minutes, "seeds": setup.seeds, "systems": setup.systems},
        "pretraining": pretraining_facts(plan),
        "means": means(plan, rows, scores, num_resamples),
        "runs": rows,
        "choices": choices(plan),
        "curve": curve(plan, rows),
    }
    return document


def cell_row(plan: Plan, system: str, cell: Cell, scores: Scores) -> dict[str, Any] | None:
    """Numbers of a system in a cell; its test scores are added to `scores`. None before the training is finished."""
    name = f"{system}/{cell}"
    job = plan.jobs[name]
    if not plan.records.is_done(job):
        return None
    config = job.output.parent / "config.json"
    row: dict[str, Any] = {
        "system": system,
        "language": cell.language,
        "minutes": cell.minutes,
        "seed": cell.seed,
        "dev_cer": read_number(config, "dev_cer"),
        "best_step": int(read_number(config, "step")),
        "processor_seconds": plan.records.processor_seconds(job),
        "total_processor_seconds": plan.records.cost(job, plan.jobs),
    }
    for decoding in DECODINGS:
        evaluation = plan.jobs.get(f"{name}-{decoding}")
        if evaluation is None or not plan.records.is_done(evaluation):
            continue
        results = read_results(evaluation.output.parent)
        total = results["scores"]["all"]
        row[decoding] = {key: total[key] for key in ("cer", "cer_interval", "wer", "wer_interval")}
        by_seed = scores.setdefault((system, cell.minutes, decoding, cell.language), {})
        by_seed[cell.seed] = {entry["id"]: recording_score(entry) for entry in results["recordings"]}
    return row


def errors_of(
    scores: Scores, systems: Sequence[str], minutes: float, decoding: Decoding, languages: Sequence[str], unit: Unit
) -> tuple[list[list[Errors]], int] | None:
    """Errors by system and language, from the seeds that all systems have, and the smallest number of these seeds.

    None if a language has no such seed. Raises UserError if recordings or references differ.
    """
    groups: list[list[Errors]] = [[] for _ in systems]
    counts = []
    for language in languages:
        found = [scores.get((system, minutes, decoding, language), {}) for system in systems]
        seeds = sorted(set.intersection(*(set(by_seed) for by_seed in found)))
        if not seeds:
            return None
        counts.append(len(seeds))
        first = found[0][seeds[0]]
        ids = sorted(first)
        lengths = np.array([getattr(first[id], unit).reference_length for id in ids])
        for system, by_seed in enumerate(found):
            for seed in seeds:
                same = {id: score.reference for id, score in by_seed[seed].items()}
                if same != {id: score.reference for id, score in first.items()}:
                    raise UserError(
                        f"{systems[system]} and {systems[0]} were evaluated on different recordings or references "
                        f"(language {language!r}, seed {seed}): delete the results of one and evaluate it again"
                    )
            errors = [[getattr(by_seed[seed][id], unit).errors for id in ids] for seed in seeds]
            groups[system].append(Errors(np.array(errors), lengths))
    return groups, min(counts)


def reductions(
    plan: Plan, rows: Sequence[Mapping[str, Any]], scores: Scores, minutes: float, suffix: str, num_resamples: int,
    pending: list[str],
) -> dict[str, Any]:  # fmt: skip
    """Keys cer_reduction_* with intervals, for one amount of labels. Systems are chosen by dev CER, never by test."""
    setup = plan.setup
    unlabelled = best_on_dev(rows, [s for s in setup.systems if fine_tuning(s).role == "unlabelled"], minutes)
    best_scratch = best_on_dev(rows, [s for s in setup.systems if fine_tuning(s).role == "scratch"], minutes)
    comparisons = {
        "pretrained": (SCRATCH, PRETRAINED),
        "unlabelled": (SCRATCH, unlabelled),
        "equal_compute": (best_scratch, unlabelled),
        "synthetic_supervision": (SCRATCH, SYNTHETIC),
    }
    values: dict[str, Any] = {}
    for what, (baseline, system) in comparisons.items():
        key = f"cer_reduction_{what}{suffix}"
        if what == "equal_compute" and not has_equal_compute(rows, setup.languages, minutes):
            baseline = ""
        if not baseline or not system or system not in setup.systems:
            pending.append(f"{key}: no results yet")
            continue
        for decoding in DECODINGS:
            name = key if decoding == "greedy" else f"{key}_ngram"
            found = errors_of(scores, [baseline, system], minutes, decoding, setup.languages, "characters")
            planned = len(setup.seeds)
            if found is None or found[1] < min(2, planned):
                if decoding == "greedy":
                    pending.append(f"{name}: results of fewer than {min(2, planned)} seeds in a language")
                continue
            (first, second), seeds = found
            if not any(errors.errors.any() for errors in first):
                continue  # a relative reduction is undefined
            groups = [SeedErrors(a.errors, b.errors, a.lengths) for a, b in zip(first, second, strict=True)]
            numbers = relative_reduction(groups, num_resamples).summary()
            values |= {name: numbers["value"], f"{name}_low": numbers["low"], f"{name}_high": numbers["high"]}
            values[f"{name}_seeds"] = seeds
            values |= {f"{name}_systems": [baseline, system]}
            if seeds < planned:
                pending.append(f"{name}: {seeds} of {planned} seeds")
    return values


def best_on_dev(rows: Sequence[Mapping[str, Any]], systems: Sequence[str], minutes: float) -> str:
    """System with the lowest mean dev CER in the cells that all finished candidates have; "" without results."""
    cells: dict[str, dict[tuple[str, int], float]] = {}
    for row in rows:
        if row["system"] in systems and row["minutes"] == minutes:
            cells.setdefault(row["system"], {})[row["language"], row["seed"]] = row["dev_cer"]
    common = set.intersection(*(set(values) for values in cells.values())) if cells else set()
    rates = {system: mean(values[cell] for cell in common) for system, values in cells.items()} if common else {}
    return min(rates, key=lambda system: rates[system], default="")


def has_equal_compute(rows: Sequence[Mapping[str, Any]], languages: Sequence[str], minutes: float) -> bool:
    """Whether scratch at equal processor time is trained in every language."""
    trained = {
        row["language"]
        for row in rows
        if fine_tuning(row["system"]).equal_cost and row["minutes"] == minutes and "greedy" in row
    }
    return trained.issuperset(languages)


def means(
    plan: Plan, rows: Sequence[Mapping[str, Any]], scores: Scores, num_resamples: int
) -> list[dict[str, Any]]:  # fmt: skip
    """Mean of every system over languages and seeds, by amount of labels, with intervals and mean costs."""
    setup, entries = plan.setup, []
    for minutes in setup.minutes:
        for system in setup.systems:
            own = [row for row in rows if row["system"] == system and row["minutes"] == minutes]
            entry: dict[str, Any] = {"system": system, "summary": fine_tuning(system).summary, "minutes": minutes}
            entry |= {"role": fine_tuning(system).role, "runs": len(own)}
            if own:
                for key in ("dev_cer", "processor_seconds", "total_processor_seconds"):
                    entry[key] = mean(row[key] for row in own)
            for decoding in DECODINGS:
                for unit, rate in RATES:
                    found = errors_of(scores, [system], minutes, decoding, setup.languages, unit)
                    if found is not None:
                        value, low, high = rate_with_interval(found[0][0], num_resamples)
                        entry[f"{decoding}_{rate}"] = [value, low, high]
                        entry["seeds"] = found[1]
            entries.append(entry)
    return entries


def pretraining_facts(plan: Plan) -> dict[str, Any]:
    job = plan.jobs.get(PRETRAINING)
    if job is None:
        return {}
    setup = plan.setup
    seconds = plan.records.processor_seconds(job) + job.known_seconds
    return {"given": setup.pretrained is not None, "steps": setup.size.pretraining_steps, "processor_seconds": seconds}


def choices(plan: Plan) -> dict[str, Any]:
    """Candidates of every grid with their dev CER, the choice, and the processor time of the trials."""
    found = {}
    for job in plan.jobs.values():
        if job.name.startswith("choice-") and plan.records.is_done(job):
            document = read_json_object(job.output.with_suffix(".json"))
            trials = [plan.jobs[name] for name in job.needs if "-grid/" in name]
            seconds = sum(plan.records.processor_seconds(trial) for trial in trials)
            found[job.name.removeprefix("choice-")] = {**document, "processor_seconds": seconds}
    return found


def curve(plan: Plan, rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Mean dev CER of the first seed against the pretraining steps before fine-tuning; 0 is scratch."""
    setup = plan.setup
    cells = [(cell.language, cell.minutes, cell.seed) for cell in setup.trial_cells]
    points: list[dict[str, Any]] = []

    def ends(system: str) -> list[float]:
        own = {
            (row["language"], row["minutes"], row["seed"]): row["dev_cer"] for row in rows if row["system"] == system
        }
        return [own[cell] for cell in cells] if own.keys() >= set(cells) else []

    for step, names in {0: [], **curve_jobs(plan), setup.size.pretraining_steps: []}.items():
        done = [name for name in names if plan.records.is_done(plan.jobs[name])]
        rates = [read_number(plan.jobs[name].output.parent / "config.json", "dev_cer") for name in done]
        if not names:
            rates = ends(SCRATCH if step == 0 else PRETRAINED)
        if rates and len(rates) == len(cells):
            points.append({"steps": step, "dev_cer": mean(rates)})
    return points


def machine() -> dict[str, Any]:
    """Processor and system."""
    name = platform.processor()
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        name = next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        pass  # not Linux on x86: the name of the platform
    return {"processor": name, "system": platform.system(), "architecture": platform.machine()}


def commit() -> str | None:
    """Commit of the source tree, with "-dirty" if it has changes; None without git."""
    try:
        command = ["git", "-C", str(REPOSITORY), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
        return subprocess.run(command, capture_output=True, encoding="utf-8", check=True, timeout=20).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None


def write_outputs(document: Mapping[str, Any], folder: Path, also: Path | None) -> None:
    """Write learning.json, learning.svg and table.md into the folder, and the numbers into a further file."""
    for path in [folder / "learning.json", *([also] if also else [])]:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, document)
    write_file(folder / "table.md", tables(document))
    write_file(folder / "learning.svg", figure(document))
