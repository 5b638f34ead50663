"""Jobs of an experiment: commands with dependencies, and their records on disk.

Each job has a record (`jobs/NAME.json` in the folder of the experiment: state, attempts, processor time) and a log
(`logs/NAME.log`). `job_runner.py` runs jobs.

Processor time is that of the job's process and of the descendants it has waited for (`wait4`), summed over attempts.
Unlike wall time, it does not depend on what else runs on the machine, so systems can be compared at equal cost.
"""

from __future__ import annotations

import fnmatch
import json
import re
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal, get_args

from common.errors import UserError
from common.files import read_json_object, write_json
from common.json_checks import count, fields, one_of, positive_or_zero, text

TAIL_LINES = 15
_KEPT = re.compile(r', "--checkpoint\.keep_last=\d+"')  # may change when a run is resumed

State = Literal["pending", "running", "stopped", "failed", "done"]


@dataclass(frozen=True)
class Job:
    """Command of an experiment, or a short calculation in the runner itself."""

    name: str
    """path of record and log, such as "scratch/cs-30-s0" """
    command: tuple[str, ...]
    """arguments; with `action`, only a description that changes whenever its inputs do"""
    output: Path
    """file that exists when the job is done"""
    needs: tuple[str, ...] = ()
    """names of jobs that must be done before"""
    action: Callable[[], object] | None = None
    """calculation in place of the command; takes at most seconds"""
    run_folder: Path | None = None
    """folder in which a stopped training script leaves REQUEUE"""
    kind: str = ""
    """jobs of a kind take times in proportion to their sizes"""
    size: float = 1.0
    guess: float = 10.0
    """seconds of processor time for a size of 1, until a job of the kind is done"""
    counted: bool = True
    """the job belongs to the cost of the systems that need it; otherwise, neither it nor its needs do"""
    share: int = 1
    """number of systems that divide its cost, such as a pretraining that serves two languages"""
    known_seconds: float = 0.0
    """processor time that was spent elsewhere, such as on a given pretraining"""


@dataclass
class Record:
    """State of a job on disk."""

    state: State = "pending"
    key: str = ""
    """command of the finished job, with the folder of the experiment replaced"""
    attempts: int = 0
    processor_seconds: float = 0.0
    """of all finished attempts"""
    wall_seconds: float = 0.0
    """of all finished attempts"""
    unfinished_seconds: float = 0.0
    """processor time of the running attempt so far; added to `processor_seconds` if it is killed with the runner"""
    finished: float = 0.0
    """time of the last change of the state, in seconds since the epoch"""
    problem: str = ""


def check_jobs(jobs: Sequence[Job]) -> None:
    """Raise ValueError unless names are distinct and every need is an earlier job."""
    known: set[str] = set()
    for job in jobs:
        if job.name in known:
            raise ValueError(f"two jobs are named {job.name}")
        if unknown := [name for name in job.needs if name not in known]:
            raise ValueError(f"job {job.name} needs {unknown[0]}, which is not an earlier job")
        known.add(job.name)


def selected(jobs: Sequence[Job], only: Sequence[str]) -> list[Job]:
    """Jobs whose name matches a pattern, and all that they need; all jobs without patterns.

    Raises UserError for a pattern without a match.
    """
    for pattern in only:
        if not any(fnmatch.fnmatch(job.name, pattern) for job in jobs):
            raise UserError(f"--only {pattern}: no job has such a name; --list shows the names")
    chosen = {job.name for job in jobs if not only or any(fnmatch.fnmatch(job.name, pattern) for pattern in only)}
    for job in reversed(jobs):  # needs come earlier, so one pass from the end suffices
        if job.name in chosen:
            chosen |= set(job.needs)
    return [job for job in jobs if job.name in chosen]


_RECORD = fields(
    {},
    {
        "state": one_of(*get_args(State)), "key": text, "attempts": count, "processor_seconds": positive_or_zero,
        "wall_seconds": positive_or_zero, "unfinished_seconds": positive_or_zero, "finished": positive_or_zero,
        "problem": text,
    },
)  # fmt: skip


class Records:
    """Records and logs of the jobs in the folder of an experiment."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def path(self, job: Job) -> Path:
        return self.folder / "jobs" / f"{job.name}.json"

    def log(self, job: Job) -> Path:
        return self.folder / "logs" / f"{job.name}.log"

    def key(self, job: Job) -> str:
        """Command, independent of the location of the experiment, of the interpreter and of the checkpoints kept."""
        text = _KEPT.sub("", json.dumps(job.command))
        return text.replace(json.dumps(sys.executable)[1:-1], "python").replace(str(self.folder), "FOLDER")

    def read(self, job: Job) -> Record:
        """Record of a job; a new one if there is none. Raises UserError if it cannot be read."""
        path = self.path(job)
        if not path.exists():
            return Record()
        try:
            values = read_json_object(path)
            _RECORD(values, str(path))
            return Record(**values)
        except (TypeError, UserError) as error:
            raise UserError(f"{path} is not a record of a job ({error}): delete it to run the job again") from error

    def write(self, job: Job, record: Record) -> None:
        self.path(job).parent.mkdir(parents=True, exist_ok=True)
        write_json(self.path(job), asdict(record))

    def is_done(self, job: Job) -> bool:
        """Whether the job is finished and its output exists. Raises UserError if another command made it."""
        record = self.read(job)
        if record.state != "done" or not job.output.exists():
            return False
        if _KEPT.sub("", record.key) != self.key(job):
            own = job.output.is_relative_to(self.folder)  # not the weights of a pretraining made elsewhere
            raise UserError(
                f"{job.name} was done with another command; give the earlier settings, another --out, or delete "
                f"{self.path(job)}{f' and {job.output}' if own else ''}.\n  then: {record.key}\n  now:  {self.key(job)}"
            )
        return True

    def tail(self, job: Job) -> str:
        """Last lines of the log."""
        try:
            lines = self.log(job).read_text(encoding="utf-8", errors="replace").splitlines()
        except OSError:
            return "(no log)"
        return "\n".join(lines[-TAIL_LINES:])

    def processor_seconds(self, job: Job) -> float:
        """Processor time of all attempts so far."""
        record = self.read(job)
        return record.processor_seconds + record.unfinished_seconds

    def estimate(self, jobs: Iterable[Job], left: Iterable[Job]) -> list[float]:
        """Wall seconds of the jobs that are left, from those of the finished jobs."""
        rates = seconds_per_size(jobs, self)
        return [rates.get(job.kind, job.guess) * job.size for job in left if job.action is None]

    def cost(self, job: Job, jobs: Mapping[str, Job]) -> float:
        """Processor seconds of the job and of all counted jobs that it needs, each divided by its `share`."""
        pending, seen, total = [job], {job.name}, 0.0
        while pending:
            current = pending.pop()
            total += (self.processor_seconds(current) + current.known_seconds) / current.share
            for name in current.needs:
                if jobs[name].counted and name not in seen:
                    seen.add(name)
                    pending.append(jobs[name])
        return total


def seconds_per_size(jobs: Iterable[Job], records: Records) -> dict[str, float]:
    """Wall seconds per unit of size of the finished jobs, by kind."""
    totals: dict[str, list[float]] = {}
    for job in jobs:
        record = records.read(job)
        if record.state == "done" and job.action is None:
            total = totals.setdefault(job.kind, [0.0, 0.0])
            total[0] += record.wall_seconds
            total[1] += job.size
    return {kind: seconds / size for kind, (seconds, size) in totals.items() if size > 0}


def duration(seconds: float) -> str:
    """`4380` as `1 h 13 min`, `75` as `2 min`, `5` as `5 s`."""
    if seconds < 60:
        return f"{seconds:.0f} s"
    minutes = -(-int(seconds) // 60)
    return f"{minutes // 60} h {minutes % 60:02d} min" if minutes >= 60 else f"{minutes} min"
