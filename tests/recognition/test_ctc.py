"""CTC model: loss against brute force, packing, impossible and empty segments, freezing."""

import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from bestrq.long_form.inference import InferenceSettings, RecordingSource, model_outputs
from bestrq.model.conformer import EncoderSettings
from bestrq.recognition.ctc import CTCModel, CTCOutput, frames_needed, pad_labels, segment_frames
from common.segments import Segments

MELS, VOCAB, STRIDE = 8, 5, 4


def make_model(num_layers: int = 1, dropout: float = 0.0) -> CTCModel:
    torch.manual_seed(0)
    settings = EncoderSettings(
        num_mels=MELS, dim=16, num_layers=num_layers, num_heads=2, feedforward_dim=24, kernel_size=5,
        subsampling_channels=4, dropout=dropout, attention_dropout=dropout,
    )  # fmt: skip
    return CTCModel(settings, VOCAB).double()


Row = list[tuple[int, int, list[int]]]
"""segments of a row: start, length, labels"""


def utterance(num_frames: int) -> Tensor:
    """Features that depend on the length only, so that a segment can be placed anywhere."""
    return torch.randn(num_frames, MELS, dtype=torch.float64, generator=torch.Generator().manual_seed(num_frames))


def batch(rows: list[Row], num_frames: int) -> tuple[Tensor, Segments]:
    log_mel = torch.zeros(len(rows), num_frames, MELS, dtype=torch.float64)
    slots = max(len(row) for row in rows)
    start, length = torch.zeros(2, len(rows), slots, dtype=torch.int64)
    for r, row in enumerate(rows):
        for s, (first, size, _) in enumerate(row):
            start[r, s], length[r, s] = first, size
            log_mel[r, first : first + size] = utterance(size)
    return log_mel, Segments(start, length, num_frames)


def run(model: CTCModel, rows: list[Row], num_frames: int, label_padding: int = 0, **options: Any) -> CTCOutput:
    labels, label_lengths = pad_labels([labels for row in rows for _, _, labels in row])
    extra = torch.full((len(labels), label_padding), 1)
    return model(*batch(rows, num_frames), torch.cat([labels, extra], dim=1), label_lengths, **options)


def segment_log_probs(model: CTCModel, rows: list[Row], num_frames: int) -> list[Tensor]:
    """Log-probabilities `[T_s, V]` of every segment, cut out of the packed rows."""
    log_mel, segments = batch(rows, num_frames)
    log_probs = model.log_probs(log_mel, segments)
    index, lengths = segment_frames(segments, STRIDE, log_probs.shape[1])
    return [log_probs.flatten(0, 1)[row[:length]] for row, length in zip(index, lengths.tolist(), strict=True)]


def gradients(model: CTCModel, loss: Tensor) -> list[Tensor]:
    return list(torch.autograd.grad(loss, list(model.parameters())))


def brute_force_loss(log_probs: Tensor, labels: list[int]) -> Tensor:
    """Negative log of the total probability of all paths through `[T, V]` that collapse to the labels."""
    paths = []
    for path in itertools.product(range(VOCAB), repeat=len(log_probs)):
        merged = [label for t, label in enumerate(path) if t == 0 or label != path[t - 1]]
        if [label for label in merged if label != 0] == labels:
            paths.append(log_probs[torch.arange(len(path)), torch.tensor(path)].sum())
    return -torch.logsumexp(torch.stack(paths), dim=0)


def test_loss_and_gradients_equal_those_of_all_paths_enumerated() -> None:
    model = make_model()
    rows: list[Row] = [[(0, 20, [1, 2]), (24, 13, [3, 3])], [(4, 17, []), (24, 7, [4])]]
    output = run(model, rows, 40)
    expected = torch.zeros((), dtype=torch.float64)
    for row in rows:
        for _, size, labels in row:
            zero = torch.zeros(1, 1, dtype=torch.int64)
            padded = torch.zeros(1, 20, MELS, dtype=torch.float64)
            padded[0, :size] = utterance(size)
            log_probs = model.log_probs(padded, Segments(zero, zero + size, 20))[0, : -(-size // STRIDE)]
            expected = expected + brute_force_loss(log_probs, labels)
    assert torch.allclose(output.loss_sum, expected, rtol=0, atol=1e-9)
    assert int(output.num_impossible) == 0
    for grad, expected_grad in zip(gradients(model, output.loss_sum), gradients(model, expected), strict=True):
        assert torch.allclose(grad, expected_grad, rtol=0, atol=1e-9)


def test_loss_and_gradients_depend_on_neither_row_nor_padding_nor_neighbours() -> None:
    model = make_model(num_layers=2)
    segments = [(60, [1, 2, 3]), (33, [2, 2]), (18, []), (47, [4])]
    alone = [run(model, [[(0, size, labels)]], 60) for size, labels in segments]
    expected = torch.stack([output.loss_sum for output in alone]).sum()
    expected_gradients = gradients(model, expected)
    layouts: list[list[Row]] = [
        [[(0, 60, [1, 2, 3]), (64, 33, [2, 2]), (104, 18, []), (128, 47, [4])]],
        [[(8, 18, []), (32, 60, [1, 2, 3])], [(100, 33, [2, 2])], [(4, 47, [4])]],
    ]
    for rows in layouts:
        output = run(model, rows, 180, label_padding=3)
        assert torch.allclose(output.loss_sum, expected, rtol=0, atol=1e-9)
        pairs = zip(gradients(model, output.loss_sum), expected_gradients, strict=True)
        assert all(torch.allclose(grad, expected_grad, rtol=0, atol=1e-9) for grad, expected_grad in pairs)


def test_outputs_at_the_frames_of_a_segment_depend_on_neither_row_nor_padding_nor_neighbours() -> None:
    model = make_model(num_layers=2)
    layouts: list[list[Row]] = [
        [[(0, 60, []), (64, 33, []), (104, 18, []), (128, 47, [])]],
        [[(8, 18, []), (32, 60, [])], [(100, 33, [])], [(4, 47, [])]],
    ]
    for rows in layouts:
        sizes = [size for row in rows for _, size, _ in row]
        outputs = segment_log_probs(model, rows, 180)
        assert [len(output) for output in outputs] == [-(-size // STRIDE) for size in sizes]
        for size, output in zip(sizes, outputs, strict=True):
            [alone] = segment_log_probs(model, [[(0, size, [])]], 60)
            assert torch.allclose(output, alone, rtol=0, atol=1e-9)


def test_impossible_segments_are_counted_and_change_nothing() -> None:
    model = make_model()
    possible = run(model, [[(0, 20, [1, 2])]], 40)
    # Two encoder frames are too few for 1, blank, 1, and for four labels.
    both = run(model, [[(0, 20, [1, 2]), (24, 8, [1, 1])], [(0, 8, [1, 2, 3, 4])]], 40)
    assert int(both.num_impossible) == 2
    assert torch.allclose(both.loss_sum, possible.loss_sum, rtol=0, atol=1e-9)
    pairs = zip(gradients(model, both.loss_sum), gradients(model, possible.loss_sum), strict=True)
    assert all(torch.allclose(grad, expected, rtol=0, atol=1e-9) for grad, expected in pairs)


def test_frames_needed_is_the_smallest_number_of_frames_with_a_finite_loss() -> None:
    labels, lengths = pad_labels([[1, 1, 1], [1, 2, 3, 3], [], [2]])
    needed = frames_needed(labels, lengths)
    assert needed.tolist() == [5, 5, 0, 1]
    for frames in range(1, 7):
        uniform = torch.zeros(frames, 4, VOCAB).log_softmax(-1)
        loss = torch.nn.functional.ctc_loss(uniform, labels, torch.full((4,), frames), lengths, reduction="none")
        assert torch.equal(loss.isfinite(), frames >= needed)


def test_a_batch_of_empty_transcripts_has_a_loss_and_no_impossible_segments() -> None:
    output = run(make_model(), [[(0, 20, []), (24, 12, [])]], 40)
    assert output.loss_sum > 0 and output.loss_sum.isfinite()
    assert int(output.num_impossible) == 0


def test_log_probs_are_float32_under_bfloat16_autocast() -> None:
    model = make_model().float()
    zero = torch.zeros(1, 1, dtype=torch.int64)
    with torch.autocast("cpu", torch.bfloat16):
        log_probs = model.log_probs(utterance(40).float()[None], Segments(zero, zero + 40, 40))
    assert log_probs.dtype == torch.float32
    assert torch.allclose(log_probs.exp().sum(-1), torch.ones(1, 10), atol=1e-6)  # bfloat16: an error of 1e-3


def test_freezing_the_encoder_removes_its_gradients_and_leaves_those_of_the_head() -> None:
    model = make_model()
    rows: list[Row] = [[(0, 20, [1, 2])]]
    run(model, rows, 20).loss_sum.backward()
    head = [parameter.grad.clone() for parameter in model.head.parameters()]
    model.zero_grad()
    run(model, rows, 20, frozen_blocks=1).loss_sum.backward()
    assert all(parameter.grad is None for parameter in model.encoder.parameters())
    for parameter, expected in zip(model.head.parameters(), head, strict=True):
        assert torch.equal(parameter.grad, expected)


@pytest.fixture
def process_group(tmp_path: Path) -> Iterator[None]:
    """Process group of one process, in which DDP and FSDP2 run their hooks."""
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize("parallel", ["none", "ddp", "fsdp2"])
def test_freezing_in_the_first_steps_gives_equal_weights_in_every_parallel_mode(
    parallel: str, process_group: None
) -> None:
    plain, model = make_model(), make_model()
    if parallel == "fsdp2":
        for block in model.encoder.blocks:
            fully_shard(block)
        fully_shard(model)
    wrapped = DistributedDataParallel(model, find_unused_parameters=True) if parallel == "ddp" else model
    plain_optimizer, optimizer = (torch.optim.AdamW(module.parameters(), lr=1e-2) for module in (plain, model))
    rows: list[Row] = [[(0, 40, [1, 2]), (44, 16, [3])]]
    before = [parameter.detach().clone() for parameter in plain.encoder.parameters()]
    for step in range(5):
        for module, module_optimizer in ((plain, plain_optimizer), (wrapped, optimizer)):
            module_optimizer.zero_grad()
            run(module, rows, 60, frozen_blocks=None if step >= 2 else 1).loss_sum.backward()
            module_optimizer.step()
        if step == 1:  # neither gradients nor weight decay changed the frozen encoder
            assert all(torch.equal(a, b) for a, b in zip(plain.encoder.parameters(), before, strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(plain.encoder.parameters(), before, strict=True))
    for parameter, expected in zip(model.parameters(), plain.parameters(), strict=True):
        full = parameter.full_tensor() if parallel == "fsdp2" else parameter
        assert torch.allclose(full, expected, rtol=0, atol=1e-12)


def test_outputs_of_whole_recordings_do_not_depend_on_the_batch() -> None:
    model = make_model(num_layers=2).eval()
    sources = [RecordingSource(n, lambda start, stop, n=n: utterance(n)[start:stop]) for n in (30, 41, 200, 203)]

    def outputs(batch_seconds: float) -> dict[int, Tensor]:
        settings = InferenceSettings(context_seconds=0.8, batch_seconds=batch_seconds)
        return dict(model_outputs(model.log_probs, sources, settings, STRIDE, 100.0))

    one_by_one, together = outputs(0.1), outputs(1000.0)
    for index, source in enumerate(sources):
        assert one_by_one[index].shape == (-(-source.num_frames // STRIDE), VOCAB)
        assert torch.allclose(one_by_one[index], together[index], rtol=0, atol=1e-9)
