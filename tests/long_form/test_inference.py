"""Windows tile a recording; outputs do not depend on batches, nor on windows if the model's reach is in the margin."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from bestrq.long_form.inference import (
    InferenceSettings,
    OutputFunction,
    RecordingSource,
    excluded_frames,
    model_outputs,
)
from bestrq.long_form.windows import plan_windows
from common.config import parse
from common.errors import UserError
from common.segments import Segments

STRIDE = 4
REACH = 3
"""encoder frames of context on each side in LocalModel"""


def outputs_of(
    outputs: OutputFunction, source: RecordingSource, settings: InferenceSettings, frames_per_second: float = 1.0
) -> Tensor:
    """Outputs of one recording."""
    [(_, output)] = model_outputs(outputs, [source], settings, STRIDE, frames_per_second)
    return output


class LocalModel:
    """Means of `STRIDE` mel frames, then sums over a neighbourhood: like a CTC model with a known reach."""

    def __init__(self) -> None:
        self.batches: list[tuple[int, int]] = []

    def log_probs(self, log_mel: Tensor, segments: Segments) -> Tensor:
        self.batches.append(tuple(log_mel.shape[:2]))
        assert (segments.start == 0).all() and log_mel.shape[1] % STRIDE == 0
        is_valid = torch.arange(log_mel.shape[1]) < segments.length
        frames = (log_mel * is_valid[:, :, None]).unflatten(1, (-1, STRIDE)).mean(dim=2)  # [R, T, M]
        kernel = torch.arange(1, 2 * REACH + 2, dtype=log_mel.dtype).expand(log_mel.shape[2], 1, -1)
        return F.conv1d(frames.mT, kernel, padding=REACH, groups=log_mel.shape[2]).mT


def recording(num_frames: int, seed: int = 0) -> tuple[Tensor, RecordingSource]:
    log_mel = torch.randn(num_frames, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    return log_mel, RecordingSource(num_frames, lambda start, stop: log_mel[start:stop])


def settings(context: int, overlap: float = 0.25, batch: int = 10_000) -> InferenceSettings:
    """Settings in mel frames, at one frame per second."""
    return InferenceSettings(context_seconds=context, overlap=overlap, batch_seconds=batch)


@given(
    num_frames=st.integers(1, 700),
    context=st.integers(STRIDE, 200),
    overlap=st.floats(0.0, 0.95),
    stride=st.sampled_from([1, 4, 8]),
)
def test_windows_write_every_encoder_frame_once(num_frames: int, context: int, overlap: float, stride: int) -> None:
    windows = plan_windows(num_frames, max(context, stride), overlap, stride)
    written = [t for window in windows for t in range(window.keep_start, window.keep_stop)]
    assert written == list(range(-(-num_frames // stride)))
    for window in windows:
        assert window.start % stride == 0
        assert 0 <= window.start < window.stop <= num_frames
        assert window.stop - window.start <= max(context, stride)
        assert window.start // stride <= window.keep_start < window.keep_stop <= -(-window.stop // stride)


def test_every_frame_is_kept_once_at_all_lengths_modulo_window_hop_and_stride() -> None:
    for stride in (1, 3, 4):
        for size in range(1, 8):
            for hop in range(1, size + 1):
                for num_frames in range(1, 3 * size * stride + 1):
                    windows = plan_windows(num_frames, size * stride, 1 - hop / size, stride)
                    kept = [t for window in windows for t in range(window.keep_start, window.keep_stop)]
                    assert kept == list(range(-(-num_frames // stride)))
                    assert all(
                        w.start <= stride * w.keep_start and stride * (w.keep_stop - 1) < w.stop for w in windows
                    )


def test_windows_keep_their_centre_and_the_last_one_is_full() -> None:
    windows = plan_windows(num_frames=990, context=160, overlap=0.25, stride=4)
    # Windows of 40 encoder frames: 30 kept, 5 dropped on each side. 248 frames in total, the last with 2 mel frames.
    assert [(w.start // 4, w.keep_start, w.keep_stop) for w in windows[:3]] == [(0, 0, 35), (30, 35, 65), (60, 65, 95)]
    assert windows[-1].stop == 990 and windows[-1].stop - windows[-1].start == 158
    for window in windows[1:]:
        assert window.keep_start - window.start // 4 >= 5
    for window in windows[:-1]:
        assert -(-window.stop // 4) - window.keep_stop >= 5


@pytest.mark.parametrize("num_frames", range(400, 420))
def test_windows_equal_the_whole_recording_if_the_reach_of_the_model_is_within_the_margin(num_frames: int) -> None:
    log_mel, source = recording(num_frames)
    whole = outputs_of(LocalModel().log_probs, source, settings(0))
    assert whole.shape == (-(-num_frames // STRIDE), 5)
    windowed = outputs_of(LocalModel().log_probs, source, settings(100))
    assert torch.allclose(windowed, whole, rtol=0, atol=1e-12)
    no_margin = outputs_of(LocalModel().log_probs, source, settings(100, overlap=0.0))
    assert not torch.allclose(no_margin, whole, rtol=0, atol=1e-3)


@pytest.mark.parametrize("num_frames", [1, 3, 4, 5, 97, 100, 103])
def test_a_window_as_long_as_the_recording_is_the_whole_recording_bit_for_bit(num_frames: int) -> None:
    _, source = recording(num_frames)
    whole = outputs_of(LocalModel().log_probs, source, settings(0))
    window = outputs_of(LocalModel().log_probs, source, settings(103))
    assert torch.equal(whole, window)
    assert plan_windows(num_frames, 103, 0.25, STRIDE) == plan_windows(num_frames, 0, 0.25, STRIDE)


def test_outputs_do_not_depend_on_the_batch_and_batches_keep_to_the_budget() -> None:
    pairs = [recording(n, seed) for seed, n in enumerate([5, 33, 34, 120, 400, 401, 7])]
    sources = [source for _, source in pairs]
    outputs = {}
    for budget in (1, 130, 300, 100_000):
        model = LocalModel()
        outputs[budget] = dict(model_outputs(model.log_probs, sources, settings(100, batch=budget), STRIDE, 1.0))
        assert list(outputs[budget]) == list(range(len(sources)))
        assert all(rows * frames <= max(budget, 100) for rows, frames in model.batches)
    assert len(model.batches) == 1
    for index, source in enumerate(sources):
        assert outputs[1][index].shape[0] == -(-source.num_frames // STRIDE)
        for budget in (130, 300, 100_000):
            assert torch.allclose(outputs[budget][index], outputs[1][index], rtol=0, atol=1e-12)


def test_a_long_recording_is_read_in_windows_and_returned_when_done() -> None:
    reads = []
    log_mel, _ = recording(1000)

    def read(start: int, stop: int) -> Tensor:
        reads.append((start, stop))
        return log_mel[start:stop]

    results = model_outputs(
        LocalModel().log_probs, [RecordingSource(40, read), RecordingSource(1000, read)], settings(100, batch=100),
        STRIDE, 1.0,
        reduce=lambda log_probs: log_probs.argmax(dim=-1),
    )  # fmt: skip
    index, ids = next(results)
    assert index == 0 and ids.shape == (10,) and len(reads) == 1  # before the second recording is read
    index, ids = next(results)
    assert index == 1 and ids.shape == (250,) and ids.dtype == torch.int64
    assert all(stop - start <= 100 for start, stop in reads)


def test_bad_settings_name_the_field() -> None:
    with pytest.raises(UserError, match="inference.overlap = 1.0"):
        InferenceSettings(overlap=1.0)
    for argument, message in (
        ("context_seconds=-2", "context_seconds is -2.*0 or more"),
        ("context_seconds=[5, 0]", "context_seconds is a list: expected a number, 0 or more"),
        ("batch_seconds=0", "batch_seconds is 0.*above 0"),
        ("mode=mean", "mode is 'mean'"),
        ("overlap=1.0", "inference.overlap = 1.0"),
    ):
        with pytest.raises(UserError, match=message):
            parse(InferenceSettings, [f"--{argument}"])
    with pytest.raises(UserError, match="less than an encoder frame"):
        outputs_of(LocalModel().log_probs, recording(9)[1], settings(2))


def test_frames_are_excluded_if_their_centre_is() -> None:
    source = RecordingSource(
        400, lambda start, stop: torch.zeros(stop - start, 5), [(0.0, 0.1), (1.42, 2.0), (3.99, 9.0)]
    )
    excluded = excluded_frames(source, 100, 25.0)
    # Encoder frame t covers 40 t to 40 t + 40 ms.
    centre = [0.04 * t + 0.02 for t in range(100)]
    assert excluded.tolist() == [t < 0.1 or 1.42 <= t < 2.0 or t >= 3.99 for t in centre]
    assert int(excluded.sum()) == 2 + 15
