"""Launch scripts, with stubs for the programs that they start: a training script, srun, scontrol."""

import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.paths import REPOSITORY
from tests.patience import PATIENCE, wait_until

SCRIPTS = sorted([*REPOSITORY.glob("launch/*.sh"), *REPOSITORY.glob("launch/*.sbatch"), REPOSITORY / ".ci/run"])
# Stub for .venv/bin/python: prints its arguments, runs until a STOP file exists, and replaces it by REQUEUE, unless the
# name of the folder ends in "crash", "finish" or "hang".
PYTHON_STUB = """#!/usr/bin/env bash
case "$1 $*" in
    "-c "*) echo 3; exit ;;  # the number of GPUs
    *" --print_config")
        printf '%s\\n' data: '  folder: no' run: '  steps: 3' '  folder: runs/finish' x: '  folder: no'
        exit ;;
esac
trap 'echo trainer got TERM' TERM
for folder; do :; done
echo "arguments: $*"
echo "threads: $OMP_NUM_THREADS rendezvous: ${MASTER_ADDR:-}:${MASTER_PORT:-}"
case $folder in
    *crash) exit 7 ;;
    *finish) exit 0 ;;
    *hang) sleep 1000; exit 9 ;;
esac
until [ -e "$folder/STOP" ]; do sleep 0.02; done
rm "$folder/STOP"
touch "$folder/REQUEUE"
echo saved
"""
SRUN = """#!/usr/bin/env bash
echo "srun: $*"
while [[ $1 == --* ]]; do shift; done
SLURM_NODEID=0 exec "$@"
"""
SCONTROL = """#!/usr/bin/env bash
case "$1 $2" in
    "show hostnames") seq -f node%g 1 100000 ;;
    "show node") echo "NodeName=$3 Arch=x86_64 NodeAddr=address-of-$3 NodeHostName=$3" ;;
    "show job") echo "JobId=$3 JobState=$FAKE_STATE Reason=None" ;;
    "requeue "*) echo "scontrol: requeued $2"; [ -z "${FAKE_FAILURE:-}" ] ;;
esac
"""


def write_program(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    path.chmod(0o755)
    return path


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    """Folder with the launch scripts and stubs for the programs that they start."""
    shutil.copytree(REPOSITORY / "launch", tmp_path / "launch")
    write_program(tmp_path / "python", PYTHON_STUB)
    write_program(tmp_path / "bin/srun", SRUN)
    write_program(tmp_path / "bin/scontrol", SCONTROL)
    (tmp_path / "pretrain.py").touch()
    return tmp_path


class Running:
    """Running launch script, with its output in a file."""

    def __init__(self, repository: Path, *command: str, **env: str) -> None:
        self.log = repository / "log"
        self.process = subprocess.Popen(
            command,
            cwd=repository,
            env={
                **{name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"},
                "PYTHON": str(repository / "python"),
                "PATH": f"{repository / 'bin'}:{os.environ['PATH']}",
                **env,
            },
            stdout=self.log.open("w"),
            stderr=subprocess.STDOUT,
            # A shell cannot trap a signal that was ignored at its start, as SIGINT is in a background test run.
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )

    def wait_for(self, text: str) -> None:
        """Wait until the output contains the text; fail if the script ends without it."""

        def is_written() -> bool:
            ended = self.process.poll() is not None  # before reading, so that the log is complete after the end
            written = text in self.log.read_text()
            assert written or not ended, self.log.read_text()
            return written

        wait_until(is_written, self.log.read_text)

    def finish(self) -> tuple[int, str]:
        """Wait for the end of the script; return its exit status and output."""
        try:
            return self.process.wait(PATIENCE), self.log.read_text()
        finally:
            self.process.kill()


def torchrun(repository: Path, *arguments: str) -> Running:
    return Running(repository, "bash", "launch/torchrun.sh", *arguments)


def job(repository: Path, folder: str, state: str = "RUNNING", **env: str) -> Running:
    slurm = {"SLURM_JOB_ID": "123", "SLURM_JOB_NODELIST": "node[1-2]", "SLURM_JOB_NUM_NODES": "2"}
    slurm |= {"SLURM_CPUS_ON_NODE": "8", "FAKE_STATE": state, **env}
    return Running(repository, "bash", "launch/pretrain.sbatch", "--run.folder", folder, **slurm)


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_every_script_is_valid_bash_and_stops_at_the_first_error(script: Path) -> None:
    subprocess.run(["bash", "-n", script], check=True)
    if script.name not in ("stoppable.sh", "slurm_job.sh"):  # sourced by the others
        assert "set -euo pipefail" in script.read_text()
        assert os.access(script, os.X_OK)


@pytest.mark.parametrize("name", ["setup.sh", "test.sh", "torchrun.sh", "quickstart.sh"])
def test_help_explains_the_script_and_does_nothing(name: str, tmp_path: Path) -> None:
    shutil.copytree(REPOSITORY / "launch", tmp_path / "launch")
    done = subprocess.run(
        ["bash", f"launch/{name}", "--help"], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    assert f"launch/{name}" in done.stdout
    assert "set -" not in done.stdout and "#" not in done.stdout
    assert [path.name for path in tmp_path.iterdir()] == ["launch"]


@pytest.mark.parametrize("name", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR2])
def test_torchrun_saves_a_checkpoint_and_stops_after_a_signal(repository: Path, name: signal.Signals) -> None:
    running = torchrun(repository, "pretrain.py", "--run.folder", "runs/a b")
    running.wait_for("arguments")
    running.process.send_signal(name)
    status, output = running.finish()
    assert status == 75
    assert "saved" in output and "the same command continues" in output
    assert "--nproc-per-node 3 " in output, "one process per GPU"
    assert not list((repository / "runs/a b").iterdir())


@pytest.mark.parametrize(("folder", "expected"), [("runs/finish", 0), ("runs/crash", 7)])
def test_torchrun_returns_the_exit_status_of_the_training_script(repository: Path, folder: str, expected: int) -> None:
    stale = repository / folder / "STOP"
    stale.parent.mkdir(parents=True)
    stale.touch()
    status, output = torchrun(repository, "-n", "200", "pretrain.py", f"--run.folder={folder}").finish()
    assert status == expected
    assert "--nproc-per-node 200 " in output and "threads: 1 " in output
    assert not stale.exists(), "an old STOP file must not end the next run"


def test_a_second_interrupt_kills_a_run_that_ignores_the_stop_file(repository: Path) -> None:
    running = torchrun(repository, "pretrain.py", "--run.folder", "runs/hang")
    running.wait_for("arguments")
    running.process.send_signal(signal.SIGINT)
    running.wait_for("the run will save a checkpoint")
    running.process.send_signal(signal.SIGINT)
    status, output = running.finish()
    assert status == 9 and "without a checkpoint" in output


def test_torchrun_finds_a_run_folder_that_is_set_in_a_config_file(repository: Path) -> None:
    stale = repository / "runs/finish/STOP"
    stale.parent.mkdir(parents=True)
    stale.touch()
    status, output = torchrun(repository, "pretrain.py", "--config", "runs/finish").finish()
    assert status == 0 and not stale.exists(), output


def test_torchrun_refuses_an_unknown_script(repository: Path) -> None:
    status, output = torchrun(repository, "pretrian.py", "--run.folder", "x").finish()
    assert status == 2 and "'pretrian.py' is not a script" in output


def test_job_starts_one_torchrun_per_node_with_all_its_cpus(repository: Path) -> None:
    status, output = job(repository, "runs/finish", SLURM_GPUS_ON_NODE="4").finish()
    assert status == 0
    assert re.search(r"srun: --ntasks-per-node=1 --cpus-per-task=8 ", output)
    assert "--nnodes 2 --node-rank 0 --master-addr address-of-node1 " in output
    assert "--nproc-per-node 4 pretrain.py --run.folder runs/finish" in output
    assert "threads: 2 " in output


def test_job_requeues_itself_after_the_time_limit_signal(repository: Path) -> None:
    running = job(repository, "runs/a", SLURM_RESTART_COUNT="1", MAX_REQUEUES="2")
    running.wait_for("arguments")
    running.process.send_signal(signal.SIGUSR2)
    status, output = running.finish()
    assert status == 0
    assert output.index("saved") < output.index("scontrol: requeued 123")
    assert not list((repository / "runs/a").iterdir())


@pytest.mark.parametrize(
    ("state", "env", "expected", "message"),
    [
        ("COMPLETING", {}, 0, "SLURM is ending this job itself"),
        ("RUNNING", {"SLURM_RESTART_COUNT": "2", "MAX_REQUEUES": "2"}, 75, "MAX_REQUEUES is 2"),
    ],
)
def test_job_is_not_requeued_after_scancel_or_max_requeues(
    repository: Path, state: str, env: dict[str, str], expected: int, message: str
) -> None:
    running = job(repository, "runs/a", state, **env)
    running.wait_for("arguments")
    running.process.send_signal(signal.SIGTERM)
    running.wait_for("saved")
    status, output = running.finish()
    assert status == expected
    assert message in output and "scontrol: requeued" not in output


def test_job_that_cannot_be_requeued_fails_with_the_command_to_continue(repository: Path) -> None:
    running = job(repository, "runs/a", FAKE_FAILURE="yes")
    running.wait_for("arguments")
    running.process.send_signal(signal.SIGUSR2)
    status, output = running.finish()
    assert status == 75 and "submit the same command again" in output


def test_job_of_a_crashed_run_fails_and_is_not_requeued(repository: Path) -> None:
    status, output = job(repository, "runs/crash").finish()
    assert status == 7 and "requeue" not in output


def test_job_submitted_from_another_folder_is_refused(repository: Path) -> None:
    process = subprocess.run(
        ["bash", repository / "launch/pretrain.sbatch"], cwd=repository / "bin", capture_output=True, text=True
    )
    assert process.returncode != 0 and "submit this script from the root of the repository" in process.stderr


@pytest.mark.parametrize(
    ("array", "expected"),
    [
        ({}, "m data.prepare synthetic --out x\n"),
        ({"ID": "3", "COUNT": "16", "MIN": "0", "MAX": "15"}, "synthetic --out x --part 3/16\n"),
        ({"ID": "3", "COUNT": "2", "MIN": "3", "MAX": "7", "PARTS": "16"}, "synthetic --out x --part 3/16\n"),
        ({"ID": "3", "COUNT": "2", "MIN": "3", "MAX": "7"}, "error: parts are numbered from 0"),
        ({"ID": "1", "COUNT": "2", "MIN": "1", "MAX": "2"}, "error: parts are numbered from 0"),
    ],
)
def test_a_task_of_a_job_array_prepares_its_part(repository: Path, array: dict[str, str], expected: str) -> None:
    write_program(repository / "python", '#!/usr/bin/env bash\necho "$@"\n')
    slurm = {name if name == "PARTS" else f"SLURM_ARRAY_TASK_{name}": value for name, value in array.items()}
    arguments = ["launch/prepare.sbatch", "synthetic", "--out", "x"]
    status, output = Running(repository, "bash", *arguments, SLURM_CPUS_ON_NODE="8", **slurm).finish()
    assert expected in output and status == (2 if "error" in expected else 0)


def setup(repository: Path, *arguments: str, python: str = sys.executable) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, "PYTHON": python, "PIP_NO_INDEX": "1"}
    command = ["bash", "launch/setup.sh", *arguments]
    return subprocess.run(command, cwd=repository, env=env, capture_output=True, text=True)


def test_setup_repeats_a_failed_installation_and_skips_a_complete_one(repository: Path) -> None:
    requirements = repository / "requirements.txt"
    for kind in ("dev", "storage"):
        (repository / f"requirements-{kind}.txt").write_text("")
    requirements.write_text("./missing-package\n")
    broken = setup(repository)
    assert broken.returncode == 1
    assert "could not install the packages of requirements.txt" in broken.stderr and "run the same" in broken.stderr
    assert setup(repository).returncode == 1, "an incomplete installation must be repeated"

    requirements.write_text("")
    assert setup(repository).returncode == 0
    again = setup(repository)
    assert again.returncode == 0 and again.stderr == "", "a finished installation is not repeated"
    requirements.write_text("# changed\n")
    assert "installing requirements.txt requirements-dev.txt" in setup(repository, "dev").stderr
    assert setup(repository).stderr == "" and setup(repository, "dev").stderr == ""


def test_setup_names_the_required_interpreter(repository: Path) -> None:
    (repository / "requirements.txt").write_text("")
    old = write_program(repository / "bin/python3.4", "#!/bin/sh\nexit 1\n")
    done = setup(repository, python=str(old))
    assert done.returncode == 1 and "no Python 3.11 or newer" in done.stderr and "PYTHON=" in done.stderr


def test_setup_names_the_debian_package_if_ensurepip_is_missing(repository: Path) -> None:
    (repository / "requirements.txt").write_text("")
    write_program(repository / "bin/apt-get", "#!/bin/sh\nexit 1\n")
    without_ensurepip = f"""#!/bin/sh
case "$*" in
    "-c import ensurepip" | "-m pip"*) exit 1 ;;
    *) exec {sys.executable} "$@" ;;
esac
"""
    python = write_program(repository / "bin/python3.99", without_ensurepip)
    command = ["bash", "launch/setup.sh"]
    env = {**os.environ, "PYTHON": str(python), "PATH": f"{repository / 'bin'}:{os.environ['PATH']}"}
    done = subprocess.run(command, cwd=repository, env=env, capture_output=True, text=True)
    assert done.returncode == 1 and "apt-get install python3-venv" in done.stderr
