"""Nodes and tasks of a SLURM step, from the environment of srun."""

import re
from collections.abc import Mapping
from typing import Any

from common.errors import UserError


def read_step(environment: Mapping[str, str]) -> dict[str, Any]:
    """Fields of `process.Launch` for a task of a step. Raises KeyError for a missing variable."""
    nodes = environment.get("SLURM_STEP_NODELIST") or environment["SLURM_JOB_NODELIST"]
    # The port depends on job and step, so that two steps of a job, or two jobs on a node, do not collide.
    spread = 97 * int(environment.get("SLURM_JOB_ID", "0")) + int(environment.get("SLURM_STEP_ID", "0"))
    return {
        "rank": int(environment["SLURM_PROCID"]),
        "local_rank": int(environment["SLURM_LOCALID"]),
        "size": int(environment["SLURM_STEP_NUM_TASKS"]),
        "local_size": tasks_of_node(environment),
        "address": environment.get("MASTER_ADDR") or first_host(nodes),
        "port": int(environment.get("MASTER_PORT", 20000 + spread % 10000)),
    }


def first_host(nodes: str) -> str:
    """First host of a SLURM node list: `node[07-09,12],other` gives `node07`."""
    match = re.match(r"([^,\[]+)(?:\[(\w+)[^\]]*\])?([^,\[]*)", nodes)
    if match is None:
        raise UserError(f"cannot parse the SLURM node list {nodes!r}: set MASTER_ADDR")
    return match[1] + (match[2] or "") + match[3]


def tasks_of_node(environment: Mapping[str, str]) -> int:
    """Number of tasks on this node: entry SLURM_NODEID of a list such as `2(x3),1`."""
    counts: list[int] = []
    for part in environment.get("SLURM_STEP_TASKS_PER_NODE", "1").split(","):
        count, _, times = part.partition("(x")
        counts += [int(count)] * int(times.rstrip(")") or "1")
    node = int(environment.get("SLURM_NODEID", "0"))
    return counts[node] if node < len(counts) else counts[0]
