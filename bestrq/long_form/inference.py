"""Recordings of any length through an encoder of bounded context.

A recording longer than the context is cut into overlapping windows. A frame near a window's edge has seen little of its
surroundings, and the next window sees more: so only the centre of every window is kept ("buffered"; each encoder frame
is written exactly once), or the windows' outputs are averaged. Windows of one or of many recordings share a batch, each
in a row of its own. Encoders that look back only are streamed instead: chunk by chunk with what they remember.

R rows, F mel frames in a row, M mel bins, T encoder frames, D model width, V vocabulary, S segment slots.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from bestrq.long_form.windows import RunningAverage, Window, are_log_probs, plan_windows
from bestrq.model.conformer import ConformerEncoder
from bestrq.model.streaming import encode_chunk, start_stream
from common.errors import UserError
from common.segments import Segments

Mode = Literal["buffered", "averaged", "whole", "streaming", "stitched"]


@dataclass(frozen=True)
class InferenceSettings:
    """How whole recordings are cut, batched and computed."""

    mode: Mode = "buffered"
    """what becomes of the windows of a recording: 'buffered' keeps the centre of each, 'averaged' takes the mean of
    their CTC probabilities, 'stitched' searches each and joins the transcripts; 'whole' has no windows but one pass;
    'streaming' goes chunk by chunk with caches (encoders with mask 'chunk' and causal convolutions)"""
    context_seconds: float = 20.0
    """length of a window; 0 gives every recording in one pass, whatever its length, as 'whole' does"""
    overlap: float = 0.25
    """share of a window that others see too: half at each of its ends. Costs 1 / (1 - overlap) times the compute; 0
    is plain chunking"""
    batch_seconds: float = 120.0
    """audio in a batch, padding included; a window longer than this is a batch by itself"""
    precision: Literal["float32", "bfloat16"] = "float32"
    """of the encoder, by autocast; log-probabilities are always float32"""

    def __post_init__(self) -> None:
        if self.mode not in get_args(Mode):
            raise UserError(f"inference.mode = {self.mode!r}: choose one of {', '.join(get_args(Mode))}")
        if self.context_seconds < 0:
            raise UserError(
                f"inference.context_seconds = {self.context_seconds}: choose seconds, or 0 for whole recordings"
            )
        if not 0.0 <= self.overlap < 1.0:
            raise UserError(f"inference.overlap = {self.overlap}: choose a share from 0 to below 1, such as 0.25")
        if self.batch_seconds <= 0:
            raise UserError(f"inference.batch_seconds = {self.batch_seconds}: choose a positive number of seconds")

    def context(self, factor: int, frames_per_second: float) -> int:
        """Mel frames of a window; 0 for the whole recording.

        Raises:
            UserError: it is shorter than an encoder frame, of `factor` mel frames.
        """
        if self.mode in ("whole", "streaming") or self.context_seconds == 0:
            return 0
        context = round(self.context_seconds * frames_per_second)
        if context < factor:
            raise UserError(
                f"inference.context_seconds = {self.context_seconds}: less than an encoder frame of "
                f"{factor / frames_per_second} s; choose several seconds, or 0 for whole recordings"
            )
        return context


class RecordingError(UserError):
    """A recording cannot be used. The message names it; the others can be decoded without it."""

    def __init__(self, index: int, message: str) -> None:
        super().__init__(message)
        self.index = index
        """of the source"""


Outputs = Callable[[Tensor, Segments], Tensor]
"""Log-mel `[R, F, M]` and its segments to a model's output at every frame, `[R, T, ...]`"""


@dataclass(frozen=True)
class StreamedOutputs:
    """What `Outputs` gives, from an encoder that can stream and a head that looks at one frame at a time."""

    encoder: ConformerEncoder
    head: Callable[[Tensor], Tensor]
    """encoder frames `[T, D]` to `[T, ...]`"""


@dataclass(frozen=True)
class Source:
    """A recording that can be read in parts."""

    num_frames: int
    """mel frames, at least 1"""
    read_mel: Callable[[int, int], Tensor]
    """normalised log-mel of the frames from a start to a stop, float32 `[stop - start, M]`"""
    excluded: Sequence[tuple[float, float]] = ()
    """stretches (start, end) in seconds that are heard but not scored: see `excluded_frames`"""
    name: str = ""
    """what an error calls it"""


@torch.no_grad()
def transcribe(
    outputs: Outputs,
    sources: Sequence[Source],
    settings: InferenceSettings,
    factor: int,
    frames_per_second: float,
    device: torch.device | str = "cpu",
    reduce: Callable[[Tensor], Tensor] = lambda output: output,
    stream: StreamedOutputs | None = None,
) -> Iterator[tuple[int, Tensor]]:
    """Outputs of whole recordings, each as soon as its last window is done.

    Memory holds one batch, the frames that a later window sees too, and what is kept of the recordings in it; never
    the features of a whole recording that is longer than the context. Put recordings of similar length side by side:
    rows of a batch are padded to the longest.

    Args:
        outputs: such as `CTCModel.log_probs` of a model in evaluation mode, on `device`.
        factor: mel frames of an encoder frame (`encoder.settings.stride`).
        frames_per_second: mel frames of a second.
        reduce: what is kept of finished frames' outputs `[n, ...]` before they leave the device, `[n, ...]`; called in
            the order of frames and sources. Greedy CTC needs only `lambda log_probs: log_probs.argmax(-1)`.
        stream: of the same model, for mode 'streaming'.

    Yields:
        index of the source, and its outputs on the CPU, T = ceil(num_frames / factor) of them, reduced.

    Raises:
        UserError: the model, or what is done with the outputs, does not go with `settings.mode`.
        RecordingError: features are not finite.
    """
    if settings.mode == "stitched":
        raise UserError(
            "inference.mode = 'stitched' joins transcripts, but frames are wanted here: choose 'buffered' or 'averaged'"
        )
    if settings.mode == "streaming":
        if stream is None:
            raise UserError("inference.mode = 'streaming' is not possible here: choose 'buffered' or 'whole'")
        finished = _stream(stream, sources, settings, device)
    elif settings.mode == "averaged":
        finished = _average(outputs, sources, settings, factor, frames_per_second, device)
    else:
        finished = _keep_centres(outputs, sources, settings, factor, frames_per_second, device)
    whole, filled = torch.empty(0), 0
    for index, frames, is_last in finished:
        kept = reduce(frames)
        if not filled:
            # At once: small pieces that stay would keep the allocator from joining what is freed between them.
            whole = torch.empty(-(-sources[index].num_frames // factor), *kept.shape[1:], dtype=kept.dtype)
        whole[filled : filled + len(kept)] = kept
        filled += len(kept)
        del frames, kept
        if is_last:
            yield index, whole
            filled = 0


Finished = tuple[int, Tensor, bool]
"""source, outputs of the next of its frames, and whether they are its last"""


def _keep_centres(
    outputs: Outputs, sources: Sequence[Source], settings: InferenceSettings, factor: int, rate: float,
    device: torch.device | str,
) -> Iterator[Finished]:  # fmt: skip
    for done in run_windows(outputs, sources, settings, factor, rate, device):
        for (index, window, following), frames in done:
            offset = window.start // factor
            yield index, frames[window.keep_start - offset : window.keep_stop - offset], following is None
            del frames


def _average(
    outputs: Outputs, sources: Sequence[Source], settings: InferenceSettings, factor: int, rate: float,
    device: torch.device | str,
) -> Iterator[Finished]:  # fmt: skip
    average, is_checked = RunningAverage(), False
    for done in run_windows(outputs, sources, settings, factor, rate, device):
        for (index, window, following), frames in done:
            if not is_checked and not (frames.dim() == 2 and are_log_probs(frames)):
                raise UserError(
                    "inference.mode = 'averaged' takes the mean of CTC probabilities, which this decoder does not "
                    "have: choose 'buffered' or 'stitched'"
                )
            is_checked = True
            num_finished = len(frames) if following is None else (following.start - window.start) // factor
            yield index, average.add(frames, num_finished), following is None
            del frames


def _stream(
    stream: StreamedOutputs, sources: Sequence[Source], settings: InferenceSettings, device: torch.device | str
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


def excluded_frames(source: Source, num_frames: int, frames_per_second: float) -> Tensor:
    """Which of a source's encoder frames have their middle in an excluded stretch: bool `[num_frames]`.

    frames_per_second: encoder frames of a second.
    """
    seconds = (0.5 + torch.arange(num_frames)) / frames_per_second
    inside = torch.zeros(num_frames, dtype=torch.bool)
    for start, end in source.excluded:
        inside |= (seconds >= start) & (seconds < end)
    return inside


Task = tuple[int, Window, Window | None]
"""source, window, and the source's next window: None after the last"""


@torch.no_grad()
def run_windows(
    outputs: Outputs,
    sources: Sequence[Source],
    settings: InferenceSettings,
    factor: int,
    frames_per_second: float,
    device: torch.device | str,
) -> Iterator[list[tuple[Task, Tensor]]]:
    """All windows of all recordings in order, a batch at a time, with their outputs `[T, ...]` on the device."""
    for batch in _batches(sources, settings, factor, frames_per_second):
        rows = _run_batch(outputs, sources, batch, settings, factor, device)
        done = [
            (task, row[: -(-(task[1].stop - task[1].start) // factor)]) for task, row in zip(batch, rows, strict=True)
        ]
        del rows
        yield done
        # Or these outputs would lie beside those of the next batch. Who is given them must let go of them, too.
        done.clear()


def _batches(
    sources: Sequence[Source], settings: InferenceSettings, factor: int, frames_per_second: float
) -> Iterator[list[Task]]:
    """As many windows at a time as the budget allows."""
    context = settings.context(factor, frames_per_second)
    budget = settings.batch_seconds * frames_per_second
    batch: list[Task] = []
    longest = 0
    for index, source in enumerate(sources):
        windows = plan_windows(source.num_frames, context, settings.overlap, factor)
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
    outputs: Outputs, sources: Sequence[Source], batch: list[Task], settings: InferenceSettings, factor: int,
    device: torch.device | str,
) -> Tensor:  # fmt: skip
    """Outputs of the windows, `[R, T, ...]` on the device; frames after a window's end mean nothing."""
    mels = [_read(sources[index], index, window.start, window.stop) for index, window, _ in batch]
    lengths = torch.tensor([[len(mel)] for mel in mels])
    row_frames = -(-int(lengths.max()) // factor) * factor
    rows = mels[0].new_zeros(len(mels), row_frames, mels[0].shape[1])
    for row, mel in zip(rows, mels, strict=True):
        row[: len(mel)] = mel
    with _autocast(settings, device):
        return outputs(rows.to(device), Segments(torch.zeros_like(lengths), lengths, row_frames))


def _read(source: Source, index: int, start: int, stop: int) -> Tensor:
    log_mel = source.read_mel(start, stop)
    # The quickest look that any NaN or infinity survives. Attention would spread it over the window, where the
    # likeliest label of nothing but NaN is the blank: a silent hole.
    if not torch.isfinite(log_mel.sum()):
        name = source.name or f"recording {index}"
        raise RecordingError(index, f"{name}: features of the mel frames {start} to {stop} are not finite numbers")
    return log_mel


def _autocast(settings: InferenceSettings, device: torch.device | str) -> torch.autocast:
    return torch.autocast(torch.device(device).type, torch.bfloat16, enabled=settings.precision == "bfloat16")
