"""Log-mel extraction in worker processes, in the order of the sources."""

from __future__ import annotations

import functools
import multiprocessing
import multiprocessing.connection
import os
import signal
import threading
import traceback
import warnings
from collections.abc import Generator, Sequence
from dataclasses import dataclass, replace
from multiprocessing import forkserver, resource_tracker
from multiprocessing.connection import Connection
from multiprocessing.context import ForkServerContext, ForkServerProcess
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from common.errors import AudioWarning, UserError
from data.corpora.base import FeatureUtterance, Source, Unreadable
from data.features import FeatureSettings
from data.log_mel import LogMel
from data.recording import Recording
from data.skipped import NO_WORD_TIMES, Skipped
from data.word_times.base import check_word_times

# Limits of finished results that wait for an earlier one: number per worker, and total bytes. High enough that workers
# are not idle during a long recording, and low enough that hours of features do not accumulate in memory.
_WAITING_PER_WORKER = 8
_WAITING_BYTES = 1 << 28


@dataclass(frozen=True)
class Extracted:
    """Recording with its features."""

    recording: Recording
    log_mel: NDArray[np.float16]
    """float16 [frames, M]"""
    warnings: tuple[str, ...] = ()
    """Problems with its labels or its audio."""


def extract(source: Source, features: FeatureSettings) -> Extracted | Skipped:
    """Load a source and compute its log-mel. A UserError, an I/O error or a lack of memory gives a Skipped.

    Word times that contradict the audio are dropped with a warning: text and audio stay usable. Audio in blocks is
    never in memory as a whole: only the float16 features grow with its length. An AudioWarning is added to the warnings
    of the result; other warnings are issued again.
    """
    if isinstance(source, Unreadable):
        return Skipped(source.id, source.reason, listed=True)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", AudioWarning)
        result = _extract(source, features)
    issued = [str(warning.message) for warning in caught if issubclass(warning.category, AudioWarning)]
    for other in (warning for warning in caught if not issubclass(warning.category, AudioWarning)):
        warnings.warn_explicit(other.message, other.category, other.filename, other.lineno)
    return result if isinstance(result, Skipped) else replace(result, warnings=(*result.warnings, *issued))


def _extract(source: Source, features: FeatureSettings) -> Extracted | Skipped:
    values = bytearray()
    try:
        utterance = source.load(features)
        recording = utterance.recording
        if isinstance(utterance, FeatureUtterance):
            blocks = iter([utterance.log_mel])
        else:
            audio = [utterance.waveform] if hasattr(utterance.audio, "shape") else utterance.audio
            blocks = _log_mel(features).blocks(audio)
        for block in blocks:
            values += block.to(torch.float16).numpy().data
        log_mel = np.frombuffer(values, np.float16).reshape(-1, features.num_mels)
        recording, dropped = _with_checked_words(recording, len(log_mel) / features.frames_per_second)
    except UserError as error:
        return Skipped(source.id, str(error))
    except OSError as error:
        return Skipped(source.id, f"{source.id}: cannot be read ({error})")
    except MemoryError:
        return Skipped(source.id, f"{source.id}: not enough memory to read it; prepare with fewer --workers")
    return Extracted(recording, log_mel, (*utterance.warnings, *dropped))


def _with_checked_words(recording: Recording, seconds: float) -> tuple[Recording, tuple[str, ...]]:
    """Recording, without its word times and with a warning if they are invalid."""
    try:
        check_word_times(recording.words or (), seconds, recording.id)
    except UserError as error:
        return replace(recording, words=None), (f"{NO_WORD_TIMES}: {error}",)
    return recording, ()


def extract_all(
    sources: Sequence[Source], features: FeatureSettings, workers: int
) -> Generator[Extracted | Skipped, None, None]:
    """Yield `extract` of every source, in order, computed in `workers` processes if there are several.

    A source whose worker process dies (crash of a decoder, lack of memory) is retried once, then skipped.
    Raises RuntimeError, with the worker's traceback, for an unexpected exception.
    """
    if workers == 1:
        threads = torch.get_num_threads()
        torch.set_num_threads(1)  # as in a worker process: the numbers do not depend on `workers`
        try:
            yield from (extract(source, features) for source in sources)
        finally:
            torch.set_num_threads(threads)
        return
    pool = _Pool(sources, features, workers)
    try:
        yield from pool.results()
    finally:
        pool.stop()


class _Pool:
    """Worker processes, each served by a thread that gives it one source at a time."""

    def __init__(self, sources: Sequence[Source], features: FeatureSettings, workers: int) -> None:
        self.sources = sources
        self.taken = 0
        self.waiting: dict[int, Extracted | Skipped | RuntimeError] = {}
        self.waiting_bytes, self.most_waiting = 0, workers * _WAITING_PER_WORKER
        self.changed = threading.Condition()
        self.stopping = False
        self.workers = [_Worker(features) for _ in range(workers)]
        self.threads = [threading.Thread(target=self._serve, args=(worker,)) for worker in self.workers]
        for thread in self.threads:
            thread.start()

    def results(self) -> Generator[Extracted | Skipped, None, None]:
        """Yield the results in the order of the sources."""
        for number in range(len(self.sources)):
            with self.changed:
                while number not in self.waiting:
                    self.changed.wait()
                result = self.waiting.pop(number)
                self.waiting_bytes -= _size(result)
                self.changed.notify_all()
            if isinstance(result, RuntimeError):
                raise result
            yield result

    def stop(self) -> None:
        """Kill all processes and join their threads."""
        with self.changed:
            self.stopping = True
            self.changed.notify_all()
        for worker in self.workers:
            worker.stop()
        for thread in self.threads:
            thread.join()

    def _serve(self, worker: _Worker) -> None:
        while True:
            with self.changed:
                # No deadlock: the earliest missing result is always being computed, so waiting results get consumed.
                self.changed.wait_for(self._may_continue)
                if self.stopping or self.taken == len(self.sources):
                    return
                number = self.taken
                self.taken += 1
            source = self.sources[number]
            # Result for an unexpected exception in this thread: `results` must not wait forever.
            result: Any = RuntimeError(f"recording {source.id!r} could not be sent to a worker process")
            try:
                result = worker.extract(source)
            finally:
                with self.changed:
                    self.waiting[number] = result
                    self.waiting_bytes += _size(result)
                    self.changed.notify_all()

    def _may_continue(self) -> bool:
        return self.stopping or (len(self.waiting) < self.most_waiting and self.waiting_bytes < _WAITING_BYTES)


class _Worker:
    """Process that extracts one recording at a time; started on first use, and restarted after it dies."""

    def __init__(self, features: FeatureSettings) -> None:
        self.context = _server()
        self.features = features
        self.lock = threading.Lock()
        self.stopped = False
        self.process: ForkServerProcess | None = None

    def extract(self, source: Source) -> Extracted | Skipped | RuntimeError:
        """Result of the function `extract`, or a RuntimeError with the worker's traceback."""
        cause = ""
        for _ in range(2):  # the cause may be temporary, such as the memory use of another process
            try:
                connection = self._connection()
                connection.send(source)
                answer = connection.recv()
                if isinstance(answer, tuple):
                    recording, issued = answer
                    values = np.frombuffer(connection.recv_bytes(), np.float16)
                    return Extracted(recording, values.reshape(-1, self.features.num_mels), issued)
            except (EOFError, OSError):
                cause = self._clean_up()
                continue
            if isinstance(answer, Skipped):
                return answer
            return RuntimeError(f"recording {source.id!r} caused an error in this program:\n{answer}")
        return Skipped(source.id, f"{source.id}: two worker processes died while reading it ({cause})")

    def stop(self) -> None:
        with self.lock:
            self.stopped = True
            if self.process is not None:
                self.process.kill()

    def _connection(self) -> Connection:
        with self.lock:
            if self.stopped:
                raise EOFError
            if self.process is None:
                self.connection, worker_end = self.context.Pipe()
                process = self.context.Process(target=_work, args=(worker_end, self.features), daemon=True)
                with worker_end:  # closed here, so that the death of the process ends the stream
                    process.start()
                self.process = process
            return self.connection

    def _clean_up(self) -> str:
        """Remove the dead process; return the cause of its death."""
        with self.lock:
            if self.process is None:
                return "stopped" if self.stopped else "it could not be started"
            self.process.kill()  # it may be alive with its end of the pipe closed
            self.process.join()
            code, self.process = self.process.exitcode or 0, None
            self.connection.close()
        if code == -signal.SIGKILL:
            return "SIGKILL, most likely for lack of memory: prepare with fewer --workers"
        return signal.Signals(-code).name if code < 0 else f"exit code {code}"


def _server() -> ForkServerContext:
    """Fork server that has imported torch once. Processes, because the synthesiser is not thread-safe.

    Ctrl-C reaches the whole process group and would kill the server during its imports, so it starts with the signal
    blocked.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    resource_tracker.ensure_running()  # otherwise the server starts it, which would unblock the signal
    previous = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])
    try:
        forkserver.ensure_running()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, previous)
    return context


def _work(connection: Connection, features: FeatureSettings) -> None:
    """Loop of a worker process: receive sources; send (Recording, warnings) and features, a Skipped, or a traceback."""
    torch.set_num_threads(1)
    # Ctrl-C reaches the whole process group; only the main process handles it.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    while True:
        source = connection.recv()
        try:
            result = extract(source, features)
        except BaseException:  # a bug, which the main process reports
            connection.send(traceback.format_exc())
            raise
        if isinstance(result, Skipped):
            connection.send(result)
        else:
            connection.send((result.recording, result.warnings))
            connection.send_bytes(result.log_mel.reshape(-1).view(np.uint8).data)


def _end_with_parent() -> None:
    """Exit once the main process is dead."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    multiprocessing.connection.wait([parent.sentinel])
    os._exit(1)


def _size(result: Any) -> int:
    return result.log_mel.nbytes if isinstance(result, Extracted) else 0


@functools.cache
def _log_mel(features: FeatureSettings) -> LogMel:
    return LogMel(features)
