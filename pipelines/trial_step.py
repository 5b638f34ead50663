"""Step of a training script on a synthetic batch: on a fake GPU of many (`fake_world`), or on a real one.

Model, losses, sharding and optimizer are those of the script. Rows are full, with segments of the largest length. DDP
itself needs a driver and is replaced by its buckets, which are the gradients and are reduced one by one.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from bestrq.model.settings import EncoderSettings
from bestrq.pretraining.quantizer import RandomProjectionQuantizer
from bestrq.recognition.ctc import CTCModel, pad_labels
from bestrq.recognition.hidden_masks import draw_hidden_masks
from bestrq.recognition.spec_augment import spec_augment
from bestrq.recognition.transducer import TransducerModel
from bestrq.training.checkpoint import model_slots
from bestrq.training.optimizer import build_optimizer, set_learning_rates, update_weights
from bestrq.training.process import World, autocast, gradient_sync, local
from bestrq.training.sharding import group_size, make_mesh, shard
from common.errors import UserError
from common.segments import Segments
from data.features import FeatureSettings
from data.loading.batch import Batch
from pipelines import pretraining
from pipelines.curriculum import stages_of
from pipelines.finetuning import FinetuneConfig
from pipelines.parameter_groups import parameter_groups

CHARACTERS = 64
"""assumed labels of the tokenizer 'char', which is trained on the transcripts of a run"""
LABELS_PER_SECOND = {"char": 15.0, "bpe": 5.0}
"""assumed labels per second of speech by tokenizer; they determine the lattices of RNN-T"""
FIRST_BUCKET, BUCKET = 2**20, 25 * 2**20
"""bytes of the buckets of DDP (`bucket_cap_mb`, torch 2.14)"""

Config = pretraining.Config | FinetuneConfig


@dataclass(frozen=True)
class Shape:
    """Rows of a process at once, all full."""

    rows: int
    row_frames: int
    """mel frames"""
    segment_frames: int
    """mel frames of the longest segment"""
    slots: int
    """segments per row, used or not"""


def shape_of(config: Config, processes: int) -> Shape:
    """Shape of a micro-batch of each process, at the stage of the curriculum with the longest rows.

    Raises UserError if the rows cannot be divided among processes and accumulation steps.
    """
    staged: Any = config
    data = max((stage.data for stage in stages_of(staged)), key=lambda data: data.row_frames)
    shares = processes * config.accumulation
    if data.rows % shares:
        raise UserError(
            f"data.rows is {data.rows}: it must be a multiple of the {processes} processes x accumulation "
            f"{config.accumulation}, such as {-(-data.rows // shares) * shares}"
        )
    rate = FeatureSettings().frames_per_second
    longest = min(data.row_frames, int(data.max_seconds * rate))
    return Shape(data.rows // shares, data.row_frames, longest, data.max_segments)


def full_rows(shape: Shape, encoder: EncoderSettings) -> Segments:
    """Segments that fill the rows as far as gaps and slots allow, with seeds."""
    place = -(-(shape.segment_frames + encoder.row_gap) // encoder.row_multiple) * encoder.row_multiple
    starts = torch.arange(shape.slots) * place
    length = (shape.row_frames - starts).clamp(min=0, max=shape.segment_frames)
    length[length < min(100, shape.segment_frames)] = 0  # the rest of a row may be shorter than any crop
    start = starts.where(length > 0, 0).expand(shape.rows, -1).contiguous()
    return Segments(start, length.expand(shape.rows, -1).contiguous(), shape.row_frames, start + 1)


def vocabulary(config: FinetuneConfig) -> int:
    """Labels of the tokenizer."""
    return config.finetune.vocab_size if config.finetune.tokenizer == "bpe" else CHARACTERS


def make_model(config: Config) -> nn.Module:
    """Model of the script. Raises UserError for targets of a teacher, whose export would have to be read."""
    if isinstance(config, pretraining.Config):
        if config.targets.export:
            raise UserError(
                f"targets.export is {config.targets.export!r}: steps with a teacher cannot be tried before training; "
                "give targets.source quantizer, which takes less memory"
            )
        return pretraining.make_model(config, None)
    settings = getattr(config, "transducer", None)
    if settings is None:
        return CTCModel(config.encoder, vocabulary(config))
    return TransducerModel(config.encoder, settings, vocabulary(config))


class TrialStep:
    """Model, optimizer and batch of a step.

    Args:
        shards: processes among which the weights are sharded; 1 with DDP and for a single process.
        replicated: keep gradients in the buckets of DDP.
        compile_blocks: called with the encoder before sharding, as in the scripts; None on a fake GPU.
    """

    def __init__(
        self, config: Config, shape: Shape, world: World, shards: int, replicated: bool,
        compile_blocks: Callable[..., None] | None = None,
    ) -> None:  # fmt: skip
        self.config, self.world, self.shape = config, world, shape
        self.settings = config.distributed
        with torch.device(world.device):
            model: Any = make_model(config)
        self.model = model
        self.gradient_bytes = 0
        if compile_blocks is not None:
            compile_blocks(model.encoder, world.device)
        if shards > 1:
            mesh = make_mesh(world.device, world.size, shards)
            shard(model, model.encoder.blocks, mesh, self.settings.precision, self.settings.reshard)
        named: Any = [(model.named_parameters(), config.optimizer)]
        if isinstance(config, FinetuneConfig):
            named = parameter_groups(model.named_parameters(), config)
        self.optimizer = build_optimizer(named)
        self.buckets = make_buckets(list(model.parameters())) if replicated else []
        self.average: list[Tensor] = []
        if isinstance(config, FinetuneConfig) and config.averaging.ema_decay:
            self.average = [tensor.detach().clone() for tensor in model_slots(model).values()]
        self.segments = full_rows(shape, config.encoder)
        self._prepare, self._loss = self._make_task()

    def _make_task(self) -> tuple[Callable[[], Any], Callable[[Any], Tensor]]:
        """Function that makes the inputs of a micro-batch, and function that computes their loss."""
        config, shape, device = self.config, self.shape, self.world.device
        frames = shape.rows, shape.row_frames, config.encoder.num_mels
        if isinstance(config, pretraining.Config):
            with torch.device(device):
                quantizer = RandomProjectionQuantizer(config.quantizer, config.encoder.stride * config.encoder.num_mels)
            mask = draw_masks(self.segments, config.masking.draw_function(FeatureSettings().hop_ms))
            state: Any = pretraining.RunState(self.model, self.optimizer, quantizer, torch.zeros(()))
            mixes = config.masking.mix_probability > 0

            def prepare() -> Any:
                clean = torch.randn(frames, device=device)
                received = torch.randn(frames, device=device) if mixes else None
                batch = Batch(clean, self.segments, mask, [], [], None, None, received)  # type: ignore[arg-type]
                return pretraining.masked_rows(batch, state, config, self.world, training=True)

            return prepare, lambda rows: self.model(*rows.inputs)[0]
        per_frame = LABELS_PER_SECOND[config.finetune.tokenizer] / FeatureSettings().frames_per_second
        lengths = [stop - start for _, _, start, stop in self.segments.used()]
        sequences = [(np.arange(int(length * per_frame)) % (vocabulary(config) - 1) + 1).tolist() for length in lengths]
        labels = pad_labels(sequences)

        def loss(_: None) -> Tensor:
            log_mel = spec_augment(torch.randn(frames, device=device), self.segments, config.spec_augment)
            masked = draw_hidden_masks(self.segments, config.encoder, config.hidden_masks, device)
            return self.model(log_mel, self.segments, *labels, masked=masked).loss_sum

        return lambda: None, loss

    def run(self) -> None:
        """One optimizer step, as in the loops of the scripts."""
        accumulation = self.config.accumulation
        for bucket in self.buckets:
            bucket.attach()
        micro_batches = [self._prepare() for _ in range(accumulation)]
        targets = float(self.world.size)  # counted on the hosts
        set_learning_rates(self.optimizer, 1, 1)
        for i, inputs in enumerate(micro_batches):
            with gradient_sync(self.model, i == accumulation - 1):
                with autocast(self.world, self.settings):
                    loss = self._loss(inputs)
                (loss / targets).backward()
        for bucket in self.buckets if self.world.size > 1 else []:
            dist.all_reduce(bucket.content)
        self.gradient_bytes = sum(local_bytes(p.grad) for p in self.model.parameters() if p.grad is not None)
        update_weights(self.model, self.optimizer, loss.detach(), self.config.optimizer.clip_norm, self.world)

    @property
    def parameter_bytes(self) -> int:
        return sum(map(local_bytes, self.model.parameters()))

    @property
    def optimizer_bytes(self) -> int:
        """Bytes of the moments and of the average of the weights, on the device."""
        states = [value for state in self.optimizer.state.values() for value in state.values() if value.ndim]
        return sum(map(local_bytes, [*states, *self.average]))


def local_bytes(tensor: Any) -> int:
    """Bytes of the shard of this rank."""
    return local(tensor).nbytes


def draw_masks(segments: Segments, draw: Callable[[np.random.Generator, int], np.ndarray]) -> Tensor:
    """Masks of all segments, bool `[R, F]`."""
    mask = np.zeros((len(segments.start), segments.num_frames), bool)
    generator = np.random.default_rng(0)
    for row, _, start, stop in segments.used():
        mask[row, start:stop] = draw(generator, stop - start)
    return torch.from_numpy(mask)


class Bucket:
    """Gradients of some parameters as views of one tensor, like those of DDP with `gradient_as_bucket_view`."""

    def __init__(self, parameters: list[nn.Parameter]) -> None:
        self.parameters = parameters
        self.content = torch.zeros(sum(p.numel() for p in parameters), device=parameters[0].device)

    def attach(self) -> None:
        """Set the gradients to zero, in place."""
        self.content.zero_()
        for part, parameter in zip(
            self.content.split([p.numel() for p in self.parameters]), self.parameters, strict=True
        ):
            parameter.grad = part.view_as(parameter)


def make_buckets(parameters: list[nn.Parameter]) -> list[Bucket]:
    """Buckets of DDP, in the order of the backward pass."""
    trained = [p for p in reversed(parameters) if p.requires_grad]
    indices, _ = dist._compute_bucket_assignment_by_size(list[Tensor](trained), [FIRST_BUCKET, BUCKET])
    return [Bucket([trained[i] for i in group]) for group in indices]


def resolved(config: Config, processes: int, local_size: int) -> tuple[Config, int]:
    """Settings with bfloat16 for precision 'auto', and the number of processes that share a tensor."""
    settings = config.distributed
    if settings.precision == "auto":
        settings = replace(settings, precision="bfloat16")
    shards = 1 if settings.strategy == "ddp" else processes
    if settings.strategy == "hsdp":
        shards = group_size(settings.shard_size or min(local_size, processes), processes)
    return replace(config, distributed=settings), shards
