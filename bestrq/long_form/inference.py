"""Inference on recordings of any length with an encoder of bounded context.

A recording longer than the context is cut into overlapping windows. A frame near the edge of a window lacks context on
one side, and has it in the neighbouring window. Therefore either only the centre of each window is kept ("buffered":
each encoder frame is written exactly once), or the outputs of all windows are averaged ("averaged"). Windows of one or
several recordings form a batch, one window per row. Encoders that only look back can be streamed instead, chunk by
chunk with cached states.

R rows, F mel frames per row, M mel bins, T encoder frames, D model width.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from jsonargparse.typing import NonNegativeFloat, PositiveFloat
from torch import Tensor

from bestrq.long_form.windows import RunningAverage, Window, are_log_probs, plan_windows
from bestrq.model.conformer import ConformerEncoder
from bestrq.model.streaming import encode_chunk, start_stream
from common.errors import UserError
from common.segments import Segments

Mode = Literal["buffered", "averaged", "whole", "streaming", "stitched"]


@dataclass(frozen=True)
class InferenceSettings:
    """Windows, batches and precision of inference on whole recordings."""

    mode: Mode = "buffered"
    """'buffered' keeps the centre of each window; 'averaged' averages the CTC probabilities of overlapping windows;
    'stitched' decodes each window and joins the transcripts; 'whole' uses no windows but a single pass; 'streaming'
    processes chunks with cached states (encoders with mask 'chunk' and causal convolutions)"""
    context_seconds: NonNegativeFloat = 20.0
    """length of a window; 0 processes each recording in a single pass, regardless of its length, like 'whole'"""
    overlap: float = 0.25
    """share of a window that overlaps with others, half of it at each end, from 0 to below 1. Multiplies the compute by
    1 / (1 - overlap); 0 is plain chunking"""
    batch_seconds: PositiveFloat = 120.0
    """audio per batch, including padding; a longer window forms a batch alone"""
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    """precision of the encoder, by autocast; log-probabilities are always float32. auto: bfloat16 on GPUs that multiply
    it in hardware, else float32; in validation only if training is in bfloat16"""

    def __post_init__(self) -> None:
        if not 0.0 <= self.overlap < 1.0:
            raise UserError(f"inference.overlap = {self.overlap}: choose a share from 0 to below 1, such as 0.25")

    def context(self, stride: int, frames_per_second: float) -> int:
        """Mel frames of a window; 0 for the whole recording.

        Raises:
            UserError: the window is shorter than an encoder frame, which has `stride` mel frames.
        """
        if self.mode in ("whole", "streaming") or self.context_seconds == 0:
            return 0
        context = round(self.context_seconds * frames_per_second)
        if context < stride:
            raise UserError(
                f"inference.context_seconds = {self.context_seconds}: less than an encoder frame of "
                f"{stride / frames_per_second} s; choose several seconds, or 0 for whole recordings"
            )
        return context


class RecordingError(UserError):
    """A recording cannot be decoded. The message names it; the others can be decoded without it."""

    def __init__(self, index: int, message: str) -> None:
        super().__init__(message)
        self.index = index
        """index of the source"""


OutputFunction = Callable[[Tensor, Segments], Tensor]
"""function from log-mel `[R, F, M]` and its segments to the model's outputs at every frame, `[R, T, ...]`"""


@dataclass(frozen=True)
class StreamedOutputs:
    """`OutputFunction` of a stream: an encoder that can stream, and a head applied to single frames."""

    encoder: ConformerEncoder
    head: Callable[[Tensor], Tensor]
    """encoder frames `[T, D]` to outputs `[T, ...]`"""


@dataclass(frozen=True)
class RecordingSource:
    """Recording that can be read in parts."""

    num_frames: int
    """mel frames, at least 1"""
    read_mel: Callable[[int, int], Tensor]
    """function from start and stop to the normalised log-mel of these frames, float32 `[stop - start, M]`"""
    excluded: Sequence[tuple[float, float]] = ()
    """intervals (start, end) in seconds that are encoded but not decoded: see `excluded_frames`"""
    name: str = ""
    """name for error messages"""


@torch.no_grad()
def model_outputs(
    outputs: OutputFunction,
    sources: Sequence[RecordingSource],
    settings: InferenceSettings,
    stride: int,
    frames_per_second: float,
    device: torch.device | str = "cpu",
    reduce: Callable[[Tensor], Tensor] = lambda output: output,
    stream: StreamedOutputs | None = None,
) -> Iterator[tuple[int, Tensor]]:
    """Outputs of whole recordings, each as soon as its last window is done.

    Memory holds one batch, the frames that overlap with the next window, and the reduced outputs of the recordings in
    the batch; never the features of a whole recording that is longer than the context. Sort recordings by length:
    rows of a batch are padded to the longest.

    Args:
        outputs: such as `CTCModel.log_probs` of a model in evaluation mode, on `device`.
        stride: mel frames per encoder frame (`encoder.settings.stride`).
        frames_per_second: mel frames per second.
        reduce: function applied to finished frames' outputs `[n, ...]` before they leave the device, to `[n, ...]`;
            called in the order of sources and frames. Greedy CTC only needs `lambda log_probs: log_probs.argmax(-1)`.
        stream: streaming version of the same model, for mode 'streaming'.

    Yields:
        index of the source, and its reduced outputs on the CPU, T = ceil(num_frames / stride) of them.

    Raises:
        UserError: the model or its outputs do not support `settings.mode`.
        RecordingError: features are not finite.
    """
    if settings.mode == "stitched":
        raise UserError(
            "inference.mode = 'stitched' joins transcripts, but this needs outputs per frame: choose 'buffered' or "
            "'averaged'"
        )
    if settings.mode == "streaming":
        if stream is None:
            raise UserError("inference.mode = 'streaming' is not supported here: choose 'buffered' or 'whole'")
        finished = _stream(stream, sources, settings, device)
    elif settings.mode == "averaged":
        finished = _average(outputs, sources, settings, stride, frames_per_second, device)
    else:
        finished = _keep_centres(outputs, sources, settings, stride, frames_per_second, device)
    whole, filled = torch.empty(0), 0
    for index, frames, is_last in finished:
        reduced = reduce(frames)
        if not filled:
            # Allocated at once: small tensors that stay allocated would fragment the memory freed between them.
            whole = torch.empty(-(-sources[index].num_frames // stride), *reduced.shape[1:], dtype=reduced.dtype)
        whole[filled : filled + len(reduced)] = reduced
        filled += len(reduced)
        del frames, reduced
        if is_last:
            yield index, whole
            filled = 0


Finished = tuple[int, Tensor, bool]
"""index of a source, outputs of its next frames, and whether they are the last"""


def _keep_centres(
    outputs: OutputFunction, sources: Sequence[RecordingSource], settings: InferenceSettings, stride: int, rate: float,
    device: torch.device | str,
) -> Iterator[Finished]:  # fmt: skip
    for batch in run_windows(outputs, sources, settings, stride, rate, device):
        for (index, window, following), frames in batch:
            offset = window.start // stride
            yield index, frames[window.keep_start - offset : window.keep_stop - offset], following is None
            del frames


def _average(
    outputs: OutputFunction, sources: Sequence[RecordingSource], settings: InferenceSettings, stride: int, rate: float,
    device: torch.device | str,
) -> Iterator[Finished]:  # fmt: skip
    average, is_checked = RunningAverage(), False
    for batch in run_windows(outputs, sources, settings, stride, rate, device):
        for (index, window, following), frames in batch:
            if not is_checked and not (frames.dim() == 2 and are_log_probs(frames)):
                raise UserError(
                    "inference.mode = 'averaged' averages CTC probabilities, which this decoder does not have: choose "
                    "'buffered' or 'stitched'"
                )
            is_checked = True
            num_finished = len(frames) if following is None else (following.start - window.start) // stride
            yield index, average.add(frames, num_finished), following is None
            del frames


def _stream(
    stream: StreamedOutputs, sources: Sequence[RecordingSource], settings: InferenceSettings, device: torch.device | str
) -> Iterator[Finished]:
    encoder = stream.encoder
    chunk = encoder.settings.chunk_size * encoder.settings.stride
    for index, source in enumerate(sources):
        state = start_stream(encoder)
        for start in range(0, source.num_frames, chunk):
            stop = min(start + chunk, source.num_frames)
            log_mel = _read(source, index, start, stop).to(device)
            with _autocast(settings, device):
                hidden, state = encode_chunk(encoder, log_mel, state)
                frames = stream.head(hidden)
            yield index, frames, stop == source.num_frames


def excluded_frames(source: RecordingSource, num_frames: int, frames_per_second: float) -> Tensor:
    """Mask of the encoder frames whose centre is in an excluded interval, bool `[num_frames]`.

    Args:
        frames_per_second: encoder frames per second.
    """
    seconds = (0.5 + torch.arange(num_frames)) / frames_per_second
    is_excluded = torch.zeros(num_frames, dtype=torch.bool)
    for start, end in source.excluded:
        is_excluded |= (seconds >= start) & (seconds < end)
    return is_excluded


Task = tuple[int, Window, Window | None]
"""index of a source, one of its windows, and the next window of the source, None after the last"""


@torch.no_grad()
def run_windows(
    outputs: OutputFunction,
    sources: Sequence[RecordingSource],
    settings: InferenceSettings,
    stride: int,
    frames_per_second: float,
    device: torch.device | str,
) -> Iterator[list[tuple[Task, Tensor]]]:
    """Yield batches of windows, in order of sources and windows, with their outputs `[T, ...]` on the device."""
    for tasks in _batches(sources, settings, stride, frames_per_second):
        rows = _run_batch(outputs, sources, tasks, settings, stride, device)
        batch = [
            (task, row[: -(-(task[1].stop - task[1].start) // stride)]) for task, row in zip(tasks, rows, strict=True)
        ]
        del rows
        yield batch
        # Frees these outputs before the next batch is computed, if the caller holds no other reference to them.
        batch.clear()


def _batches(
    sources: Sequence[RecordingSource], settings: InferenceSettings, stride: int, frames_per_second: float
) -> Iterator[list[Task]]:
    """Yield batches of windows, each of at most `batch_seconds` or a single window."""
    context = settings.context(stride, frames_per_second)
    budget = settings.batch_seconds * frames_per_second
    batch: list[Task] = []
    longest = 0
    for index, source in enumerate(sources):
        windows = plan_windows(source.num_frames, context, settings.overlap, stride)
        for window, following in zip(windows, [*windows[1:], None], strict=True):
            length = max(longest, window.stop - window.start)
            if batch and length * (len(batch) + 1) > budget:
                yield batch
                batch, length = [], window.stop - window.start
            batch.append((index, window, following))
            longest = length
    if batch:
        yield batch


def _run_batch(
    outputs: OutputFunction, sources: Sequence[RecordingSource], batch: list[Task], settings: InferenceSettings,
    stride: int, device: torch.device | str,
) -> Tensor:  # fmt: skip
    """Outputs of windows, `[R, T, ...]` on the device. Outputs at padding frames are unused."""
    mels = [_read(sources[index], index, window.start, window.stop) for index, window, _ in batch]
    lengths = torch.tensor([[len(mel)] for mel in mels])
    row_frames = -(-int(lengths.max()) // stride) * stride
    rows = mels[0].new_zeros(len(mels), row_frames, mels[0].shape[1])
    for row, mel in zip(rows, mels, strict=True):
        row[: len(mel)] = mel
    with _autocast(settings, device):
        return outputs(rows.to(device), Segments(torch.zeros_like(lengths), lengths, row_frames))


def _read(source: RecordingSource, index: int, start: int, stop: int) -> Tensor:
    log_mel = source.read_mel(start, stop)
    # The sum is the fastest check that any NaN or infinity survives. Attention would spread a NaN over the window, and
    # argmax over NaN is the blank: the window would silently have no tokens.
    if not torch.isfinite(log_mel.sum()):
        name = source.name or f"recording {index}"
        raise RecordingError(index, f"{name}: features of the mel frames {start} to {stop} are not finite numbers")
    return log_mel


def _autocast(settings: InferenceSettings, device: torch.device | str) -> torch.autocast:
    return torch.autocast(torch.device(device).type, torch.bfloat16, enabled=settings.precision == "bfloat16")
