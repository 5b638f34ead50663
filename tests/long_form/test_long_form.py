"""All inference modes on long recordings, compared with slow reference implementations (float64)."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from torch import Tensor

from bestrq.long_form.decoders import DecoderSettings, TransducerDecoder, decode_recordings
from bestrq.long_form.inference import (
    InferenceSettings,
    Mode,
    RecordingError,
    RecordingSource,
    StreamedOutputs,
    model_outputs,
)
from bestrq.long_form.windows import RunningAverage, plan_windows
from bestrq.model.settings import EncoderSettings
from bestrq.recognition.ctc import CTCModel, frame_log_probs
from common.errors import UserError
from common.segments import Segments
from tests.tiny_transducer import make_transducer

STRIDE, MELS, VOCAB = 4, 5, 3
WINDOWED: list[Mode] = ["buffered", "averaged"]


class WholeWindowModel:
    """Model whose log-probabilities at each frame depend on all frames of the window and on the position in it, so that
    windows differ. With `context` 0, a frame depends only on itself."""

    def __init__(self, context: float = 1.0, stride: int = STRIDE) -> None:
        generator = torch.Generator().manual_seed(7)
        self.frame_weight, self.window_weight = torch.randn(2, MELS, VOCAB, dtype=torch.float64, generator=generator)
        self.context, self.stride = context, stride

    def log_probs(self, log_mel: Tensor, segments: Segments) -> Tensor:
        is_valid = torch.arange(log_mel.shape[1]) < segments.length
        frames = (log_mel * is_valid[:, :, None]).unflatten(1, (-1, self.stride)).sum(dim=2)  # [R, T, M]
        position = torch.arange(frames.shape[1], dtype=torch.float64)[:, None] / 10
        window = (frames.sum(dim=1, keepdim=True) + position) @ self.window_weight
        return (frames @ self.frame_weight + self.context * window).log_softmax(dim=-1)

    def alone(self, log_mel: Tensor) -> Tensor:
        """Log-probabilities of one window `[F, M]`, without a batch."""
        length = len(log_mel)
        padded = torch.zeros(-(-length // self.stride) * self.stride, log_mel.shape[1], dtype=torch.float64)
        padded[:length] = log_mel
        return self.log_probs(padded[None], Segments(torch.tensor([[0]]), torch.tensor([[length]]), len(padded)))[0]


def recording(num_frames: int, seed: int = 0, mels: int = MELS) -> tuple[Tensor, RecordingSource]:
    log_mel = torch.randn(num_frames, mels, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    return log_mel, RecordingSource(num_frames, lambda start, stop: log_mel[start:stop])


def run(
    mode: Mode, source: RecordingSource, context: float, overlap: float, batch: float = 1e6,
    outputs: Callable[..., Tensor] | None = None, **more: Any,
) -> Tensor:  # fmt: skip
    """Outputs of one recording; seconds are mel frames."""
    settings = InferenceSettings(mode, context, overlap, batch)
    [(_, result)] = model_outputs(outputs or WholeWindowModel().log_probs, [source], settings, STRIDE, 1.0, **more)
    return result


def plain_windows(total: int, size: int, hop: int) -> list[tuple[int, int]]:
    """Start and stop of each window, in encoder frames."""
    windows, start = [], 0
    while start + size < total:
        windows.append((start, start + size))
        start += hop
    return [*windows, (start if hop == size else max(total - size, 0), total)]


def plain_average(windows: list[tuple[int, int]], outputs: list[Tensor], total: int) -> Tensor:
    """Mean of the probabilities over the windows."""
    sums, counts = torch.zeros(total, VOCAB, dtype=torch.float64), torch.zeros(total, 1, dtype=torch.float64)
    for (start, stop), log_probs in zip(windows, outputs, strict=True):
        sums[start:stop] += log_probs.exp()
        counts[start:stop] += 1
    return (sums / counts).log()


def plain_buffer(windows: list[tuple[int, int]], outputs: list[Tensor], total: int, size: int, hop: int) -> Tensor:
    """Output of the first window in which a frame is before the right margin, for each frame."""
    frames = []
    for t in range(total):
        for (start, stop), log_probs in zip(windows, outputs, strict=True):
            if start <= t and (t < start + hop + (size - hop) // 2 or stop == total):
                frames.append(log_probs[t - start])
                break
    return torch.stack(frames)


@hypothesis_settings(deadline=None, max_examples=120)
@given(
    total_mel=st.integers(1, 260),
    size=st.integers(1, 16),
    overlap=st.sampled_from([0.0, 0.1, 0.25, 0.5, 0.75, 0.875, 0.95]),
    batch=st.sampled_from([1, 70, 1000]),
)
def test_windows_equal_the_reference(total_mel: int, size: int, overlap: float, batch: int) -> None:
    log_mel, source = recording(total_mel)
    model = WholeWindowModel()
    total, hop = -(-total_mel // STRIDE), max(1, round(size * (1 - overlap)))
    windows = plain_windows(total, size, hop) if total > size else [(0, total)]
    outputs = [model.alone(log_mel[start * STRIDE : stop * STRIDE]) for start, stop in windows]
    averaged = run("averaged", source, size * STRIDE, overlap, batch)
    torch.testing.assert_close(averaged, plain_average(windows, outputs, total), rtol=0, atol=1e-11)
    buffered = run("buffered", source, size * STRIDE, overlap, batch)
    torch.testing.assert_close(buffered, plain_buffer(windows, outputs, total, size, hop), rtol=0, atol=1e-11)


@pytest.mark.parametrize("num_frames", range(150, 192, 3))
def test_without_overlap_both_are_plain_chunking(num_frames: int) -> None:
    log_mel, source = recording(num_frames)
    chunks = torch.cat([WholeWindowModel().alone(part) for part in log_mel.split(40)])
    for mode in WINDOWED:
        torch.testing.assert_close(run(mode, source, 40, 0.0), chunks, rtol=0, atol=1e-12)
    assert not torch.allclose(run("buffered", source, 40, 0.25), chunks)


@hypothesis_settings(deadline=None, max_examples=40)
@given(num_frames=st.integers(1, 300), context=st.integers(STRIDE, 80), overlap=st.floats(0.0, 0.95))
def test_a_model_without_context_gives_the_same_in_all_modes(num_frames: int, context: int, overlap: float) -> None:
    log_mel, source = recording(num_frames)
    model = WholeWindowModel(context=0.0)
    expected = model.alone(log_mel)
    modes: list[Mode] = ["buffered", "averaged", "whole"]
    for mode in modes:
        result = run(mode, source, context, overlap, outputs=model.log_probs)
        torch.testing.assert_close(result, expected, rtol=0, atol=1e-12)


def window_weights(total: int, size: int, overlap: float) -> Tensor:
    """Weight of each window in the average of each frame, float64 `[total, windows]`.

    Each window has all of its probability on a separate label, so that the averages are the weights.
    """
    windows = plan_windows(total * STRIDE, size * STRIDE, overlap, STRIDE)
    average, parts = RunningAverage(), []
    for number, (window, following) in enumerate(zip(windows, [*windows[1:], None], strict=True)):
        outputs = torch.full(((window.stop - window.start) // STRIDE, len(windows)), -torch.inf, dtype=torch.float64)
        outputs[:, number] = 0.0
        finished = len(outputs) if following is None else (following.start - window.start) // STRIDE
        parts.append(average.add(outputs, finished))
    assert average.log_sum is not None and len(average.log_sum) == 0
    return torch.cat(parts).exp()


def test_every_window_has_the_same_weight_at_all_lengths_modulo_window_and_hop() -> None:
    for size in range(1, 8):
        for hop in range(1, size + 1):
            for total in range(1, 3 * size + 1):
                covered = torch.zeros(total, total, dtype=torch.float64)
                spans = plain_windows(total, size, hop) if total > size else [(0, total)]
                for number, (start, stop) in enumerate(spans):
                    covered[start:stop, number] = 1.0
                expected = covered[:, : len(spans)] / covered.sum(dim=1, keepdim=True)
                result = window_weights(total, size, 1 - hop / size)
                torch.testing.assert_close(result, expected, rtol=0, atol=1e-12)


def test_an_average_of_extreme_probabilities_is_finite() -> None:
    """exp(-200) is 0 in float32, and log(0) would make a probable path impossible."""
    average = RunningAverage()
    certain = torch.tensor([[0.0, -200.0]]).expand(4, 2)
    result = torch.cat([average.add(certain, 2), average.add(certain, 4)])
    assert result.dtype == torch.float32
    torch.testing.assert_close(result, certain[:1].expand(6, 2))


def make_ctc(**changes: Any) -> CTCModel:
    torch.manual_seed(0)
    shape: dict[str, Any] = {
        "num_mels": 8, "dim": 16, "num_layers": 2, "num_heads": 2, "feedforward_dim": 24, "kernel_size": 5,
        "subsampling_channels": 4, **changes,
    }  # fmt: skip
    model = CTCModel(EncoderSettings(**shape), 6).double().eval()
    for parameter in model.encoder.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return model


@pytest.mark.parametrize("mode", WINDOWED)
@pytest.mark.parametrize("num_frames", [1, 10, 79, 80])
def test_a_window_longer_than_the_recording_is_the_whole_recording_bit_for_bit(mode: Mode, num_frames: int) -> None:
    model = make_ctc()
    _, source = recording(num_frames, mels=8)
    whole = run("whole", source, 20, 0.5, outputs=model.log_probs)
    assert torch.equal(run(mode, source, 80, 0.5, outputs=model.log_probs), whole)
    assert torch.equal(run(mode, source, 0, 0.5, outputs=model.log_probs), whole)


@pytest.mark.parametrize("mode", WINDOWED)
def test_outputs_depend_neither_on_the_batch_nor_on_its_other_recordings(mode: Mode) -> None:
    model = make_ctc()
    sources = [recording(n, n, mels=8)[1] for n in (7, 60, 61, 200, 333)]

    def outputs(order: list[int], batch: float) -> dict[int, Tensor]:
        settings = InferenceSettings(mode, 60, 0.5, batch)
        result = model_outputs(model.log_probs, [sources[i] for i in order], settings, STRIDE, 1.0)
        return {order[index]: output for index, output in result}

    alone = {i: output for n in range(5) for i, output in outputs([n], 1).items()}
    for order, batch in (([0, 1, 2, 3, 4], 1e6), ([4, 1, 3, 0, 2], 150)):
        together = outputs(order, batch)
        for index, output in alone.items():
            torch.testing.assert_close(together[index], output, rtol=0, atol=1e-12)


@pytest.mark.parametrize("left_chunks", [2, -1])
def test_a_stream_equals_one_pass_and_reads_a_chunk_at_a_time(left_chunks: int) -> None:
    model = make_ctc(mask="chunk", chunk_size=4, left_chunks=left_chunks, causal_convolution=True)
    stream = StreamedOutputs(model.encoder, lambda frames: frame_log_probs(model.head, frames))
    log_mels = [recording(n, n, mels=8)[0] for n in (1, 15, 16, 17, 203)]
    reads: list[int] = []

    def reader(log_mel: Tensor) -> Callable[[int, int], Tensor]:
        def read(start: int, stop: int) -> Tensor:
            reads.append(stop - start)
            return log_mel[start:stop]

        return read

    sources = [RecordingSource(len(log_mel), reader(log_mel)) for log_mel in log_mels]
    kept: list[Tensor] = []

    def reduce(log_probs: Tensor) -> Tensor:
        kept.append(log_probs)
        return log_probs

    settings = InferenceSettings("streaming")
    result = []
    for index, streamed in model_outputs(model.log_probs, sources, settings, STRIDE, 1.0, reduce=reduce, stream=stream):
        assert torch.equal(torch.cat(kept), streamed)
        kept.clear()
        result.append((index, streamed))
    assert max(reads) == 16 and [index for index, _ in result] == [0, 1, 2, 3, 4]
    for index, streamed in result:
        whole = run("whole", sources[index], 0, 0, outputs=model.log_probs)
        torch.testing.assert_close(streamed, whole, rtol=0, atol=1e-11)


@pytest.mark.parametrize("prediction", ["stateless", "lstm"])
def test_a_transducer_streams_to_the_tokens_of_one_pass(prediction: str) -> None:
    model = make_transducer(prediction, mask="chunk", chunk_size=4, left_chunks=2, causal_convolution=True)
    decoder = TransducerDecoder(model, DecoderSettings(max_symbols=2))
    sources = [recording(n, n, mels=8)[1] for n in (5, 64, 203)]
    modes: list[Mode] = ["streaming", "whole"]
    streamed, whole = (
        dict(decode_recordings(decoder, sources, InferenceSettings(mode), STRIDE, 100.0)) for mode in modes
    )
    assert streamed == whole and len(whole[2].ids) > 10


def test_an_encoder_that_looks_ahead_is_not_streamed() -> None:
    model = make_ctc()
    stream = StreamedOutputs(model.encoder, model.head)
    with pytest.raises(UserError, match="encoder.mask is 'segment'"):
        run("streaming", recording(50, mels=8)[1], 0, 0, outputs=model.log_probs, stream=stream)


@pytest.mark.parametrize("mode", WINDOWED)
def test_memory_does_not_grow_with_the_recording(mode: Mode, monkeypatch: pytest.MonkeyPatch) -> None:
    """Three hours at 100 mel frames per second, windows of 20 s: sizes of reads, averages and reduced outputs."""
    frames, context = 3 * 3600 * 100, 2000
    held: list[int] = []
    add = RunningAverage.add

    def counting(average: RunningAverage, log_probs: Tensor, num_finished: int) -> Tensor:
        result = add(average, log_probs, num_finished)
        assert average.log_sum is not None
        held.append(average.log_sum.untyped_storage().nbytes() // (8 * VOCAB))
        return result

    monkeypatch.setattr(RunningAverage, "add", counting)
    reads, reduced = [], []

    def read(start: int, stop: int) -> Tensor:
        reads.append(stop - start)
        return torch.zeros(stop - start, MELS, dtype=torch.float64)

    def reduce(log_probs: Tensor) -> Tensor:
        reduced.append(len(log_probs))
        return log_probs.argmax(dim=-1)

    settings = InferenceSettings(mode, 20.0, 0.5, 60.0)
    [(_, ids)] = model_outputs(
        WholeWindowModel().log_probs, [RecordingSource(frames, read)], settings, STRIDE, 100.0, reduce=reduce
    )
    assert len(ids) == sum(reduced) == frames // STRIDE
    assert max(reads) == context and max(reduced) <= context // STRIDE
    assert mode == "buffered" or max(held[:-2]) == context // STRIDE // 2 and held[-1] == 0


@pytest.mark.parametrize("mode", WINDOWED)
@pytest.mark.parametrize("num_frames", [1, 10, 500])
def test_silence_and_very_short_recordings_have_outputs(mode: Mode, num_frames: int) -> None:
    model = make_ctc()
    silence = RecordingSource(num_frames, lambda start, stop: torch.zeros(stop - start, 8, dtype=torch.float64))
    result = run(mode, silence, 120, 0.5, outputs=model.log_probs)
    assert result.shape == (-(-num_frames // STRIDE), 6) and result.isfinite().all()


@pytest.mark.parametrize("mode", [*WINDOWED, "whole", "streaming"])
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_features_that_are_not_finite_are_an_error_that_names_the_recording(mode: Mode, value: float) -> None:
    model = make_ctc(mask="chunk", chunk_size=4, causal_convolution=True)
    stream = StreamedOutputs(model.encoder, lambda frames: frame_log_probs(model.head, frames))
    log_mel, good = recording(300, mels=8)
    log_mel[211, 3] = value
    bad = RecordingSource(300, lambda start, stop: log_mel[start:stop], name="call-17")
    good = RecordingSource(40, lambda start, stop: log_mel[start:stop], name="call-16")
    result = model_outputs(
        model.log_probs, [good, bad], InferenceSettings(mode, 80, 0.5, 80), STRIDE, 1.0, stream=stream
    )  # fmt: skip
    assert next(result)[0] == 0
    with pytest.raises(RecordingError, match="call-17: .* not finite") as error:
        next(result)
    assert error.value.index == 1


def test_outputs_that_are_not_a_distribution_are_not_averaged() -> None:
    """The projected frames of a transducer have the same shape as log-probabilities."""
    log_probs = WholeWindowModel().log_probs
    with pytest.raises(UserError, match="inference.mode = 'averaged'"):
        run("averaged", recording(50)[1], 40, 0.5, outputs=lambda *rows: log_probs(*rows) + 0.1)


@pytest.mark.parametrize("mode", ["streaming", "stitched"])
def test_an_unsupported_mode_is_named(mode: Mode) -> None:
    with pytest.raises(UserError, match=f"inference.mode = '{mode}'"):
        run(mode, recording(50)[1], 40, 0.5)
