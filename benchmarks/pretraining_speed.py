"""Full BEST-RQ pretraining steps of `bestrq-94m` beside SpeechBrain's recipe model of the same size.

    python -m benchmarks.pretraining_speed        # needs requirements-benchmarks.txt

One step is one update on the same 64 utterances of 2 to 17 s: forward, loss and backward of all batches, gradient
clipping, AdamW. Features are made beforehand for both, from noise: the arithmetic is the same as on speech. SpeechBrain
batches by its own DynamicBatchSampler (buckets of similar length), we by packed rows; both by about the same amount of
audio at a time, both in bf16 autocast, both with dropout 0.1 everywhere. Speed is in seconds of real audio, not of
padding, per second. The two alternate; medians are printed as one line of JSON, the last:

    ratio_to_speechbrain   audio-seconds per second, ours / SpeechBrain's
    row_fill               share of our rows' frames that is audio
    matmul_share           our model FLOPs per second of the whole step, as a share of the rate of plain bf16 matrix
                           products of the model's shapes, measured between the steps. Model FLOPs are three times
                           what torch's flop counter finds in the forward pass: in the backward pass it counts a
                           depthwise convolution as if it were a full one, 576 times too much
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from bestrq.model.conformer import ConformerEncoder
from bestrq.model.presets import PRESETS
from bestrq.pretraining.masking import MaskingSettings, draw_span_mask
from bestrq.pretraining.objective import BestRQ, MaskedRows, mask_rows
from bestrq.pretraining.quantizer import QuantizerSettings, RandomProjectionQuantizer
from data.packing import Row, pack_rows

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
    """One system under test."""

    model: nn.Module
    step: Callable[[], float]
    """one whole update; gives its loss"""
    forward: Callable[[], None] | None = None
    """the forward passes alone, for counting"""


def adamw(model: nn.Module) -> torch.optim.AdamW:
    """The recipe's optimizer, in torch's fused form for both systems."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    return torch.optim.AdamW(parameters, lr=8e-4, betas=(0.9, 0.98), eps=1e-9, weight_decay=0.01, fused=True)


def update(model: nn.Module, optimizer: torch.optim.AdamW) -> None:
    nn.utils.clip_grad_norm_(model.parameters(), MAX_GRAD_NORM)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


# ---------------------------------------------------------------------------------------------------- ours


@dataclass
class PackedRows:
    """A batch of packed rows, as the loader makes them."""

    log_mel: Tensor
    mask: Tensor
    segment_start: Tensor
    segment_length: Tensor
    segment_seed: Tensor


def collate(rows: list[Row], utterances: list[Tensor], row_frames: int, seed: int) -> PackedRows:
    masking, slots = MaskingSettings(), max(len(row) for row in rows)
    batch = PackedRows(
        torch.zeros(len(rows), row_frames, NUM_MELS),
        torch.zeros(len(rows), row_frames, dtype=torch.bool),
        *(torch.zeros(len(rows), slots, dtype=torch.int64) for _ in range(3)),
    )
    generator = np.random.default_rng(seed)
    for r, row in enumerate(rows):
        for s, (index, start) in enumerate(row):
            n = len(utterances[index])
            batch.log_mel[r, start : start + n] = utterances[index]
            drawn = draw_span_mask(generator, n, masking.span_ms // 10, masking.start_probability)
            batch.mask[r, start : start + n] = torch.from_numpy(drawn)
            batch.segment_start[r, s], batch.segment_length[r, s], batch.segment_seed[r, s] = start, n, 1000 * r + s
    return batch


def make_ours(batches: list[PackedRows]) -> System:
    settings = replace(PRESETS["bestrq-94m"], dropout=DROPOUT, attention_dropout=DROPOUT)
    masking = MaskingSettings()
    quantizer_settings = QuantizerSettings()
    quantizer = RandomProjectionQuantizer(quantizer_settings, settings.subsampling_factor * NUM_MELS)
    model = BestRQ(settings, quantizer_settings).train()
    optimizer = adamw(model)

    def mask_all() -> list[MaskedRows]:
        return [
            mask_rows(
                b.log_mel, b.mask, b.segment_start, b.segment_length, b.segment_seed, quantizer,
                settings.subsampling_factor, masking.noise_std,
            )
            for b in batches
        ]  # fmt: skip

    def loss_sum(m: MaskedRows) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return model(m.log_mel, m.segment_start, m.segment_length, m.target_frames, m.targets)[0]

    def step() -> float:
        total, masked = 0.0, mask_all()
        targets = sum(m.targets.numel() for m in masked)
        for m in masked:
            loss = loss_sum(m) / targets
            loss.backward()
            total += float(loss.detach())
        update(model, optimizer)
        return total

    @torch.no_grad()
    def forward() -> None:
        for m in mask_all():
            loss_sum(m)

    return System(model, step, forward)


# --------------------------------------------------------------------------------------------- SpeechBrain


def speechbrain_batches(utterances: list[Tensor], batch_seconds: float) -> list[list[Tensor]]:
    """Its own sampler, with the bucket boundaries that suit it best: every bucket makes one full batch.

    The recipe's 200 buckets are for 280,000 utterances; on 64 they would leave most batches with one.
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
    """The recipe's model, LibriSpeech/self-supervised-learning/BEST-RQ, with the values of its BEST-RQ.yaml."""

    def __init__(self) -> None:
        super().__init__()
        from speechbrain.lobes.models.convolution import ConvolutionFrontEnd
        from speechbrain.lobes.models.transformer.TransformerASR import EncoderWrapper, TransformerASR
        from speechbrain.nnet.linear import Linear
        from speechbrain.nnet.quantisers import RandomProjectionQuantizer as SpeechBrainQuantizer

        self.front_end = ConvolutionFrontEnd(
            input_shape=(8, 10, NUM_MELS), num_blocks=2, num_layers_per_block=1, out_channels=(128, 32),
            kernel_sizes=(3, 3), strides=(2, 2), residuals=(False, False), dropout=DROPOUT,
        )
        self.encoder = EncoderWrapper(
            TransformerASR(
                input_size=640, tgt_vocab=2048, d_model=576, nhead=8, num_encoder_layers=12, num_decoder_layers=0,
                d_ffn=2048, dropout=DROPOUT, activation=nn.GELU, conformer_activation=nn.GELU,
                encoder_module="conformer", attention_type="RelPosMHAXL", normalize_before=True, causal=False,
                layerdrop_prob=0.0,
            )
        )
        self.quantizer = SpeechBrainQuantizer(320, 16, 8192)
        self.head = Linear(input_size=576, n_neurons=8192)

    def forward(self, log_mel: Tensor, lengths: Tensor, mask: Tensor) -> Tensor:
        """Mean loss of padded `[B, F, M]`, F a multiple of 4, relative lengths `[B]` and masked frames `[N]`."""
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
            with torch.autocast("cpu", torch.bfloat16):
                loss = model(log_mel, torch.tensor(frames) / width, mask)
            (loss / len(batches)).backward()
            total += float(loss.detach()) / len(batches)
        update(model, optimizer)
        return total

    return System(model, step)


# ------------------------------------------------------------------------------------------------ measuring


def timed(function: Callable[[], float]) -> float:
    begin = time.perf_counter()
    loss = function()
    if loss != loss:
        raise RuntimeError("the loss is not a number: these timings mean nothing")
    return time.perf_counter() - begin


def matmul_rate(frames: int) -> float:
    """FLOP/s of plain bf16 products: forward, input gradient and weight gradient of each linear map of a block."""
    settings = PRESETS["bestrq-94m"]
    dim, hidden = settings.dim, settings.feedforward_dim
    flops = seconds = 0.0
    for inputs, outputs in ((dim, hidden), (hidden, dim), (dim, 3 * dim), (dim, dim), (dim, 2 * dim)):
        x, w, g = (torch.randn(shape).bfloat16() for shape in ((frames, inputs), (outputs, inputs), (frames, outputs)))
        for product in (lambda: x @ w.T, lambda: g @ w, lambda: g.T @ x):  # noqa: B023
            product()
            times = []
            for _ in range(5):
                begin = time.perf_counter()
                product()
                times.append(time.perf_counter() - begin)
            seconds += statistics.median(times)
            flops += 2 * frames * inputs * outputs
    return flops / seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--utterances", type=int, default=64)
    # 64 utterances fill 20 rows of this length, five batches; a loader's endless stream has no last row to leave open.
    parser.add_argument("--row-seconds", type=float, default=31.2)
    parser.add_argument("--rows", type=int, default=4, help="rows in a batch of ours")
    parser.add_argument("--batch-seconds", type=float, default=125.0, help="audio in a batch of SpeechBrain's")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--only-ours", action="store_true", help="leave SpeechBrain out, and the ratio with it")
    args = parser.parse_args()

    torch.manual_seed(0)
    utterances = make_utterances(args.utterances, seed=1)
    seconds = sum(map(len, utterances)) / FRAMES_PER_SECOND
    row_frames = round(args.row_seconds * FRAMES_PER_SECOND) // 4 * 4
    lengths = [len(u) for u in utterances]
    rows = pack_rows(lengths, row_frames, ConformerEncoder.row_gap, 4, max_segments=args.utterances)
    fill = sum(lengths) / (len(rows) * row_frames)
    batches = [rows[i : i + args.rows] for i in range(0, len(rows), args.rows)]
    ours = make_ours([collate(batch, utterances, row_frames, seed) for seed, batch in enumerate(batches)])
    systems = {"ours": ours}
    print(f"{len(utterances)} utterances, {seconds:.0f} s; {len(rows)} rows of {row_frames} frames, fill {fill:.3f}")
    if not args.only_ours:
        buckets = speechbrain_batches(utterances, args.batch_seconds)
        padded = sum(len(b) * max(map(len, b)) for b in buckets)
        systems["speechbrain"] = make_speechbrain(buckets)
        print(f"SpeechBrain: {len(buckets)} batches, fill {sum(lengths) / padded:.3f}")
    for name, system in systems.items():
        print(f"{name}: {sum(p.numel() for p in system.model.parameters()) / 1e6:.1f} M parameters")

    assert ours.forward is not None
    with FlopCounterMode(display=False) as counter:
        ours.forward()
    flops = 3 * counter.get_total_flops()
    for system in systems.values():  # warm up
        system.step()
    times: dict[str, list[float]] = {name: [] for name in systems}
    rates = [matmul_rate(args.rows * row_frames // 4)]
    for repeat in range(args.repeats):
        for name, system in systems.items():
            times[name].append(timed(system.step))
        rates.append(matmul_rate(args.rows * row_frames // 4))
        print(f"{repeat}: " + ", ".join(f"{n} {seconds / t[-1]:.2f} audio-s/s" for n, t in times.items()), flush=True)

    median = {name: statistics.median(values) for name, values in times.items()}
    rate = statistics.median(rates)
    result = {
        "row_fill": round(fill, 4),
        "matmul_share": round(flops / median["ours"] / rate, 4),
        "matmul_gflops": round(rate / 1e9, 1),
        "model_tflop_a_step": round(flops / 1e12, 3),
        **{f"{name}_audio_seconds_per_second": round(seconds / t, 3) for name, t in median.items()},
    }
    if "speechbrain" in median:
        result["ratio_to_speechbrain"] = round(median["speechbrain"] / median["ours"], 4)
    print(json.dumps(result))


if __name__ == "__main__":
    main()
