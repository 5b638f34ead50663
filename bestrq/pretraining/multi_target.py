"""Several targets and several predicting blocks: quantizer and teacher, last block and inner blocks.

Sources: HuBERT (Hsu et al., arXiv 2106.07447) for targets of a model and for the weight of unmasked frames; ILS-SSL
(Wang et al., arXiv 2112.08778) for the losses of inner layers. Imported only if `TargetSettings.extended`.

R rows, F mel frames, M mel bins, T encoder frames per row, N frames with a target, C codebooks, V teacher's classes.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bestrq.model.conformer import ConformerEncoder, EncoderSettings
from bestrq.pretraining.distillation import DistilledCodebook, frame_spans
from bestrq.pretraining.masking import MaskingSettings
from bestrq.pretraining.objective import MaskedRows, TargetSettings, mask_rows, target_frame_mask
from bestrq.pretraining.quantizer import QuantizerSettings, RandomProjectionQuantizer
from bestrq.pretraining.teacher import Teacher
from common.errors import UserError
from common.segments import Segments, to_device


@dataclass(frozen=True)
class Task:
    """Head on a block that predicts one kind of target."""

    name: str
    """of the head and of its loss in the metrics"""
    block: int
    """number of the block, from 1"""
    source: str
    """'quantizer' or 'teacher'"""
    codebooks: int
    """predictions per frame"""
    size: int
    """classes of each"""
    weight: float


def make_tasks(
    encoder: EncoderSettings, quantizer: QuantizerSettings, targets: TargetSettings, classes: int
) -> list[Task]:
    """Tasks in the order of the losses; the first is that of the accuracy. `classes`: of the teacher, 0 without one."""
    if encoder.output != "last":
        raise UserError(
            f"encoder.output is {encoder.output!r}, but the heads of these targets are on single blocks: give 'last', "
            "or leave out targets.export, inner_layers, distill_layers and unmasked_weight"
        )
    num_blocks = encoder.num_layers + sum(stage.num_layers for stage in encoder.earlier_stages)
    first = num_blocks - encoder.num_layers + 1
    for name in ("inner_layers", "distill_layers"):
        if wrong := [number for number in getattr(targets, name) if not first <= number < num_blocks]:
            raise UserError(f"targets.{name} has {wrong[0]}: give blocks from {first} to {num_blocks - 1}")
    if targets.source == "teacher" and quantizer.adapts:
        raise UserError(
            "quantizer.pca_steps and refine_steps have no effect with targets.source 'teacher', which does not use the "
            "quantizer: leave them out, or give source 'both'"
        )
    if targets.distill_layers and (quantizer.num_codebooks < 2 or targets.source == "teacher"):
        raise UserError(
            "targets.distill_layers replaces the last of several codebooks, but quantizer.num_codebooks is "
            f"{quantizer.num_codebooks} and targets.source {targets.source!r}: give 2 or more, and 'quantizer' or "
            "'both'"
        )
    tasks = []
    for block in (num_blocks, *targets.inner_layers):
        weight, suffix = (1.0, "") if block == num_blocks else (targets.inner_weight, f"_block_{block}")
        if targets.source != "teacher":
            size = quantizer.num_codebooks, quantizer.codebook_size
            tasks.append(Task(f"quantizer{suffix}", block, "quantizer", *size, weight))
        if targets.source != "quantizer":
            share = targets.teacher_weight if targets.source == "both" else 1.0
            tasks.append(Task(f"teacher{suffix}", block, "teacher", 1, classes, weight * share))
    return tasks


class MultiTarget(nn.Module):
    """Conformer encoder with a linear head per task, applied to the frames with a target only."""

    def __init__(
        self, encoder: EncoderSettings, quantizer: QuantizerSettings, targets: TargetSettings, classes: int
    ) -> None:
        super().__init__()
        self.tasks = make_tasks(encoder, quantizer, targets, classes)
        self.encoder = ConformerEncoder(encoder)
        self.heads = nn.ModuleDict({t.name: nn.Linear(encoder.dim, t.codebooks * t.size) for t in self.tasks})
        self.num_codebooks = self.tasks[0].codebooks
        self.distilled, self.distill_layers, self.distill_weight = None, targets.distill_layers, targets.distill_weight
        if targets.distill_layers:
            first = RandomProjectionQuantizer(quantizer, encoder.stride * encoder.num_mels)
            self.distilled = DistilledCodebook(first.codebook[-1])
        names = [task.name for task in self.tasks] + ["distillation"] * bool(targets.distill_layers)
        self.loss_names = tuple(f"loss_{name}" for name in names)

    def forward(
        self, log_mel: Tensor, segments: Segments, target_frames: Tensor, targets: Tensor,
        teacher: Tensor | None = None, weights: Tensor | None = None, projected: Tensor | None = None,
        spans: Sequence[tuple[int, int]] = (),
    ) -> tuple[Tensor, ...]:  # fmt: skip
        """Weighted sum of all losses, number of correct predictions of the first task, and the loss of every task.

        All are sums over the frames with their weights; the loss of a frame is the mean over codebooks. The loop
        divides by the sum of the weights over all ranks and micro-batches.

        Args:
            targets: int64 `[N, C]`, codes of the quantizer, or labels of the teacher with C = 1.
            teacher: further targets of the teacher: int64 `[N]`, or distributions `[N, V]`, whose loss is the
                Kullback-Leibler divergence; None (to count FLOPs): the first column of `targets`.
            weights: `[N]`; None: 1.
            projected, spans: see `DistilledCodebook.forward`.
        """
        blocks = sorted({*(task.block for task in self.tasks), *self.distill_layers})
        outputs = self.encoder.block_outputs(log_mel, self.encoder.layout(segments), blocks)
        hidden = {block: x.flatten(0, 1)[target_frames] for block, x in zip(blocks, outputs, strict=True)}
        sums, num_correct = [], torch.zeros((), device=log_mel.device)
        for task in self.tasks:
            logits = self.heads[task.name](hidden[task.block]).unflatten(1, (task.codebooks, task.size))
            logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
            labels = targets
            if task.source == "teacher":
                labels = targets[:, 0] if teacher is None else teacher
                labels = labels if labels.is_floating_point() else labels[:, None]
            losses = frame_losses(logits, labels)
            sums.append((losses if weights is None else losses * weights).sum())
            if task is self.tasks[0]:
                with torch.no_grad():
                    correct = (logits.argmax(dim=-1) == targets).double().mean(dim=1)
                    num_correct = (correct if weights is None else correct * weights).sum()
        factors = [task.weight for task in self.tasks]
        if self.distilled is not None:
            sums.append(self.distilled(projected, [hidden[block] for block in self.distill_layers], spans))
            factors.append(self.distill_weight)
        total = torch.stack([factor * value for factor, value in zip(factors, sums, strict=True)]).sum()
        return total, num_correct, *(value.detach() for value in sums)


def frame_losses(logits: Tensor, labels: Tensor) -> Tensor:
    """Loss of every frame in nats, `[N]`: mean cross-entropy over codebooks, or divergence from a distribution.

    logits: `[N, C, V]`. labels: int64 `[N, C]`, or distributions `[N, V]` with C = 1.
    """
    if not labels.is_floating_point():
        losses = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none")
        return losses.unflatten(0, labels.shape).mean(dim=1)
    log_probs = F.log_softmax(logits[:, 0], dim=-1)
    return (torch.special.xlogy(labels, labels) - labels * log_probs).sum(dim=-1)


def multi_target_rows(
    log_mel: Tensor, mask: Tensor, segments: Segments, quantizer: RandomProjectionQuantizer, stride: int,
    masking: MaskingSettings, targets: TargetSettings, teacher: Teacher | None, received: Tensor | None = None,
    training: bool = True,
) -> MaskedRows:  # fmt: skip
    """`mask_rows` with the targets of the teacher, from the clean features, and with weighted unmasked frames.

    Frames with some masked and some unmasked mel frames have no target. On held-out rows (`training` false), unmasked
    frames have none either: the rows that pad the last batch are recognised by their empty mask. Without waiting for
    the device.
    """
    masked = target_frame_mask(mask, segments, stride)
    frames, weights, num_targets = masked, None, float(masked.sum())
    if targets.unmasked_weight and training:
        frames = masked | target_frame_mask(~mask, segments, stride)
        chosen = torch.where(masked, 1.0, targets.unmasked_weight)[frames]
        weights, num_targets = to_device(chosen, log_mel.device), float(chosen.double().sum())
    rows = mask_rows(log_mel, mask, segments, quantizer, stride, masking.noise_std, frames, received)
    distilled: tuple = ()
    if targets.distill_layers:
        distilled = quantizer.project(rows.stacks)[-1], frame_spans(frames, segments, stride)
    rows = replace(rows, num_targets=num_targets, more=(None, weights, *distilled))
    if teacher is None:
        return rows
    of_teacher = teacher(log_mel, segments)[rows.target_frames]
    if targets.source == "teacher":
        labels = of_teacher.argmax(dim=-1) if of_teacher.is_floating_point() else of_teacher
        rows = replace(rows, targets=labels[:, None])
    return replace(rows, more=(of_teacher, weights, *distilled))
