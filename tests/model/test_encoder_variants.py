"""Properties of encoder variants: relative positions, layer drop, dynamic chunks, saving and exporting."""

import io
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load, save
from torch import Tensor, nn

import tests.reference_attention  # noqa: F401 - adds the backend 'reference'
from bestrq.model.attention.masks import ChunkMask, SegmentMask
from bestrq.model.attention.module import ATTEND
from bestrq.model.conformer import ConformerBlock, ConformerEncoder
from bestrq.model.layout import RowLayout
from bestrq.model.learned_positions import RelativeBias, distance_bucket
from bestrq.model.presets import PRESETS
from bestrq.model.settings import EncoderSettings, StageSettings
from common.segments import Segments
from tests.layouts import stage_layout
from tests.variants import CHOICES, MELS, covering_cases, make_encoder

# ---- positions

LENGTH, REACH = 40, 12


def weights_under(bias: Tensor, backend: str) -> Tensor:
    """Attention weights `[H, queries, keys]` of the bias alone, with queries and keys of zero."""
    sizes = {"dim": 2 * LENGTH, "num_heads": 2, "position": "relative"}
    layout = stage_layout([LENGTH], gap=0, backend=backend, mask="window", window=LENGTH, **sizes).attention
    qkv = torch.zeros(1, LENGTH, 6, LENGTH, dtype=torch.float64)
    qkv[0, :, 4:] = torch.eye(LENGTH, dtype=torch.float64)[:, None]  # one-hot values: outputs are the weights
    return ATTEND[backend](qkv, 2, layout, bias, 0.0)[0].transpose(0, 1)


def assert_relative_and_bounded(weights: Tensor) -> None:
    """Relative to the query's own weight, a key's weight depends on the distance only; constant beyond `REACH`."""
    scores = weights.log() - weights.diagonal(dim1=1, dim2=2).log()[..., None]
    torch.testing.assert_close(scores[:, 1:, 1:], scores[:, :-1, :-1])
    far = scores[:, -1].flip(-1)[:, REACH:], scores[:, 0][:, REACH:]
    for side in far:
        torch.testing.assert_close(side, side[:, :1].expand_as(side))


@pytest.mark.parametrize("backend", ["segments", "dense", "bands", "reference"])
def test_a_relative_bias_depends_on_the_distance_only_and_is_bounded(backend: str) -> None:
    torch.manual_seed(0)
    bias = RelativeBias(2, 8, REACH).double()
    nn.init.normal_(bias.weight)
    weights = weights_under(bias(), backend)
    assert_relative_and_bounded(weights)
    scores = weights.log() - weights.diagonal(dim1=1, dim2=2).log()[..., None]
    last = bias.weight[:, [3, 7]] - bias.weight[:, :1]  # last buckets before and after the query
    torch.testing.assert_close(torch.stack((scores[:, -1, 0], scores[:, 0, -1]), dim=1), last)


def test_the_check_of_relative_bias_fails_for_a_bias_without_bound() -> None:
    frame = torch.arange(LENGTH, dtype=torch.float64)
    with pytest.raises(AssertionError):
        assert_relative_and_bounded((frame[:, None] - frame).softmax(dim=-1)[None])


def test_distances_up_to_an_hour_share_the_last_bucket_and_short_ones_have_their_own() -> None:
    distance = torch.arange(-90_000, 90_001)
    bucket = distance_bucket(distance, 64, 800)
    before, after = bucket[:90_001].flip(0), bucket[90_001:]
    assert (before[800:] == 31).all() and (after[799:] == 63).all()
    assert before[:16].tolist() == list(range(16)) and after[:15].tolist() == list(range(33, 48))
    for side in (before, after):
        assert set(side.diff().tolist()) == {0, 1}  # no bucket is skipped


@pytest.mark.parametrize("position", CHOICES["position"])
def test_outputs_under_a_window_do_not_depend_on_the_position_far_from_both_ends(position: str) -> None:
    """Except with Fourier features of the position in the input."""
    encoder = make_encoder({"position": position, "mask": "window"}, num_layers=2)
    reach, later = 2 * (6 + 3) + 1, 17
    long = torch.randn(1, 4 * 80, MELS, dtype=torch.float64)
    outputs = []
    for log_mel in (long, long[:, 4 * later :]):
        frames = log_mel.shape[1]
        segments = Segments(torch.tensor([[0]]), torch.tensor([[frames]]), frames)
        outputs.append(encoder(log_mel, encoder.layout(segments))[0])
    difference = (outputs[0][later + reach :] - outputs[1][reach:]).abs().max()
    assert difference > 1e-3 if position == "fourier" else difference < 1e-10


# ---- layer drop and dynamic chunks


def test_rows_skip_a_block_with_the_configured_probability() -> None:
    rows, share = 600, 0.3
    encoder = make_encoder({"subsampling": "stacking 4"}, dropout=0.0, attention_dropout=0.0, layer_drop=share)
    layout = encoder.layout(Segments(torch.zeros(rows, 1, dtype=torch.int64), torch.full((rows, 1), 8), 8))
    x, block = torch.randn(rows, 2, 8, dtype=torch.float64), encoder.blocks[0]
    kept = block(x, layout.output)
    torch.manual_seed(0)
    y = block.train()(x, layout.output)
    dropped = (y == x).all(dim=2).all(dim=1)
    assert torch.equal(y[~dropped], kept[~dropped])
    assert abs(int(dropped.sum()) - share * rows) < 4 * (share * (1 - share) * rows) ** 0.5
    assert not (kept == x).all(dim=2).any()  # no row is dropped in evaluation


def test_every_parameter_has_a_gradient_for_any_dropped_rows() -> None:
    """Zeros if all rows skip a block: DDP waits for the gradients of all parameters."""
    encoder = make_encoder({"stages": "two"}, num_layers=3, dropout=0.0, attention_dropout=0.0, layer_drop=0.99).train()
    layout = encoder.layout(Segments(torch.tensor([[0]]), torch.tensor([[90]]), 96))
    torch.manual_seed(0)
    encoder(torch.randn(1, 96, MELS, dtype=torch.float64), layout).square().sum().backward()
    grads = {name: parameter.grad for name, parameter in encoder.named_parameters()}
    assert all(grad is not None and grad.isfinite().all() for grad in grads.values())
    assert grads["blocks.2.attention.qkv.weight"].abs().max() == 0 < grads["subsampling.out.weight"].abs().max()  # type: ignore[union-attr]
    blocks = [block for block in encoder.blocks if isinstance(block, ConformerBlock)]
    assert [block.layer_drop for block in blocks] == [
        0.0,
        0.99,
        0.99,
        0.99,
    ]  # a block that halves the rate is never skipped


def chunk_sizes(encoder: ConformerEncoder) -> list[int | None]:
    """Chunk size of each stage, in frames of the first stage; None for the entire segment."""
    layout = encoder.layout(Segments(torch.tensor([[0]]), torch.tensor([[90]]), 96))
    sizes: list[int | None] = []
    for number, (stage, settings) in enumerate(zip(layout.stages, encoder.settings.stages, strict=True)):
        mask = stage.attention.mask
        assert isinstance(mask, ChunkMask | SegmentMask)
        sizes.append(mask.size * settings.group_size << number if isinstance(mask, ChunkMask) else None)
    return sizes


@pytest.mark.parametrize("stages, unit", [("one", 1), ("grouped", 3), ("two", 6)])
def test_dynamic_chunks_are_drawn_in_training_from_the_global_generator_and_fixed_in_evaluation(
    stages: str, unit: int
) -> None:
    encoder = make_encoder({"stages": stages}, mask="chunk", chunk_size=24, dynamic_chunks=True)
    assert {*chunk_sizes(encoder)} == {24}
    encoder.train()
    torch.manual_seed(0)
    drawn = [chunk_sizes(encoder) for _ in range(400)]
    assert all(len({*sizes}) == 1 for sizes in drawn)  # the same context in all stages
    assert {sizes[0] for sizes in drawn} == {None, *range(unit, 25, unit)}
    torch.manual_seed(0)
    assert [chunk_sizes(encoder) for _ in range(400)] == drawn
    fixed = make_encoder({"stages": stages}, mask="chunk", chunk_size=24).train()
    state = torch.get_rng_state()
    assert {*chunk_sizes(fixed)} == {24} and torch.equal(torch.get_rng_state(), state)


# ---- saving and exporting


def shrunk(settings: EncoderSettings) -> EncoderSettings:
    """Tiny encoder of the same variant."""
    earlier = [
        StageSettings(1, 2 * stage.num_heads, stage.num_heads, 6, stage.group_size) for stage in settings.earlier_stages
    ]
    return replace(
        settings, num_mels=MELS, dim=4 * settings.num_heads, num_layers=2, feedforward_dim=6, kernel_size=5,
        subsampling_channels=2, earlier_stages=earlier,
    )  # fmt: skip


VARIANTS = {name: shrunk(settings) for name, settings in PRESETS.items()} | {
    f"covering {number}": make_encoder(case).settings for number, case in enumerate(covering_cases(1))
}


def rows_of(encoder: ConformerEncoder, backend: str | None = None) -> tuple[Tensor, RowLayout]:
    start, length = torch.tensor([[0, 96], [48, 0]]), torch.tensor([[61, 90], [97, 0]])
    return torch.randn(2, 192, MELS, dtype=torch.float64), encoder.layout(Segments(start, length, 192), backend)


@pytest.mark.parametrize("name", VARIANTS)
def test_state_round_trips_through_safetensors_and_determines_the_outputs(name: str) -> None:
    torch.manual_seed(1)
    encoder, other = (ConformerEncoder(VARIANTS[name]).double().eval() for _ in range(2))
    for tensor in encoder.state_dict().values():
        tensor += torch.ones_like(tensor) if not tensor.is_floating_point() else torch.rand_like(tensor)
    log_mel, layout = rows_of(encoder)
    assert not torch.equal(encoder(log_mel, layout), other(log_mel, layout))
    other.load_state_dict(load(save(encoder.state_dict())), strict=True)
    assert torch.equal(encoder(log_mel, layout), other(log_mel, layout))
    unsaved = {name for name, _ in encoder.named_buffers()} - encoder.state_dict().keys()
    assert all(name.endswith("relative_bias.bucket") for name in unsaved)  # derived from the settings


class FixedLayout(nn.Module):
    """Encoder with a fixed layout."""

    def __init__(self, encoder: ConformerEncoder, layout: RowLayout) -> None:
        super().__init__()
        self.encoder, self.layout = encoder, layout

    def forward(self, log_mel: Tensor) -> Tensor:
        return self.encoder(log_mel, self.layout)


@pytest.mark.parametrize("number, case", list(enumerate(covering_cases(1))), ids=lambda value: "")
def test_exported_programs_give_the_same_outputs(number: int, case: dict[str, str]) -> None:
    encoder = make_encoder(case)
    log_mel, layout = rows_of(encoder, case["backend"])
    with torch.no_grad():
        program = torch.export.export(FixedLayout(encoder, layout).eval(), (log_mel,))
        if number == 0:
            file = io.BytesIO()
            torch.export.save(program, file)
            file.seek(0)
            program = torch.export.load(file)
        other = torch.randn_like(log_mel)
        torch.testing.assert_close(program.module()(other), encoder(other, layout), rtol=1e-12, atol=1e-12)
