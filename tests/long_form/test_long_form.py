"""Every way through a long recording, against plain code that is slow and obviously right (float64)."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from bestrq.long_form.decoders import DecoderSettings, TransducerDecoder, decode_recordings
from bestrq.long_form.inference import InferenceSettings, Mode, RecordingError, Source, StreamedOutputs, transcribe
from bestrq.long_form.windows import RunningAverage, plan_windows
from bestrq.model.settings import EncoderSettings
from bestrq.recognition.ctc import CTCModel, frame_log_probs
from common.errors import UserError
from common.segments import Segments
from tests.tiny_transducer import make_transducer

FACTOR, MELS, VOCAB = 4, 5, 3
WINDOWED: list[Mode] = ["buffered", "averaged"]


class WholeWindowModel:
    """Log-probabilities of every frame that depend on all of its window, and on its place there: no two windows give
    the same. `context` 0 makes a frame depend on itself alone."""

    def __init__(self, context: float = 1.0, factor: int = FACTOR) -> None:
        generator = torch.Generator().manual_seed(7)
        self.own, self.all = torch.randn(2, MELS, VOCAB, dtype=torch.float64, generator=generator)
        self.context, self.factor = context, factor

    def log_probs(self, log_mel: Tensor, segments: Segments) -> Tensor:
        inside = torch.arange(log_mel.shape[1]) < segments.length
        frames = (log_mel * inside[:, :, None]).unflatten(1, (-1, self.factor)).sum(dim=2)  # [R, T, M]
        place = torch.arange(frames.shape[1], dtype=torch.float64)[:, None] / 10
        of_window = (frames.sum(dim=1, keepdim=True) + place) @ self.all
        return (frames @ self.own + self.context * of_window).log_softmax(dim=-1)

    def alone(self, log_mel: Tensor) -> Tensor:
        """Of one window `[F, M]`, without a batch."""
        length = len(log_mel)
        padded = torch.zeros(-(-length // self.factor) * self.factor, log_mel.shape[1], dtype=torch.float64)
        padded[:length] = log_mel
        return self.log_probs(padded[None], Segments(torch.tensor([[0]]), torch.tensor([[length]]), len(padded)))[0]


def recording(num_frames: int, seed: int = 0, mels: int = MELS) -> tuple[Tensor, Source]:
    log_mel = torch.randn(num_frames, mels, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    return log_mel, Source(num_frames, lambda start, stop: log_mel[start:stop])


def run(
    mode: Mode, source: Source, context: float, overlap: float, batch: float = 1e6,
    outputs: Callable[..., Tensor] | None = None, **more: Any,
) -> Tensor:  # fmt: skip
    """Outputs of one recording; seconds are mel frames."""
    how = InferenceSettings(mode, context, overlap, batch)
    [(_, found)] = transcribe(outputs or WholeWindowModel().log_probs, [source], how, FACTOR, 1.0, **more)
    return found


def plain_windows(total: int, size: int, hop: int) -> list[tuple[int, int]]:
    """First frame and frame after the last of every window, in encoder frames."""
    windows, start = [], 0
    while start + size < total:
        windows.append((start, start + size))
        start += hop
    return [*windows, (start if hop == size else max(total - size, 0), total)]


def plain_average(windows: list[tuple[int, int]], outputs: list[Tensor], total: int) -> Tensor:
    """Probabilities added up and divided by how many there were."""
    sums, counts = torch.zeros(total, VOCAB, dtype=torch.float64), torch.zeros(total, 1, dtype=torch.float64)
    for (start, stop), log_probs in zip(windows, outputs, strict=True):
        sums[start:stop] += log_probs.exp()
        counts[start:stop] += 1
    return (sums / counts).log()


def plain_buffer(windows: list[tuple[int, int]], outputs: list[Tensor], total: int, size: int, hop: int) -> Tensor:
    """Of every frame, the first window that has it before its right margin."""
    frames = []
    for t in range(total):
        for (start, stop), log_probs in zip(windows, outputs, strict=True):
            if start <= t and (t < start + hop + (size - hop) // 2 or stop == total):
                frames.append(log_probs[t - start])
                break
    return torch.stack(frames)


@settings(deadline=None, max_examples=120)
@given(
    total_mel=st.integers(1, 260),
    size=st.integers(1, 16),
    overlap=st.sampled_from([0.0, 0.1, 0.25, 0.5, 0.75, 0.875, 0.95]),
    batch=st.sampled_from([1, 70, 1000]),
)
def test_windows_equal_the_plain_definition(total_mel: int, size: int, overlap: float, batch: int) -> None:
    log_mel, source = recording(total_mel)
    model = WholeWindowModel()
    total, hop = -(-total_mel // FACTOR), max(1, round(size * (1 - overlap)))
    windows = plain_windows(total, size, hop) if total > size else [(0, total)]
    outputs = [model.alone(log_mel[start * FACTOR : stop * FACTOR]) for start, stop in windows]
    averaged = run("averaged", source, size * FACTOR, overlap, batch)
    torch.testing.assert_close(averaged, plain_average(windows, outputs, total), rtol=0, atol=1e-11)
    buffered = run("buffered", source, size * FACTOR, overlap, batch)
    torch.testing.assert_close(buffered, plain_buffer(windows, outputs, total, size, hop), rtol=0, atol=1e-11)


@pytest.mark.parametrize("num_frames", range(150, 192, 3))
def test_without_overlap_both_are_plain_chunking(num_frames: int) -> None:
    log_mel, source = recording(num_frames)
    chunks = torch.cat([WholeWindowModel().alone(part) for part in log_mel.split(40)])
    for mode in WINDOWED:
        torch.testing.assert_close(run(mode, source, 40, 0.0), chunks, rtol=0, atol=1e-12)
    assert not torch.allclose(run("buffered", source, 40, 0.25), chunks)


@settings(deadline=None, max_examples=40)
@given(num_frames=st.integers(1, 300), context=st.integers(FACTOR, 80), overlap=st.floats(0.0, 0.95))
def test_a_model_without_context_gives_the_same_in_all_modes(num_frames: int, context: int, overlap: float) -> None:
    log_mel, source = recording(num_frames)
    model = WholeWindowModel(context=0.0)
    expected = model.alone(log_mel)
    modes: list[Mode] = ["buffered", "averaged", "whole"]
    for mode in modes:
        found = run(mode, source, context, overlap, outputs=model.log_probs)
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)


def weights_of_windows(total: int, size: int, overlap: float) -> Tensor:
    """What share of a frame comes from which window, float64 `[total, windows]`.

    Each window gives all of its frames to a label of its own, so that the averages are the weights.
    """
    windows = plan_windows(total * FACTOR, size * FACTOR, overlap, FACTOR)
    average, parts = RunningAverage(), []
    for number, (window, following) in enumerate(zip(windows, [*windows[1:], None], strict=True)):
        outputs = torch.full(((window.stop - window.start) // FACTOR, len(windows)), -torch.inf, dtype=torch.float64)
        outputs[:, number] = 0.0
        finished = len(outputs) if following is None else (following.start - window.start) // FACTOR
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
                found = weights_of_windows(total, size, 1 - hop / size)
                torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)


def test_an_average_of_certainties_stays_a_number() -> None:
    """exp(-200) is 0 in float32, and the log of 0 would make a likely path impossible."""
    average = RunningAverage()
    certain = torch.tensor([[0.0, -200.0]]).expand(4, 2)
    found = torch.cat([average.add(certain, 2), average.add(certain, 4)])
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, certain[:1].expand(6, 2))


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
def test_outputs_depend_neither_on_the_batch_nor_on_who_shares_it(mode: Mode) -> None:
    model = make_ctc()
    sources = [recording(n, n, mels=8)[1] for n in (7, 60, 61, 200, 333)]

    def outputs(order: list[int], batch: float) -> dict[int, Tensor]:
        how = InferenceSettings(mode, 60, 0.5, batch)
        found = transcribe(model.log_probs, [sources[i] for i in order], how, FACTOR, 1.0)
        return {order[index]: one for index, one in found}

    alone = {i: one for n in range(5) for i, one in outputs([n], 1).items()}
    for order, batch in (([0, 1, 2, 3, 4], 1e6), ([4, 1, 3, 0, 2], 150)):
        together = outputs(order, batch)
        for index, one in alone.items():
            torch.testing.assert_close(together[index], one, rtol=0, atol=1e-12)


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

    sources = [Source(len(log_mel), reader(log_mel)) for log_mel in log_mels]
    kept: list[Tensor] = []

    def reduce(log_probs: Tensor) -> Tensor:
        kept.append(log_probs)
        return log_probs

    how = InferenceSettings("streaming")
    found = []
    for index, streamed in transcribe(model.log_probs, sources, how, FACTOR, 1.0, reduce=reduce, stream=stream):
        assert torch.equal(torch.cat(kept), streamed)
        kept.clear()
        found.append((index, streamed))
    assert max(reads) == 16 and [index for index, _ in found] == [0, 1, 2, 3, 4]
    for index, streamed in found:
        whole = run("whole", sources[index], 0, 0, outputs=model.log_probs)
        torch.testing.assert_close(streamed, whole, rtol=0, atol=1e-11)


@pytest.mark.parametrize("prediction", ["stateless", "lstm"])
def test_a_transducer_streams_to_the_tokens_of_one_pass(prediction: str) -> None:
    model = make_transducer(prediction, mask="chunk", chunk_size=4, left_chunks=2, causal_convolution=True)
    decoder = TransducerDecoder(model, DecoderSettings(max_symbols=2))
    sources = [recording(n, n, mels=8)[1] for n in (5, 64, 203)]
    modes: list[Mode] = ["streaming", "whole"]
    streamed, whole = (
        dict(decode_recordings(decoder, sources, InferenceSettings(mode), FACTOR, 100.0)) for mode in modes
    )
    assert streamed == whole and len(whole[2].ids) > 10


def test_an_encoder_that_looks_ahead_is_not_streamed() -> None:
    model = make_ctc()
    stream = StreamedOutputs(model.encoder, model.head)
    with pytest.raises(UserError, match="encoder.mask is 'segment'"):
        run("streaming", recording(50, mels=8)[1], 0, 0, outputs=model.log_probs, stream=stream)


@pytest.mark.parametrize("mode", WINDOWED)
def test_what_is_held_does_not_grow_with_the_recording(mode: Mode, monkeypatch: pytest.MonkeyPatch) -> None:
    """Three hours of 100 mel frames a second, each window 20 s: batches, unfinished frames, frames given at once."""
    frames, context = 3 * 3600 * 100, 2000
    held: list[int] = []
    add = RunningAverage.add

    def counted(average: RunningAverage, log_probs: Tensor, num_finished: int) -> Tensor:
        found = add(average, log_probs, num_finished)
        assert average.log_sum is not None
        held.append(average.log_sum.untyped_storage().nbytes() // (8 * VOCAB))
        return found

    monkeypatch.setattr(RunningAverage, "add", counted)
    reads, given = [], []

    def read(start: int, stop: int) -> Tensor:
        reads.append(stop - start)
        return torch.zeros(stop - start, MELS, dtype=torch.float64)

    def reduce(log_probs: Tensor) -> Tensor:
        given.append(len(log_probs))
        return log_probs.argmax(dim=-1)

    how = InferenceSettings(mode, 20.0, 0.5, 60.0)
    [(_, ids)] = transcribe(WholeWindowModel().log_probs, [Source(frames, read)], how, FACTOR, 100.0, reduce=reduce)
    assert len(ids) == sum(given) == frames // FACTOR
    assert max(reads) == context and max(given) <= context // FACTOR
    assert mode == "buffered" or max(held[:-2]) == context // FACTOR // 2 and held[-1] == 0


@pytest.mark.parametrize("mode", WINDOWED)
@pytest.mark.parametrize("num_frames", [1, 10, 500])
def test_silence_and_a_tenth_of_a_second_are_recordings_too(mode: Mode, num_frames: int) -> None:
    model = make_ctc()
    silence = Source(num_frames, lambda start, stop: torch.zeros(stop - start, 8, dtype=torch.float64))
    found = run(mode, silence, 120, 0.5, outputs=model.log_probs)
    assert found.shape == (-(-num_frames // FACTOR), 6) and found.isfinite().all()


@pytest.mark.parametrize("mode", [*WINDOWED, "whole", "streaming"])
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_features_that_are_no_numbers_are_an_error_that_names_the_recording(mode: Mode, value: float) -> None:
    model = make_ctc(mask="chunk", chunk_size=4, causal_convolution=True)
    stream = StreamedOutputs(model.encoder, lambda frames: frame_log_probs(model.head, frames))
    log_mel, good = recording(300, mels=8)
    log_mel[211, 3] = value
    bad = Source(300, lambda start, stop: log_mel[start:stop], name="call-17")
    good = Source(40, lambda start, stop: log_mel[start:stop], name="call-16")
    found = transcribe(
        model.log_probs, [good, bad], InferenceSettings(mode, 80, 0.5, 80), FACTOR, 1.0, stream=stream
    )  # fmt: skip
    assert next(found)[0] == 0
    with pytest.raises(RecordingError, match="call-17: .* not finite") as error:
        next(found)
    assert error.value.index == 1


def test_what_is_no_distribution_is_not_averaged() -> None:
    """The projected frames of a transducer are of the same shape as log-probabilities."""
    log_probs = WholeWindowModel().log_probs
    with pytest.raises(UserError, match="inference.mode = 'averaged'"):
        run("averaged", recording(50)[1], 40, 0.5, outputs=lambda *rows: log_probs(*rows) + 0.1)


@pytest.mark.parametrize("mode", ["streaming", "stitched"])
def test_a_mode_that_is_not_possible_is_named(mode: Mode) -> None:
    with pytest.raises(UserError, match=f"inference.mode = '{mode}'"):
        run(mode, recording(50)[1], 40, 0.5)


def test_an_unknown_mode_is_named() -> None:
    with pytest.raises(UserError, match="inference.mode = 'mean'"):
        InferenceSettings("mean")  # type: ignore[arg-type]
