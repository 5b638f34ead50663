"""Ranks and process counts of this process, as the launcher has set them: torchrun, srun, or none."""

from __future__ import annotations

import os
import socket
from collections.abc import Mapping
from dataclasses import dataclass

from common.errors import UserError
from common.processes import stop_with_parent

STORE_SECONDS = 30.0
"""time in which torchrun's store has to accept a connection"""


@dataclass(frozen=True)
class Launch:
    """Ranks, process counts and rendezvous address, as set by the launcher."""

    rank: int = 0
    local_rank: int = 0
    size: int = 1
    local_size: int = 1
    address: str = "127.0.0.1"
    port: int = 29500


def read_launch(environment: Mapping[str, str]) -> Launch:
    """Read the variables of torchrun, or of a SLURM step (srun); without either, a single process.

    SLURM_PROCID is also set in a batch script outside srun; SLURM_STEP_NUM_TASKS is set only inside a step. Raises
    UserError if a required variable is missing or is not a number.
    """
    try:
        if "RANK" in environment and "WORLD_SIZE" in environment:
            size = int(environment["WORLD_SIZE"])
            return Launch(
                rank=int(environment["RANK"]),
                local_rank=int(environment.get("LOCAL_RANK", "0")),
                size=size,
                local_size=int(environment.get("LOCAL_WORLD_SIZE", "1")),
                address=environment.get("MASTER_ADDR", "127.0.0.1"),
                port=int(environment.get("MASTER_PORT", "29500")),
            )
        if int(environment.get("SLURM_STEP_NUM_TASKS", "1")) > 1:
            from bestrq.training.slurm import read_step  # imported only under SLURM

            return Launch(**read_step(environment))
    except KeyError as error:
        raise UserError(f"{error.args[0]} is missing from the environment of a distributed launch") from error
    except ValueError as error:
        raise UserError(f"an environment variable of a distributed launch is not a number: {error}") from error
    return Launch()


def end_with_torchrun(environment: Mapping[str, str], launch: Launch) -> None:
    """End this process with torchrun, if that has started it; otherwise ranks would train on if torchrun is killed.

    Raises UserError if it has ended already: the process group would wait for its store until the timeout.
    """
    if "TORCHELASTIC_RUN_ID" not in environment:
        return
    stop_with_parent(os.getppid())
    if environment.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        try:
            socket.create_connection((launch.address, launch.port), STORE_SECONDS).close()
        except OSError as error:
            raise UserError(
                f"torchrun, which started this process, does not answer at {launch.address}:{launch.port} ({error}): "
                "it has ended; start it again"
            ) from error
