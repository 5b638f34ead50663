"""Step of BEST-RQ pretraining on a GPU that is not there: fake tensors of device `cuda`, backward pass included.

    with fake_gpu():
        step = FakeStep(PRESETS["base-120m"], QuantizerSettings(num_codebooks=4), segments)
        step.prepare(), step.forward(), step.backward(), step.update()

Operators compute shapes, dtypes and strides only, so that a model of any size runs in seconds without memory. Dispatch
modes around the calls count bytes or kernels. It needs a CUDA build of torch without a GPU (`cuda_runtime.py`).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from bestrq.model.layout import lay_out, order_segments
from bestrq.model.settings import EncoderSettings
from bestrq.pretraining.masking import fill_with_noise
from bestrq.pretraining.objective import BestRQ
from bestrq.pretraining.quantizer import QuantizerSettings, RandomProjectionQuantizer, stack_frames
from bestrq.pretraining.reporting import count_codes
from bestrq.training.optimizer import OptimizerSettings, build_optimizer
from common.segments import Segments
from pipelines.fake_gpu import fake_gpu
from pipelines.live_bytes import LiveBytes, on_gpu

aten = torch.ops.aten
TARGET_SHARE = 1 / 3
"""of the encoder frames have a target, as in `flops_per_row`"""


def filled_rows(rows: int, frames: int, num_segments: int, settings: EncoderSettings) -> Segments:
    """Rows of equal segments with the gaps that they need, as long as possible, with seeds."""
    place = frames // num_segments // settings.row_multiple * settings.row_multiple
    gap = settings.row_gap if num_segments > 1 else 0
    start = (torch.arange(num_segments) * place).expand(rows, -1).contiguous()
    return Segments(start, torch.full_like(start, place - gap), frames, torch.zeros_like(start))


class FakeStep:
    """Model, optimizer and batch of a step; make it inside `fake_gpu`, and call the four parts in their order."""

    def __init__(self, settings: EncoderSettings, quantizer: QuantizerSettings, segments: Segments) -> None:
        self.settings, self.segments = settings, segments
        rows, frames = len(segments.start), segments.num_frames
        with torch.device("cuda"):
            self.model = BestRQ(settings, quantizer)
            self.quantizer = RandomProjectionQuantizer(quantizer, settings.stride * settings.num_mels)
            self.clean = torch.empty(rows, frames, settings.num_mels)
            self.mask = torch.zeros(rows, frames, dtype=torch.bool)
            number = int(rows * (frames // settings.stride) * TARGET_SHARE)
            self.target_frames = torch.zeros(number, dtype=torch.int64)
            self.code_counts = torch.zeros(quantizer.num_codebooks, quantizer.codebook_size, dtype=torch.int64)
        self.optimizer = build_optimizer([(self.model.named_parameters(), OptimizerSettings())])
        self.loss = torch.zeros((), device="cuda")

    def initialise_optimizer(self) -> None:
        """Allocate the moments, as the first step does."""
        for parameter in self.model.parameters():
            parameter.grad = torch.zeros_like(parameter)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    def prepare(self) -> None:
        """Targets, noise in the masked frames, and the layout."""
        stacks = stack_frames(self.clean, self.settings.stride).flatten(0, 1)[self.target_frames]
        on_device = on_gpu(self.segments)
        self.log_mel = fill_with_noise(self.clean, self.mask, on_device, 0.1)
        self.targets = self.quantizer(stacks)
        count_codes(self.code_counts, self.targets)
        ordered = order_segments(on_device)
        layout = lay_out(ordered, ordered, self.settings, False, torch.float32, "dense")  # no values are read
        self.model.encoder.layout = lambda *_, **__: layout  # type: ignore[method-assign]

    def forward(self) -> None:
        """Loss under bfloat16 autocast."""
        with torch.autocast("cuda", torch.bfloat16):
            self.loss, _ = self.model(self.log_mel, self.segments, self.target_frames, self.targets)

    def backward(self) -> None:
        (self.loss / len(self.targets)).backward()

    def update(self) -> None:
        """Clipping and AdamW, skipped on the device if a gradient is not finite (`StepGuard`)."""
        parameters = list(self.model.parameters())
        norm = torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
        torch.nn.utils.clip_grads_with_norm_(parameters, 5.0, norm)
        self.optimizer.found_inf = (~norm.isfinite()).float()  # type: ignore[attr-defined]
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)


@dataclass(frozen=True)
class StepBytes:
    """Bytes of tensors in a step, besides weights, gradients and moments; without workspaces inside kernels."""

    kept: int
    """after the forward pass"""
    peak: int
    """in the forward or backward pass"""
    update: int
    """peak of clipping and AdamW"""
    parameters: int
    """number of parameters of encoder and heads; their weights, gradients and moments have 16 bytes each"""


def count_step(settings: EncoderSettings, quantizer: QuantizerSettings, segments: Segments) -> StepBytes:
    """Count a step with gradients allocated, as under accumulation and DDP."""
    with fake_gpu():
        step = FakeStep(settings, quantizer, segments)
        step.initialise_optimizer()
        for parameter in step.model.parameters():
            parameter.grad = torch.zeros_like(parameter)
        with LiveBytes() as live:
            step.prepare()
            step.forward()
            kept = live.now
            step.backward()
            peak, live.peak = live.peak, 0
            before = live.now
            step.update()
    return StepBytes(kept, peak, max(0, live.peak - before), sum(p.numel() for p in step.model.parameters()))
