"""BEST-RQ pretraining of a Conformer encoder.

    python pretrain.py --config configs/quickstart-pretrain.yaml
    torchrun --nproc-per-node 8 pretrain.py --config configs/base-120m.yaml --run.folder runs/base-120m
    sbatch -N 4 launch/pretrain.sbatch --config configs/base-120m.yaml --run.folder runs/base-120m

The same command resumes an interrupted run, bit for bit on a CPU. A file named STOP in the run folder, SIGTERM or
Ctrl-C saves a checkpoint and exits after the current step. RUN_FOLDER/export holds the encoder for fine-tuning.
"""

from dataclasses import dataclass, field
from typing import Any

import torch
from jsonargparse.typing import PositiveInt
from torch import nn

from bestrq.model.conformer import EncoderSettings
from bestrq.pretraining.masking import MaskingSettings
from bestrq.pretraining.objective import BestRQ, MaskedRows, flops_per_row, frame_counts, mask_rows, validate
from bestrq.pretraining.quantizer import QuantizerSettings, RandomProjectionQuantizer
from bestrq.pretraining.reporting import (
    COUNTERS,
    ProbeSettings,
    codebook_figures,
    count_codes,
    interval_means,
    model_card,
    save_codebook_usage,
    save_pictures,
)
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
from bestrq.training.meters import IntervalSums, MetricsLog, Throughput, console_line, peak_flops, start_line
from bestrq.training.optimizer import (
    GuardSettings,
    OptimizerSettings,
    StepGuard,
    build_optimizer,
    report_skipped_step,
    seed_step,
    set_learning_rates,
)
from bestrq.training.precision import resolve_precision, with_precision
from bestrq.training.process import DistributedSettings, World, autocast, gradient_sync, parallelise, start_world
from bestrq.training.run_folder import FREE_RUN_FIELDS, RunFolder, RunSettings
from bestrq.training.stop import StopRequest
from common.config import parse, run_main, to_dict
from common.errors import UserError
from data.format.dataset import Dataset
from data.loading.heldout import HeldoutSettings, heldout_batches, split_recordings
from data.loading.loader import FREE_LOADER_FIELDS, LOADER_PLACES, Batch, DataState, LoaderSettings, RowLoader


@dataclass
class Config:
    """BEST-RQ pretraining."""

    run: RunSettings = field(default_factory=RunSettings)
    """folder, length and seed"""
    data: LoaderSettings = field(default_factory=LoaderSettings)
    """dataset, rows and packing"""
    accumulation: PositiveInt = 1
    """micro-batches per optimizer step: divides the rows that a process holds at once"""
    encoder: EncoderSettings = field(default_factory=EncoderSettings)
    """the Conformer"""
    quantizer: QuantizerSettings = field(default_factory=QuantizerSettings)
    """the frozen targets"""
    masking: MaskingSettings = field(default_factory=MaskingSettings)
    """span masks and noise"""
    optimizer: OptimizerSettings = field(default_factory=OptimizerSettings)
    """AdamW and its schedule"""
    validation: HeldoutSettings = field(default_factory=HeldoutSettings)
    """masked loss and accuracy on held-out audio"""
    probe: ProbeSettings = field(default_factory=ProbeSettings)
    """probe of the frozen features on labelled recordings"""
    guard: GuardSettings = field(default_factory=GuardSettings)
    """non-finite losses and gradient spikes"""
    checkpoint: CheckpointSettings = field(default_factory=CheckpointSettings)
    """frequency and retention of checkpoints"""
    distributed: DistributedSettings = field(default_factory=DistributedSettings)
    """processes, devices and precision"""


# Fields that may change when a run is resumed, because they do not affect the optimizer steps.
FREE_FIELDS = (
    *FREE_RUN_FIELDS,
    "encoder.activation_checkpointing",
    "encoder.backend",
    *(f"data.{name}" for name in FREE_LOADER_FIELDS),
    "validation.every_steps",
    "probe",
)
# Fields that may name another location if the fingerprint of the data is the same.
PLACES = {f"data.{name}": "dataset" for name in LOADER_PLACES}


@dataclass
class RunState:
    """Everything that a checkpoint holds. Random generators have no state to save: see `seed_step`."""

    model: nn.Module
    """wrapped by `parallelise`"""
    optimizer: torch.optim.Optimizer
    quantizer: RandomProjectionQuantizer
    code_counts: torch.Tensor
    """int64 [C, V], counts of the targets since the start of the run; their sum over ranks is saved"""
    step: int = 0
    """optimizer steps done"""
    data: DataState | None = None
    """position in the stream of rows after `step`; None before the first step"""


def train(config: Config) -> None:
    # ---- Run folder and data: configuration errors end the run here, before any training ----
    world = start_world(config.distributed)
    dataset = config.data.open()
    run = RunFolder(config.run.folder)
    precision = resolve_precision(config.distributed, run, world)
    config = with_precision(config, precision)
    training, heldout = split_recordings(dataset, config.data, config.validation)
    probe = make_probe(config, dataset, world)
    run.start(config, world, FREE_FIELDS, dataset.identity(), PLACES, facts={"precision": str(precision)})

    # ---- Model, optimizer and targets, resumed from the latest checkpoint ----
    torch.manual_seed(config.run.seed)  # the same initial weights for any world size
    model = BestRQ(config.encoder, config.quantizer).to(world.device)
    quantizer = RandomProjectionQuantizer(config.quantizer, config.encoder.stride * config.encoder.num_mels)
    quantizer.to(world.device)
    max_frames, _ = config.data.crop_frames(dataset)
    row_flops = flops_per_row(model, config.data.row_frames, max_frames, world.device)
    parallel_model = parallelise(model, model.encoder.blocks, world, config.distributed)
    optimizer = build_optimizer([(parallel_model.named_parameters(), config.optimizer)])
    shape = config.quantizer.num_codebooks, config.quantizer.codebook_size
    code_counts = torch.zeros(shape, dtype=torch.int64, device=world.device)
    state = RunState(parallel_model, optimizer, quantizer, code_counts)
    latest = latest_checkpoint(run.checkpoints, world)
    if latest is not None:
        resume(state, load_checkpoint(latest, parallel_model, optimizer, world), world)

    # ---- Loader. The rows of a step depend neither on world size nor on accumulation nor on workers ----
    packing = {"multiple": config.encoder.row_multiple, "row_gap": config.encoder.row_gap}
    shares = {"rank": world.rank, "world_size": world.size, "accumulation": config.accumulation}
    draw_mask = config.masking.draw_function(dataset.features.hop_ms)
    crops = config.data.crop_order(dataset, training)
    loader = RowLoader(dataset, crops, config.data, **packing, **shares, draw_mask=draw_mask, state=state.data)
    dev_batches = heldout_batches(
        dataset, heldout, config.data, config.validation, **packing, **shares, draw_mask=draw_mask
    )

    from bestrq.pretraining.alarms import Alarms  # not at the top: a reader of the loop need not read it

    alarms = Alarms(config.quantizer.codebook_size, config.optimizer.warmup_steps)
    guard = StepGuard(config.guard)
    metrics = MetricsLog(run, state.step, world)
    throughput = Throughput(world, config.run.steps, peak_flops(world, precision.name))
    stop = StopRequest(run.path)
    sums = IntervalSums(COUNTERS, world.device)
    if world.is_main:
        seconds = config.data.rows * config.data.row_frames * dataset.features.hop_ms / 1000
        hours = dataset.total_frames / dataset.features.frames_per_second / 3600
        print(
            f"{start_line(model, '', precision, world, state.step)}, {seconds:.0f} s of rows per step, "
            f"{hours:.1f} h in {dataset.location}, run {config.run.folder}",
            flush=True,
        )

    batches = iter(loader)
    while state.step < config.run.steps and not stop.agreed(world):
        # ---- Data: targets from the clean features, noise in place of the masked frames ----
        with throughput.waiting():
            micro_batches = next(batches)
        state.step += 1
        seed_step(config.run.seed, state.step, world.rank)
        micro_rows = [masked_rows(batch, quantizer, config, world) for batch in micro_batches]
        num_targets = sum(rows.targets.numel() for rows in micro_rows)
        # The loss is divided by the targets of all ranks, and gradients are summed over ranks: see process.py.
        global_targets = world.sum(torch.tensor(num_targets, device=world.device)).clamp(min=1)

        # ---- Forward and backward. Counters stay on the device until the log interval ends ----
        (learning_rate,) = set_learning_rates(optimizer, state.step, config.run.steps)
        loss_sum = torch.zeros((), device=world.device)
        for i, rows in enumerate(micro_rows):
            with gradient_sync(parallel_model, i == len(micro_rows) - 1):
                with autocast(world, config.distributed):
                    loss, num_correct = parallel_model(rows.log_mel, rows.segments, rows.target_frames, rows.targets)
                (loss / global_targets).backward()
            loss_sum += loss.detach()
            sums.add(loss=loss, correct=num_correct, targets=rows.targets.numel(), **frame_counts(rows))
            count_codes(code_counts, rows.targets)

        # ---- Optimizer step, skipped on all ranks if a loss or the gradient is not finite ----
        result = guard.apply(parallel_model, optimizer, loss_sum, config.optimizer.clip_norm, world)
        if not result.applied:
            samples = [sample for batch in micro_batches for ids in batch.ids for sample in ids]
            report_skipped_step(state.step, loss_sum, samples, world)
        audio_frames = sum(int(batch.segments.length.sum()) for batch in micro_batches)
        num_rows = sum(batch.log_mel.shape[0] for batch in micro_batches)
        throughput.count(audio_frames / dataset.features.frames_per_second, row_flops * num_rows)
        state.data = micro_batches[-1].state

        # ---- Logging ----
        is_last = state.step == config.run.steps
        is_checkpoint = state.step % config.checkpoint.every_steps == 0
        if state.step % config.run.log_every == 0 or is_last or result.spike:
            sums.add(quarantined=len(loader.quarantined))
            values: dict[str, Any] = {"learning_rate": learning_rate, "grad_norm": result.grad_norm}
            values |= {"spike": result.spike, **interval_means(sums.totals(world))}
            values |= codebook_figures(world.sum(code_counts)) | throughput.interval(state.step)
            metrics.write(state.step, values)
            if world.is_main:
                print(console_line(state.step, config.run.steps, values), flush=True)
                alarms.report(state.step, values, micro_batches[0].log_mel, micro_batches[0].segments, parallel_model)
        if state.step == 1 or is_checkpoint:
            counts, row = world.sum(code_counts), (micro_batches[0].log_mel[0], micro_rows[0].mask[0])
            save_pictures(run.pictures, metrics, state.step, *row, counts, dataset.features.hop_ms)

        # ---- Validation on the same crops, masks and noise each time; training is not affected ----
        if dev_batches and (is_last or state.step % config.validation.every_steps == 0):
            with throughput.paused():
                dev_rows = (masked_rows(batch, quantizer, config, world) for batch in dev_batches)
                rates = validate(parallel_model, dev_rows, config.distributed, world)
            metrics.write(state.step, rates, kind="dev")
            if world.is_main:
                print(console_line(state.step, config.run.steps, rates), flush=True)

        if probe and (is_last or state.step % config.probe.every_steps == 0):
            with throughput.paused():
                probe.run(state.step, config.run.steps, parallel_model, metrics, alarms)

        # ---- Checkpoint ----
        if is_checkpoint and not is_last:
            save(state, run, config, dataset, world)

    # ---- End of the run, or a stop ----
    if state.step:
        save(state, run, config, dataset, world)
        counts = world.sum(code_counts)
        if world.is_main:
            save_codebook_usage(run.pictures, counts)
    if state.step < config.run.steps:
        stop.leave_requeue_marker(world)
        if world.is_main:
            print(f"stopped after step {state.step} ({stop.reason}); the same command continues", flush=True)
    elif world.is_main:
        print(f"done: {run.export}", flush=True)
    metrics.close()
    world.close()


def make_probe(config: Config, dataset: Dataset, world: World) -> Any:
    """`TrainingProbe` of the settings, or None. Raises UserError without labelled recordings."""
    if not config.probe.every_steps:
        return None
    from pipelines.training_probe import TrainingProbe

    return TrainingProbe(config.probe, dataset, config.data, config.encoder, config.run.seed, world)


def masked_rows(batch: Batch, quantizer: RandomProjectionQuantizer, config: Config, world: World) -> MaskedRows:
    """Masked features and targets of a batch, on the device."""
    assert batch.mask is not None
    log_mel = batch.log_mel.to(world.device, non_blocking=True)
    stride, noise_std = config.encoder.stride, config.masking.noise_std
    return mask_rows(log_mel, batch.mask, batch.segments, quantizer, stride, noise_std)


def resume(state: RunState, checkpoint: Checkpoint, world: World) -> None:
    """Restore step, data and code counts. Raises UserError if the targets of the checkpoint are different."""
    for name, tensor in state.quantizer.state_dict().items():
        if not torch.equal(checkpoint.extra_tensors[f"quantizer.{name}"], tensor.cpu()):
            raise UserError(f"{checkpoint.path} has another quantizer: its {name} differs from that of quantizer.seed")
    state.step, state.data = checkpoint.step, DataState.from_dict(checkpoint.state["data"])
    if world.is_main:  # the saved counts are a sum over ranks, so only one rank continues them
        state.code_counts += checkpoint.extra_tensors["code_counts"].to(world.device)


def save(state: RunState, run: RunFolder, config: Config, dataset: Dataset, world: World) -> None:
    """Save a checkpoint and export the encoder; all ranks must call it."""
    assert state.data is not None
    features = {"features": dataset.features.to_dict(), "feature_hash": dataset.features.hash()}
    values = {"data": state.data.to_dict(), **features, "precision": config.distributed.precision}
    tensors = {f"quantizer.{name}": tensor for name, tensor in state.quantizer.state_dict().items()}
    tensors["code_counts"] = world.sum(state.code_counts)
    save_checkpoint(run.checkpoints, state.step, state.model, state.optimizer, values, world, tensors)
    prune_checkpoints(run.checkpoints, config.checkpoint.keep_last, None, world)
    weights = gather_model(state.model, world)
    if world.is_main:
        description = {
            "kind": "pretrained",
            "step": state.step,
            "encoder": to_dict(config.encoder),
            "quantizer": to_dict(config.quantizer),
            **features,
            "normalisation": config.data.normalisation,
        }
        encoder = {name: tensor for name, tensor in weights.items() if name.startswith("encoder.")}
        rows = f"{config.data.rows} rows of\n{config.data.row_frames} mel frames"
        training = f"{rows}, on `{dataset.location}` (fingerprint `{dataset.fingerprint}`)"
        write_export(run.export, encoder, description, model_card(description, training))
    world.barrier()


def main() -> None:
    train(parse(Config, description=__doc__))


if __name__ == "__main__":
    run_main(main, console_may_vanish=True)
