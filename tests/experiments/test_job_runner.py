"""Runner of jobs: order, resumption after signals and SIGKILL, failures, shared folders, processor time."""

from __future__ import annotations

import fcntl
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from common.errors import UserError
from experiments.job_runner import REQUEUE, STOPPED, Options, Runner
from experiments.jobs import Job, Record, Records, check_jobs, duration, selected
from tests.paths import REPOSITORY
from tests.patience import PATIENCE, wait_until

# A job like a training script: counts its starts, works for the given processor time, and on SIGTERM leaves REQUEUE.
TRAINING = """
import pathlib, signal, sys, time
folder, seconds, steps = pathlib.Path(sys.argv[1]), float(sys.argv[2]), int(sys.argv[3])
folder.mkdir(parents=True, exist_ok=True)
stop = []
signal.signal(signal.SIGTERM, lambda *_: stop.append(1))
state = folder / "step"
step = int(state.read_text()) if state.exists() else 0
with open(folder / "starts", "a") as file:
    file.write(f"{step}\\n")
while step < steps and not stop:
    step += 1
    end = time.process_time() + seconds
    while time.process_time() < end:
        pass
    if steps > 100:
        time.sleep(0.01)
    state.write_text(str(step))
if stop:
    (folder / "REQUEUE").write_text("stopped")
else:
    (folder / "done").write_text("done")
"""


def python(code: str, *arguments: object) -> tuple[str, ...]:
    return (sys.executable, "-S", "-c", code, *map(str, arguments))


def training(folder: Path, name: str, seconds: float = 0.0, steps: int = 1, needs: tuple[str, ...] = ()) -> Job:
    run = folder / "runs" / name
    return Job(name, python(TRAINING, run, seconds, steps), run / "done", needs, run_folder=run, kind="train")


def starts(folder: Path, name: str) -> list[str]:
    return (folder / "runs" / name / "starts").read_text().split()


def test_jobs_run_after_those_they_need_and_only_once(tmp_path: Path) -> None:
    """Three workers are free, and every job fails without the output of the one that it needs."""
    code = "import pathlib, sys, time\nbefore, own = map(pathlib.Path, sys.argv[1:])\n"
    code += "text = before.read_text()\ntime.sleep(0.5)\nown.write_text(text + own.name)"
    (tmp_path / "start").write_text("")
    names = ["start", "a", "b", "c"]
    jobs = [
        Job(name, python(code, tmp_path / before, tmp_path / name), tmp_path / name, (before,) if name != "a" else ())
        for before, name in zip(names, names[1:], strict=False)
    ]
    finished: list[str] = []
    for _ in range(2):
        runner = Runner(jobs, tmp_path, Options(workers=3), lambda job: finished.append(job.name))
        assert runner.run() == 0
    assert finished == ["a", "b", "c"] and (tmp_path / "c").read_text() == "abc"
    assert [Records(tmp_path).read(job).attempts for job in jobs] == [1, 1, 1]


def test_several_jobs_run_at_a_time_up_to_the_number_of_workers(tmp_path: Path) -> None:
    """Every job waits until two jobs have started, which only happens if two run at the same time."""
    code = (
        "import pathlib, sys, time\nfolder = pathlib.Path(sys.argv[1])\n(folder / f'started-{sys.argv[2]}').touch()\n"
        "while len(list(folder.glob('started-*'))) < 2: time.sleep(0.01)\n"
        "time.sleep(1)  # in which further jobs would start\n"
        "running = len(list(folder.glob('started-*'))) - len(list(folder.glob('ended-*')))\n"
        "(folder / f'ended-{sys.argv[2]}').write_text(str(running))"
    )
    jobs = [Job(f"j{i}", python(code, tmp_path, i), tmp_path / f"ended-{i}") for i in range(4)]
    assert Runner(jobs, tmp_path, Options(workers=2)).run() == 0
    assert max(int(path.read_text()) for path in tmp_path.glob("ended-*")) == 2


def test_a_job_whose_output_was_deleted_runs_again(tmp_path: Path) -> None:
    jobs = [training(tmp_path, "a")]
    assert Runner(jobs, tmp_path, Options(workers=1)).run() == 0
    jobs[0].output.unlink()
    assert Runner(jobs, tmp_path, Options(workers=1)).run() == 0
    assert len(starts(tmp_path, "a")) == 2


def test_a_failure_is_named_with_the_end_of_its_log_and_blocks_only_the_jobs_that_need_it(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    bad = Job("bad", python("import sys; print('the reason'); sys.exit(3)"), tmp_path / "never")
    jobs = [bad, training(tmp_path, "after", needs=("bad",)), training(tmp_path, "other")]
    assert Runner(jobs, tmp_path, Options(workers=1)).run() == 1
    error = capfd.readouterr().err
    assert "failed: bad: exit status 3" in error and "the reason" in error
    assert "1 jobs failed, 1 others need them" in error
    assert (tmp_path / "runs/other/done").exists() and not (tmp_path / "runs/after").exists()


def test_a_failed_job_runs_again_with_the_next_start(tmp_path: Path) -> None:
    code = "import pathlib, sys; p = pathlib.Path(sys.argv[1]); fails = not p.exists(); p.touch(); sys.exit(fails)"
    jobs = [Job("flaky", python(code, tmp_path / "once"), tmp_path / "once")]
    assert [Runner(jobs, tmp_path, Options(workers=1)).run() for _ in range(2)] == [1, 0]
    assert Records(tmp_path).read(jobs[0]).attempts == 2


def test_a_job_that_does_not_write_its_output_has_failed(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert Runner([Job("empty", python(""), tmp_path / "out")], tmp_path, Options(workers=1)).run() == 1
    assert f"it ended without writing {tmp_path / 'out'}" in capfd.readouterr().err


def test_an_action_runs_in_the_runner_and_its_user_errors_are_failures(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    def fail() -> None:
        raise UserError("no candidate was given")

    write = tmp_path / "choices/a.yaml"
    good = Job("good", ("choose", "1"), write, action=lambda: write.write_text("1"))
    jobs = [good, Job("bad", ("choose", "2"), tmp_path / "b", action=fail)]
    assert Runner(jobs, tmp_path, Options(workers=1)).run() == 1
    assert write.exists() and "no candidate was given" in capfd.readouterr().err


def test_a_finished_job_with_another_command_is_refused(tmp_path: Path) -> None:
    assert Runner([training(tmp_path, "a")], tmp_path, Options(workers=1)).run() == 0
    with pytest.raises(UserError, match=r"a was done with another command; .* or delete \S+/jobs/a.json and \S+/done"):
        Runner([training(tmp_path, "a", steps=2)], tmp_path, Options(workers=1))


def test_the_output_of_a_job_outside_the_experiment_is_not_to_be_deleted(tmp_path: Path) -> None:
    given = tmp_path / "elsewhere/model.safetensors"
    given.parent.mkdir()
    given.touch()
    job = Job("given", ("given", "1"), given, action=given.stat)
    assert Runner([job], tmp_path / "out", Options(workers=1)).run() == 0
    with pytest.raises(UserError, match=r"or delete \S+/jobs/given.json\.\n"):
        Runner([replace(job, command=("given", "2"))], tmp_path / "out", Options(workers=1))


def test_a_finished_job_is_not_repeated_for_another_number_of_kept_checkpoints(tmp_path: Path) -> None:
    job = training(tmp_path, "a")
    assert Runner([replace(job, command=(*job.command, "--checkpoint.keep_last=8"))], tmp_path, Options(1)).run() == 0
    records = Records(tmp_path)
    assert records.is_done(replace(job, command=(*job.command, "--checkpoint.keep_last=32")))
    record = records.read(job)  # of an earlier version, whose keys had the number
    record.key = record.key.removesuffix("]") + ', "--checkpoint.keep_last=8"]'
    records.write(job, record)
    assert records.is_done(job)


def test_a_moved_experiment_is_still_finished(tmp_path: Path) -> None:
    old, new = tmp_path / "old", tmp_path / "new"
    assert Runner([training(old, "a")], old, Options(workers=1)).run() == 0
    old.rename(new)
    assert Records(new).is_done(training(new, "a"))


def test_processor_time_is_that_of_the_job_and_its_children_over_all_attempts(tmp_path: Path) -> None:
    """Each attempt computes 0.3 s in a child process and sleeps: wall time is longer, processor time is not."""
    code = (
        "import pathlib, subprocess, sys, time\np = pathlib.Path(sys.argv[1])\n"
        "busy = 'import time\\nwhile time.process_time() < 0.3: pass'\n"
        "subprocess.run([sys.executable, '-S', '-c', busy])\ntime.sleep(0.5)\n"
        "again = p.exists()\np.touch()\nsys.exit(0 if again else 1)"
    )
    job = Job("busy", python(code, tmp_path / "out"), tmp_path / "out")
    records = Records(tmp_path)
    seconds = []
    for _ in range(2):
        Runner([job], tmp_path, Options(workers=1)).run()
        seconds.append(records.processor_seconds(job))
    record = records.read(job)
    assert record.attempts == 2 and seconds[0] >= 0.3 and seconds[1] - seconds[0] >= 0.3
    assert record.wall_seconds > record.processor_seconds or record.processor_seconds < 2 * record.wall_seconds
    assert record.wall_seconds >= 1.6


def start_runner(folder: Path, body: str) -> subprocess.Popen[bytes]:
    """Runner in a process of its own; `body` defines `jobs` and may use `training` and `folder`."""
    code = (
        "import sys, pathlib\nfrom tests.experiments.test_job_runner import *\n"
        f"folder = pathlib.Path({str(folder)!r})\n{body}\nsys.exit(Runner(jobs, folder, Options(workers=2)).run())"
    )
    return subprocess.Popen([sys.executable, "-c", code], cwd=REPOSITORY, env={**os.environ, "PYTHONPATH": "."})


LONG = "jobs = [training(folder, 'a', 0.005, 100000), training(folder, 'b', needs=('a',))]"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_stops_the_jobs_with_their_work_saved_and_the_same_command_continues(
    tmp_path: Path, number: signal.Signals
) -> None:
    process = start_runner(tmp_path, LONG)
    step = tmp_path / "runs/a/step"
    wait_until(lambda: step.exists() and int(step.read_text() or 0) > 3)
    process.send_signal(number)
    assert process.wait(PATIENCE) == STOPPED
    reached = int(step.read_text())
    job = training(tmp_path, "a", 0.005, 100000)
    record = Records(tmp_path).read(job)
    assert (
        record.state == "stopped" and record.processor_seconds > 0.005 * 3 and (tmp_path / "runs/a" / REQUEUE).exists()
    )
    step.write_text("99998")  # almost at the end, so that the test does not take minutes
    assert start_runner(tmp_path, LONG).wait(PATIENCE) == 0
    assert reached >= 3 and starts(tmp_path, "a") == ["0", "99998"] and starts(tmp_path, "b") == ["0"]
    assert Records(tmp_path).read(job).processor_seconds > record.processor_seconds


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="PR_SET_PDEATHSIG is Linux's")
def test_jobs_of_a_killed_runner_save_and_stop_and_are_not_started_twice(tmp_path: Path) -> None:
    process = start_runner(tmp_path, LONG)
    step = tmp_path / "runs/a/step"
    wait_until(lambda: step.exists() and int(step.read_text() or 0) > 3)
    process.kill()
    process.wait(PATIENCE)
    wait_until((tmp_path / "runs/a" / REQUEUE).exists)
    step.write_text("99998")
    assert start_runner(tmp_path, LONG).wait(PATIENCE) == 0
    assert starts(tmp_path, "a") == ["0", "99998"]


def test_the_processor_time_of_an_attempt_that_was_killed_with_its_runner_is_counted(tmp_path: Path) -> None:
    job, records = training(tmp_path, "a"), Records(tmp_path)
    records.write(job, Record("running", attempts=1, processor_seconds=2.0, unfinished_seconds=5.0))
    assert Runner([job], tmp_path, Options(workers=1)).run() == 0
    record = records.read(job)
    assert record.processor_seconds >= 7.0 and record.unfinished_seconds == 0 and record.attempts == 2


def test_the_time_of_running_jobs_is_recorded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("experiments.job_runner.SAVE_SECONDS", 0.0)
    seen: list[float] = []
    original = Records.write

    def write(records: Records, job: Job, record: Record) -> None:
        seen.append(record.unfinished_seconds)
        original(records, job, record)

    monkeypatch.setattr(Records, "write", write)
    assert Runner([training(tmp_path, "a", 0.5)], tmp_path, Options(workers=1)).run() == 0
    assert max(seen) > 0.1 and seen[-1] == 0


def test_a_part_runs_only_its_jobs(tmp_path: Path) -> None:
    jobs = [training(tmp_path, name) for name in "abc"]
    for part, done in ((1, "b"), (0, "abc")):
        assert Runner(jobs, tmp_path, Options(workers=3, part=(part, 2))).run() == 0
        assert [job.name for job in jobs if Records(tmp_path).is_done(job)] == list(done)


def test_parts_run_all_jobs_once_and_wait_for_each_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Part 1 has b and d, which need jobs of part 0."""
    body = (
        "import experiments.job_runner\nexperiments.job_runner.WAIT_SECONDS = 0.1\n"
        "jobs = [training(folder, 'a'), training(folder, 'b', needs=('a',)), training(folder, 'c', needs=('b',)),\n"
        "        training(folder, 'd', needs=('c',))]"
    )
    code = "import sys, pathlib\nfrom tests.experiments.test_job_runner import *\nfolder = pathlib.Path(sys.argv[1])\n"
    code += f"{body}\nsys.exit(Runner(jobs, folder, Options(workers=1, part=(int(sys.argv[2]), 2))).run())"
    env = {**os.environ, "PYTHONPATH": "."}
    parts = [
        subprocess.Popen([sys.executable, "-c", code, str(tmp_path), str(part)], cwd=REPOSITORY, env=env)
        for part in (1, 0)
    ]
    assert [process.wait(PATIENCE) for process in parts] == [0, 0]
    assert [starts(tmp_path, name) for name in "abcd"] == [["0"]] * 4


def test_a_part_ends_if_a_job_of_another_part_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("experiments.job_runner.WAIT_SECONDS", 0.05)
    bad = Job("bad", python("import sys; sys.exit(3)"), tmp_path / "never")
    runner = Runner([bad, training(tmp_path, "after", needs=("bad",))], tmp_path, Options(workers=1, part=(1, 2)))
    Records(tmp_path).write(bad, Record("failed", finished=time.time() + 1))
    assert runner.run() == 1


@pytest.mark.parametrize("action", [False, True])
def test_a_job_stays_locked_until_its_end_is_recorded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, action: bool
) -> None:
    """Otherwise another runner could lock it in between, find it unfinished and start it again."""
    locked: dict[str, bool] = {}
    original = Records.write

    def write(records: Records, job: Job, record: Record) -> None:
        with open(records.path(job).with_suffix(".lock"), "rb") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                locked[record.state] = False
            except BlockingIOError:
                locked[record.state] = True
        original(records, job, record)

    monkeypatch.setattr(Records, "write", write)
    job = training(tmp_path, "a")
    if action:
        output = tmp_path / "table"
        job = Job("a", (), output, action=lambda: output.write_text("table"))
    assert Runner([job], tmp_path, Options(workers=1)).run() == 0
    assert locked == {"running": True, "done": True}


def test_a_locked_job_is_left_to_its_runner(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two runners of all jobs in one folder: each job runs once."""
    body = "import experiments.job_runner\nexperiments.job_runner.WAIT_SECONDS = 0.1\n"
    body += "jobs = [training(folder, f'j{i}', 0.05) for i in range(6)]"
    runners = [start_runner(tmp_path, body) for _ in range(2)]
    assert [process.wait(PATIENCE) for process in runners] == [0, 0]
    assert [starts(tmp_path, f"j{i}") for i in range(6)] == [["0"]] * 6


def test_a_pattern_selects_jobs_with_all_that_they_need(tmp_path: Path) -> None:
    jobs = [training(tmp_path, "a"), training(tmp_path, "b", needs=("a",)), training(tmp_path, "c")]
    assert [job.name for job in selected(jobs, ["b*"])] == ["a", "b"]
    assert selected(jobs, []) == jobs
    with pytest.raises(UserError, match="--only x: no job has such a name"):
        selected(jobs, ["x"])


def test_the_cost_is_that_of_all_counted_needs_divided_by_their_shares(tmp_path: Path) -> None:
    """4 own + 10 / 2 pretraining + 3 teacher (whose pretraining is the same) + 6 known / 2; trials are not counted."""
    out = tmp_path / "out"
    jobs = [
        Job("speech", (), out, known_seconds=6.0, share=2),
        Job("pretraining", (), out, ("speech",), share=2),
        Job("trial", (), out, ("pretraining",)),
        Job("choice", (), out, ("trial",), counted=False),
        Job("teacher", (), out, ("pretraining", "choice")),
        Job("system", (), out, ("pretraining", "teacher", "choice")),
    ]
    records = Records(tmp_path)
    for job, seconds in zip(jobs, (0.0, 10.0, 100.0, 0.0, 3.0, 4.0), strict=True):
        records.write(job, Record("done", processor_seconds=seconds))
    assert records.cost(jobs[-1], {job.name: job for job in jobs}) == pytest.approx(4 + 5 + 3 + 3)


def test_the_remaining_time_is_estimated_from_finished_jobs_of_the_kind(tmp_path: Path) -> None:
    jobs = [Job(f"j{i}", (), tmp_path / "out", kind="train", size=100.0 * (i + 1), guess=9.0) for i in range(3)]
    jobs.append(Job("other", (), tmp_path / "out", kind="decode", size=2.0, guess=9.0))
    Records(tmp_path).write(jobs[0], Record("done", wall_seconds=50.0))
    assert Records(tmp_path).estimate(jobs, jobs[1:]) == [100.0, 150.0, 18.0]


def test_wrong_plans_are_programming_errors(tmp_path: Path) -> None:
    a = training(tmp_path, "a")
    with pytest.raises(ValueError, match="two jobs are named a"):
        check_jobs([a, a])
    with pytest.raises(ValueError, match="needs b, which is not an earlier job"):
        check_jobs([training(tmp_path, "a", needs=("b",)), training(tmp_path, "b")])


@pytest.mark.parametrize(("seconds", "text"), [(5, "5 s"), (75, "2 min"), (4380, "1 h 13 min"), (7200, "2 h 00 min")])
def test_durations_are_readable(seconds: float, text: str) -> None:
    assert duration(seconds) == text
