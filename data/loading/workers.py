"""Worker processes that read batches, in the order of the plans; killed workers are replaced.

While no batch is ready, `read_in_workers` wakes up every `POLL` seconds, so that a request to stop is obeyed even if a
worker hangs in a read of a file system.
"""

from __future__ import annotations

import logging
import multiprocessing
import os
import shutil
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch.utils.data import DataLoader

from common.errors import UserError

POLL = 2.0
"""seconds between two checks for dead workers and for a request to stop"""
MAX_RESTARTS = 3
"""restarts of the workers without a batch between them"""

Plan = TypeVar("Plan")


def read_in_workers(
    reader: Any, plans: Iterable[Plan], *, num_workers: int, prefetch: int, start_method: str,
    interrupted: Callable[[], bool] | None = None,
) -> Iterator[Any]:  # fmt: skip
    """Yield `reader[plan]` of every plan in order, read ahead by worker processes.

    A plan determines its batch, so workers that have been killed (out of memory) are replaced by new ones, which read
    the same batches.

    Args:
        interrupted: called every `POLL` seconds while no batch is ready; True ends the iteration and kills the workers.

    Raises:
        RuntimeError: workers die again and again.
    """
    unread: deque[Plan] = deque()  # given to workers, and not yielded
    plans = iter(plans)

    def issue() -> Iterator[Plan]:
        yield from tuple(unread)
        for plan in plans:
            unread.append(plan)
            yield plan

    restarts = 0
    while True:
        with _workers(reader, issue(), num_workers, prefetch, start_method) as contents:
            while True:
                try:
                    content = next(contents)
                except StopIteration:
                    return
                except RuntimeError as error:
                    if str(error).startswith("DataLoader timed out"):  # after POLL; the iterator can go on
                        if interrupted is not None and interrupted():
                            return
                        continue
                    if not str(error).startswith("DataLoader worker (pid") or restarts == MAX_RESTARTS:
                        raise
                    restarts += 1
                    logging.getLogger(__name__).warning("%s (out of memory?); they are started again", error)
                    break
                unread.popleft()
                restarts = 0
                yield content


def check_shared_memory(needed: int, workers: str) -> None:
    """Raise UserError if /dev/shm has fewer than `needed` bytes for the batches of these workers."""
    folder = Path("/dev/shm")
    free = shutil.disk_usage(folder).free if folder.is_dir() else needed
    if needed > free:
        raise UserError(
            f"data.num_workers {workers} needs {needed >> 20} MiB of shared memory, but /dev/shm has {free >> 20} MiB "
            "free: lower one of them or enlarge /dev/shm (docker run --shm-size)"
        )


@contextmanager
def _workers(
    reader: Any, plans: Iterator[Any], num_workers: int, prefetch: int, start_method: str
) -> Iterator[Iterator[Any]]:
    """Started workers; they are killed at the end of the block, since they only read."""
    before = set(multiprocessing.active_children())
    on_child = signal.getsignal(signal.SIGCHLD)
    contents = iter(
        DataLoader(
            reader,
            sampler=plans,
            batch_size=None,
            num_workers=num_workers,
            prefetch_factor=prefetch,
            timeout=POLL,
            collate_fn=_identity,
            worker_init_fn=_start_worker,
            multiprocessing_context=multiprocessing.get_context(start_method),
            generator=torch.Generator(),  # the default draws from the global generator and changes its state
        )
    )
    workers = [child for child in multiprocessing.active_children() if child not in before]
    if on_child is not None and threading.current_thread() is threading.main_thread():
        # Torch's handler raises the death of a worker anywhere, in the middle of an optimizer step.
        signal.signal(signal.SIGCHLD, on_child)
    try:
        yield contents
    finally:
        for worker in workers:
            worker.kill()


def _start_worker(_: int) -> None:
    """Ignore the signals at which the training process stops, and SIGTERM unless it sends it.

    A cluster sends them to every process of a job. A worker that exited would break the last steps of the training
    process, which stops its workers itself.
    """
    for number in (signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])
    parent = multiprocessing.parent_process()
    assert parent is not None

    def exit_on_request() -> None:
        while parent.is_alive():
            received = signal.sigtimedwait([signal.SIGTERM], 1.0)
            if received is not None and received.si_pid == parent.pid:
                break
        os._exit(0)

    threading.Thread(target=exit_on_request, daemon=True).start()


def _identity(content: Any) -> Any:
    return content
