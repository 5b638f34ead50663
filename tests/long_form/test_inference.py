"""Windows tile a recording, and what comes out depends on neither batching nor, where it cannot, on windowing."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from bestrq.long_form.inference import (
    InferenceSettings,
    Outputs,
    Source,
    excluded_frames,
    transcribe,
)
from bestrq.long_form.windows import plan_windows
from common.errors import UserError
from common.segments import Segments

FACTOR = 4
REACH = 3
"""encoder frames to each side that LocalModel sees"""


def outputs_of(outputs: Outputs, source: Source, how: InferenceSettings, frames_per_second: float = 1.0) -> Tensor:
    """Outputs of one recording."""
    [(_, output)] = transcribe(outputs, [source], how, FACTOR, frames_per_second)
    return output


class LocalModel:
    """Frames of `FACTOR` mel frames averaged, then sums over a neighbourhood: as a CTC model of a known reach."""

    def __init__(self) -> None:
        self.batches: list[tuple[int, int]] = []

    def log_probs(self, log_mel: Tensor, segments: Segments) -> Tensor:
        self.batches.append(tuple(log_mel.shape[:2]))
        assert (segments.start == 0).all() and log_mel.shape[1] % FACTOR == 0
        inside = torch.arange(log_mel.shape[1]) < segments.length
        frames = (log_mel * inside[:, :, None]).unflatten(1, (-1, FACTOR)).mean(dim=2)  # [R, T, M]
        kernel = torch.arange(1, 2 * REACH + 2, dtype=log_mel.dtype).expand(log_mel.shape[2], 1, -1)
        return F.conv1d(frames.mT, kernel, padding=REACH, groups=log_mel.shape[2]).mT


def recording(num_frames: int, seed: int = 0) -> tuple[Tensor, Source]:
    log_mel = torch.randn(num_frames, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    return log_mel, Source(num_frames, lambda start, stop: log_mel[start:stop])


def settings(context: int, overlap: float = 0.25, batch: int = 10_000) -> InferenceSettings:
    """In mel frames, at one frame a second."""
    return InferenceSettings(context_seconds=context, overlap=overlap, batch_seconds=batch)


@given(
    num_frames=st.integers(1, 700),
    context=st.integers(FACTOR, 200),
    overlap=st.floats(0.0, 0.95),
    factor=st.sampled_from([1, 4, 8]),
)
def test_windows_write_every_encoder_frame_once(num_frames: int, context: int, overlap: float, factor: int) -> None:
    windows = plan_windows(num_frames, max(context, factor), overlap, factor)
    written = [t for window in windows for t in range(window.keep_start, window.keep_stop)]
    assert written == list(range(-(-num_frames // factor)))
    for window in windows:
        assert window.start % factor == 0
        assert 0 <= window.start < window.stop <= num_frames
        assert window.stop - window.start <= max(context, factor)
        assert window.start // factor <= window.keep_start < window.keep_stop <= -(-window.stop // factor)


def test_every_frame_is_kept_once_at_all_lengths_modulo_window_hop_and_stride() -> None:
    for factor in (1, 3, 4):
        for size in range(1, 8):
            for hop in range(1, size + 1):
                for num_frames in range(1, 3 * size * factor + 1):
                    windows = plan_windows(num_frames, size * factor, 1 - hop / size, factor)
                    kept = [t for window in windows for t in range(window.keep_start, window.keep_stop)]
                    assert kept == list(range(-(-num_frames // factor)))
                    assert all(
                        w.start <= factor * w.keep_start and factor * (w.keep_stop - 1) < w.stop for w in windows
                    )


def test_windows_keep_their_centre_and_the_last_one_is_full() -> None:
    windows = plan_windows(num_frames=990, context=160, overlap=0.25, factor=4)
    # 40 encoder frames a window, 30 kept, 5 dropped at each side; 248 frames in all, the last one of 2 mel frames.
    assert [(w.start // 4, w.keep_start, w.keep_stop) for w in windows[:3]] == [(0, 0, 35), (30, 35, 65), (60, 65, 95)]
    assert windows[-1].stop == 990 and windows[-1].stop - windows[-1].start == 158
    for window in windows[1:]:
        assert window.keep_start - window.start // 4 >= 5
    for window in windows[:-1]:
        assert -(-window.stop // 4) - window.keep_stop >= 5


@pytest.mark.parametrize("num_frames", range(400, 420))
def test_windows_equal_the_whole_recording_where_the_model_sees_no_further_than_the_margin(num_frames: int) -> None:
    log_mel, source = recording(num_frames)
    at_once = outputs_of(LocalModel().log_probs, source, settings(0))
    assert at_once.shape == (-(-num_frames // FACTOR), 5)
    windowed = outputs_of(LocalModel().log_probs, source, settings(100))
    assert torch.allclose(windowed, at_once, rtol=0, atol=1e-12)
    no_margin = outputs_of(LocalModel().log_probs, source, settings(100, overlap=0.0))
    assert not torch.allclose(no_margin, at_once, rtol=0, atol=1e-3)


@pytest.mark.parametrize("num_frames", [1, 3, 4, 5, 97, 100, 103])
def test_a_window_as_long_as_the_recording_is_the_whole_recording_bit_for_bit(num_frames: int) -> None:
    _, source = recording(num_frames)
    at_once = outputs_of(LocalModel().log_probs, source, settings(0))
    window = outputs_of(LocalModel().log_probs, source, settings(103))
    assert torch.equal(at_once, window)
    assert plan_windows(num_frames, 103, 0.25, FACTOR) == plan_windows(num_frames, 0, 0.25, FACTOR)


def test_outputs_do_not_depend_on_the_batch_and_batches_keep_to_the_budget() -> None:
    pairs = [recording(n, seed) for seed, n in enumerate([5, 33, 34, 120, 400, 401, 7])]
    sources = [source for _, source in pairs]
    outputs = {}
    for budget in (1, 130, 300, 100_000):
        model = LocalModel()
        outputs[budget] = dict(transcribe(model.log_probs, sources, settings(100, batch=budget), FACTOR, 1.0))
        assert list(outputs[budget]) == list(range(len(sources)))
        assert all(rows * frames <= max(budget, 100) for rows, frames in model.batches)
    assert len(model.batches) == 1
    for index, source in enumerate(sources):
        assert outputs[1][index].shape[0] == -(-source.num_frames // FACTOR)
        for budget in (130, 300, 100_000):
            assert torch.allclose(outputs[budget][index], outputs[1][index], rtol=0, atol=1e-12)


def test_a_long_recording_is_read_in_windows_and_given_back_when_done() -> None:
    reads = []
    log_mel, _ = recording(1000)

    def read(start: int, stop: int) -> Tensor:
        reads.append((start, stop))
        return log_mel[start:stop]

    results = transcribe(
        LocalModel().log_probs, [Source(40, read), Source(1000, read)], settings(100, batch=100), FACTOR, 1.0,
        reduce=lambda log_probs: log_probs.argmax(dim=-1),
    )  # fmt: skip
    index, ids = next(results)
    assert index == 0 and ids.shape == (10,) and len(reads) == 1  # before anything of the second was read
    index, ids = next(results)
    assert index == 1 and ids.shape == (250,) and ids.dtype == torch.int64
    assert all(stop - start <= 100 for start, stop in reads)


def test_bad_settings_name_the_field() -> None:
    with pytest.raises(UserError, match="inference.overlap = 1.0"):
        InferenceSettings(overlap=1.0)
    with pytest.raises(UserError, match="inference.context_seconds = -2"):
        InferenceSettings(context_seconds=-2)
    with pytest.raises(UserError, match="inference.batch_seconds = 0"):
        InferenceSettings(batch_seconds=0)
    with pytest.raises(UserError, match="less than an encoder frame"):
        outputs_of(LocalModel().log_probs, recording(9)[1], settings(2))


def test_frames_are_excluded_whose_middle_is() -> None:
    source = Source(400, lambda start, stop: torch.zeros(stop - start, 5), [(0.0, 0.1), (1.42, 2.0), (3.99, 9.0)])
    excluded = excluded_frames(source, 100, 25.0)
    # Encoder frame t stands for 40 t to 40 t + 40 ms.
    middle = [0.04 * t + 0.02 for t in range(100)]
    assert excluded.tolist() == [m < 0.1 or 1.42 <= m < 2.0 or m >= 3.99 for m in middle]
    assert int(excluded.sum()) == 2 + 15
