"""Outputs and gradients of an utterance do not depend on its neighbours, its row, or the padding (float64).

Outputs are compared for every allowed combination of backend, position, mask, norm of the convolution module,
subsampling and shared heads. Outputs and gradients of input and parameters are compared for combinations that cover
every three values of these and of norm, gate, causal convolution and stages.
"""

from itertools import combinations

import pytest
import torch
from torch import Tensor

from bestrq.model.conformer import ConformerEncoder
from common.segments import Segments
from tests.variants import CHOICES, Case, Segment, all_cases, covering_cases, encode, make_encoder

TOLERANCE = 1e-9
PRODUCT = ("backend", "position", "mask", "convolution_norm", "subsampling", "heads")
Item = tuple[int, int | None]
"""length in mel frames, and number of the utterance; None for noise"""


def pack_row(encoder: ConformerEncoder, row: int, items: list[Item], order: list[int] | None = None) -> list[Segment]:
    """Place segments one after another with the smallest allowed gaps; return them in the given order."""
    segments, end = [], -encoder.settings.row_gap
    for length, utterance in items:
        start = -(-(end + encoder.settings.row_gap) // encoder.settings.row_multiple) * encoder.settings.row_multiple
        segments.append(Segment(row, start, length, utterance))
        end = start + length
    return [segments[i] for i in order or range(len(segments))]


def last_stop(segments: list[Segment]) -> int:
    return max(segment.start + segment.length for segment in segments)


def assert_packing_changes_nothing(case: Case, lengths: list[int], grads: bool, **changes: object) -> None:
    """Compare three utterances alone in a row of their length, packed between noise, and packed in other rows."""
    encoder, backend = make_encoder(case, **changes), case.get("backend", "segments")
    stride = encoder.settings.stride
    a, b, c = ((length, number) for number, length in enumerate(lengths))
    alone = [encode(encoder, backend, [Segment(0, 0, *item)], 1, item[0], grads) for item in (a, b, c)]
    expected = [run.outputs[0] for run in alone] + [grad for run in alone for grad in run.input_grads]
    if grads:
        expected += [torch.stack(g).sum(dim=0) for g in zip(*(run.parameter_grads for run in alone), strict=True)]
    packed = pack_row(encoder, 0, [(5 * stride - 1, None), c, (7, None), a], order=[3, 1, 0, 2])
    packed += pack_row(encoder, 2, [b, (stride + 1, None)])
    moved = pack_row(encoder, 0, [a, b], order=[1, 0]) + pack_row(encoder, 1, [(51 * stride, None), c])
    for segments, rows, frames in ((packed, 3, last_stop(packed)), (moved, 2, last_stop(moved) + 9 * stride + 1)):
        run = encode(encoder, backend, segments, rows, frames, grads)
        assert run.outside_grad == 0, f"{case}: frames outside the utterances have gradients"
        results = [*run.outputs, *run.input_grads, *run.parameter_grads]
        for actual, exact in zip(results, expected, strict=True):
            torch.testing.assert_close(
                actual, exact, rtol=TOLERANCE, atol=TOLERANCE, msg=lambda text: f"{case}, {lengths}: {text}"
            )
    assert all(run.outputs[0].abs().min() > 0 for run in alone)
    if grads:
        assert (
            min(float(grad.abs().max()) for grad in expected[4:]) > 0
        )  # the ReLUs of a single frame may all be inactive


def edge_case_lengths(case: Case, number: int) -> list[int]:
    """Lengths of one mel frame, of a varying remainder modulo the stride, and of more than one block of bands."""
    stride = 2 * int(case["subsampling"].split()[1])
    return [1, 5 * stride + number % stride, 13 * stride - number % 3]


def test_every_three_choices_that_are_allowed_together_occur_in_a_case() -> None:
    cases = covering_cases(3)
    covered = {
        tuple((factor, case[factor]) for factor in factors) for case in cases for factors in combinations(CHOICES, 3)
    }
    for factors in combinations(CHOICES, 3):
        for combination in all_cases(*factors):
            assert tuple(combination.items()) in covered
    assert len(cases) < 150 and all(set(case) == set(CHOICES) for case in cases)


@pytest.mark.parametrize("part", range(6))
def test_utterances_alone_packed_and_moved_have_the_same_outputs_and_gradients(part: int) -> None:
    for number, case in list(enumerate(covering_cases(3)))[part::6]:
        assert_packing_changes_nothing(case, edge_case_lengths(case, number), grads=True)


@pytest.mark.parametrize("position", CHOICES["position"])
@pytest.mark.parametrize("backend", CHOICES["backend"])
def test_every_combination_of_the_main_choices_has_the_same_outputs_alone_packed_and_moved(
    backend: str, position: str
) -> None:
    for number, case in enumerate(all_cases(*PRODUCT)):
        if (case["backend"], case["position"]) == (backend, position):
            assert_packing_changes_nothing(case, edge_case_lengths(case, number), grads=False)


def test_a_block_does_not_depend_on_the_frames_in_gaps() -> None:
    for case in covering_cases(2):
        encoder = make_encoder(case)
        rows = pack_row(
            encoder, 0, [(5 * encoder.settings.stride - 1, None), (3, None), (encoder.settings.stride, None)]
        )
        start, length = torch.tensor([[s.start for s in rows], [0, 0, 0]]), torch.tensor([[s.length for s in rows]] * 2)
        layout = encoder.layout(Segments(start, length * torch.tensor([[1], [0]]), last_stop(rows)), case["backend"])
        valid, block = layout.stages[0].valid, encoder.blocks[0]
        x = torch.randn(*valid.shape, block.attention.qkv.in_features, dtype=torch.float64)  # type: ignore[union-attr]
        other = torch.where(valid[..., None], x, 5 * torch.randn_like(x))
        outputs = [block(frames, layout.stages[0]) for frames in (x, other)]
        output_valid = layout.output.valid if case["stages"] == "two" else valid
        torch.testing.assert_close(
            outputs[0][output_valid], outputs[1][output_valid], rtol=TOLERANCE, atol=TOLERANCE, msg=str(case)
        )


@pytest.mark.parametrize("convolution", CHOICES["convolution"])
@pytest.mark.parametrize("subsampling", CHOICES["subsampling"])
def test_packed_segments_of_all_lengths_modulo_the_stride_equal_each_alone(subsampling: str, convolution: str) -> None:
    encoder = make_encoder({"subsampling": subsampling, "convolution": convolution, "norm": "rms_norm"})
    stride = encoder.settings.stride
    items: list[Item] = [(3 * stride + rest, rest) for rest in range(stride)]
    run = encode(encoder, "segments", row := pack_row(encoder, 0, items), 1, last_stop(row))
    for number, (length, _) in enumerate(items):
        alone = encode(encoder, "segments", [Segment(0, 0, length, number)], 1, length)
        torch.testing.assert_close(run.outputs[number], alone.outputs[0], rtol=TOLERANCE, atol=TOLERANCE)
        torch.testing.assert_close(run.input_grads[number], alone.input_grads[0], rtol=TOLERANCE, atol=TOLERANCE)


@pytest.mark.parametrize("mask", CHOICES["mask"])
@pytest.mark.parametrize("backend", CHOICES["backend"])
def test_segments_may_start_or_end_at_the_edge_of_a_block(backend: str, mask: str) -> None:
    """Blocks of 64 frames in bands, of 128 in FlexAttention."""
    if backend == "bands" and mask in ("segment", "causal"):
        pytest.skip("bands need a bounded mask")
    encoder = make_encoder({"mask": mask, "position": "relative", "heads": "shared", "subsampling": "stacking 4"})
    lengths = [4 * 64, 4 * 63 - 1, 1]
    alone = [encode(encoder, backend, [Segment(0, 0, n, number)], 1, n) for number, n in enumerate(lengths)]
    ending = [Segment(0, 0, lengths[0], 0), Segment(0, 4 * 65, lengths[1], 1), Segment(1, 4 * 127, 1, 2)]
    beginning = [Segment(0, 4 * 64, lengths[0], 0), Segment(1, 4, lengths[1], 1), Segment(0, 4 * 192, 1, 2)]
    beginning += [Segment(0, 0, 4 * 63, None), Segment(1, 4 * 128, 4, None)]
    for segments in (ending, [s for s in beginning if s.start != 4 * 192], beginning[1:2] + beginning[2:3]):
        run = encode(encoder, backend, segments, 2, 4 * 193)
        numbers = sorted(s.utterance for s in segments if s.utterance is not None)
        for number, output, grad in zip(numbers, run.outputs, run.input_grads, strict=True):
            torch.testing.assert_close(output, alone[number].outputs[0], rtol=TOLERANCE, atol=TOLERANCE)
            torch.testing.assert_close(grad, alone[number].input_grads[0], rtol=TOLERANCE, atol=TOLERANCE)


@pytest.mark.parametrize("convolution", CHOICES["convolution"])
@pytest.mark.parametrize("stages", CHOICES["stages"])
@pytest.mark.parametrize("kernel_size", [1, 31])
def test_packing_with_kernels_of_one_frame_or_longer_than_a_segment(
    kernel_size: int, stages: str, convolution: str
) -> None:
    case = {"stages": stages, "convolution": convolution, "subsampling": "striding 2"}
    assert_packing_changes_nothing(case, [1, 37, 52], grads=True, kernel_size=kernel_size, num_layers=2)


@pytest.mark.parametrize("stages", CHOICES["stages"])
def test_gaps_and_unused_rows_are_zero_in_the_output(stages: str) -> None:
    encoder = make_encoder({"stages": stages})
    layout = encoder.layout(Segments(torch.tensor([[24], [0]]), torch.tensor([[21], [0]]), 72))
    outputs: Tensor = encoder(torch.randn(2, 72, 4, dtype=torch.float64), layout)
    stride = encoder.settings.stride
    assert outputs[~layout.output.valid].abs().max() == 0
    assert outputs[layout.output.valid].abs().min() > 0 and int(layout.output.valid.sum()) == -(-21 // stride)


def test_rows_that_do_not_fit_the_layout_are_refused() -> None:
    encoder = make_encoder({})
    layout = encoder.layout(Segments(torch.tensor([[0]]), torch.tensor([[21]]), 24))
    for frames in (20, 28):
        with pytest.raises(ValueError, match=f"rows of {frames} mel frames do not fit a layout of 24"):
            encoder(torch.randn(1, frames, 4, dtype=torch.float64), layout)


def test_segments_that_the_subsampling_would_mix_are_refused() -> None:
    encoder = make_encoder({"subsampling": "striding 8"})
    lengths = torch.tensor([[20, 20, 0], [8, 20, 0]])
    encoder.layout(Segments(torch.tensor([[24, 0, 0], [32, 0, 0]]), lengths, 64))
    for start in (16, 0):
        with pytest.raises(ValueError, match="less than 4 mel frames apart"):
            encoder.layout(Segments(torch.tensor([[start, 0, 0], [32, 0, 0]]), lengths, 64))
