"""Run a function in several processes that are connected by gloo."""

from __future__ import annotations

import multiprocessing
import os
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from multiprocessing.context import ForkServerContext
from typing import Any

import numpy as np
import torch
from torch.utils._pytree import tree_map

from bestrq.training.process import DistributedSettings, World, start_world
from tests.patience import PATIENCE
from tests.ports import free_port


def forkserver() -> ForkServerContext:
    """Start method whose children come from a process without threads.

    A direct fork of a test process can hang or fail: locks of other threads stay taken in the child, and autograd
    refuses to run there once it has used threads.
    """
    context = multiprocessing.get_context("forkserver")
    # Preloaded modules are imported once, instead of in every process of every test.
    context.set_forkserver_preload(["pretrain", "finetune_ctc", "finetune_rnnt", "evaluate", "pytest"])
    return context


def run_distributed(
    function: Callable[..., Any], world_size: int, *arguments: Any, timeout: float = PATIENCE
) -> list[Any]:
    """Call `function(world, *arguments)` in `world_size` processes and return the results by rank.

    `function` must be at the top level of a module. Tensors are sent as numpy arrays, so that no shared memory outlives
    a process. Raises AssertionError with the tracebacks by rank if a process fails or does not return within `timeout`
    seconds.
    """
    context = forkserver()
    port = free_port()
    processes, pipes = [], []
    for rank in range(world_size):
        receiver, sender = context.Pipe(duplex=False)
        details = (function, rank, world_size, port, sender, arguments)
        process = context.Process(target=_child, args=details, daemon=True)
        process.start()
        sender.close()
        processes.append(process)
        pipes.append(receiver)
    results, errors = _collect(pipes, timeout)
    for process in processes:
        process.join(5)
        process.kill()
    assert not errors, "\n".join(errors)
    return [results[rank] for rank in range(world_size)]


def _collect(pipes: list[Connection], timeout: float) -> tuple[dict[int, Any], list[str]]:
    results: dict[int, Any] = {}
    errors: list[str] = []
    open_pipes = {pipe: rank for rank, pipe in enumerate(pipes)}
    deadline = time.monotonic() + timeout
    while open_pipes:
        ready = wait(list(open_pipes), max(0.0, deadline - time.monotonic()))
        if not ready:
            return results, [*errors, f"ranks {sorted(open_pipes.values())} did not return within {timeout} s"]
        for pipe in ready:
            assert isinstance(pipe, Connection)
            rank = open_pipes.pop(pipe)
            try:
                error, result = pipe.recv()
            except EOFError:
                error, result = "died without an error", None
            if error is not None:
                errors.append(f"[rank {rank}] {error}")
                deadline = min(deadline, time.monotonic() + 30)  # other ranks may be waiting for this one
            results[rank] = tree_map(lambda leaf: torch.from_numpy(leaf) if _is_array(leaf) else leaf, result)
    return results, errors


def _is_array(leaf: Any) -> bool:
    return isinstance(leaf, np.ndarray)


def _child(
    function: Callable[..., Any], rank: int, size: int, port: int, pipe: Connection, arguments: tuple[Any, ...]
) -> None:
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(size), LOCAL_WORLD_SIZE=str(size),
                      MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))  # fmt: skip
    torch.set_num_threads(1)
    try:
        world: World = start_world(DistributedSettings(device="cpu", threads=1, timeout_minutes=PATIENCE / 60))
        result = function(world, *arguments)
        result = tree_map(lambda leaf: leaf.detach().numpy() if isinstance(leaf, torch.Tensor) else leaf, result)
        pipe.send((None, result))
    except BaseException:  # noqa: BLE001 - every failure of a child must reach the test
        pipe.send((traceback.format_exc(), None))
        os._exit(1)
    pipe.close()
    world.close()
