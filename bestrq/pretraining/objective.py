"""BEST-RQ objective: predict the code of every fully masked stack of mel frames from its context.

Targets are computed outside the model, in float32, from the clean features; the model receives the masked features
only. Target t belongs to encoder frame t: both are counted from the start of the segment, a multiple of the stride.

R rows, F mel frames per row, M mel bins, T encoder frames per row, N targets, C codebooks.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import Any, Literal, cast

import numpy as np
import torch
import torch.nn.functional as F
from jsonargparse.typing import NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt
from torch import Tensor, nn

from bestrq.model.conformer import ConformerEncoder, EncoderSettings
from bestrq.model.layout import order_segments
from bestrq.pretraining.masking import fill_with_noise, num_runs
from bestrq.pretraining.quantizer import QuantizerSettings, RandomProjectionQuantizer, stack_frames
from bestrq.training.meters import IntervalSums
from bestrq.training.process import DistributedSettings, World, autocast, unwrap
from common.errors import UserError
from common.segments import Segments, to_device_together


@dataclass
class TargetSettings:
    """Targets of the masked frames, and the blocks that predict them; docs/objectives.md compares them."""

    source: Literal["quantizer", "teacher", "both"] = "quantizer"
    """'quantizer': codes of the clean features; 'teacher': targets from the model of `export`; 'both': two heads"""
    export: str = ""
    """teacher: export (or checkpoint) of pretrain.py, finetune_ctc.py or finetune_rnnt.py, of the same stride"""
    kind: Literal["clusters", "ctc_labels", "ctc_posteriors"] = "clusters"
    """teacher: 'clusters': k-means clusters of the outputs of a block (HuBERT, arXiv 2106.07447, section 3);
    'ctc_labels': most probable labels of its CTC head; 'ctc_posteriors': its distributions (Kullback-Leibler loss)"""
    blank: Literal["fill", "keep", "without"] = "fill"
    """CTC kinds: 'fill' gives frames of the blank the target of the nearest frame with a label in the segment;
    'without' sets the probability of the blank to 0"""
    layer: NonNegativeInt = 0
    """kind 'clusters': block, from 1, whose outputs are clustered; 0: at two thirds of the depth"""
    clusters: PositiveInt = 500
    """kind 'clusters': number of clusters (HuBERT's second iteration: 500)"""
    cluster_seconds: PositiveFloat = 3600.0
    """kind 'clusters': training audio, from which the clusters are estimated at the first start"""
    seed: int = 0
    """kind 'clusters': seed of that sample and of k-means"""
    teacher_weight: PositiveFloat = 1.0
    """source 'both': weight of the teacher's loss; that of the quantizer has 1"""
    unmasked_weight: NonNegativeFloat = 0.0
    """weight of unmasked frames in the loss, relative to masked ones (HuBERT, equation 2; 0 is best there)"""
    inner_layers: list[PositiveInt] = field(default_factory=list)
    """blocks, from 1, that predict the targets too, each with its own heads (ILS-SSL, arXiv 2112.08778)"""
    inner_weight: PositiveFloat = 1.0
    """weight of the loss of each inner layer; that of the last block has 1"""
    distill_layers: list[PositiveInt] = field(default_factory=list)
    """blocks, from 1, from which the last codebook is distilled (RWTH, arXiv 2606.30671)"""
    distill_steps: list[PositiveInt] = field(default_factory=list)
    """optimizer steps after which the distilled codes replace it"""
    distill_weight: PositiveFloat = 1.0
    """weight of the loss that trains them"""

    def __post_init__(self) -> None:
        if (self.source == "quantizer") == bool(self.export):
            fix = "give an export" if not self.export else "give source 'teacher' or 'both', or no export"
            raise UserError(f"targets.source is {self.source!r} and targets.export {self.export!r}: {fix}")
        if len(set(self.inner_layers)) < len(self.inner_layers):
            raise UserError(f"targets.inner_layers is {self.inner_layers}: give every block once")
        if bool(self.distill_layers) != bool(self.distill_steps):
            raise UserError(
                f"targets.distill_layers is {self.distill_layers} and distill_steps {self.distill_steps}: they belong "
                "together, give both, or neither"
            )

    @property
    def extended(self) -> bool:
        """Whether the model needs more than one head on the masked frames (`MultiTarget`)."""
        return self.source != "quantizer" or bool(self.unmasked_weight or self.inner_layers or self.distill_layers)


@dataclass
class MaskedRows:
    """Input and targets of the model for a batch."""

    log_mel: Tensor
    """float32 [R, F, M], masked frames replaced by noise"""
    mask: Tensor
    """bool [R, F], on the CPU"""
    segments: Segments
    """in mel frames"""
    target_frames: Tensor
    """int64 [N], ascending: row * T + t of every encoder frame with a target"""
    targets: Tensor
    """int64 [N, C] codes"""
    stacks: Tensor
    """float32 [N, stride * M], clean stacks of the frames with a target"""
    num_targets: float
    """N x C; with `MultiTarget`, the sum of the weights of the frames"""
    more: tuple[Any, ...] = ()
    """further arguments of `MultiTarget.forward`"""

    @property
    def inputs(self) -> tuple:
        """Arguments of the model."""
        return self.log_mel, self.segments, self.target_frames, self.targets, *self.more


def target_frame_mask(mask: Tensor, segments: Segments, stride: int) -> Tensor:
    """Encoder frames with a target, bool `[R, T]`: all mel frames of their stack are masked and in one segment.

    The incomplete last stack of a segment has no target, and neither have gaps, which are never masked.
    """
    rows, frames = mask.shape
    target = np.zeros(mask.shape, bool)  # slicing a tensor takes ten times as long
    for row, _, start, stop in segments.used():
        target[row, start:stop] = mask.numpy()[row, start:stop]
    return torch.from_numpy(target).view(rows, frames // stride, stride).all(dim=-1)


def mask_rows(
    log_mel: Tensor,
    mask: Tensor,
    segments: Segments,
    quantizer: RandomProjectionQuantizer,
    stride: int,
    noise_std: float,
    frames: Tensor | None = None,
    received: Tensor | None = None,
) -> MaskedRows:
    """Compute the codes of the clean features, and replace masked frames by noise.

    Args:
        log_mel: clean normalised features, float32 `[R, F, M]`, on the device.
        mask: bool `[R, F]`, on the CPU: the number of targets is then known without waiting for the device.
        segments: in mel frames, with seeds.
        frames: encoder frames with a target, bool `[R, T]`, on the CPU; by default, those of `target_frame_mask`.
        received: features that the model receives in unmasked frames, `[R, F, M]`; by default the clean ones.
    """
    frames = target_frame_mask(mask, segments, stride) if frames is None else frames
    ordered = order_segments(segments)
    assert ordered.seed is not None
    numbers = frames.flatten().nonzero().squeeze(1), ordered.start, ordered.length, ordered.seed, mask
    target_frames, start, length, seed, masked = to_device_together(numbers, log_mel.device)
    segments = replace(segments, placed=Segments(start, length, segments.num_frames, seed))
    stacks = stack_frames(log_mel, stride).flatten(0, 1)[target_frames]
    received = log_mel if received is None else received
    noisy = fill_with_noise(received, masked, segments, noise_std)
    codes = quantizer(stacks)
    return MaskedRows(noisy, mask, segments, target_frames, codes, stacks, codes.numel())


def frame_counts(rows: MaskedRows) -> dict[str, int]:
    """Numbers of masked frames, masked runs, frames of segments, and frames of rows."""
    counts = {"masked_frames": int(np.count_nonzero(rows.mask.numpy())), "masked_runs": num_runs(rows.mask)}
    return counts | {"frames": int(rows.segments.length.sum()), "row_frames": rows.mask.numel()}


class BestRQ(nn.Module):
    """Conformer encoder with one softmax head per codebook, applied to the frames with a target only."""

    loss_names: tuple[str, ...] = ()
    """further outputs of `forward`, sums by name; none"""
    distilled = None
    """codebook of `MultiTarget`; none"""

    def __init__(self, encoder: EncoderSettings, quantizer: QuantizerSettings) -> None:
        super().__init__()
        self.encoder = ConformerEncoder(encoder)
        self.num_codebooks = quantizer.num_codebooks
        self.heads = nn.Linear(encoder.dim, quantizer.num_codebooks * quantizer.codebook_size)

    def forward(
        self, log_mel: Tensor, segments: Segments, target_frames: Tensor, targets: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Sum of the cross-entropies in nats over N targets x C codebooks, and the number of correct predictions.

        Sums, not means: the loop divides by the number of targets of all ranks and micro-batches. Arguments: see
        `MaskedRows`. Returns scalars, float32 (float64 for a float64 model) and int64.
        """
        hidden = self.encoder(log_mel, self.encoder.layout(segments)).flatten(0, 1)[target_frames]
        logits = self.heads(hidden).unflatten(1, (self.num_codebooks, -1)).flatten(0, 1)
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        labels = targets.flatten()
        loss_sum = F.cross_entropy(logits, labels, reduction="sum")
        with torch.no_grad():
            num_correct = (logits.argmax(dim=-1) == labels).sum()
        return loss_sum, num_correct


@torch.no_grad()
def validate(
    model: nn.Module, batches: Iterable[MaskedRows], settings: DistributedSettings, world: World
) -> dict[str, float]:
    """Mean loss (nats per target) and accuracy over the held-out batches of all ranks, in eval mode.

    All ranks must call it with the same number of batches, because the forward pass of FSDP2 is a collective.
    """
    plain = cast(BestRQ, unwrap(model))  # or MultiTarget
    sums = IntervalSums(("loss", "correct", "targets", *plain.loss_names), world.device)
    plain.eval()
    for rows in batches:
        with autocast(world, settings):
            loss, num_correct, *losses = plain(*rows.inputs)
        sums.add(loss=loss, correct=num_correct, targets=rows.num_targets)
        sums.add(**dict(zip(plain.loss_names, losses, strict=True)))
    plain.train()
    totals = sums.totals(world)
    means = {name: value / max(totals["targets"], 1) for name, value in totals.items()}
    return {"dev_loss": means["loss"], "dev_accuracy": means["correct"]} | {
        f"dev_{name}": means[name] for name in plain.loss_names
    }
