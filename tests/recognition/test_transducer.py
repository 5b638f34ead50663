"""Transducer model: loss against enumeration, packing, accumulation, empty batches, CTC head, parallel modes."""

import re
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.distributed.fsdp import FSDPModule

from bestrq.model.conformer import EncoderSettings
from bestrq.recognition.ctc import CTCModel, pad_labels
from bestrq.recognition.transducer import TransducerModel, TransducerOutput, TransducerSettings, check_slice_bytes
from bestrq.training.process import DistributedSettings, World, autocast, gradient_sync, parallelise
from common.config import parse
from common.errors import UserError
from common.segments import Segments
from tests.gloo import run_distributed
from tests.lattices import assert_same, brute_force_loss, select_arcs

MELS, VOCAB, STRIDE = 8, 5, 4
ENCODER = EncoderSettings(
    num_mels=MELS, dim=16, num_layers=2, num_heads=2, feedforward_dim=24, kernel_size=5, subsampling_channels=4,
    dropout=0.0, attention_dropout=0.0,
)  # fmt: skip
KINDS: dict[str, dict[str, Any]] = {
    "stateless": {},
    "lstm-hybrid": {"prediction": "lstm", "ctc_weight": 0.3, "fast_emit": 0.1},
    "durations": {"durations": [0, 1, 2], "prediction": "lstm"},
    "pruned": {"prune_range": 2, "ctc_weight": 0.3, "simple_weight": 0.7},
}
every_kind = pytest.mark.parametrize("kind", list(KINDS))

Row = list[tuple[int, int, list[int]]]
"""segments of a row: start, length, labels"""
ROWS: list[Row] = [[(0, 20, [1, 2]), (24, 13, [3, 3, 3]), (40, 6, [4, 2, 1])], [(4, 17, []), (24, 7, [4])]]
"""includes two frames with three labels, and a segment without labels"""


def make_model(kind: str = "stateless", **changed: Any) -> TransducerModel:
    torch.manual_seed(0)
    options = {"prediction_dim": 12, "joint_dim": 10, "dropout": 0.0} | KINDS[kind] | changed
    return TransducerModel(ENCODER, TransducerSettings(**options), VOCAB).double()


def utterance(num_frames: int) -> Tensor:
    """Features that depend on the length only, so that a segment can be placed anywhere."""
    return torch.randn(num_frames, MELS, dtype=torch.float64, generator=torch.Generator().manual_seed(num_frames))


def batch(rows: list[Row], num_frames: int, label_padding: int = 0) -> tuple[Tensor, Segments, Tensor, Tensor]:
    log_mel = torch.zeros(len(rows), num_frames, MELS, dtype=torch.float64)
    start, length = torch.zeros(2, len(rows), max(1, *(len(row) for row in rows)), dtype=torch.int64)
    for r, row in enumerate(rows):
        for s, (first, size, _) in enumerate(row):
            start[r, s], length[r, s] = first, size
            log_mel[r, first : first + size] = utterance(size)
    labels, label_lengths = pad_labels([labels for row in rows for _, _, labels in row])
    if label_padding:
        labels = torch.cat([labels, torch.zeros(len(labels), 2, dtype=torch.int64)], dim=1)
        labels[torch.arange(labels.shape[1]) >= label_lengths[:, None]] = label_padding
    return log_mel, Segments(start, length, num_frames), labels, label_lengths


def run(model: Any, rows: list[Row], num_frames: int = 48, **options: Any) -> TransducerOutput:
    padding = options.pop("label_padding", 0)
    return model(*batch(rows, num_frames, padding), **options)


def gradients(model: TransducerModel, loss: Tensor) -> list[Tensor]:
    return list(torch.autograd.grad(loss, list(model.parameters()), allow_unused=False))


def search_arcs(model: TransducerModel, size: int, labels: list[int]) -> Tensor:
    """Arcs `[T, U + 1, 2]` of a single segment, from the methods that a search calls."""
    zero = torch.zeros(1, 1, dtype=torch.int64)
    padded = torch.nn.functional.pad(utterance(size), (0, 0, 0, 48 - size))
    encoded = model.encode(padded[None], Segments(zero, zero + size, len(padded)))[0, : -(-size // STRIDE)]
    state, predicted = model.start(1), []
    for label in [0, *labels]:
        output, state = model.predict(torch.tensor([label]), state)
        predicted.append(output)
    return select_arcs(model.joint(encoded[:, None], torch.cat(predicted)), torch.tensor(labels))


@pytest.mark.parametrize("kind", ["stateless", "lstm-hybrid"])
def test_loss_and_gradients_equal_those_of_all_alignments_through_the_outputs_of_a_search(kind: str) -> None:
    model = make_model(kind, ctc_weight=0.0, fast_emit=0.0)
    output = run(model, ROWS)
    segments = [segment for row in ROWS for segment in row]
    expected = torch.stack([brute_force_loss(search_arcs(model, size, labels)) for _, size, labels in segments]).sum()
    assert_same([output.loss_sum, output.transducer_sum], [expected, expected.detach()], 1e-9)
    assert output.ctc_sum == 0 and not output.transducer_sum.requires_grad
    assert_same(gradients(model, output.loss_sum), gradients(model, expected), 1e-9)


@every_kind
def test_loss_and_gradients_depend_on_neither_row_nor_padding_nor_neighbours(kind: str) -> None:
    model = make_model(kind)
    segments = [(60, [1, 2, 3]), (33, [2, 2]), (18, []), (47, [4])]
    alone = [run(model, [[(0, size, labels)]], 60) for size, labels in segments]
    reference = torch.stack([output.loss_sum for output in alone]).sum()
    expected_gradients = gradients(model, reference)
    layouts: list[list[Row]] = [
        [[(0, 60, [1, 2, 3]), (64, 33, [2, 2]), (104, 18, []), (128, 47, [4])]],
        [[(8, 18, []), (32, 60, [1, 2, 3])], [], [(100, 33, [2, 2])], [(4, 47, [4])]],
    ]
    for rows in layouts:
        for padding in (0, -7, 10**6):
            output = run(model, rows, 180, label_padding=padding)
            assert_same([output.loss_sum], [reference], 1e-9)
        assert_same(gradients(model, output.loss_sum), expected_gradients, 1e-9)


@every_kind
def test_a_batch_in_two_calls_sums_to_the_same_gradients(kind: str) -> None:
    model = make_model(kind)
    whole = run(model, ROWS)
    parts = [run(model, [row]) for row in ROWS]
    assert_same([whole.loss_sum], [parts[0].loss_sum + parts[1].loss_sum], 1e-9)
    reference = gradients(model, whole.loss_sum)
    for part in parts:
        part.loss_sum.backward()
    assert_same([parameter.grad for parameter in model.parameters()], reference, 1e-9)


@every_kind
@pytest.mark.parametrize("slice_bytes", [2**12, 2**30])
def test_slices_change_neither_loss_nor_gradients(kind: str, slice_bytes: int) -> None:
    outputs = [(model, run(model, ROWS)) for model in (make_model(kind), make_model(kind, slice_bytes=slice_bytes))]
    assert_same([outputs[1][1].loss_sum], [outputs[0][1].loss_sum], 1e-9)
    assert_same(*(gradients(model, output.loss_sum) for model, output in outputs), 1e-9)


@every_kind
def test_the_budget_check_before_training_passes_if_one_frame_of_all_labels_fits(kind: str) -> None:
    labels = [1, 2, 3, 4, 1, 2, 3]
    with pytest.raises(UserError, match=r"give \d+ or more") as refused:
        check_slice_bytes(make_model(kind, slice_bytes=1).settings, VOCAB, len(labels), itemsize=8)
    smallest = int(re.findall(r"give (\d+) or more", str(refused.value))[0])
    model = make_model(kind, slice_bytes=smallest)
    check_slice_bytes(model.settings, VOCAB, len(labels), itemsize=8)
    run(model, [[(0, STRIDE, labels)]]).loss_sum.backward()


@every_kind
def test_a_batch_of_no_segments_has_a_loss_and_gradients_of_zero(kind: str) -> None:
    model = make_model(kind)
    output = run(model, [[], []])
    assert output.loss_sum == 0
    output.loss_sum.backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and not parameter.grad.any(), name  # DDP waits for every gradient


@every_kind
def test_freezing_the_encoder_removes_its_gradients_and_leaves_all_others(kind: str) -> None:
    model = make_model(kind)
    reference = dict(zip(dict(model.named_parameters()), gradients(model, run(model, ROWS).loss_sum), strict=True))
    run(model, ROWS, frozen_blocks=ENCODER.num_layers).loss_sum.backward()
    for name, parameter in model.named_parameters():
        if name.startswith("encoder."):
            assert parameter.grad is None
        else:
            assert torch.equal(parameter.grad, reference[name])


def test_the_ctc_head_adds_the_weighted_loss_of_a_ctc_model() -> None:
    model = make_model("lstm-hybrid")
    ctc = CTCModel(ENCODER, VOCAB).double()
    tensors = {name.replace("ctc_head.", "head."): tensor for name, tensor in model.state_dict().items()}
    ctc.load_state_dict({name: tensors[name] for name in ctc.state_dict()})
    output, reference = run(model, ROWS), ctc(*batch(ROWS, 48))
    assert int(reference.num_impossible) == 2  # impossible for CTC, but not for the transducer
    assert_same([output.ctc_sum], [reference.loss_sum.detach()], 1e-9)
    assert_same([output.loss_sum.detach()], [output.transducer_sum + 0.3 * output.ctc_sum], 1e-9)
    plain = make_model("lstm-hybrid", ctc_weight=0.0)
    plain.load_state_dict({name: tensor for name, tensor in model.state_dict().items() if "ctc_head" not in name})
    run(model, ROWS).loss_sum.backward()
    run(plain, ROWS).loss_sum.backward()
    reference.loss_sum.backward()
    ctc_parameters = dict(ctc.named_parameters()) | {f"ctc_head.{k}": p for k, p in ctc.head.named_parameters()}
    plain_parameters = dict(plain.named_parameters())
    for name, parameter in model.named_parameters():
        expected = 0.3 * ctc_parameters[name].grad if name in ctc_parameters else torch.zeros_like(parameter)
        if name in plain_parameters:
            expected = expected + plain_parameters[name].grad
        torch.testing.assert_close(parameter.grad, expected, rtol=0, atol=1e-9, msg=name)
    log_mel, segments, *_ = batch(ROWS, 48)
    assert_same([model.ctc_log_probs(log_mel, segments)], [ctc.log_probs(log_mel, segments)], 1e-12)


def test_ctc_outputs_without_a_ctc_head_are_refused_with_the_name_of_the_setting() -> None:
    with pytest.raises(UserError, match="transducer.ctc_weight 0"):
        make_model().ctc_log_probs(*batch(ROWS, 48)[:2])


def test_a_prune_range_of_all_states_adds_only_the_loss_of_the_simple_joint_network() -> None:
    model = make_model("pruned", prune_range=4, ctc_weight=0.0)
    plain = make_model("stateless")
    tensors = {name: tensor for name, tensor in model.state_dict().items() if not name.startswith("simple_joint.")}
    plain.load_state_dict(tensors)
    output, reference = run(model, ROWS), run(plain, ROWS)
    assert_same([output.transducer_sum], [reference.transducer_sum], 1e-9)
    doubled = make_model("pruned", prune_range=4, ctc_weight=0.0, simple_weight=1.4)
    simple = (output.loss_sum - output.transducer_sum).detach()
    assert simple > 1
    again = run(doubled, ROWS)
    assert_same([(again.loss_sum - again.transducer_sum).detach()], [2 * simple], 1e-9)
    narrow = run(make_model("pruned", ctc_weight=0.0), ROWS)
    assert narrow.transducer_sum > output.transducer_sum  # fewer alignments


@every_kind
def test_bfloat16_autocast_agrees_with_float32_and_gives_float32_losses_and_gradients(kind: str) -> None:
    """Tolerance 3 % of the loss, 10 % of the gradient: bfloat16 has 8 bits."""
    results = []
    for enabled in (False, True):
        model = make_model(kind, prune_range=0).float()
        log_mel, *rest = batch(ROWS, 48)
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            output = model(log_mel.float(), *rest)
        output.loss_sum.backward()
        assert output.loss_sum.dtype == output.transducer_sum.dtype == torch.float32
        assert all(parameter.grad.dtype == torch.float32 for parameter in model.parameters())
        results.append((output.loss_sum.detach(), torch.cat([p.grad.flatten() for p in model.parameters()])))
    (loss, grad), (low_loss, low_grad) = results
    assert low_grad.isfinite().all() and not torch.equal(low_loss, loss)
    assert abs(low_loss - loss) < 0.03 * loss and (low_grad - grad).norm() < 0.1 * grad.norm()


@every_kind
@pytest.mark.parametrize("wrong", [0, VOCAB, -1])
def test_a_label_outside_the_vocabulary_is_refused_and_named(kind: str, wrong: int) -> None:
    rows: list[Row] = [[(0, 20, [1, 2])], [(0, 17, [3, wrong, 2])]]
    with pytest.raises(UserError, match=f"label {wrong} at position 1 of segment 1: .* labels 1 to {VOCAB - 1}"):
        run(make_model(kind), rows)


@dataclass
class Config:
    """Settings with a transducer section, as in finetune_rnnt.py."""

    transducer: TransducerSettings = field(default_factory=TransducerSettings)
    """transducer"""


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        *(
            (name, 0, "expected an integer above 0")
            for name in ("context", "prediction_dim", "prediction_layers", "joint_dim", "slice_bytes")
        ),
        *(
            (name, -0.1, "expected a number, 0 or more")
            for name in ("ctc_weight", "fast_emit", "simple_weight", "sigma")
        ),
        *(("dropout", value, "give 0 or more, and less than 1") for value in (-0.1, 1.0)),
        *(("prune_range", value, "give 2 or more") for value in (1, -1)),
    ],
)
def test_invalid_settings_are_refused_with_their_names_and_values(name: str, value: float, expected: str) -> None:
    with pytest.raises(UserError, match=f"^transducer.{name} is {value}: {expected}"):
        parse(Config, [f"--transducer.{name}={value}"])


def test_fast_emit_is_refused_with_durations() -> None:
    with pytest.raises(UserError, match="transducer.fast_emit is 0.01: give 0 with durations"):
        parse(Config, ["--transducer.fast_emit=0.01", "--transducer.durations=[0, 1, 2]"])


PARALLEL_ROWS: list[Row] = [ROWS[0], ROWS[1], [(8, 30, [4, 4, 1, 2])], []]


def train_once(world: World, strategy: str, precision: str, accumulation: int, reshard: bool) -> dict[str, Tensor]:
    """Arcs from the methods of a search (in one case), and the full gradients of one step."""
    settings = DistributedSettings(strategy=strategy, device="cpu", precision=precision)
    model = make_model("pruned", prediction="lstm", fast_emit=0.1)
    model = model.float() if precision == "bfloat16" else model
    parallel: Any = parallelise(model, model.encoder.blocks, world, settings)
    if reshard:
        assert isinstance(parallel, FSDPModule)
        parallel.set_reshard_after_forward(True, recurse=False)  # backward gathers the joint weights again
    results = {}
    if strategy == "fsdp" and precision == "float32" and not reshard:
        with torch.no_grad():
            results["arcs"] = search_arcs(model, 20, [1, 2])
    rows = PARALLEL_ROWS[world.rank * 4 // world.size : (world.rank + 1) * 4 // world.size]
    step = len(rows) // accumulation
    for i in range(accumulation):
        log_mel, *rest = batch(rows[i * step : (i + 1) * step], 48)
        with gradient_sync(parallel, i == accumulation - 1):
            with autocast(world, settings):
                output = parallel(log_mel.to(next(model.parameters()).dtype), *rest)
            output.loss_sum.backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        results[name] = getattr(parameter.grad, "full_tensor", lambda grad=parameter.grad: grad)().clone()
    return results


CASES = {
    "ddp": ("ddp", "float32", 1, False),
    "ddp, 2 micro-batches": ("ddp", "float32", 2, False),
    "fsdp": ("fsdp", "float32", 1, False),
    "fsdp, 2 micro-batches": ("fsdp", "float32", 2, False),
    "fsdp, resharded, 2 micro-batches": ("fsdp", "float32", 2, True),
    "ddp, bfloat16": ("ddp", "bfloat16", 1, False),
    "fsdp, bfloat16, 2 micro-batches": ("fsdp", "bfloat16", 2, False),
}


def train_all_cases(world: World) -> dict[str, dict[str, Tensor]]:
    return {name: train_once(world, *case) for name, case in CASES.items()}


def test_one_process_ddp_fsdp_and_accumulation_give_equal_gradients_even_if_a_rank_has_no_segments() -> None:
    """Tolerance 1e-5 for float32 sums, 10 % for bfloat16 as above."""
    reference = train_once(World(), "ddp", "float32", 1, False)
    low = train_once(World(), "ddp", "bfloat16", 1, False)
    arcs = search_arcs(make_model("pruned", prediction="lstm"), 20, [1, 2])
    for cases in run_distributed(train_all_cases, 2):
        for name, results in cases.items():
            if "arcs" in results:
                torch.testing.assert_close(results.pop("arcs"), arcs.detach(), rtol=0, atol=1e-9)
            assert results.keys() == reference.keys()
            for parameter, grad in results.items():
                if "bfloat16" in name:
                    error = (grad - low[parameter]).norm() / max(low[parameter].norm(), 1e-3)
                    assert error < 0.1, (name, parameter)
                else:
                    torch.testing.assert_close(
                        grad, reference[parameter], rtol=1e-5, atol=1e-6, msg=f"{name} {parameter}"
                    )
