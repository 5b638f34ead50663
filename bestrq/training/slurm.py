"""Nodes and tasks of a SLURM step, from the environment of srun."""

import re
from collections.abc import Mapping

from common.errors import UserError


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
