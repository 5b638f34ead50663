"""Runner of the jobs of an experiment: several at a time, resumable.

Finished jobs are skipped. A signal is passed to the running jobs as SIGTERM, on which training scripts save a
checkpoint; the same command continues. Several runners may share a folder: a job is locked while it runs.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from common.errors import UserError
from common.processes import stop_with_parent
from experiments.jobs import Job, Record, Records, State, check_jobs, duration, seconds_per_size, selected

STOPPED = 75
"""exit status of a run that was stopped and that the same command continues (EX_TEMPFAIL), as in launch/torchrun.sh"""
REQUEUE = "REQUEUE"
"""file in the run folder of a training script that stopped on request (bestrq/training/stop.py)"""
POLL_SECONDS = 0.1
SAVE_SECONDS = 10.0
"""interval at which the processor time of running jobs is recorded, in case the runner is killed"""
WAIT_SECONDS = 5.0
"""interval at which jobs of other runners are checked"""


@dataclass(frozen=True)
class Options:
    """Settings of a runner."""

    workers: int
    threads: int = 1
    """OMP_NUM_THREADS of the jobs"""
    part: tuple[int, int] = (0, 1)
    """(i, n): run every n-th job, beginning with number i; runners with the other parts run the rest"""
    directory: Path | None = None
    """working directory of the jobs; None is that of the runner"""
    only: tuple[str, ...] = ()
    """patterns of names (`fnmatch`): run these jobs and what they need"""


@dataclass
class _Running:
    job: Job
    record: Record
    process: subprocess.Popen[bytes]
    lock: int
    start: float
    saved: float


class Runner:
    """Runs jobs until all are done, one has failed and blocks the rest, or a signal arrives.

    Args:
        jobs: all jobs of the experiment, each after those that it needs.
        on_done: called after every finished job, for partial results.
    """

    def __init__(
        self, jobs: Sequence[Job], folder: Path, options: Options, on_done: Callable[[Job], None] | None = None
    ) -> None:
        check_jobs(jobs)
        self.records, self.options, self.on_done = Records(folder), options, on_done
        index, count = options.part
        mine = {job.name for number, job in enumerate(jobs) if number % count == index}
        self.jobs = {job.name: job for job in selected(jobs, options.only)}
        self.mine = [job for job in self.jobs.values() if job.name in mine]
        self.done = {job.name for job in self.jobs.values() if self.records.is_done(job)}
        self.failed: list[Job] = []
        self.running: list[_Running] = []
        self.signals = 0
        self.started = time.time()
        self.waiting = False

    def run(self) -> int:
        """Run the jobs. Returns 0, 1 if a job failed, or 75 after a signal."""
        handlers = {number: signal.signal(number, self._on_signal) for number in (signal.SIGINT, signal.SIGTERM)}
        next_check = 0.0
        try:
            while True:
                self._reap()
                if not self.signals:
                    if time.monotonic() >= next_check:  # reads the records of jobs that other runners may have done
                        next_check = time.monotonic() + WAIT_SECONDS
                        self._refresh()
                    if self._start_ready():
                        continue
                if not self.running and (self.signals or not self._can_continue()):
                    break
                time.sleep(POLL_SECONDS)
        finally:
            for entry in self.running:  # only after an exception
                entry.process.terminate()
            for number, handler in handlers.items():
                signal.signal(number, handler)
        return self._summary()

    def _on_signal(self, number: int, frame: object) -> None:
        self.signals += 1
        for entry in self.running:
            with contextlib.suppress(ProcessLookupError):
                if self.signals == 1:
                    os.kill(entry.process.pid, signal.SIGTERM)
                elif number == signal.SIGINT:  # a second Ctrl-C ends the jobs without a checkpoint
                    os.killpg(entry.process.pid, signal.SIGKILL)
        if self.signals == 1:
            os.write(2, b"\nstopping: the running jobs save their work; press Ctrl-C again to end them at once\n")

    def _refresh(self) -> None:
        for job in self.jobs.values():
            if job.name not in self.done and self.records.is_done(job):
                self.done.add(job.name)

    def _start_ready(self) -> bool:
        """Start the first job that can start. Returns whether there was one."""
        if len(self.running) >= self.options.workers:
            return False
        busy = {entry.job.name for entry in self.running} | {job.name for job in self.failed}
        for job in self.mine:
            if job.name not in self.done | busy and self.done.issuperset(job.needs):
                lock = self._lock(job)
                if lock is None:  # another runner has it
                    continue
                if self.records.is_done(job):
                    os.close(lock)
                    self.done.add(job.name)
                    return True
                self._start(job, lock)
                return True
        return False

    def _lock(self, job: Job) -> int | None:
        path = self.records.path(job).with_suffix(".lock")
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            os.close(descriptor)
            return None
        return descriptor

    def _start(self, job: Job, lock: int) -> None:
        record = self.records.read(job)
        record.processor_seconds += record.unfinished_seconds  # of an attempt that was killed with its runner
        record.unfinished_seconds, record.state, record.problem = 0.0, "running", ""
        record.attempts += 1
        log = self.records.log(job)
        log.parent.mkdir(parents=True, exist_ok=True)
        if job.run_folder is not None:
            (job.run_folder / REQUEUE).unlink(missing_ok=True)
        self.records.write(job, record)
        if job.action is not None:
            self._act(job, record, job.action)
            os.close(lock)
            return
        with open(log, "ab") as file:
            file.write(f"$ {' '.join(job.command)}\n".encode())
            file.flush()
            process = subprocess.Popen(
                job.command,
                cwd=self.options.directory,
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
                env={**os.environ, "OMP_NUM_THREADS": str(self.options.threads)},
                start_new_session=True,  # Ctrl-C reaches only this process, which passes it on once
                pass_fds=[lock],  # the job is locked until its process ends, even if this one is killed
                preexec_fn=partial(_stop_with_runner, os.getpid()),
            )
        now = time.monotonic()
        self.running.append(_Running(job, record, process, lock, now, now))
        self._print(f"started {job.name}")

    def _act(self, job: Job, record: Record, action: Callable[[], object]) -> None:
        try:
            job.output.parent.mkdir(parents=True, exist_ok=True)
            action()
            problem = "" if job.output.exists() else f"{job.output} was not written"
        except UserError as error:
            problem = str(error)
            self.records.log(job).write_text(f"error: {error}\n", encoding="utf-8")
        self._finish(job, record, "failed" if problem else "done", problem)

    def _reap(self) -> None:
        for entry in list(self.running):
            pid, status, usage = os.wait4(entry.process.pid, os.WNOHANG)
            now = time.monotonic()
            if pid == 0:
                if now - entry.saved > SAVE_SECONDS:
                    entry.saved, entry.record.unfinished_seconds = now, process_seconds(entry.process.pid)
                    self.records.write(entry.job, entry.record)
                continue
            self.running.remove(entry)
            entry.process.returncode = code = os.waitstatus_to_exitcode(status)  # Popen must not wait again
            entry.record.unfinished_seconds = 0.0
            entry.record.processor_seconds += usage.ru_utime + usage.ru_stime
            entry.record.wall_seconds += now - entry.start
            self._finish(entry.job, entry.record, *self._outcome(entry.job, code))
            os.close(entry.lock)  # after the record: another runner that locks the job must find it done

    def _outcome(self, job: Job, code: int) -> tuple[State, str]:
        requeued = job.run_folder is not None and (job.run_folder / REQUEUE).exists()
        if code == STOPPED or (code == 0 and requeued) or (code != 0 and self.signals):
            return "stopped", ""
        if code != 0:
            return "failed", f"exit status {code}" if code > 0 else f"ended by signal {-code}"
        return ("done", "") if job.output.exists() else ("failed", f"it ended without writing {job.output}")

    def _finish(self, job: Job, record: Record, state: State, problem: str) -> None:
        record.state, record.problem, record.finished = state, problem, time.time()
        record.key = self.records.key(job)
        self.records.write(job, record)
        if state == "done":
            self.done.add(job.name)
        elif not self.signals:  # a job that was stopped from outside is not repeated at once
            self.failed.append(job)
        self._print(f"{state} {job.name}" + (f" ({problem})" if problem else ""))
        if state == "done" and self.on_done is not None:
            self.on_done(job)

    def _can_continue(self) -> bool:
        """Whether a job of this part can still start, after jobs of other runners."""
        failed = {job.name for job in self.failed}
        for job in self.jobs.values():
            record = self.records.read(job)
            blocked = failed.intersection(job.needs)
            elsewhere = job not in self.mine and record.state == "failed" and record.finished > self.started
            if blocked or elsewhere:
                failed.add(job.name)
        left = [job for job in self.mine if job.name not in self.done | failed]
        if left and not self.waiting:
            print(f"waiting for other runners: {len(left)} jobs are left, the first is {left[0].name}", flush=True)
        self.waiting = bool(left)
        return bool(left)

    def _print(self, event: str) -> None:
        done = sum(job.name in self.done for job in self.mine)
        left = duration(self.remaining_seconds())
        print(f"[{done}/{len(self.mine)} done, {len(self.running)} running, {left} left] {event}", flush=True)

    def remaining_seconds(self) -> float:
        """Estimated wall time of this part's remaining jobs, if all workers are busy."""
        now = time.monotonic()
        elapsed = {entry.job.name: now - entry.start for entry in self.running}
        rates = seconds_per_size(self.jobs.values(), self.records)
        left = (job for job in self.mine if job.name not in self.done and job.action is None)
        seconds = (max(rates.get(job.kind, job.guess) * job.size - elapsed.get(job.name, 0.0), 0.0) for job in left)
        return sum(seconds) / self.options.workers

    def _summary(self) -> int:
        for job in self.failed:
            record = self.records.read(job)
            print(f"\n{record.state}: {job.name}: {record.problem}\nlog: {self.records.log(job)}", file=sys.stderr)
            print(self.records.tail(job), file=sys.stderr)
        left = [job.name for job in self.mine if job.name not in self.done]
        if self.signals or (self.failed and all(self.records.read(job).state == "stopped" for job in self.failed)):
            print(f"stopped: {len(left)} of {len(self.mine)} jobs are left; the same command continues", flush=True)
            return STOPPED
        if self.failed or left:
            print(
                f"\n{len(self.failed)} jobs failed, {len(left) - len(self.failed)} others need them; the same command "
                "tries them again",
                file=sys.stderr,
            )
            return 1
        return 0


def process_seconds(pid: int) -> float:
    """Processor seconds of a running process and of the children it has waited for; 0 if /proc does not list it."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()
    except OSError:
        return 0.0
    return sum(int(value) for value in fields[11:15]) / os.sysconf("SC_CLK_TCK")


def _stop_with_runner(runner: int) -> None:
    """Called in a new process before its program: it receives SIGTERM when the runner dies."""
    if not stop_with_parent(runner):
        os._exit(STOPPED)
