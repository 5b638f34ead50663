"""Watchdog of a training process: a step that hangs ends it, with a report.

A hung collective, file system or loader leaves a job waiting for hours. All ranks wait for each other in every step, so
all of them exceed the limit within a few seconds of each other, and each writes its own report; none has to be reached
by another one. A stopped process (SIGSTOP) writes none: the missing report names it.
"""

from __future__ import annotations

import faulthandler
import multiprocessing
import os
import platform
import sys
import threading
import time
import weakref
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from bestrq.training.optimizer import GuardSettings
from bestrq.training.process import World

STATUS = 3
"""exit status of a process that hung"""
GRACE = 5.0
"""seconds between the report and the end of the process, in which the other ranks write theirs"""
LONGEST_TICK = 5.0
"""seconds that a pause of the watchdog itself counts at most: a suspended or stopped process does not hang"""


class Watchdog:
    """Thread that ends the process with a report if a step takes too long; used by all ranks.

    The limit is `guard.first_step_minutes` until the second step, as the first one may compile, and in a `long` period,
    else `guard.step_minutes` or ten times the longest step so far, whichever is more.

    Args:
        folder: the run folder; reports go to `hangs/`.
    """

    def __init__(self, settings: GuardSettings, folder: Path, world: World) -> None:
        self.settings, self.folder, self.world = settings, folder, world
        self._lock = threading.Lock()
        self._step = 0
        self._samples: Sequence[str] = ()
        self._waited, self._longest, self._is_first, self._is_step = 0.0, 0.0, True, False
        self._limit = 60 * settings.first_step_minutes
        self._closed = threading.Event()
        if settings.step_minutes:  # a weak reference: the thread ends with a script that raised, as in a notebook
            arguments = (weakref.ref(self), self._closed)
            threading.Thread(target=_watch, args=arguments, name="watchdog", daemon=True).start()
        if torch.cuda.is_initialized():
            attach: Any = torch._C._cuda_attach_out_of_memory_observer  # type: ignore[attr-defined]
            attach(self._on_out_of_memory)  # private, but called wherever an allocation fails

    def step(self, step: int, samples: Sequence[str]) -> None:
        """Start of an optimizer step, with the ids of this rank's samples."""
        with self._lock:
            if self._is_step:
                self._longest = max(self._longest, self._waited)
            self._step, self._samples, self._waited = step, tuple(samples), 0.0
            if self._is_first:  # it keeps the first limit
                self._is_first = False
                return
            self._is_step, self._limit = True, max(60 * self.settings.step_minutes, 10 * self._longest)

    def long(self) -> None:
        """Start of a validation, a probe or a checkpoint, which may take longer than a step."""
        with self._lock:
            self._waited, self._is_step = 0.0, False
            self._limit = max(60 * self.settings.first_step_minutes, self._limit)

    def close(self) -> None:
        """Stop watching."""
        self._closed.set()

    def _exceeds(self, seconds: float) -> bool:
        """Count further seconds of waiting; whether the limit is exceeded."""
        with self._lock:
            self._waited += min(seconds, LONGEST_TICK)
            return self._waited > self._limit

    def _end(self) -> None:
        reason = f"no progress for {self._waited:.0f} s in step {self._step}"
        path = self._report("hangs", reason)
        print(
            f"[rank {self.world.rank}] {reason} (guard.step_minutes {self.settings.step_minutes:g}): the process ends; "
            f"the same command continues from the last checkpoint. Stacks and sample ids: {path}",
            file=sys.stderr,
            flush=True,
        )
        time.sleep(GRACE)
        os._exit(STATUS)

    def _report(self, kind: str, reason: str) -> Path:
        """Write the stacks of all threads, the loader's workers and the samples of the step."""
        path = self.folder / kind / f"{time.strftime('%Y%m%d-%H%M%S')}-rank-{self.world.rank:03d}.txt"
        try:
            path.parent.mkdir(exist_ok=True)
            with open(path, "w", encoding="utf-8") as file:
                print(
                    f"rank {self.world.rank} of {self.world.size}, process {os.getpid()} on {platform.node()}",
                    file=file,
                )
                print(f"{reason}\nsamples: {', '.join(self._samples)}", file=file)
                for child in multiprocessing.active_children():
                    print(f"child process {child.pid} ({child.name}): {_state(child.pid)}", file=file)
                file.flush()
                faulthandler.dump_traceback(file, all_threads=True)
        except OSError as error:
            print(f"[rank {self.world.rank}] cannot write {path}: {error}", file=sys.stderr)
        return path

    def _on_out_of_memory(self, device: int, requested: int, total: int, free: int) -> None:
        """Report of an allocation that failed; the exception follows. Signature of torch's observer."""
        reason = f"out of memory on GPU {device} in step {self._step}: {requested} bytes of {total}, {free} free"
        path = self._report("out-of-memory", reason)
        snapshot: Any = torch.cuda.memory._dump_snapshot
        try:
            snapshot(str(path.with_suffix(".pickle")))  # for pytorch.org/memory_viz; never loaded here
        except OSError as error:
            print(f"[rank {self.world.rank}] no memory snapshot: {error}", file=sys.stderr)
        print(f"[rank {self.world.rank}] {reason}. Samples and memory snapshot: {path.parent}", file=sys.stderr)


def _watch(watched: weakref.ref[Watchdog], closed: threading.Event) -> None:
    last = time.monotonic()
    while not closed.wait(1.0) and (watchdog := watched()) is not None:
        now = time.monotonic()
        if watchdog._exceeds(now - last):
            watchdog._end()
        last = now
        del watchdog


def _state(pid: int | None) -> str:
    """State of a process and the kernel function in which it waits, if Linux shows them."""
    try:
        status = Path(f"/proc/{pid}/status").read_text(encoding="utf-8", errors="replace")
        waits = Path(f"/proc/{pid}/wchan").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return "unknown"
    states = [line.partition(":")[2].strip() for line in status.splitlines() if line.startswith("State:")]
    return ", ".join([*states, *([f"in {waits}"] if waits.strip("0") else [])])
