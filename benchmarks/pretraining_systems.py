"""Systems of benchmarks.pretraining_speed: bestrq on packed rows, and SpeechBrain's BEST-RQ recipe."""

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.machine import hardware_autocast
from bestrq.model.presets import PRESETS
from bestrq.pretraining.masking import MaskingSettings, draw_span_mask
from bestrq.pretraining.objective import BestRQ, MaskedRows, mask_rows
from bestrq.pretraining.quantizer import QuantizerSettings, RandomProjectionQuantizer
from common.segments import Segments
from data.loading.rows import Placement

FRAMES_PER_SECOND = 100
NUM_MELS = 80
DROPOUT = 0.1
MAX_GRAD_NORM = 10.0


def make_utterances(count: int, seed: int) -> list[Tensor]:
    """Log-mel float32 `[frames, M]` of 2 to 17 s each, normalised."""
    generator = torch.Generator().manual_seed(seed)
    frames = torch.randint(200, 1701, (count,), generator=generator).tolist()
    return [torch.randn(n, NUM_MELS, generator=generator) for n in frames]


@dataclass
class System:
    """System under test."""

    model: nn.Module
    step: Callable[[], float]
    """makes an optimizer step and returns its loss"""
    forward: Callable[[], None] | None = None
    """runs only the forward passes, to count FLOPs"""


def adamw(model: nn.Module) -> torch.optim.AdamW:
    """Optimizer of the recipe, in torch's fused form for both systems."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    return torch.optim.AdamW(parameters, lr=8e-4, betas=(0.9, 0.98), eps=1e-9, weight_decay=0.01, fused=True)


def optimizer_step(model: nn.Module, optimizer: torch.optim.AdamW) -> None:
    """Clip gradients, update the weights, clear the gradients."""
    nn.utils.clip_grad_norm_(model.parameters(), MAX_GRAD_NORM)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


@dataclass
class PackedRows:
    """Batch of packed rows, as from the loader."""

    log_mel: Tensor
    mask: Tensor
    segments: Segments


def collate(rows: list[list[Placement]], utterances: list[Tensor], row_frames: int, seed: int) -> PackedRows:
    masking, slots = MaskingSettings(), max(len(row) for row in rows)
    starts, lengths, seeds = (torch.zeros(len(rows), slots, dtype=torch.int64) for _ in range(3))
    batch = PackedRows(
        torch.zeros(len(rows), row_frames, NUM_MELS),
        torch.zeros(len(rows), row_frames, dtype=torch.bool),
        Segments(starts, lengths, row_frames, seeds),
    )
    generator = np.random.default_rng(seed)
    for r, row in enumerate(rows):
        for s, (index, start) in enumerate(row):
            n = len(utterances[index])
            batch.log_mel[r, start : start + n] = utterances[index]
            drawn = draw_span_mask(generator, n, masking.span_ms // 10, masking.start_probability)
            batch.mask[r, start : start + n] = torch.from_numpy(drawn)
            starts[r, s], lengths[r, s], seeds[r, s] = start, n, 1000 * r + s
    return batch


def make_ours(batches: list[PackedRows]) -> System:
    settings = replace(PRESETS["bestrq-94m"], dropout=DROPOUT, attention_dropout=DROPOUT)
    masking = MaskingSettings()
    quantizer_settings = QuantizerSettings()
    quantizer = RandomProjectionQuantizer(quantizer_settings, settings.stride * NUM_MELS)
    model = BestRQ(settings, quantizer_settings).train()
    optimizer = adamw(model)

    def mask_all() -> list[MaskedRows]:
        return [
            mask_rows(b.log_mel, b.mask, b.segments, quantizer, settings.stride, masking.noise_std) for b in batches
        ]

    def loss_sum(m: MaskedRows) -> Tensor:
        with hardware_autocast():
            return model(m.log_mel, m.segments, m.target_frames, m.targets)[0]

    def step() -> float:
        total, masked = 0.0, mask_all()
        targets = sum(m.targets.numel() for m in masked)
        for m in masked:
            loss = loss_sum(m) / targets
            loss.backward()
            total += float(loss.detach())
        optimizer_step(model, optimizer)
        return total

    @torch.no_grad()
    def forward() -> None:
        for m in mask_all():
            loss_sum(m)

    return System(model, step, forward)


def speechbrain_batches(utterances: list[Tensor], batch_seconds: float) -> list[list[Tensor]]:
    """Batches of SpeechBrain's sampler, with optimal bucket boundaries: every bucket makes one full batch.

    The 200 buckets of the recipe are for 280,000 utterances; with 64 utterances, most batches would have only one.
    """
    from speechbrain.dataio.sampler import DynamicBatchSampler

    lengths = [len(u) / FRAMES_PER_SECOND for u in utterances]
    ascending = sorted(lengths)
    boundaries: list[float] = []
    while ascending:
        boundaries.insert(0, ascending[-1])
        del ascending[-int(batch_seconds / ascending[-1]) :]
    sampler = DynamicBatchSampler(
        utterances, batch_seconds, bucket_boundaries=boundaries, lengths_list=lengths, shuffle=False
    )
    return [[utterances[i] for i in batch] for batch in sampler]


class SpeechBrainBestRQ(nn.Module):
    """Model of the recipe LibriSpeech/self-supervised-learning/BEST-RQ, with the values of its BEST-RQ.yaml."""

    def __init__(self) -> None:
        super().__init__()
        from speechbrain.lobes.models.convolution import ConvolutionFrontEnd
        from speechbrain.lobes.models.transformer.TransformerASR import EncoderWrapper, TransformerASR
        from speechbrain.nnet.linear import Linear
        from speechbrain.nnet.quantisers import RandomProjectionQuantizer as SpeechBrainQuantizer

        self.front_end = ConvolutionFrontEnd(
            input_shape=(8, 10, NUM_MELS),
            num_blocks=2,
            num_layers_per_block=1,
            out_channels=(128, 32),
            kernel_sizes=(3, 3),
            strides=(2, 2),
            residuals=(False, False),
            dropout=DROPOUT,
        )
        self.encoder = EncoderWrapper(
            TransformerASR(
                input_size=640,
                tgt_vocab=2048,
                d_model=576,
                nhead=8,
                num_encoder_layers=12,
                num_decoder_layers=0,
                d_ffn=2048,
                dropout=DROPOUT,
                activation=nn.GELU,
                conformer_activation=nn.GELU,
                encoder_module="conformer",
                attention_type="RelPosMHAXL",
                normalize_before=True,
                causal=False,
                layerdrop_prob=0.0,
            )
        )
        self.quantizer = SpeechBrainQuantizer(320, 16, 8192)
        self.head = Linear(input_size=576, n_neurons=8192)

    def forward(self, log_mel: Tensor, lengths: Tensor, mask: Tensor) -> Tensor:
        """Mean loss for padded `[B, F, M]`, F a multiple of 4, relative lengths `[B]` and masked frames `[N]`."""
        stacks = mask[::4] // 4
        with torch.no_grad():
            targets = self.quantizer(log_mel.view(len(log_mel), log_mel.shape[1] // 4, -1)[:, stacks])
        noisy = log_mel.clone()
        noisy[:, mask] = torch.randn(len(log_mel), len(mask), NUM_MELS) * 0.1
        logits = self.head(self.encoder(self.front_end(noisy), lengths))[:, stacks]
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten())


def make_speechbrain(batches: list[list[Tensor]]) -> System:
    from speechbrain.lobes.models.BESTRQ import compute_mask

    model = SpeechBrainBestRQ().train()
    optimizer = adamw(model)

    def step() -> float:
        total = 0.0
        for utterances in batches:
            frames = [len(u) for u in utterances]
            width = -(-max(frames) // 4) * 4
            log_mel = torch.stack([F.pad(u, (0, 0, 0, width - len(u))) for u in utterances])
            mask = compute_mask((len(frames), max(frames), NUM_MELS), frames, mask_prob=0.15, mask_length=4)
            with hardware_autocast():
                loss = model(log_mel, torch.tensor(frames) / width, mask)
            (loss / len(batches)).backward()
            total += float(loss.detach()) / len(batches)
        optimizer_step(model, optimizer)
        return total

    return System(model, step)
