"""BEST-RQ pretraining of a Conformer encoder: the whole loop.

    python pretrain.py --config configs/quickstart-pretrain.yaml
    torchrun --nproc-per-node 8 pretrain.py --config configs/base-120m.yaml --run.folder runs/base-120m
    sbatch -N 4 launch/pretrain.sbatch --config configs/base-120m.yaml --run.folder runs/base-120m

The same command continues an interrupted run, bit for bit on a CPU. A file named STOP in the run folder, SIGTERM or
Ctrl-C makes it save and leave at the next step. What others use of the result lies in RUN_FOLDER/export.
"""

import sys
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

from bestrq.model.conformer import EncoderSettings
from bestrq.pretraining.masking import MaskingSettings, draw_span_mask, num_runs
from bestrq.pretraining.objective import BestRQ, MaskedRows, mask_rows
from bestrq.pretraining.pictures import draw_codebook_usage, draw_mask, save_codebook_usage, save_mask_example
from bestrq.pretraining.quantizer import QuantizerSettings, RandomProjectionQuantizer, unigram_entropy
from bestrq.training.checkpoint import (
    Checkpoint,
    CheckpointSettings,
    gather_model,
    latest_checkpoint,
    load_checkpoint,
    prune_checkpoints,
    save_checkpoint,
)
from bestrq.training.export import write_export
from bestrq.training.flops import count_flops
from bestrq.training.meters import MetricsLog, Throughput, console_line, peak_flops
from bestrq.training.optimizer import OptimizerSettings, build_optimizer, set_learning_rates
from bestrq.training.precision import Precision, resolve_precision, with_precision
from bestrq.training.process import (
    FREE_DISTRIBUTED_FIELDS,
    DistributedSettings,
    World,
    autocast,
    gradient_sync,
    parallelise,
    start_world,
)
from bestrq.training.run_folder import RunFolder, RunSettings
from bestrq.training.stop import StopRequest
from bestrq.training.update import GuardSettings, UpdateGuard, report_skipped_update, seed_step
from common.config import parse, run_main, to_dict
from common.errors import UserError
from common.segments import Segments
from data.format.dataset import Dataset
from data.loading.loader import FREE_LOADER_FIELDS, LOADER_PLACES, Batch, DataState, LoaderSettings, RowLoader


@dataclass
class Config:
    """BEST-RQ pretraining."""

    run: RunSettings = field(default_factory=RunSettings)
    """folder, length and seed"""
    data: LoaderSettings = field(default_factory=LoaderSettings)
    """dataset, rows and packing"""
    accumulation: int = 1
    """micro-batches an update: divides the rows that a process holds at once"""
    encoder: EncoderSettings = field(default_factory=EncoderSettings)
    """the Conformer"""
    quantizer: QuantizerSettings = field(default_factory=QuantizerSettings)
    """the frozen targets"""
    masking: MaskingSettings = field(default_factory=MaskingSettings)
    """span masks and noise"""
    optimizer: OptimizerSettings = field(default_factory=OptimizerSettings)
    """AdamW and its schedule"""
    guard: GuardSettings = field(default_factory=GuardSettings)
    """what to do about bad numbers"""
    checkpoint: CheckpointSettings = field(default_factory=CheckpointSettings)
    """when to save, and what to keep"""
    distributed: DistributedSettings = field(default_factory=DistributedSettings)
    """processes, devices and precision"""


# What may change between two starts of one run: nothing here alters which updates are made.
FREE_FIELDS = (
    "accumulation",
    "checkpoint",
    *(f"distributed.{name}" for name in FREE_DISTRIBUTED_FIELDS),
    "encoder.activation_checkpointing",
    "encoder.backend",
    "guard.max_bad_updates",
    *(f"data.{name}" for name in FREE_LOADER_FIELDS),
    "run.folder",
    "run.log_every",
)
# Fields that may hold another location if the fingerprint of the data is the same.
PLACES = {f"data.{name}": "dataset" for name in LOADER_PLACES}


def train(config: Config) -> None:
    world = start_world(config.distributed)
    dataset = config.data.open()
    run = RunFolder(config.run.folder)
    precision = resolve_precision(config.distributed, run, world)
    config = with_precision(config, precision)
    facts = {"precision": str(precision)}
    run.start(config, world, FREE_FIELDS, dataset.identity(), PLACES, facts=facts)
    stride = config.encoder.stride

    torch.manual_seed(config.run.seed)  # the same initial weights whatever the world size
    model = BestRQ(config.encoder, config.quantizer).to(world.device)
    quantizer = RandomProjectionQuantizer(config.quantizer, stride * config.encoder.num_mels)
    quantizer.to(world.device)
    flops_per_row = model_flops(model, config, config.data.crop_frames(dataset)[0], world)
    parallel_model = parallelise(model, model.encoder.blocks, world, config.distributed)
    optimizer = build_optimizer([(parallel_model.named_parameters(), config.optimizer)])
    code_counts = torch.zeros(config.quantizer.num_codebooks, config.quantizer.codebook_size, dtype=torch.int64)
    code_counts = code_counts.to(world.device)

    # The state of a run: a step, the data's three integers, tensors. No generator state: see seed_step.
    step, data_state = 0, None
    latest = latest_checkpoint(run.checkpoints, world)
    if latest is not None:
        checkpoint = load_checkpoint(latest, parallel_model, optimizer, world)
        check_targets(checkpoint, quantizer)
        step, data_state = checkpoint.step, DataState.from_dict(checkpoint.state["data"])
        if world.is_main:  # the counts are a sum over ranks: one rank carries what came before
            code_counts += checkpoint.extra_tensors["code_counts"].to(world.device)

    loader = RowLoader(
        dataset,
        config.data.crop_order(dataset),
        config.data,
        multiple=config.encoder.row_multiple,
        row_gap=config.encoder.row_gap,
        rank=world.rank,
        world_size=world.size,
        accumulation=config.accumulation,
        draw_mask=partial(
            draw_span_mask,
            span_frames=round(config.masking.span_ms / dataset.features.hop_ms),
            start_probability=config.masking.start_probability,
        ),
        state=data_state,
    )
    guard = UpdateGuard(config.guard)
    metrics = MetricsLog(run, step, world)
    throughput = Throughput(world, config.run.steps, peak_flops(world, precision.name))
    stop = StopRequest(run.path)
    if world.is_main:
        print(describe(config, precision, model, dataset, world, step), flush=True)

    sums = torch.zeros(len(SUMS), dtype=torch.float64, device=world.device)  # over the log interval, this rank's
    batches = iter(loader)
    while step < config.run.steps and not stop.agreed(world):
        with throughput.waiting():
            micro_batches = next(batches)
        step += 1
        seed_step(config.run.seed, step, world.rank)
        micro_rows = [masked_rows(batch, quantizer, stride, config, world) for batch in micro_batches]
        num_targets = sum(rows.targets.numel() for rows in micro_rows)
        global_targets = world.sum(torch.tensor(num_targets, device=world.device)).clamp(min=1)

        (learning_rate,) = set_learning_rates(optimizer, step, config.run.steps)
        loss_sum = torch.zeros((), device=world.device)
        for i, rows in enumerate(micro_rows):
            with gradient_sync(parallel_model, i == len(micro_rows) - 1):
                with autocast(world, config.distributed):
                    micro_loss, num_correct = parallel_model(
                        rows.log_mel, rows.segments, rows.target_frames, rows.targets
                    )
                (micro_loss / global_targets).backward()
            loss_sum += micro_loss.detach()
            sums += step_sums(micro_loss, num_correct, rows, micro_batches[i]).to(world.device)
            count_codes(code_counts, rows.targets)
        update = guard.apply_update(parallel_model, optimizer, loss_sum, config.optimizer.clip_norm, world)
        if not update.applied:
            samples = [sample for batch in micro_batches for ids in batch.ids for sample in ids]
            report_skipped_update(step, loss_sum, samples, world)
        audio_frames = sum(int(batch.segments.length.sum()) for batch in micro_batches)
        throughput.count(
            audio_frames / dataset.features.frames_per_second,
            flops_per_row * sum(batch.log_mel.shape[0] for batch in micro_batches),
        )

        if step % config.run.log_every == 0 or step == config.run.steps or update.spike:
            values: dict[str, Any] = {
                "learning_rate": learning_rate,
                "grad_norm": update.grad_norm,
                "spike": update.spike,
                "quarantined": int(world.sum(torch.tensor(len(loader.quarantined), device=world.device))),
            }
            values |= summarise(world.sum(sums).tolist())
            values |= codebook_figures(world.sum(code_counts.clone()))
            values |= throughput.interval(step)
            metrics.write(step, values)
            sums.zero_()
            if world.is_main:
                print(console_line(step, config.run.steps, values), flush=True)
                warn_of_collapse(values, config.quantizer)
        if step == 1 or step % config.checkpoint.every_steps == 0:
            show_pictures(run, metrics, step, micro_batches[0], world.sum(code_counts.clone()), dataset.features.hop_ms)
        data_state = micro_batches[-1].state
        if step % config.checkpoint.every_steps == 0 and step < config.run.steps:
            save(run, step, parallel_model, optimizer, quantizer, data_state, code_counts, dataset, config, world)

    if data_state is not None:  # at least one update was made, now or before
        save(run, step, parallel_model, optimizer, quantizer, data_state, code_counts, dataset, config, world)
        counts = world.sum(code_counts.clone())
        if world.is_main:
            save_codebook_usage(run.path / "pictures", counts)
    if step < config.run.steps:
        stop.leave_requeue_marker(world)
        if world.is_main:
            print(f"stopped after step {step} ({stop.reason}); the same command continues", flush=True)
    elif world.is_main:
        print(f"done: {run.export}", flush=True)
    metrics.close()
    world.close()


def masked_rows(
    batch: Batch, quantizer: RandomProjectionQuantizer, stride: int, config: Config, world: World
) -> MaskedRows:
    """A batch on the device, with its targets, and noise in place of the masked frames."""
    assert batch.mask is not None
    return mask_rows(
        batch.log_mel.to(world.device, non_blocking=True),
        batch.mask.to(world.device, non_blocking=True),
        batch.segments,
        quantizer,
        stride,
        config.masking.noise_std,
    )


SUMS = ("loss", "correct", "targets", "masked_frames", "masked_runs", "frames", "row_frames")


def step_sums(loss_sum: Tensor, num_correct: Tensor, rows: MaskedRows, batch: Batch) -> Tensor:
    """What `summarise` needs of a micro-batch, float64 [len(SUMS)], in the order of SUMS."""
    assert batch.mask is not None
    frames, row_frames = int(batch.segments.length.sum()), batch.mask.numel()
    counts = [rows.targets.numel(), int(batch.mask.sum()), num_runs(batch.mask), frames, row_frames]
    return torch.tensor([float(loss_sum.detach()), float(num_correct), *counts], dtype=torch.float64)


def summarise(sums: list[float]) -> dict[str, float]:
    """Means over an interval and all ranks. The mask share is that of real frames; a run may be several spans."""
    total = dict(zip(SUMS, sums, strict=True))
    targets, frames = max(total["targets"], 1), max(total["frames"], 1)
    return {
        "loss": total["loss"] / targets,
        "accuracy": total["correct"] / targets,
        "mask_share": total["masked_frames"] / frames,
        "mask_run_frames": total["masked_frames"] / max(total["masked_runs"], 1),
        "row_fill": total["frames"] / max(total["row_frames"], 1),
    }


def count_codes(code_counts: Tensor, targets: Tensor) -> None:
    """Add targets [N, C] to the counts [C, V], in place."""
    for counts, codes in zip(code_counts, targets.unbind(dim=1), strict=True):
        counts += codes.bincount(minlength=counts.numel())


def codebook_figures(code_counts: Tensor) -> dict[str, float | list[float]]:
    """Entropy, perplexity and usage of the targets since the run began; lists have one entry a codebook."""
    entropy = unigram_entropy(code_counts)
    return {
        "unigram_entropy": float(entropy.mean()),
        "perplexity": float(entropy.exp().min()),
        "codebook_perplexity": entropy.exp().tolist(),
        "codebook_usage": (code_counts > 0).double().mean(dim=1).tolist(),
        "targets_seen": int(code_counts[0].sum()),
    }


def warn_of_collapse(values: dict, quantizer: QuantizerSettings) -> None:
    """Say so when the targets of some codebook are nearly always the same few codes: there is nothing to learn."""
    if values["targets_seen"] >= quantizer.codebook_size and values["perplexity"] < quantizer.codebook_size / 100:
        print(
            f"ALARM: a codebook has collapsed: perplexity {values['perplexity']:.1f} of {quantizer.codebook_size} "
            "codes. Are the features normalised (data.normalisation), and is the audio not silent?",
            file=sys.stderr,
            flush=True,
        )


def show_pictures(
    run: RunFolder, metrics: MetricsLog, step: int, batch: Batch, code_counts: Tensor, hop_ms: float
) -> None:
    """A spectrogram with its mask and the use of the codes, for TensorBoard and the report."""
    if metrics.active and batch.mask is not None:
        shown = slice(0, min(batch.log_mel.shape[1], 1500))
        log_mel, mask = batch.log_mel[0, shown], batch.mask[0, shown]
        save_mask_example(run.path / "pictures", log_mel, mask)
        save_codebook_usage(run.path / "pictures", code_counts)
        metrics.picture(step, "mask", draw_mask(log_mel, mask, hop_ms))
        metrics.picture(step, "codebook_usage", draw_codebook_usage(code_counts.cpu()))


def check_targets(checkpoint: Checkpoint, quantizer: RandomProjectionQuantizer) -> None:
    """Refuse to continue on other targets than those of the checkpoint. Raises UserError naming the tensor."""
    for name, tensor in quantizer.state_dict().items():
        if not torch.equal(checkpoint.extra_tensors[f"quantizer.{name}"], tensor.cpu()):
            raise UserError(f"{checkpoint.path} has another quantizer: its {name} differs from that of quantizer.seed")


def save(run, step, model, optimizer, quantizer, data_state, code_counts, dataset, config, world) -> None:
    """A checkpoint, and the export of the encoder as it is now."""
    features = dataset.features.to_dict()
    state = {"data": data_state.to_dict(), "features": features, "feature_hash": dataset.features.hash()}
    state["precision"] = config.distributed.precision
    tensors = {f"quantizer.{name}": tensor for name, tensor in quantizer.state_dict().items()}
    tensors["code_counts"] = world.sum(code_counts.clone())
    save_checkpoint(run.checkpoints, step, model, optimizer, state, world, tensors)
    prune_checkpoints(run.checkpoints, config.checkpoint.keep_last, None, world)
    whole = gather_model(model, world)
    if world.is_main:
        description = {
            "kind": "pretrained",
            "step": step,
            "encoder": to_dict(config.encoder),
            "quantizer": to_dict(config.quantizer),
            "features": features,
            "feature_hash": dataset.features.hash(),
            "normalisation": config.data.normalisation,
        }
        encoder = {name: tensor for name, tensor in whole.items() if name.startswith("encoder.")}
        write_export(run.export, encoder, description, model_card(config, step, dataset))
    world.barrier()


def model_card(config: Config, step: int, dataset: Dataset) -> str:
    """README.md of the export."""
    return f"""# Conformer encoder, pretrained with BEST-RQ

{config.encoder.num_layers} layers of width {config.encoder.dim}; {step} updates of {config.data.rows} rows of
{config.data.row_frames} mel frames, on `{dataset.location}` (fingerprint `{dataset.fingerprint}`).

`config.json` holds the encoder's settings and the features' (16 kHz, {dataset.features.num_mels} log-mel bins,
normalised per {config.data.normalisation}). Fine-tune it: `python finetune_ctc.py --init THIS_FOLDER`.
"""


def model_flops(model: BestRQ, config: Config, longest: int, world: World) -> int:
    """FLOPs of a forward and backward pass of one row, full of segments of the `longest` length, in mel frames."""
    frames = config.data.row_frames
    longest -= longest % config.encoder.row_multiple
    starts = torch.arange(0, frames - longest + 1, longest).unsqueeze(0)
    lengths = torch.full_like(starts, longest)
    targets = torch.zeros(frames // config.encoder.stride // 3, config.quantizer.num_codebooks)
    log_mel = torch.zeros(1, frames, config.encoder.num_mels)
    target_frames = torch.arange(len(targets))

    def loss() -> Tensor:
        arguments = (log_mel.to(world.device), Segments(starts, lengths, frames), target_frames.to(world.device))
        return model(*arguments, targets.long().to(world.device))[0]

    model.eval()  # counting must not draw dropout, nor feed zeros to the statistics of a batch norm
    flops = count_flops(loss)
    model.train()
    return flops


def describe(config: Config, precision: Precision, model: BestRQ, dataset: Dataset, world: World, step: int) -> str:
    """The first line of the console."""
    millions = sum(parameter.numel() for parameter in model.parameters()) / 1e6
    seconds = config.data.rows * config.data.row_frames * dataset.features.hop_ms / 1000
    hours = dataset.total_frames / dataset.features.frames_per_second / 3600
    start = f"continuing after step {step}" if step else "starting"
    return (
        f"{start}: {millions:.1f} M parameters, {world.size} process(es) on {world.device.type} "
        f"in {precision}, {seconds:.0f} s of rows an update, {hours:.1f} h in {dataset.location}, "
        f"run {config.run.folder}"
    )


def main() -> None:
    train(parse(Config, description=__doc__))


if __name__ == "__main__":
    run_main(main, console_may_vanish=True)
