"""Sources to log-mel in worker processes, given back in the order of the sources."""

from __future__ import annotations

import functools
import multiprocessing
import multiprocessing.connection
import os
import signal
import threading
from collections import deque
from collections.abc import Generator, Iterable
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from itertools import islice

import numpy as np
import torch
from numpy.typing import NDArray

from data.corpora.base import Source
from data.errors import DataError
from data.features import FeatureSettings, LogMel
from data.index import Recording
from data.transcripts import check_word_times

# Results that may wait for their turn, for each worker: enough that no worker idles while a long recording is done, few
# enough that hours of features never pile up in memory.
_WAITING_PER_WORKER = 8


@dataclass(frozen=True)
class Extracted:
    """A recording with its features."""

    recording: Recording
    log_mel: NDArray[np.float16]
    """float16 [frames, M]"""


@dataclass(frozen=True)
class Skipped:
    """A recording that cannot be used."""

    id: str
    reason: str


def extract(source: Source, features: FeatureSettings) -> Extracted | Skipped:
    """Load one source and compute its log-mel; a DataError on the way makes it a skipped one."""
    try:
        utterance = source.load(features)
        recording = utterance.recording
        check_word_times(recording.words or (), len(utterance.waveform) / features.sample_rate, recording.id)
        log_mel = _log_mel(features)(utterance.waveform)
    except DataError as error:
        return Skipped(source.id, str(error))
    return Extracted(recording, log_mel.to(torch.float16).numpy())


def extract_all(
    sources: Iterable[Source], features: FeatureSettings, workers: int
) -> Generator[Extracted | Skipped, None, None]:
    """`extract` of every source, in order; with more than one worker in that many processes.

    Raises DataError when a worker process dies.
    """
    if workers == 1:
        threads = torch.get_num_threads()
        torch.set_num_threads(1)  # as in a worker process: the numbers do not depend on `workers`
        try:
            yield from (extract(source, features) for source in sources)
        finally:
            torch.set_num_threads(threads)
        return
    # Processes, as the synthesiser is not thread-safe; forked from a server that has imported torch once.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    pool = ProcessPoolExecutor(workers, mp_context=context, initializer=_start_worker)
    try:
        remaining = iter(sources)
        waiting: deque[Future[Extracted | Skipped]] = deque(
            pool.submit(extract, source, features) for source in islice(remaining, workers * _WAITING_PER_WORKER)
        )
        while waiting:
            result = waiting.popleft().result()
            waiting.extend(pool.submit(extract, source, features) for source in islice(remaining, 1))
            yield result
    except BrokenProcessPool as error:
        raise DataError(
            "a worker process died, most likely for want of memory; what is finished is kept: run the same command "
            f"again with fewer than {workers} --workers"
        ) from error
    finally:
        pool.shutdown(cancel_futures=True)


def _start_worker() -> None:
    torch.set_num_threads(1)
    # Ctrl-C reaches the whole process group: the main process alone decides what it means.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """A worker whose main process was killed would wait for work for ever."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    multiprocessing.connection.wait([parent.sentinel])
    os._exit(1)


@functools.cache
def _log_mel(features: FeatureSettings) -> LogMel:
    return LogMel(features)
