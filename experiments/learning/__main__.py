"""Experiment on pretraining: recognisers from few labels, with and without unlabelled speech, at equal cost.

    bash experiments/does_pretraining_help.sh --size hour     about an hour on two cores
    bash experiments/does_pretraining_help.sh --size night    all systems and amounts of labels
    bash experiments/does_pretraining_help.sh --folder DATASET_OR_MANIFEST --languages de,it

The same command continues after an interruption. Writes into --out: learning.json (all numbers so far), learning.svg,
table.md; jobs/ and logs/ hold the state and the console of every job. Method, systems and results: docs/learning.md.
"""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from common.config import run_main
from common.cores import available_cores
from common.errors import UserError, did_you_mean
from experiments.job_runner import Options, Runner
from experiments.jobs import Job, Records, duration, selected
from experiments.learning.corpus import choose_languages, corpus_facts, preparation, usable_minutes
from experiments.learning.setup import REPOSITORY, Setup
from experiments.learning.stages import PRETRAINING, SIZES, SYSTEMS, Settings


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="bash experiments/does_pretraining_help.sh",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--size", choices=[name for name in SIZES if name != "tiny"], default="hour", help="extent (default: hour)")
    add("--tiny", action="store_true", help="for tests: a few steps of a small model on a few minutes of speech")
    add("--out", help="folder of all outputs (default: runs/learning-SIZE)")
    add("--folder", default="", help="your corpus: a dataset, a NeMo manifest, or a folder with audio and .txt files")
    add("--languages", type=_names, default=(), help="languages (default: cs,nl; else the two with most labels)")
    add("--minutes", type=_numbers, help="minutes of labels, such as 10,30,60")
    add("--seeds", type=_seeds, help="seeds, such as 0,1,2")
    add("--systems", type=_names, help=f"systems to compare: {','.join(SYSTEMS)}")
    add("--pretraining-steps", type=int, help="optimizer steps of the pretraining, in place of those of the size")
    add("--finetuning-steps", type=int, help="optimizer steps of every fine-tuning, in place of those of the size")
    add("--pretrain-only", action="store_true", help="only the dataset and the self-supervised pretraining")
    add("--pretrained", default="", help="export of a pretraining made elsewhere, in place of this pretraining")
    add("--pretrained-seconds", type=float, help="processor seconds that it took, for the comparison at equal cost")
    add("--set", action="append", default=[], metavar="NAME=VALUE", help="setting of the pretraining; may be repeated")
    add("--workers", type=int, default=available_cores(), help="jobs at a time (default: one per core, %(default)s)")
    add("--part", type=_part, default=(0, 1), help="i/n: every n-th job, for n machines or tasks that share --out")
    add("--only", action="append", default=[], metavar="PATTERN", help="only jobs of this name, and what they need")
    add("--list", action="store_true", help="list the jobs with their state and estimated time, and exit")
    add("--results", default="", help="also write the numbers to this file, such as results/learning.json")
    return parser


def _names(text: str) -> tuple[str, ...]:
    return tuple(name.strip() for name in text.split(",") if name.strip())


def _numbers(text: str) -> tuple[float, ...]:
    numbers = tuple(float(part) for part in text.split(","))
    if min(numbers) <= 0:
        raise argparse.ArgumentTypeError("give numbers above 0")
    return numbers


def _seeds(text: str) -> tuple[int, ...]:
    return tuple(dict.fromkeys(int(part) for part in text.split(",")))


def _part(text: str) -> tuple[int, int]:
    index, _, count = text.partition("/")
    if not (index.isdigit() and count.isdigit() and int(index) < int(count)):
        raise argparse.ArgumentTypeError(f"{text!r}: give i/n with i from 0 to n - 1, such as 0/4")
    return int(index), int(count)


def _settings(values: Sequence[str]) -> Settings:
    """Settings of `NAME=VALUE` arguments."""
    if bad := [value for value in values if "=" not in value]:
        raise UserError(f"--set {bad[0]}: write NAME=VALUE, such as --set data.rows=16")
    return dict(value.split("=", 1) for value in values)


def main() -> int:
    options = make_parser().parse_args()
    size_name = "tiny" if options.tiny else options.size
    size = SIZES[size_name]
    for name in ("pretraining_steps", "finetuning_steps"):
        if steps := getattr(options, name):
            size = replace(size, **{name: steps})
    folder = Path(options.out or f"runs/learning-{size_name}").resolve()
    systems = tuple(options.systems or size.systems)
    for system in systems:
        if system not in SYSTEMS:
            raise UserError(
                f"--systems {system}: unknown; give some of {', '.join(SYSTEMS)}.{did_you_mean(system, SYSTEMS)}"
            )
    if options.workers < 1:
        raise UserError(f"--workers {options.workers}: give 1 or more")
    threads = max(1, available_cores() // options.workers)
    run_options = Options(options.workers, threads, options.part, REPOSITORY, tuple(options.only))

    # ---- Speech: the plan depends on its languages ----
    preparing, dataset_path = preparation(options.folder, options.languages, folder, options.tiny)
    if preparing is not None:
        if options.list and not Records(folder).is_done(preparing):
            print(f"{preparing.name}: {shlex.join(preparing.command)}\n(the other jobs depend on the languages in it)")
            return 0
        if status := Runner([preparing], folder, replace(run_options, only=())).run():
            return status
    from data.format.dataset import open_dataset  # takes seconds, as it imports torch
    from experiments.learning.plan import make_plan
    from experiments.learning.results import collect, write_outputs

    dataset = open_dataset(dataset_path)
    minutes = tuple(options.minutes or size.minutes)
    setup = Setup(
        folder=folder,
        dataset=dataset_path,
        languages=(),
        size=size,
        minutes=minutes,
        seeds=options.seeds or size.seeds,
        systems=systems,
        pretrained=Path(options.pretrained).resolve() if options.pretrained else None,
        pretrained_seconds=options.pretrained_seconds or 0.0,
        settings=_settings(options.set),
    )
    facts: dict[str, Any] = {}
    if options.pretrain_only:
        setup = replace(setup, languages=("",), systems=())
        run_options = replace(run_options, only=(PRETRAINING,))
    else:
        languages = choose_languages(dataset, options.languages, min(minutes))
        if left_out := sorted(set(minutes) - set(usable_minutes(minutes, languages))):
            print(
                f"left out: {', '.join(f'{amount:g}' for amount in left_out)} minutes: not every language has as much"
            )
        setup = replace(setup, languages=tuple(languages), minutes=usable_minutes(minutes, languages))
        facts = corpus_facts(dataset, languages)
    check_pretrained(setup, options.pretrained_seconds)

    # ---- Jobs ----
    plan = make_plan(setup)
    jobs = list(plan.jobs.values())
    if options.list:
        print_jobs(selected(jobs, run_options.only), plan.records, options.workers)
        return 0

    def write_results(job: Job | None) -> None:
        if options.pretrain_only or (job is not None and job.kind not in ("decode", "beam", "finetune")):
            return
        document = collect(plan, facts, f"{make_parser().prog} {shlex.join(whole_command(sys.argv[1:]))}")
        write_outputs(document, folder, Path(options.results) if options.results else None)

    status = Runner(jobs, folder, run_options, write_results).run()
    write_results(None)
    if options.pretrain_only and status == 0:
        seconds = plan.records.processor_seconds(plan.jobs[PRETRAINING])
        print(f"pretrained: {plan.run(PRETRAINING) / 'export'}, {seconds:.0f} processor seconds")
    elif status == 0:
        print(f"numbers: {folder / 'learning.json'}, figure: {folder / 'learning.svg'}, table: {folder / 'table.md'}")
    return status


def whole_command(arguments: Sequence[str]) -> list[str]:
    """Arguments without --only and --part: those that give all results, not only the last ones."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    for name in ("--only", "--part"):
        parser.add_argument(name, action="append")
    return parser.parse_known_args(arguments)[1]


def check_pretrained(setup: Setup, seconds: float | None) -> None:
    """Raise UserError if the given export is missing, or its cost is needed and unknown."""
    if setup.pretrained is None:
        return
    if not (setup.pretrained / "model.safetensors").is_file():
        raise UserError(f"--pretrained {setup.pretrained}: no model.safetensors there; give RUN_FOLDER/export")
    if seconds is None and "scratch-long" in setup.systems:
        raise UserError(
            "--pretrained without --pretrained-seconds: scratch-long takes as much processor time as the best system "
            "with this encoder; give the seconds that --pretrain-only printed, or --systems without scratch-long"
        )


def print_jobs(jobs: Sequence[Job], records: Records, workers: int) -> None:
    """Print state, processor time so far and name of every job, and the totals."""
    counts: dict[str, int] = {}
    for job in jobs:
        record = records.read(job)
        state = "done" if records.is_done(job) else "pending" if record.state == "done" else record.state
        counts[state] = counts.get(state, 0) + 1
        print(f"{state:8} {records.processor_seconds(job):8.0f} s  {job.name}")
    left = [job for job in jobs if not records.is_done(job)]
    print(
        f"{', '.join(f'{count} {state}' for state, count in counts.items())}; about "
        f"{duration(sum(records.estimate(jobs, left)) / workers)} left with {workers} workers"
    )


if __name__ == "__main__":
    run_main(main, console_may_vanish=True)
