"""Real SLURM cluster on this machine: munged, slurmctld and two slurmd, with files in one folder and free ports."""

import contextlib
import os
import shutil
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from tests.patience import PATIENCE
from tests.ports import free_port

NODES = ("n1", "n2")
PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "scontrol", "squeue", "scancel", "srun")
CONFIG = """
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
AuthInfo=socket={folder}/munge.sock
SlurmUser=root
SlurmdUser=root
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool/%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/%n.pid
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SchedulerType=sched/backfill
SchedulerParameters=batch_sched_delay=0,sched_min_interval=0
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SlurmdParameters=config_overrides
ReturnToService=2
MpiDefault=none
SlurmctldPort={ports[0]}
SwitchType=switch/none
JobRequeue=1
KillWait=120
OverTimeLimit=0
"""


def unavailable_reason() -> str | None:
    """Reason that no cluster can be started on this machine, or None."""
    missing = [program for program in PROGRAMS if find(program) is None]
    if missing:
        return f"not installed: {', '.join(missing)} (Debian: slurmd slurmctld slurm-client munge)"
    if os.geteuid() != 0:
        return "the daemons of SLURM start jobs only as root"
    return None


def find(program: str) -> str | None:
    return shutil.which(program, path=f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin")


@dataclass
class Cluster:
    """Cluster of two nodes with two CPUs each. SLURM commands run with the environment `env`."""

    folder: Path
    env: dict[str, str]

    def command(self, *arguments: str, cwd: Path | None = None) -> str:
        """Run a SLURM command and return its output. Raises RuntimeError with its error output."""
        done = subprocess.run(arguments, cwd=cwd, env=self.env, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"{' '.join(arguments)}: {done.stderr}{done.stdout}")
        return done.stdout.strip()

    def job(self, job: str) -> dict[str, str]:
        """Fields of `scontrol show job`."""
        fields = self.command("scontrol", "show", "job", job, "-o").split()
        return dict(field.split("=", 1) for field in fields if "=" in field)

    def wait(self, job: str, *states: str, seconds: float = PATIENCE) -> dict[str, str]:
        """Wait until the job is in one of the states and return its fields. A requeued job is started at once."""
        end = time.monotonic() + seconds
        while (fields := self.job(job))["JobState"] not in states:
            if time.monotonic() > end:
                raise TimeoutError(f"job {job} is {fields['JobState']}, not one of {states}")
            if fields["JobState"] == "PENDING" and fields["Reason"] == "BeginTime":
                # slurmd refuses a start ("job credential revoked") within a second of the end of the previous start.
                time.sleep(2)
                self.command("scontrol", "update", f"JobId={job}", "StartTime=now")
            time.sleep(0.2)
        return fields


def log_tails(folder: Path) -> str:
    return "\n".join(f"== {log.name}\n{log.read_text()[-2000:]}" for log in sorted(folder.glob("*.log")))


@contextlib.contextmanager
def running_cluster(folder: Path, **job_environment: str) -> Iterator[Cluster]:
    """Start the daemons in `folder`, yield the cluster, cancel its jobs and stop the daemons."""
    host = socket.gethostname().split(".")[0]
    ports = [free_port() for _ in range(1 + len(NODES))]
    config = folder / "slurm.conf"
    nodes = [
        f"NodeName={name} NodeHostname={host} NodeAddr=127.0.0.1 Port={port} CPUs=2 RealMemory=1000 State=UNKNOWN"
        for name, port in zip(NODES, ports[1:], strict=True)
    ]
    partition = f"PartitionName=test Nodes={','.join(NODES)} Default=YES MaxTime=INFINITE State=UP"
    config.write_text("\n".join([CONFIG.format(host=host, folder=folder, ports=ports), *nodes, partition, ""]))
    # Releases from 23.11 on use cgroups and systemd unless disabled; older ones refuse this option.
    (folder / "cgroup.conf").write_text("CgroupPlugin=disabled\n" if version() >= (23, 11) else "")
    for name in ("state", *(f"spool/{node}" for node in NODES)):
        (folder / name).mkdir(parents=True)
    key = folder / "munge.key"
    key.write_bytes(os.urandom(128))
    key.chmod(0o400)
    folder.chmod(0o755)  # munged requires its socket to be accessible to every user

    env = {**os.environ, "SLURM_CONF": str(config), "PATH": f"{os.environ['PATH']}:/usr/sbin:/sbin"}
    env |= job_environment
    cluster = Cluster(folder, env)
    munge = ["munged", "--foreground", "--force", f"--key-file={key}", f"--socket={folder}/munge.sock"]
    munge += [f"--pid-file={folder}/munged.pid", f"--seed-file={folder}/munged.seed"]
    with contextlib.ExitStack() as stack:

        def start(name: str, *command: str) -> None:
            log = stack.enter_context((folder / f"{name}.log").open("w"))
            daemon = subprocess.Popen(command, env=env, stdout=log, stderr=log, start_new_session=True)
            stack.callback(stop, daemon)

        start("munged", *munge)
        wait_until((folder / "munge.sock").exists, "munged opens its socket", folder)
        start("slurmctld", "slurmctld", "-D", "-c")
        for node in NODES:
            start(node, "slurmd", "-D", "-N", node)
        wait_until(lambda: idle(cluster), "both nodes are idle", folder)
        try:
            yield cluster
        finally:
            cluster.command("scancel", "--quiet", "--full", "--signal=KILL", "--user=root")
            cluster.command("scancel", "--quiet", "--user=root")
            wait_until(lambda: not cluster.command("squeue", "--noheader"), "all jobs have ended", folder)


def version() -> tuple[int, ...]:
    words = subprocess.run([find("slurmctld") or "slurmctld", "-V"], capture_output=True, text=True).stdout.split()
    return tuple(int(number) for number in words[1].split(".")[:2])


def idle(cluster: Cluster) -> bool:
    try:
        return cluster.command("sinfo", "--noheader", "--format=%T %D").split() == ["idle", str(len(NODES))]
    except RuntimeError:  # slurmctld is not ready
        return False


def wait_until(condition: Callable[[], bool], state: str, folder: Path, seconds: float = PATIENCE) -> None:
    end = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > end:
            raise TimeoutError(f"waited {seconds:.0f} s until {state}\n{log_tails(folder)}")
        time.sleep(0.1)


def stop(daemon: subprocess.Popen) -> None:
    daemon.terminate()
    try:
        daemon.wait(20)
    except subprocess.TimeoutExpired:
        daemon.kill()
        daemon.wait()
