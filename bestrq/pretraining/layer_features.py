"""Features of every layer of a frozen encoder, and figures of features that need no labels.

N recordings, T frames of a recording at a layer's own rate, D features per frame, M mel bins.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from bestrq.model.conformer import ConformerEncoder
from common.segments import Segments

LAG_MS = 40.0
"""lag of the frame correlation: one encoder frame at a stride of 4"""
BATCH_FRAMES = 24_000
"""mel frames of a batch, padding included"""


@dataclass(frozen=True)
class Frames:
    """Frames of several recordings, one after the other."""

    values: Tensor
    """float16 or float32 [sum of T, D]"""
    lengths: tuple[int, ...]
    """frames of every recording, N numbers"""
    stride: int
    """mel frames per frame"""

    @classmethod
    def of(cls, recordings: Sequence[Tensor], stride: int) -> "Frames":
        """Join recordings `[T, D]`, at least one."""
        return cls(torch.cat(list(recordings)), tuple(map(len, recordings)), stride)

    def recordings(self) -> list[Tensor]:
        """Frames of every recording, N views `[T, D]`."""
        return list(self.values.split(list(self.lengths)))

    def select(self, numbers: Sequence[int]) -> "Frames":
        """Frames of some of the recordings, in this order."""
        parts = self.recordings()
        return Frames.of([parts[number] for number in numbers], self.stride)


def stack_log_mel(log_mel: Sequence[Tensor], stride: int) -> Frames:
    """Log-mel as features: stacks of `stride` frames, as for the targets, `[F, M]` -> `[ceil(F / stride), stride * M]`.

    An incomplete last stack is filled with zeros, so that a recording has as many frames as in an encoder.
    """
    padded = (F.pad(frames, (0, 0, 0, -len(frames) % stride)) for frames in log_mel)
    return Frames.of([frames.reshape(len(frames) // stride, -1) for frames in padded], stride)


def layer_strides(encoder: ConformerEncoder) -> list[int]:
    """Mel frames per frame of every layer: the subsampling (layer 0), then every block."""
    # The last block of a stage halves the rate: a block's output has the rate of the next block.
    stages = [*encoder.stage_of_block, encoder.stage_of_block[-1]]
    return [encoder.settings.subsampling_factor << stage for stage in stages]


@torch.no_grad()
def encode_layers(
    encoder: ConformerEncoder, log_mel: Sequence[Tensor], progress: Callable[[int], None] | None = None
) -> list[Frames]:
    """Features of every layer: layer 0 is the subsampling, layer k block k. Layers of an earlier stage have a higher
    frame rate.

    Args:
        encoder: in eval mode.
        log_mel: normalised recordings, float32 `[F, M]`.
        progress: called with the number of recordings done.

    Returns:
        Features on the CPU, float16: half of the memory of float32, and exact to 0.05 %. Values beyond the range of
        float16 are clamped, NaN is kept.
    """
    assert not encoder.training, "features are those of the eval mode"
    strides = layer_strides(encoder)
    parts: list[list[Tensor]] = [[torch.empty(0)] * len(log_mel) for _ in strides]
    done = 0
    for numbers in similar_lengths([len(frames) for frames in log_mel]):
        outputs = _layer_outputs(encoder, [log_mel[number] for number in numbers])
        for stride, output, layer in zip(strides, outputs, parts, strict=True):
            output = output.float().clamp(-65504, 65504).half().cpu()
            for row, number in zip(output, numbers, strict=True):
                layer[number] = row[: -(-len(log_mel[number]) // stride)].clone()
        done += len(numbers)
        if progress is not None:
            progress(done)
    return [Frames.of(layer, stride) for layer, stride in zip(parts, strides, strict=True)]


def similar_lengths(lengths: Sequence[int]) -> Iterator[list[int]]:
    """Numbers of the recordings of every batch: similar lengths, at most `BATCH_FRAMES` frames with padding."""
    batch: list[int] = []
    for number in sorted(range(len(lengths)), key=lambda number: -lengths[number]):
        if batch and (len(batch) + 1) * lengths[batch[0]] > BATCH_FRAMES:
            yield batch
            batch = []
        batch.append(number)
    if batch:
        yield batch


def pad_rows(log_mel: Sequence[Tensor], multiple: int) -> tuple[Tensor, Segments]:
    """Recordings `[F, M]` as rows of one segment, float32 `[N, longest F, M]`, padded to a multiple of mel frames."""
    lengths = torch.tensor([[len(frames)] for frames in log_mel])
    rows = torch.zeros(len(log_mel), -(-int(lengths.max()) // multiple) * multiple, log_mel[0].shape[1])
    for row, frames in zip(rows, log_mel, strict=True):
        row[: len(frames)] = frames
    return rows, Segments(torch.zeros_like(lengths), lengths, rows.shape[1])


def _layer_outputs(encoder: ConformerEncoder, log_mel: Sequence[Tensor]) -> list[Tensor]:
    """Output `[N, T, D]` of the subsampling and of every block, for one batch with one recording per row."""
    device = next(encoder.parameters()).device
    rows, segments = pad_rows(log_mel, encoder.settings.row_multiple)
    outputs: list[Tensor] = []
    modules = [encoder.subsampling, *encoder.blocks]
    hooks = [module.register_forward_hook(lambda _, __, output: outputs.append(output)) for module in modules]
    try:
        encoder(rows.to(device), encoder.layout(segments))
    finally:
        for hook in hooks:
            hook.remove()
    return outputs


def standardise(values: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """Zero mean and unit variance per feature, in float32; a constant feature becomes 0."""
    return (values.float() - mean) / std.clamp(min=1e-4)


def mean_and_std(values: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of every feature over frames `[N, D]`, float32 [D] each, summed in float64."""
    chunks = values.split(8192)
    mean = sum((chunk.double().sum(dim=0) for chunk in chunks), torch.zeros(values.shape[1]).double()) / len(values)
    square = sum(((chunk.double() - mean).square().sum(dim=0) for chunk in chunks), torch.zeros_like(mean))
    return mean.float(), (square / len(values)).sqrt().float()


def frame_correlation(frames: Frames, hop_ms: float, lag_ms: float = LAG_MS) -> float:
    """Correlation of each feature with itself `lag_ms` later, within recordings, mean over the features that vary.

    Near 1 the features are slow: neighbouring frames are nearly equal. At a lower frame rate the lag is one frame. NaN
    if no feature varies, or no recording is long enough.
    """
    lag = max(1, round(lag_ms / (frames.stride * hop_ms)))
    mean, std = mean_and_std(frames.values)
    pairs = [(part[:-lag].float() - mean, part[lag:].float() - mean) for part in frames.recordings() if len(part) > lag]
    if not pairs:
        return float("nan")
    first, second = (torch.cat(parts).double() for parts in zip(*pairs, strict=True))
    scale = (first.square().sum(dim=0) * second.square().sum(dim=0)).sqrt()
    varying = std.double() > 1e-4
    return float(((first * second).sum(dim=0) / scale)[varying].mean())


def effective_ranks(values: Tensor) -> tuple[float, float]:
    """Effective numbers of dimensions of frames `[N, D]`, from 1 to D; (0, 0) for constant frames.

    Of the eigenvalues l of the covariance: the participation ratio (sum l)^2 / sum l^2, and the exponential of the
    entropy of l / sum l (Roy and Vetterli 2007, "The effective rank", with eigenvalues in place of singular values).
    The first is never the larger one.
    """
    mean, _ = mean_and_std(values)
    covariance = torch.zeros(values.shape[1], values.shape[1], dtype=torch.float64)
    for chunk in values.split(8192):
        centred = chunk.double() - mean.double()
        covariance += centred.T @ centred
    if not bool(covariance.isfinite().all()):
        return float("nan"), float("nan")
    # Dividing by the trace first avoids overflow; eigenvalues below the rounding error of the largest are zero.
    trace = covariance.trace()
    if trace / len(values) < 1e-12:
        return 0.0, 0.0
    share = torch.linalg.eigvalsh(covariance / trace).clamp(min=0)
    share = share / share.sum()
    return float(1 / share.square().sum()), float(torch.special.entr(share).sum().exp())


def pooled(frames: Frames) -> Tensor:
    """Mean and standard deviation of every recording's frames, float32 `[N, 2 D]`."""
    parts = [part.float() for part in frames.recordings()]
    return torch.stack([torch.cat([part.mean(dim=0), part.std(dim=0, correction=0)]) for part in parts])


def spans(frames: Frames, hop_ms: float, recording: int, times: Sequence[tuple[float, float]]) -> list[Tensor]:
    """Frames of passages (start, end) in seconds of a recording, `[T, D]` each, at least one frame.

    A frame belongs to a passage if its centre does; frame t covers mel frames t * stride to (t + 1) * stride - 1.
    """
    ends = torch.tensor(frames.lengths).cumsum(0).tolist()
    first = ([0, *ends])[recording]
    hop = frames.stride * hop_ms / 1000
    centre = (frames.stride - 1) / 2 * hop_ms / 1000  # of frame 0
    cuts = []
    for start, end in times:
        start_frame = min(max(0, -int(-(start - centre) // hop)), frames.lengths[recording] - 1)
        end_frame = min(max(start_frame + 1, -int(-(end - centre) // hop)), frames.lengths[recording])
        cuts.append(frames.values[first + start_frame : first + end_frame].float())
    return cuts


def frame_labels(length: int, stride: int, hop_ms: float, times: Sequence[tuple[int, float, float]]) -> Tensor:
    """Label of every frame, int64 `[length]`, from passages (label, start, end) in seconds; -1 outside of them."""
    labels = torch.full((length,), -1, dtype=torch.int64)
    seconds = (torch.arange(length) * stride + (stride - 1) / 2) * hop_ms / 1000
    for label, start, end in times:
        labels[(seconds >= start) & (seconds < end)] = label
    return labels
