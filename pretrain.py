"""BEST-RQ pretraining of a Conformer encoder.

    python pretrain.py --config configs/quickstart-pretrain.yaml
    torchrun --nproc-per-node 8 pretrain.py --config configs/base-120m.yaml --run.folder runs/base-120m
    sbatch -N 4 launch/pretrain.sbatch --config configs/base-120m.yaml --run.folder runs/base-120m

The same command resumes an interrupted run, bit for bit on a CPU. A file named STOP in the run folder, SIGTERM or
Ctrl-C saves a checkpoint and exits after the current step. RUN_FOLDER/export holds the encoder for fine-tuning.
"""

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from jsonargparse.typing import PositiveInt
from torch import nn

from bestrq.model.conformer import EncoderSettings
from bestrq.pretraining.masking import MaskingSettings
from bestrq.pretraining.objective import BestRQ, MaskedRows, TargetSettings, frame_counts, mask_rows, validate
from bestrq.pretraining.quantizer import QuantizerSettings, RandomProjectionQuantizer
from bestrq.pretraining.reporting import (
    COUNTERS,
    codebook_figures,
    count_codes,
    interval_means,
    save_codebook_usage,
    warn_of_collapse,
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
from bestrq.training.meters import IntervalSums, MetricsLog, Throughput, console_line, start_line
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
from bestrq.training.process import (
    DistributedSettings,
    World,
    autocast,
    gradient_sync,
    parallelise,
    start_world,
    unwrap,
)
from bestrq.training.run_folder import FREE_RUN_FIELDS, RunFolder, RunSettings
from bestrq.training.stop import StopRequest
from common.config import parse, run_main, to_dict
from common.errors import UserError
from data.format.dataset import STD_FLOOR, Dataset
from data.loading.heldout import HeldoutSettings, heldout_batches, split_recordings
from data.loading.loader import (
    FREE_LOADER_FIELDS,
    LOADER_PLACES,
    Batch,
    CurriculumStage,
    DataState,
    LoaderSettings,
    RowLoader,
)

if TYPE_CHECKING:
    from bestrq.pretraining.adaptation import Adaptation
    from bestrq.pretraining.multi_target import MultiTarget
    from bestrq.pretraining.teacher import Teacher

    Model = BestRQ | MultiTarget


@dataclass
class Config:
    """BEST-RQ pretraining."""

    run: RunSettings = field(default_factory=RunSettings)
    """folder, length and seed"""
    data: LoaderSettings = field(default_factory=LoaderSettings)
    """dataset, rows and packing"""
    curriculum: list[CurriculumStage] = field(default_factory=list)
    """later stages of training, for example with longer rows and crops; data describes the first stage"""
    accumulation: PositiveInt = 1
    """micro-batches per optimizer step: divides the rows that a process holds at once"""
    encoder: EncoderSettings = field(default_factory=EncoderSettings)
    """the Conformer"""
    quantizer: QuantizerSettings = field(default_factory=QuantizerSettings)
    """codes of the clean features"""
    targets: TargetSettings = field(default_factory=TargetSettings)
    """targets other than the quantizer's, and blocks that predict them"""
    masking: MaskingSettings = field(default_factory=MaskingSettings)
    """masks, noise and other sounds in the model's input"""
    optimizer: OptimizerSettings = field(default_factory=OptimizerSettings)
    """AdamW and its schedule"""
    validation: HeldoutSettings = field(default_factory=HeldoutSettings)
    """masked loss and accuracy on held-out audio"""
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
)
# Fields that may name another location if the fingerprint of the data is the same.
PLACES = {**{f"data.{name}": "dataset" for name in LOADER_PLACES}, "targets.export": "targets.export"}


@dataclass
class RunState:
    """Everything that a checkpoint holds. Random generators have no state to save: see `seed_step`."""

    model: nn.Module
    """wrapped by `parallelise`"""
    optimizer: torch.optim.Optimizer
    quantizer: RandomProjectionQuantizer
    code_counts: torch.Tensor
    """int64 [C, V], counts of the targets since they last changed; their sum over ranks is saved"""
    adaptation: "Adaptation | None" = None
    """estimates projection and codes; None if they are fixed"""
    teacher: "Teacher | None" = None
    """model that gives further targets"""
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
    stages = [(config.data, config.encoder)]
    if config.curriculum:
        from pipelines.curriculum import CurriculumLoader, stages_of  # imported only for a curriculum

        stages = [(stage.data, stage.encoder) for stage in stages_of(config)]
    teacher = None
    if config.targets.export:
        from pipelines.teacher import open_teacher

        teacher = open_teacher(config.targets, config.encoder, config.data, dataset, world)
    fingerprints = dataset.identity() | ({"targets.export": teacher.fingerprint} if teacher else {})
    run.start(config, world, FREE_FIELDS, fingerprints, PLACES, facts={"precision": str(precision)})

    # ---- Model, optimizer and targets, resumed from the latest checkpoint ----
    torch.manual_seed(config.run.seed)  # the same initial weights for any world size
    if config.targets.extended:
        from bestrq.pretraining import multi_target

        classes = teacher.classes if teacher else 0
        model: Model = multi_target.MultiTarget(config.encoder, config.quantizer, config.targets, classes)
    else:
        model = BestRQ(config.encoder, config.quantizer)
    model.to(world.device)
    quantizer = RandomProjectionQuantizer(config.quantizer, config.encoder.stride * config.encoder.num_mels)
    quantizer.to(world.device)
    adaptation = None
    if config.quantizer.adapts or config.targets.distill_steps:
        from bestrq.pretraining.adaptation import Adaptation

        adaptation = Adaptation(quantizer, config.quantizer, config.targets.distill_steps)
    from bestrq.pretraining.cost import flops_per_row, peak_flops  # only for the MFU

    row_flops = [
        flops_per_row(model, data.row_frames, data.crop_frames(dataset)[0], world.device) for data, _ in stages
    ]
    parallel_model = parallelise(model, model.encoder.blocks, world, config.distributed)
    optimizer = build_optimizer([(parallel_model.named_parameters(), config.optimizer)])
    shape = config.quantizer.num_codebooks, config.quantizer.codebook_size
    if teacher and config.targets.source == "teacher":
        shape = 1, teacher.classes
    code_counts = torch.zeros(shape, dtype=torch.int64, device=world.device)
    state = RunState(parallel_model, optimizer, quantizer, code_counts, adaptation, teacher)
    latest = latest_checkpoint(run.checkpoints, world)
    if latest is not None:
        resume(state, load_checkpoint(latest, parallel_model, optimizer, world), world)
    elif teacher and config.targets.kind == "clusters":
        from pipelines.teacher import sample_rows

        with autocast(world, config.distributed):
            sample = sample_rows(config.targets, config.data, dataset, training, config.encoder, world)
            teacher.estimate(sample, config.targets.seed, world)

    # ---- Loader. The rows of a step depend neither on world size nor on accumulation nor on workers ----
    packing = {"multiple": config.encoder.row_multiple, "row_gap": config.encoder.row_gap}
    shares = {"rank": world.rank, "world_size": world.size, "accumulation": config.accumulation}
    draw_mask = config.masking.draw_function(dataset.features.hop_ms)
    crops = [data.crop_order(dataset, training) for data, _ in stages]
    mix = None
    if config.masking.mix_probability:
        from data.loading.mixing import Mixer

        masking = config.masking
        mix = Mixer(dataset, crops[0], config.data.normalisation, masking.mix_probability, masking.mix_noise_share)
    loader: RowLoader | CurriculumLoader
    if config.curriculum:
        loader = CurriculumLoader(dataset, crops, config, world, state.step, state.data, draw_mask, mix)
    else:
        loader = RowLoader(
            dataset, crops[0], config.data, **packing, **shares, draw_mask=draw_mask, mix=mix, state=state.data
        )
    model.encoder.settings = stages[loader.stage][1]
    dev_batches = heldout_batches(
        dataset, heldout, config.data, config.validation, **packing, **shares, draw_mask=draw_mask
    )

    guard = StepGuard(config.guard)
    metrics = MetricsLog(run, state.step, world)
    throughput = Throughput(world, config.run.steps, peak_flops(world, precision.name))
    stop = StopRequest(run.path)
    sums = IntervalSums((*COUNTERS, *model.loss_names), world.device)
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
        model.encoder.settings = stages[loader.stage][1]  # positions may be interpolated in later stages
        seed_step(config.run.seed, state.step, world.rank)
        micro_rows = [masked_rows(batch, state, config, world, training=True) for batch in micro_batches]
        num_targets = sum(rows.num_targets for rows in micro_rows)
        # The loss is divided by the targets of all ranks, and gradients are summed over ranks: see process.py.
        global_targets = world.sum(torch.tensor(num_targets, device=world.device)).clamp(min=1)

        # ---- Forward and backward. Counters stay on the device until the log interval ends ----
        (learning_rate,) = set_learning_rates(optimizer, state.step, config.run.steps)
        loss_sum = torch.zeros((), device=world.device)
        for i, rows in enumerate(micro_rows):
            with gradient_sync(parallel_model, i == len(micro_rows) - 1):
                with autocast(world, config.distributed):
                    loss, num_correct, *losses = parallel_model(*rows.inputs)
                (loss / global_targets).backward()
            loss_sum += loss.detach()
            sums.add(loss=loss, correct=num_correct, targets=rows.num_targets, **frame_counts(rows))
            sums.add(**dict(zip(model.loss_names, losses, strict=True)))
            count_codes(code_counts, rows.targets)
            if adaptation:
                adaptation.observe(state.step, rows.stacks, rows.targets)

        # ---- Optimizer step, skipped on all ranks if a loss or the gradient is not finite ----
        result = guard.apply(parallel_model, optimizer, loss_sum, config.optimizer.clip_norm, world)
        if not result.applied:
            samples = [sample for batch in micro_batches for ids in batch.ids for sample in ids]
            report_skipped_step(state.step, loss_sum, samples, world)
        audio_frames = sum(int(batch.segments.length.sum()) for batch in micro_batches)
        num_rows = sum(batch.log_mel.shape[0] for batch in micro_batches)
        throughput.count(audio_frames / dataset.features.frames_per_second, row_flops[loader.stage] * num_rows)
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
                warn_of_collapse(values, code_counts.shape[1])
        if state.step == 1 or is_checkpoint:
            from bestrq.pretraining.pictures import save_pictures  # matplotlib is slow to import

            counts, row = world.sum(code_counts), (micro_batches[0].log_mel[0], micro_rows[0].mask[0])
            save_pictures(run.pictures, metrics, state.step, *row, counts, dataset.features.hop_ms)

        # ---- Validation on the same crops, masks and noise each time; training is not affected ----
        if dev_batches and (is_last or state.step % config.validation.every_steps == 0):
            with throughput.paused():
                dev_rows = (masked_rows(batch, state, config, world) for batch in dev_batches)
                rates = validate(parallel_model, dev_rows, config.distributed, world)
            metrics.write(state.step, rates, kind="dev")
            if world.is_main:
                print(console_line(state.step, config.run.steps, rates), flush=True)

        # ---- Estimated projection or codes: from the next step on, counts of codes restart ----
        if adaptation and (change := adaptation.update(state.step, world, model.distilled)):
            code_counts.zero_()
            if world.is_main:
                print(f"step {state.step}: {change}", flush=True)

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


def masked_rows(batch: Batch, state: RunState, config: Config, world: World, training: bool = False) -> MaskedRows:
    """Masked features and targets of a batch, on the device; with other sounds and masked bands only in training."""
    assert batch.mask is not None
    log_mel = batch.log_mel.to(world.device, non_blocking=True)
    clean = log_mel, batch.mask, batch.segments, state.quantizer, config.encoder.stride
    received = None
    if training and (config.masking.bands or batch.received is not None):
        from pipelines.corruption import corrupted

        received = corrupted(log_mel, batch, config.masking)
    if not config.targets.extended:
        return mask_rows(*clean, config.masking.noise_std, None, received)
    from bestrq.pretraining.multi_target import multi_target_rows

    with autocast(world, config.distributed):
        return multi_target_rows(*clean, config.masking, config.targets, state.teacher, received, training)


def resume(state: RunState, checkpoint: Checkpoint, world: World) -> None:
    """Restore step, data, targets and code counts. Raises UserError if the checkpoint has another quantizer."""
    if state.teacher:
        state.teacher.restore(checkpoint.extra_tensors, world.device)
    if state.adaptation:
        state.adaptation.restore(checkpoint.extra_tensors, checkpoint.path, world)
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
    targets = {f"quantizer.{name}": tensor for name, tensor in state.quantizer.state_dict().items()}
    targets |= state.teacher.tensors() if state.teacher else {}
    tensors = targets | (state.adaptation.tensors(world) if state.adaptation else {})
    tensors["code_counts"] = world.sum(state.code_counts)
    save_checkpoint(run.checkpoints, state.step, state.model, state.optimizer, values, world, tensors)
    prune_checkpoints(run.checkpoints, config.checkpoint.keep_last, None, world)
    weights = gather_model(state.model, world)
    if world.is_main:
        from bestrq.pretraining.export import export_encoder  # only the main process exports

        description = {
            "kind": "pretrained",
            "step": state.step,
            "encoder": to_dict(unwrap(state.model).get_submodule("encoder").settings),
            "quantizer": to_dict(config.quantizer),
            "targets": to_dict(config.targets),
            **features,
            "normalisation": config.data.normalisation,
            "std_floor": STD_FLOOR,
        }
        rows = f"{config.data.rows} rows of\n{config.data.row_frames} mel frames"
        training = f"{rows}, on `{dataset.location}` (fingerprint `{dataset.fingerprint}`)"
        export_encoder(run.export, weights, targets, description, training)
    world.barrier()


def main() -> None:
    train(parse(Config, description=__doc__))


if __name__ == "__main__":
    run_main(main, console_may_vanish=True)
