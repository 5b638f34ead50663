"""Recordings of any length through an encoder of bounded context.

A recording longer than the context is cut into overlapping windows, and of every window only the centre is kept: a
frame near a window's edge has seen little of its surroundings, and the next window sees more. Each encoder frame is
written exactly once. Windows of one or of many recordings share a batch, each in a row of its own.

R rows, F mel frames in a row, M mel bins, T encoder frames, V vocabulary, S segment slots.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from bestrq.config import ConfigError


@dataclass(frozen=True)
class InferenceSettings:
    """How whole recordings are cut, batched and computed."""

    context_seconds: float = 20.0
    """Length of a window; 0 gives every recording in one pass, whatever its length."""
    overlap: float = 0.25
    """Share of a window that is not kept: half at each of its ends. Costs 1 / (1 - overlap) times the compute."""
    batch_seconds: float = 120.0
    """Audio in a batch, padding included; a window longer than this is a batch by itself."""
    precision: Literal["float32", "bfloat16"] = "float32"
    """Of the encoder, by autocast; log-probabilities are always float32."""

    def __post_init__(self) -> None:
        if self.context_seconds < 0:
            raise ConfigError(
                f"inference.context_seconds = {self.context_seconds}: choose seconds, or 0 for whole recordings"
            )
        if not 0.0 <= self.overlap < 1.0:
            raise ConfigError(f"inference.overlap = {self.overlap}: choose a share from 0 to below 1, such as 0.25")
        if self.batch_seconds <= 0:
            raise ConfigError(f"inference.batch_seconds = {self.batch_seconds}: choose a positive number of seconds")


Outputs = Callable[[Tensor, Tensor, Tensor], Tensor]
"""log-mel `[R, F, M]`, segment starts and lengths `[R, S]`, to what a model gives of every frame, `[R, T, ...]`"""


@dataclass(frozen=True)
class Source:
    """A recording that can be read in parts."""

    num_frames: int
    """mel frames, at least 1"""
    read_mel: Callable[[int, int], Tensor]
    """normalised log-mel of the frames from a start to a stop, float32 `[stop - start, M]`"""
    excluded: Sequence[tuple[float, float]] = ()
    """stretches (start, end) in seconds that are heard but not scored: see `excluded_frames`"""


@dataclass(frozen=True)
class Window:
    """A stretch of a recording and the part of its output that is kept."""

    start: int
    """first mel frame, a multiple of the subsampling factor"""
    stop: int
    """mel frame after the last"""
    keep_start: int
    """first encoder frame of the recording that is taken from this window"""
    keep_stop: int
    """encoder frame after the last that is"""


def plan_windows(num_frames: int, context: int, overlap: float, factor: int) -> list[Window]:
    """Windows of at most `context` mel frames; their kept parts tile the encoder frames of the recording.

    All windows but the last begin a hop of `(1 - overlap) * context` apart. The last one is moved back to end with
    the recording, so that it too has a full context.

    Args:
        num_frames: mel frames of the recording.
        context: mel frames of a window; 0 for the whole recording.
        overlap: share of a window that is not kept.
        factor: mel frames of an encoder frame.
    """
    if context == 0 or num_frames <= context:
        return [Window(0, num_frames, 0, -(-num_frames // factor))]
    # All in encoder frames from here: a window that began between two would shift the grid of the subsampling.
    total, size = -(-num_frames // factor), max(1, context // factor)
    hop = min(size, max(1, round(size * (1 - overlap))))
    margin = (size - hop) // 2
    windows: list[Window] = []
    kept = 0
    while kept < total:
        start = min(max(kept - margin, 0), max(total - size, 0))
        last = start + size >= total
        keep_stop = total if last else start + margin + hop
        windows.append(Window(start * factor, min((start + size) * factor, num_frames), kept, keep_stop))
        kept = keep_stop
    return windows


@torch.no_grad()
def transcribe(
    outputs: Outputs,
    sources: Sequence[Source],
    settings: InferenceSettings,
    factor: int,
    frames_per_second: float,
    device: torch.device | str = "cpu",
    reduce: Callable[[Tensor], Tensor] = lambda output: output,
) -> Iterator[tuple[int, Tensor]]:
    """Outputs of whole recordings, each as soon as its last window is done.

    Memory holds one batch and the outputs of the recordings in it, never the features of a whole recording that is
    longer than the context. Put recordings of similar length side by side: rows of a batch are padded to the longest.

    Args:
        outputs: such as `CTCModel.log_probs` of a model in evaluation mode, on `device`.
        factor: mel frames of an encoder frame (`encoder.settings.stride`).
        frames_per_second: mel frames of a second.
        reduce: what is kept of a window's outputs `[n, ...]` before they leave the device, `[n, ...]`; called in the
            order of windows and sources. Greedy CTC needs only `lambda log_probs: log_probs.argmax(-1)`.

    Yields:
        index of the source, and its outputs on the CPU, T = ceil(num_frames / factor) of them, reduced.
    """
    context = round(settings.context_seconds * frames_per_second)
    if settings.context_seconds and context < factor:
        raise ConfigError(
            f"inference.context_seconds = {settings.context_seconds}: less than an encoder frame of "
            f"{factor / frames_per_second} s; choose several seconds, or 0 for whole recordings"
        )
    parts: dict[int, list[Tensor]] = {}
    for batch in _batches(sources, context, settings, factor, frames_per_second):
        rows = _run_windows(outputs, sources, batch, settings, factor, device)
        for (index, window, is_last), row in zip(batch, rows, strict=True):
            offset = window.start // factor
            kept = row[window.keep_start - offset : window.keep_stop - offset]
            parts.setdefault(index, []).append(reduce(kept).cpu())
            if is_last:
                yield index, torch.cat(parts.pop(index))


def excluded_frames(source: Source, num_frames: int, frames_per_second: float) -> Tensor:
    """Which of a source's encoder frames have their middle in an excluded stretch: bool `[num_frames]`.

    frames_per_second: encoder frames of a second.
    """
    seconds = (0.5 + torch.arange(num_frames)) / frames_per_second
    inside = torch.zeros(num_frames, dtype=torch.bool)
    for start, end in source.excluded:
        inside |= (seconds >= start) & (seconds < end)
    return inside


Task = tuple[int, Window, bool]
"""source, window, and whether it is the source's last"""


def _batches(
    sources: Sequence[Source], context: int, settings: InferenceSettings, factor: int, frames_per_second: float
) -> Iterator[list[Task]]:
    """All windows in order, as many at a time as the budget allows."""
    budget = settings.batch_seconds * frames_per_second
    batch: list[Task] = []
    longest = 0
    for index, source in enumerate(sources):
        windows = plan_windows(source.num_frames, context, settings.overlap, factor)
        for window in windows:
            length = max(longest, window.stop - window.start)
            if batch and length * (len(batch) + 1) > budget:
                yield batch
                batch, length = [], window.stop - window.start
            batch.append((index, window, window is windows[-1]))
            longest = length
    if batch:
        yield batch


def _run_windows(
    outputs: Outputs,
    sources: Sequence[Source],
    batch: list[Task],
    settings: InferenceSettings,
    factor: int,
    device: torch.device | str,
) -> Tensor:
    """Outputs of the windows, `[R, T, ...]` on the device; frames after a window's end mean nothing."""
    mels = [sources[index].read_mel(window.start, window.stop) for index, window, _ in batch]
    lengths = torch.tensor([[len(mel)] for mel in mels])
    row_frames = -(-int(lengths.max()) // factor) * factor
    rows = mels[0].new_zeros(len(mels), row_frames, mels[0].shape[1])
    for row, mel in zip(rows, mels, strict=True):
        row[: len(mel)] = mel
    use_bfloat16 = settings.precision == "bfloat16"
    with torch.autocast(torch.device(device).type, torch.bfloat16, enabled=use_bfloat16):
        return outputs(rows.to(device), torch.zeros_like(lengths), lengths)
