"""Dropout, layout, LayerNorm and the complete encoder, each against its definition."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from bestrq.model import conformer
from bestrq.model.attention import heads
from bestrq.model.attention.heads import rotate
from bestrq.model.conformer import ConformerEncoder, EncoderSettings
from bestrq.model.cpu import dropout as dropout_module
from bestrq.model.cpu.dropout import Dropout, drop_threshold, keep_scale, random_words
from bestrq.model.norms import LayerNorm, make_norm
from bestrq.model.positions import rotary_phase
from bestrq.model.settings import StageSettings
from common.segments import Segments
from tests.layouts import row_layout

# ---- dropout


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("probability", [0.1, 0.5])
def test_dropout_drops_with_its_probability_and_scales_the_rest_exactly(probability: float, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    threshold = drop_threshold(probability)
    x = torch.ones(1001, 301, dtype=dtype)
    y = Dropout(probability)(x)
    kept = y != 0
    assert y.dtype == dtype
    assert (y[kept] == torch.tensor(256 / (256 - threshold), dtype=dtype)).all()
    expected, count = 1 - threshold / 256, x.numel()
    assert abs(float(kept.double().mean()) - expected) < 4 * (expected * (1 - expected) / count) ** 0.5


def test_dropout_probability_is_the_nearest_256th_and_never_all_or_none() -> None:
    assert [drop_threshold(p) for p in (0.0, 1e-4, 0.1, 0.5, 0.999)] == [0, 1, 26, 128, 255]
    assert keep_scale(0) == 1.0


def test_dropout_masks_are_uncorrelated_between_elements() -> None:
    torch.manual_seed(0)
    kept = (Dropout(0.5)(torch.ones(1 << 18)) != 0).double() - 0.5
    for lag in (1, 2, 4, 7, 8, 16, 64):
        correlation = float((kept[lag:] * kept[:-lag]).mean() / 0.25)
        assert abs(correlation) < 4 / len(kept) ** 0.5


def test_random_words_are_splitmix64() -> None:
    def splitmix64(counter: int) -> int:
        bits = 2**64 - 1
        z = counter * 0x9E3779B97F4A7C15 & bits
        z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 & bits
        z = (z ^ (z >> 27)) * 0x94D049BB133111EB & bits
        return z ^ (z >> 31)

    seed = 2**62 - 5
    expected = [splitmix64(seed + i) for i in range(1000)]
    assert [word % 2**64 for word in random_words(1000, seed).tolist()] == expected


def test_dropout_repeats_with_the_global_seed_and_differs_between_calls() -> None:
    drop, x = Dropout(0.3), torch.ones(999)
    torch.manual_seed(5)
    first, second = drop(x), drop(x)
    torch.manual_seed(5)
    assert torch.equal(drop(x), first) and torch.equal(drop(x), second) and not torch.equal(first, second)
    state = torch.get_rng_state()
    third = drop(x)
    torch.set_rng_state(state)
    assert torch.equal(drop(x), third)


def test_dropout_gradients_use_the_mask_of_the_forward_pass() -> None:
    torch.manual_seed(0)
    x, y = (torch.randn(6, 7, dtype=torch.float64, requires_grad=True) for _ in range(2))
    drop = Dropout(0.4)

    def seeded(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        torch.manual_seed(1)
        return drop.add(drop(x), y, 0.5)

    assert torch.autograd.gradcheck(seeded, (x, y))
    torch.manual_seed(1)
    expected = drop(x) + 0.5 * drop(y)
    torch.testing.assert_close(seeded(x, y), expected)


def test_dropout_is_the_identity_in_evaluation_or_at_probability_zero(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dropout_module, "draw_kept", lambda *_: pytest.fail("a mask was drawn"))
    x, y = torch.randn(2, 5)
    for drop in (Dropout(0.5).eval(), Dropout(0.0)):
        assert torch.equal(drop(x), x) and torch.equal(drop.add(x, y, 0.5), x + 0.5 * y)


# ---- layout


@settings(max_examples=60, deadline=None)
@given(
    rows=st.lists(st.lists(st.integers(1, 60), max_size=4), min_size=1, max_size=3),
    reach=st.integers(0, 15),
    data=st.data(),
)
def test_segments_are_moved_apart_by_the_reach_for_any_order_of_the_slots(rows, reach, data) -> None:  # type: ignore
    frames, starts, lengths = 400, [], []
    for row in rows:
        row_starts, end = [], 0
        for length in row:
            row_starts.append(end)
            end = -(-(end + length + 4) // 4) * 4
        pairs = data.draw(st.permutations([*zip(row_starts, row, strict=True), *[(0, 0)] * (4 - len(row))]))
        starts.append([start for start, _ in pairs])
        lengths.append([length for _, length in pairs])
    layout = row_layout(starts, lengths, frames, kernel_size=2 * reach + 1)
    stage = layout.output
    spread = stage.convolution
    assert int(stage.valid.sum()) == sum(-(-n // 4) for row in rows for n in row) == int(spread.occupied.sum())
    assert int(layout.valid_mel.sum()) == sum(n for row in rows for n in row)
    assert torch.equal(stage.valid.flatten(), spread.valid[:, 0])
    # Naive: the segments of a row in the order of their start, each `reach` places further right than in the row.
    num_places = len(spread.frame) // len(rows)
    expected = {}
    for number, (row_starts, row_lengths) in enumerate(zip(starts, lengths, strict=True)):
        used = sorted((start, length) for start, length in zip(row_starts, row_lengths, strict=True) if length)
        for order, (start, length) in enumerate(used):
            for t in range(start // 4, start // 4 - (-length // 4)):
                expected[number * 100 + t] = number * num_places + t + order * reach
    frames_in_order = sorted(expected)
    assert spread.place[spread.valid[:, 0]].tolist() == [expected[frame] for frame in frames_in_order]
    assert spread.frame[spread.occupied[:, 0]].tolist() == frames_in_order
    assert spread.occupied[:, 0].nonzero().flatten().tolist() == [expected[frame] for frame in frames_in_order]
    assert spread.place.max() < len(spread.frame) and len(set(spread.place.tolist())) == len(spread.place)


@pytest.mark.parametrize("interpolation", [1.0, 4.0])
def test_positions_start_at_each_segment(interpolation: float) -> None:
    stage = row_layout([[0, 44]], [[40, 37]], 100, rotary_interpolation=interpolation).output
    phase = stage.attention.rotary_phase
    assert phase is not None
    for start, stop in stage.attention.segments:
        position = torch.arange(stop - start)
        assert torch.equal(stage.position[0, start:stop], position)
        expected = position.double() / interpolation * 1e4**-0.5
        torch.testing.assert_close(torch.view_as_complex(phase)[0, start:stop, 1].angle(), expected)


def test_stages_of_an_efficient_conformer_halve_the_frames_of_every_segment() -> None:
    earlier = [StageSettings(1, 8, 2, 8, group_size=3), StageSettings(1, 8, 2, 8)]
    layout = row_layout([[0, 96]], [[90, 53]], 200, earlier_stages=earlier)  # rows are padded to 240
    assert [stage.valid.shape[1] for stage in layout.stages] == [60, 30, 15]
    assert [stage.segments.start[0].tolist() for stage in layout.stages] == [[0, 24], [0, 12], [0, 6]]
    assert [stage.segments.length[0].tolist() for stage in layout.stages] == [[23, 14], [12, 7], [6, 4]]
    assert layout.stages[0].attention.segments == [(0, 8), (8, 13)]  # in groups of three frames


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_real_rotations_of_devices_are_the_complex_ones_of_the_cpu(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    x = torch.randn(3, 7, 2, 8).to(dtype)
    phase = rotary_phase(torch.arange(7) * 1000, 8, 1e4, dtype)[:, None]
    expected = rotate(x, phase)
    assert expected.dtype == phase.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    monkeypatch.setattr(heads, "rotate_complex", lambda *_: pytest.fail("complex numbers do not compile"))
    torch.testing.assert_close(rotate(x, phase), expected)


@pytest.mark.parametrize("start, length, frames, message", [(6, 8, 40, "multiples"), (36, 8, 40, "ends after")])
def test_invalid_rows_are_refused(start: int, length: int, frames: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        row_layout([[start]], [[length]], frames)


# ---- norms and the complete encoder


def test_layer_norm_has_the_parameter_names_of_torchs() -> None:
    norm = make_norm("layer_norm", 8)
    assert isinstance(norm, LayerNorm) and set(norm.state_dict()) == {"weight", "bias"}
    norm.load_state_dict(torch.nn.LayerNorm(8).state_dict())
    x = torch.randn(3, 8)
    assert torch.equal(norm(x), F.layer_norm(x, (8,)))
    with pytest.raises(ValueError, match="group_norm"):
        make_norm("group_norm", 8)


def test_encoder_error_stays_within_its_precision() -> None:
    """Float32 within 1e-5 of float64, bfloat16 autocast within 2 %."""
    torch.manual_seed(0)
    encoder = ConformerEncoder(
        EncoderSettings(dim=64, num_layers=3, num_heads=2, feedforward_dim=128, subsampling_channels=16)
    ).eval()
    log_mel = torch.randn(2, 200, 80)
    rows = Segments(torch.tensor([[0, 100], [0, 0]]), torch.tensor([[91, 100], [200, 0]]), 200)
    with torch.no_grad():
        single = encoder(log_mel, encoder.layout(rows))
        with torch.autocast("cpu", torch.bfloat16):
            half = encoder(log_mel, encoder.layout(rows))
        encoder.double()
        exact = encoder(log_mel.double(), encoder.layout(rows))
    assert (single - exact).norm() < 1e-5 * exact.norm()
    assert (half - exact).norm() < 0.02 * exact.norm()


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no NVIDIA GPU here")
def test_encoder_on_cuda_equals_the_cpu_forward_and_backward() -> None:
    torch.manual_seed(0)
    cpu = ConformerEncoder(EncoderSettings(dim=64, num_layers=2, num_heads=2, feedforward_dim=128)).double().eval()
    log_mel = torch.randn(2, 200, 80, dtype=torch.float64)
    rows = Segments(torch.tensor([[0, 100], [0, 0]]), torch.tensor([[91, 100], [197, 0]]), 200)
    expected = cpu(log_mel, cpu.layout(rows))
    grads = torch.autograd.grad(expected.pow(2).sum(), list(cpu.parameters()))
    gpu = cpu.cuda()
    actual = gpu(log_mel.cuda(), gpu.layout(rows))
    actual_grads = torch.autograd.grad(actual.pow(2).sum(), list(gpu.parameters()))
    torch.testing.assert_close(actual.cpu(), expected, rtol=1e-9, atol=1e-9)
    for a, b in zip(actual_grads, grads, strict=True):
        torch.testing.assert_close(a.cpu(), b, rtol=1e-8, atol=1e-8)


def test_slicing_frames_without_gradients_does_not_change_the_output(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    encoder = ConformerEncoder(
        EncoderSettings(dim=32, num_layers=2, num_heads=2, feedforward_dim=48, subsampling_channels=8)
    )
    encoder.double().eval()
    log_mel = torch.randn(2, 200, 80, dtype=torch.float64)
    layout = encoder.layout(Segments(torch.tensor([[0, 100], [0, 0]]), torch.tensor([[91, 100], [197, 0]]), 200))
    whole = encoder(log_mel, layout)
    monkeypatch.setattr(conformer, "FRAMES_PER_CALL", 7)
    hidden: list[int] = []
    for block in encoder.blocks:
        block.feedforward_in.hidden.register_forward_hook(lambda *call: hidden.append(call[2].numel()))
    with torch.no_grad():
        sliced = encoder(log_mel, layout)
    torch.testing.assert_close(sliced, whole, rtol=1e-12, atol=1e-12)
    assert max(hidden) == 7 * 48, "hidden units of all frames were in memory at once"
