"""Losses of several heads against plain loops in float64, and their independence of packing."""

from dataclasses import replace

import pytest
import torch

from bestrq.model.conformer import ConformerEncoder
from bestrq.pretraining import distillation
from bestrq.pretraining.distillation import DistilledCodebook, frame_spans, replaced_codes
from bestrq.pretraining.masking import MaskingSettings
from bestrq.pretraining.multi_target import MultiTarget, frame_losses, make_tasks, multi_target_rows
from bestrq.pretraining.objective import BestRQ, MaskedRows, TargetSettings, mask_rows
from bestrq.pretraining.quantizer import QuantizerSettings, RandomProjectionQuantizer
from bestrq.pretraining.teacher import Teacher
from bestrq.training.process import World
from common.errors import UserError
from common.segments import Segments
from tests.pretraining.test_objective import ENCODER, QUANTIZER, random_mel

CLASSES = 9
DEEP = replace(ENCODER, num_layers=3)
ALL = TargetSettings(
    source="both", export="x", unmasked_weight=0.25, teacher_weight=0.7, inner_layers=[2], inner_weight=0.4
)


def make_model(targets: TargetSettings) -> MultiTarget:
    torch.manual_seed(0)
    return MultiTarget(DEEP, QUANTIZER, targets, CLASSES).double()


def make_teacher(soft: bool = False) -> Teacher:
    torch.manual_seed(1)
    encoder = ConformerEncoder(ENCODER).double().eval().requires_grad_(False)
    if soft:
        head = torch.randn(CLASSES, 16), torch.zeros(CLASSES)
        return Teacher(encoder, 2, CLASSES, "", head=head, soft=True)
    return Teacher(encoder, 1, CLASSES, "", mean=torch.zeros(16), inverse_std=torch.ones(16),
                   centroids=torch.randn(CLASSES, 16))  # fmt: skip


LENGTHS = [23, 41, 16]
UTTERANCES = [random_mel(n, ENCODER.num_mels, seed=n) for n in LENGTHS]
MASKS = [torch.rand(n // 4 + 1, generator=torch.Generator().manual_seed(n)).repeat_interleave(4)[:n] < 0.6
         for n in LENGTHS]  # fmt: skip


def make_rows(targets: TargetSettings, frames: int, members: list[tuple[int, int]], soft: bool = False) -> MaskedRows:
    log_mel = 50 * random_mel(1, frames, ENCODER.num_mels, seed=77)
    mask = torch.zeros(1, frames, dtype=torch.bool)
    for index, start in members:
        log_mel[0, start : start + LENGTHS[index]] = UTTERANCES[index]
        mask[0, start : start + LENGTHS[index]] = MASKS[index]
    starts, used, seeds = (
        torch.tensor([[*column, 0]])
        for column in zip(*[(start, LENGTHS[index], 1000 + index) for index, start in members], strict=True)
    )
    quantizer = RandomProjectionQuantizer(QUANTIZER, 4 * ENCODER.num_mels).double()
    return multi_target_rows(
        log_mel, mask, Segments(starts, used, frames, seeds), quantizer, 4, MaskingSettings(), targets,
        make_teacher(soft) if targets.export else None,
    )  # fmt: skip


@pytest.mark.parametrize("soft", [False, True], ids=["clusters", "posteriors"])
def test_losses_gradients_and_weights_do_not_depend_on_packing(soft: bool) -> None:
    model = make_model(ALL)

    def result(rows: list[MaskedRows]) -> tuple[float, torch.Tensor, list[torch.Tensor]]:
        model.zero_grad()
        outputs = [torch.stack(model(*r.inputs)) for r in rows]
        total = torch.stack(outputs).sum(dim=0)
        total[0].backward()
        gradients = [p.grad.clone() for p in model.parameters() if p.grad is not None]
        assert len(gradients) == len(list(model.parameters()))
        return sum(r.num_targets for r in rows), total.detach(), gradients

    alone = result([make_rows(ALL, -(-n // 4) * 4, [(i, 0)], soft) for i, n in enumerate(LENGTHS)])
    packed = result([make_rows(ALL, 96, [(1, 4), (2, 52), (0, 72)], soft)])
    assert packed[0] == alone[0]
    torch.testing.assert_close(packed[1:], alone[1:], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("soft", [False, True], ids=["clusters", "posteriors"])
def test_the_loss_is_the_weighted_sum_over_frames_codebooks_and_blocks(soft: bool) -> None:
    model, rows = make_model(ALL).eval(), make_rows(ALL, 96, [(1, 4), (2, 52), (0, 72)], soft)
    total, correct, *parts = model(*rows.inputs)
    inner, last = model.encoder.block_outputs(rows.log_mel, model.encoder.layout(rows.segments), [2, 3])
    teacher, weights = rows.more
    assert teacher is not None and weights is not None
    expected, num_correct, sums = 0.0, 0.0, dict.fromkeys(model.loss_names, 0.0)
    for n, frame in enumerate(rows.target_frames.tolist()):
        weight = 1.0 if bool(rows.mask[0, 4 * frame]) else 0.25
        assert float(weights[n]) == weight
        for block, hidden, of_block, suffix in ((3, last, 1.0, ""), (2, inner, 0.4, "_block_2")):
            quantized = model.heads[f"quantizer{suffix}"](hidden[0, frame]).view(2, 64).log_softmax(dim=-1)
            loss = -sum(float(quantized[c, rows.targets[n, c]]) for c in range(2)) / 2
            log_probs = model.heads[f"teacher{suffix}"](hidden[0, frame]).log_softmax(dim=-1)
            if soft:
                target = teacher[n].double()
                second = float((target * (target.log() - log_probs)).sum())
            else:
                second = -float(log_probs[teacher[n]])
            expected += weight * of_block * (loss + 0.7 * second)
            sums[f"loss_quantizer{suffix}"] += weight * loss
            sums[f"loss_teacher{suffix}"] += weight * second
            if block == 3:
                num_correct += weight * float((quantized.argmax(dim=-1) == rows.targets[n]).double().mean())
    assert float(total) == pytest.approx(expected, rel=1e-6)
    assert float(correct) == pytest.approx(num_correct)
    assert [float(part) for part in parts] == pytest.approx(list(sums.values()), rel=1e-6)
    assert rows.num_targets == float(weights.double().sum())


def test_partly_masked_frames_have_no_target_and_unmasked_ones_only_with_a_weight() -> None:
    mask = torch.zeros(1, 24, dtype=torch.bool)
    mask[0, 6:16] = True  # frame 1 in part, 2 and 3 entirely
    segments = Segments(torch.tensor([[0]]), torch.tensor([[22]]), 24, torch.tensor([[9]]))
    quantizer = RandomProjectionQuantizer(QUANTIZER, 48).double()
    found = {}
    for weight in (0.0, 0.5):
        targets = TargetSettings(unmasked_weight=weight, inner_layers=[1])
        rows = multi_target_rows(random_mel(1, 24, 12), mask, segments, quantizer, 4, MaskingSettings(), targets, None)
        found[weight] = rows.target_frames.tolist(), rows.num_targets
    assert found == {0.0: ([2, 3], 2.0), 0.5: ([0, 2, 3, 4], 3.0)}


def test_a_single_quantizer_head_has_the_loss_of_the_plain_model() -> None:
    """Per frame instead of per code: C times smaller sums over C times fewer targets."""
    targets = TargetSettings(inner_layers=[1])
    model = make_model(targets).eval()
    plain = BestRQ(DEEP, QUANTIZER).double().eval()
    plain.encoder.load_state_dict(model.encoder.state_dict())
    plain.heads.load_state_dict(model.heads["quantizer"].state_dict())
    rows = make_rows(targets, 96, [(1, 4), (2, 52), (0, 72)])
    quantizer = RandomProjectionQuantizer(QUANTIZER, 48).double()
    log_mel = 50 * random_mel(1, 96, 12, seed=77)
    for index, start in [(1, 4), (2, 52), (0, 72)]:
        log_mel[0, start : start + LENGTHS[index]] = UTTERANCES[index]
    reference = mask_rows(log_mel, rows.mask, rows.segments, quantizer, 4, 0.1)
    loss, correct = plain(*reference.inputs)
    _, more_correct, of_head, _ = model(*rows.inputs)
    assert float(of_head) / rows.num_targets == pytest.approx(float(loss) / reference.num_targets, rel=1e-9)
    assert float(more_correct) / rows.num_targets == pytest.approx(float(correct) / reference.num_targets)


def test_a_teacher_alone_replaces_the_codes() -> None:
    targets = TargetSettings(source="teacher", export="x")
    rows = make_rows(targets, 96, [(1, 4), (2, 52), (0, 72)])
    teacher, weights = rows.more
    assert teacher is not None and weights is None
    assert torch.equal(rows.targets, teacher[:, None])
    model = make_model(targets)
    assert list(model.heads) == ["teacher"] and model.num_codebooks == 1


def test_the_divergence_from_its_own_distribution_is_zero_and_its_gradient_that_of_cross_entropy() -> None:
    logits = torch.randn(5, 1, CLASSES, dtype=torch.float64, requires_grad=True)
    assert frame_losses(logits, logits[:, 0].softmax(dim=-1).detach()).abs().max() < 1e-12
    labels = torch.arange(5)
    hard = torch.nn.functional.one_hot(labels, CLASSES).double()
    torch.testing.assert_close(frame_losses(logits, hard), frame_losses(logits, labels[:, None]))


def test_settings_that_cannot_work_name_the_field_and_a_fix() -> None:
    with pytest.raises(UserError, match=r"targets.source is 'teacher' and targets.export '': give an export"):
        TargetSettings(source="teacher")
    with pytest.raises(UserError, match=r"targets.source is 'quantizer' and targets.export 'x': give source 'teacher'"):
        TargetSettings(export="x")
    with pytest.raises(UserError, match=r"targets.inner_layers has 3: give blocks from 1 to 2"):
        make_tasks(DEEP, QUANTIZER, TargetSettings(inner_layers=[3]), 0)
    with pytest.raises(UserError, match=r"pca_steps and refine_steps have no effect with targets.source 'teacher'"):
        make_tasks(DEEP, QuantizerSettings(pca_steps=5), TargetSettings(source="teacher", export="x"), 9)
    with pytest.raises(UserError, match=r"encoder.output is 'weighted_sum', .*: give 'last'"):
        make_tasks(replace(DEEP, output="weighted_sum"), QUANTIZER, TargetSettings(inner_layers=[1]), 0)
    with pytest.raises(UserError, match=r"inner_layers is \[1, 1\]: give every block once"):
        TargetSettings(inner_layers=[1, 1])


# ---- codebook distilled from layers

DISTILL = TargetSettings(distill_layers=[1, 2], distill_steps=[5], distill_weight=0.3)


def test_the_distillation_is_the_mean_difference_of_cosines_within_segments() -> None:
    model = make_model(DISTILL).eval()
    rows = make_rows(DISTILL, 96, [(1, 4), (2, 52), (0, 72)])
    projected = rows.more[2]
    outputs = model.encoder.block_outputs(rows.log_mel, model.encoder.layout(rows.segments), [1, 2])
    assert model.distilled is not None
    codes = torch.nn.functional.normalize(model.distilled.codes, dim=-1)
    expected = 0.0
    for first, stop in ((1, 12), (13, 17), (18, 24)):
        members = [n for n, frame in enumerate(rows.target_frames.tolist()) if first <= frame < stop]
        chosen = [codes[(codes @ projected[n]).argmax()] for n in members]
        layers = [[output[0, int(rows.target_frames[n])] for n in members] for output in outputs]
        for i in range(len(members)):
            for j in range(len(members)):
                cosine = sum(float(torch.cosine_similarity(x[i], x[j], dim=0)) for x in layers) / 2
                expected += abs(float(chosen[i] @ chosen[j]) - cosine) / len(members)
    total, _, quantizer, distillation = model(*rows.inputs)
    assert float(distillation) == pytest.approx(expected, rel=1e-9) and expected > 0.1
    assert float(total) == pytest.approx(float(quantizer) + 0.3 * expected)


def test_the_distillation_trains_the_codes_only_and_not_across_segments() -> None:
    model = make_model(DISTILL).eval()
    rows = make_rows(DISTILL, 96, [(1, 4), (2, 52), (0, 72)])
    assert model.distilled is not None
    hidden = model.encoder.block_outputs(rows.log_mel, model.encoder.layout(rows.segments), [1, 2])
    frames = [x.flatten(0, 1)[rows.target_frames] for x in hidden]
    model.distilled(rows.more[2], frames, rows.more[3]).backward()
    with_gradient = {name for name, p in model.named_parameters() if p.grad is not None}
    assert with_gradient == {"distilled.codes"} and model.distilled.codes.grad.abs().sum() > 0
    alone = [make_rows(DISTILL, -(-n // 4) * 4, [(i, 0)]) for i, n in enumerate(LENGTHS)]
    parts = sum(float(model(*r.inputs)[3]) for r in alone)
    assert float(model(*rows.inputs)[3]) == pytest.approx(parts, rel=1e-6)


def test_training_the_codes_brings_their_similarities_to_those_of_the_layers() -> None:
    model = make_model(DISTILL).eval()
    rows = make_rows(DISTILL, 96, [(1, 4), (2, 52), (0, 72)])
    assert model.distilled is not None
    optimizer = torch.optim.Adam(model.distilled.parameters(), lr=0.03)
    losses = []
    for _ in range(80):
        optimizer.zero_grad()
        loss = model(*rows.inputs)[0]
        loss.backward()
        optimizer.step()
        losses.append(float(model(*rows.inputs)[3]))
    assert losses[-1] < 0.6 * losses[0]


def test_distilled_codes_keep_the_ids_of_the_codes_that_they_resemble() -> None:
    generator = torch.Generator().manual_seed(3)
    old = torch.nn.functional.normalize(torch.randn(20, 8, generator=generator), dim=-1)
    order = torch.randperm(20, generator=generator)
    codebook = DistilledCodebook(3 * (old[order] + 0.02 * torch.randn(20, 8, generator=generator)))
    new = replaced_codes(old, codebook, World())
    torch.testing.assert_close(new.norm(dim=-1), torch.ones(20))
    assert ((old * new).sum(dim=-1) > 0.95).all()


def test_long_segments_are_compared_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(distillation, "MAX_SPAN", 3)
    frames = torch.zeros(2, 10, dtype=torch.bool)
    frames[0, 1:8] = frames[1, [0, 5, 6]] = True
    segments = Segments(torch.tensor([[0, 0], [20, 0]]), torch.tensor([[40, 0], [18, 16]]), 40)
    assert frame_spans(frames, segments, 4) == [(0, 3), (3, 6), (6, 7), (7, 8), (8, 10)]


def test_a_distilled_codebook_needs_an_anchor() -> None:
    for quantizer, targets, message in (
        (QuantizerSettings(), DISTILL, r"num_codebooks is 1 .* give 2 or more"),
        (
            QUANTIZER,
            TargetSettings(distill_layers=[3], distill_steps=[2]),
            r"targets.distill_layers has 3: give blocks",
        ),
    ):
        with pytest.raises(UserError, match=message):
            make_tasks(DEEP, quantizer, targets, 0)
    for alone in ({"distill_layers": [1]}, {"distill_steps": [2]}):
        with pytest.raises(UserError, match=r"targets.distill_layers is .* and distill_steps .* belong together"):
            TargetSettings(**alone)
