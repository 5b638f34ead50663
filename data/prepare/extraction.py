"""Sources to log-mel in worker processes, given back in the order of the sources."""

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

from common.errors import SoundWarning, UserError
from data.corpora.base import FeatureUtterance, Source, Unreadable
from data.features import FeatureSettings, LogMel
from data.format.schema import Recording
from data.skipped import NO_WORD_TIMES, Skipped
from data.transcripts import check_word_times

__all__ = ["Extracted", "Skipped", "extract", "extract_all"]

# Results that may wait for their turn, for each worker and in bytes: enough that no worker idles while a long recording
# is done, few enough that hours of features never pile up in memory.
_WAITING_PER_WORKER = 8
_WAITING_BYTES = 1 << 28


@dataclass(frozen=True)
class Extracted:
    """A recording with its features."""

    recording: Recording
    log_mel: NDArray[np.float16]
    """float16 [frames, M]"""
    warnings: tuple[str, ...] = ()
    """Problems with its labels or its audio."""


def extract(source: Source, features: FeatureSettings) -> Extracted | Skipped:
    """Load one source and compute its log-mel; a UserError, an I/O error or a lack of memory gives a Skipped.

    Word times that contradict the sound are dropped with a warning: text and sound stay usable. Sound that comes in
    blocks is never held whole: only the float16 features grow with its length. A SoundWarning is added to the result's
    warnings; other warnings are issued again.
    """
    if isinstance(source, Unreadable):
        return Skipped(source.id, source.reason, listed=True)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", SoundWarning)
        result = _extract(source, features)
    issued = [str(warning.message) for warning in caught if issubclass(warning.category, SoundWarning)]
    for other in (warning for warning in caught if not issubclass(warning.category, SoundWarning)):
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
            sound = [utterance.waveform] if hasattr(utterance.sound, "shape") else utterance.sound
            blocks = _log_mel(features).blocks(sound)
        for block in blocks:
            values += block.to(torch.float16).numpy().data
        log_mel = np.frombuffer(values, np.float16).reshape(-1, features.num_mels)
        recording, dropped = _with_checked_words(recording, len(log_mel) / features.frames_per_second)
    except UserError as error:
        return Skipped(source.id, str(error))
    except OSError as error:
        return Skipped(source.id, f"{source.id}: cannot be read ({error})")
    except MemoryError:
        return Skipped(source.id, f"{source.id}: there was not enough memory to read it; prepare with fewer --workers")
    return Extracted(recording, log_mel, (*utterance.warnings, *dropped))


def _with_checked_words(recording: Recording, seconds: float) -> tuple[Recording, tuple[str, ...]]:
    """The recording, without its word times if they are invalid, and the warning about it."""
    try:
        check_word_times(recording.words or (), seconds, recording.id)
    except UserError as error:
        return replace(recording, words=None), (f"{NO_WORD_TIMES}: {error}",)
    return recording, ()


def extract_all(
    sources: Sequence[Source], features: FeatureSettings, workers: int
) -> Generator[Extracted | Skipped, None, None]:
    """`extract` of every source, in order; with more than one worker in that many processes.

    A source whose worker process dies (a fault in a decoder, a want of memory) is tried once more, then skipped.
    Raises RuntimeError, with the traceback of the worker, for what is neither a UserError nor a death.
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
    """A thread for every worker process. It takes the next source, so a process that dies had that one alone."""

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
        """In the order of the sources."""
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
        """End all processes, at once, and their threads."""
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
                # The earliest missing result is always among those under way: it cannot wait for those that wait.
                self.changed.wait_for(self._may_go_on)
                if self.stopping or self.taken == len(self.sources):
                    return
                number = self.taken
                self.taken += 1
            source = self.sources[number]
            # For an exception that is not foreseen: Python prints it, and `results` must not wait for ever.
            result: Any = RuntimeError(f"recording {source.id!r} could not be handed to a worker process")
            try:
                result = worker.extract(source)
            finally:
                with self.changed:
                    self.waiting[number] = result
                    self.waiting_bytes += _size(result)
                    self.changed.notify_all()

    def _may_go_on(self) -> bool:
        return self.stopping or (len(self.waiting) < self.most_waiting and self.waiting_bytes < _WAITING_BYTES)


class _Worker:
    """A process that extracts one recording at a time; started when it is first needed, and again when it has died."""

    def __init__(self, features: FeatureSettings) -> None:
        self.context = _server()
        self.features = features
        self.lock = threading.Lock()
        self.stopped = False
        self.process: ForkServerProcess | None = None

    def extract(self, source: Source) -> Extracted | Skipped | RuntimeError:
        """As the function of that name; gives a RuntimeError with the worker's traceback for any other exception."""
        how = ""
        for _ in range(2):  # another process may have taken the memory that this one lacked
            try:
                connection = self._connection()
                connection.send(source)
                answer = connection.recv()
                if isinstance(answer, tuple):
                    recording, found = answer
                    values = np.frombuffer(connection.recv_bytes(), np.float16)
                    return Extracted(recording, values.reshape(-1, self.features.num_mels), found)
            except (EOFError, OSError):
                how = self._bury()
                continue
            if isinstance(answer, Skipped):
                return answer
            return RuntimeError(f"recording {source.id!r} met a mistake in this program:\n{answer}")
        return Skipped(source.id, f"{source.id}: two worker processes died while they read it ({how})")

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
                self.connection, theirs = self.context.Pipe()
                process = self.context.Process(target=_work, args=(theirs, self.features), daemon=True)
                with theirs:  # then the process has it alone, so that its death is the end of what can be read
                    process.start()
                self.process = process
            return self.connection

    def _bury(self) -> str:
        """What the dead process died of."""
        with self.lock:
            if self.process is None:
                return "stopped" if self.stopped else "it could not be started"
            self.process.kill()  # it may be alive, and have closed its end
            self.process.join()
            code, self.process = self.process.exitcode or 0, None
            self.connection.close()
        if code == -signal.SIGKILL:
            return "SIGKILL, most likely for want of memory: prepare with fewer --workers"
        return signal.Signals(-code).name if code < 0 else f"exit code {code}"


def _server() -> ForkServerContext:
    """Processes, as the synthesiser is not thread-safe; forked from a server that has imported torch once.

    Ctrl-C reaches the whole process group. The server would die of it while it imports, so it is started deaf to it.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    resource_tracker.ensure_running()  # else the server's start starts it, which would unblock the signal
    before = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])
    try:
        forkserver.ensure_running()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
    return context


def _work(connection: Connection, features: FeatureSettings) -> None:
    """Loop of a worker process: answers a source with (Recording, warnings) and features, a Skipped, or a str."""
    torch.set_num_threads(1)
    # Ctrl-C reaches the whole process group: the main process alone decides what it means.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    while True:
        source = connection.recv()
        try:
            result = extract(source, features)
        except BaseException:  # a bug: the main process shows it
            connection.send(traceback.format_exc())
            raise
        if isinstance(result, Skipped):
            connection.send(result)
        else:
            connection.send((result.recording, result.warnings))
            connection.send_bytes(result.log_mel.reshape(-1).view(np.uint8).data)


def _end_with_parent() -> None:
    """A worker whose main process was killed would work on for nobody."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    multiprocessing.connection.wait([parent.sentinel])
    os._exit(1)


def _size(result: Any) -> int:
    return result.log_mel.nbytes if isinstance(result, Extracted) else 0


@functools.cache
def _log_mel(features: FeatureSettings) -> LogMel:
    return LogMel(features)
