"""Targets from a trained model: clusters of the outputs of a block, or the labels or distributions of a CTC head.

Sources: HuBERT (Hsu et al., arXiv 2106.07447, section 3.1): k-means clusters of an earlier model's outputs; if that
model was trained on labels, these are the supervision-guided codebooks of Wang et al. 2022 ("Supervision-Guided
Codebooks for Masked Prediction in Speech Pre-training"). The teacher receives the clean rows, in evaluation mode and
without gradients; its targets do not depend on the packing of the rows.

R rows, F mel frames, M mel bins, T encoder frames per row, D width of the teacher, V classes.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from bestrq.model.conformer import ConformerEncoder
from bestrq.pretraining.clustering import estimate_clusters, nearest_cluster
from bestrq.training.process import World
from common.errors import UserError
from common.segments import Segments, to_device

SMALLEST_STD = 1e-3


@dataclass
class Teacher:
    """Frozen model and what turns its outputs into targets."""

    encoder: ConformerEncoder
    """in evaluation mode, on the device"""
    layer: int
    """clusters: block, from 1, whose outputs are clustered"""
    classes: int
    """V"""
    fingerprint: str
    """SHA-256 of the weights"""
    head: tuple[Tensor, Tensor] | None = None
    """CTC: weight [V, D] and bias [V] of its head, with the blank at 0"""
    soft: bool = False
    """CTC: distributions instead of labels"""
    fill: bool = True
    """CTC: frames of the blank get the target of the nearest frame with a label"""
    exclude_blank: bool = False
    """CTC: the blank has no probability, so that every frame has a label"""
    mean: Tensor | None = None
    """clusters: mean of the outputs, float32 [D]"""
    inverse_std: Tensor | None = None
    """clusters: 1 / standard deviation of the outputs, float32 [D]"""
    centroids: Tensor | None = None
    """clusters: float32 [V, D], of normalised outputs"""

    @torch.no_grad()
    def __call__(self, log_mel: Tensor, segments: Segments) -> Tensor:
        """Targets of all encoder frames of clean rows: int64 `[R * T]`, or float32 `[R * T, V]` of unit sum.

        Frames of gaps have arbitrary targets.
        """
        if self.head is None:
            hidden = self.outputs(log_mel, segments)
            assert self.mean is not None and self.inverse_std is not None and self.centroids is not None
            return nearest_cluster((hidden.flatten(0, 1) - self.mean) * self.inverse_std, self.centroids)
        # Not the last block: the output of the encoder may be a weighted sum of all.
        hidden = self.encoder(log_mel, self.encoder.layout(segments)).float()
        with torch.autocast(hidden.device.type, enabled=False):
            logits = F.linear(hidden, *self.head)
            if self.exclude_blank:
                logits[..., 0] = -torch.inf
            probabilities = logits.softmax(dim=-1)
        labels = probabilities.argmax(dim=-1)
        if self.fill:
            nearest = nearest_label(labels, segments, self.encoder.settings.stride)
        else:
            nearest = torch.arange(labels.numel(), device=labels.device)
        return (probabilities.flatten(0, 1) if self.soft else labels.flatten())[nearest.flatten()]

    def outputs(self, log_mel: Tensor, segments: Segments) -> Tensor:
        """Outputs of the block in float32, `[R, T, D]`."""
        layout = self.encoder.layout(segments)
        return self.encoder.block_outputs(log_mel, layout, [self.layer])[0].float()

    @torch.no_grad()
    def estimate(self, batches: Sequence[tuple[Tensor, Segments]], seed: int, world: World) -> None:
        """Estimate the clusters from clean rows, on rank 0, and send them to all ranks; all ranks must call it.

        Prints progress.

        Raises UserError if the rows have fewer frames than there are clusters.
        """
        dim, device = self.encoder.settings.dim, world.device
        mean, inverse_std = torch.zeros(dim, device=device), torch.zeros(dim, device=device)
        centroids = torch.zeros(self.classes, dim, device=device)
        problem = None
        if world.is_main:
            try:
                outputs = [torch.zeros(0, dim, device=device)]
                for number, (log_mel, segments) in enumerate(batches, start=1):
                    outputs.append(self.sample(log_mel.to(device), segments))
                    if number * 10 // len(batches) > (number - 1) * 10 // len(batches):  # every tenth
                        print(f"clusters: {number} of {len(batches)} rows through block {self.layer}", flush=True)
                frames = torch.cat(outputs)
                exact = frames.double()
                mean = exact.mean(dim=0).float()
                inverse_std = exact.std(dim=0, correction=0).clamp(min=SMALLEST_STD).reciprocal().float()
                centroids = estimate_clusters((frames - mean) * inverse_std, self.classes, seed)
            except UserError as error:
                problem = str(error)
        if problem := world.broadcast(problem):
            raise UserError(problem)
        self.mean, self.inverse_std, self.centroids = (world.sum(x) for x in (mean, inverse_std, centroids))

    def sample(self, log_mel: Tensor, segments: Segments) -> Tensor:
        """Outputs at the frames of segments, `[N, D]`, in the order of rows."""
        stride = self.encoder.settings.stride
        valid = torch.zeros(log_mel.shape[0], -(-log_mel.shape[1] // stride), dtype=torch.bool)
        for row, _, start, stop in segments.subsampled(stride).used():
            valid[row, start:stop] = True
        index = valid.flatten().nonzero().squeeze(1).to(log_mel.device)
        return self.outputs(log_mel, segments).flatten(0, 1)[index]

    def tensors(self) -> dict[str, Tensor]:
        """Clusters by name, for a checkpoint or an export; {} with a CTC head, which its own export holds."""
        values = {"mean": self.mean, "inverse_std": self.inverse_std, "centroids": self.centroids}
        return {f"teacher.{name}": value for name, value in values.items() if value is not None}

    def restore(self, tensors: Mapping[str, Tensor], device: torch.device) -> None:
        """Load the clusters of a checkpoint."""
        if self.head is None:
            self.mean, self.inverse_std, self.centroids = (
                tensors[f"teacher.{name}"].to(device) for name in ("mean", "inverse_std", "centroids")
            )


def nearest_label(labels: Tensor, segments: Segments, stride: int) -> Tensor:
    """Index row * T + t of the nearest frame of the segment that has a label, int64 `[R, T]`.

    The earlier of two equally near ones; the frame itself if it has a label, if its segment has none, or in gaps. A CTC
    model emits most labels in a single frame, so this divides its blanks between the neighbours.

    Args:
        labels: int64 `[R, T]`; 0 is the blank.
        segments: in mel frames.
    """
    rows, frames = labels.shape
    bounds = torch.zeros(2, rows, frames, dtype=torch.int64)  # first frame of the segment, and frame after its last
    for row, _, start, stop in segments.subsampled(stride).used():
        bounds[0, row, start:stop], bounds[1, row, start:stop] = start, stop
    first, stop = to_device(bounds, labels.device)
    time = torch.arange(frames, device=labels.device)
    has_label = labels != 0
    before = torch.where(has_label, time, -1).cummax(dim=1).values
    after = torch.where(has_label, time, 2 * frames).flip(1).cummin(dim=1).values.flip(1)
    far = 4 * frames
    to_before = torch.where(before >= first, time - before, far)
    to_after = torch.where(after < stop, after - time, far)
    nearest = torch.where(to_before <= to_after, before, after)
    nearest = torch.where(torch.minimum(to_before, to_after) < far, nearest, time)
    nearest = torch.where(stop > first, nearest, time)
    return nearest + frames * torch.arange(rows, device=labels.device)[:, None]
