"""BEST-RQ pretraining of a Conformer encoder.

    python pretrain.py --config configs/quickstart-pretrain.yaml
    torchrun --nproc-per-node 8 pretrain.py --config configs/base-120m.yaml --run.folder runs/base-120m
    sbatch -N 4 launch/pretrain.sbatch --config configs/base-120m.yaml --run.folder runs/base-120m

The same command resumes an interrupted run, bit for bit on a CPU. A file named STOP in the run folder, SIGTERM or
Ctrl-C saves a checkpoint and exits after the current step. RUN_FOLDER/export holds the encoder for fine-tuning.
"""

from typing import Any

import torch

from bestrq.pretraining.objective import frame_counts, validate
from bestrq.pretraining.quantizer import RandomProjectionQuantizer
from bestrq.pretraining.reporting import (
    COUNTERS,
    codebook_figures,
    count_codes,
    interval_means,
    save_codebook_usage,
)
from bestrq.training.checkpoint import latest_checkpoint, load_checkpoint
from bestrq.training.meters import IntervalSums, MetricsLog, Throughput, console_line, start_line
from bestrq.training.optimizer import StepGuard, build_optimizer, seed_step, set_learning_rates
from bestrq.training.precision import resolve_precision, with_precision
from bestrq.training.process import autocast, gradient_sync, parallelise, start_world
from bestrq.training.run_folder import RunFolder
from bestrq.training.stop import StopRequest
from common.config import run_main
from data.loading.heldout import split_recordings
from pipelines.pretraining import (
    FREE_FIELDS,
    PLACES,
    Config,
    RunState,
    estimate_clusters,
    make_adaptation,
    make_loaders,
    make_model,
    make_probe,
    masked_rows,
    open_teacher,
    resume,
    save,
    stages_of_run,
)


def train(config: Config) -> None:
    # ---- Run folder and data: configuration errors end the run here, before any training ----
    world = start_world(config.distributed)
    from pipelines.kernels import (  # not at the top: a reader of the loop need not read it
        check_kernels,
        compile_encoder,
    )

    check_kernels(config.encoder, world.device)
    dataset = config.data.open()
    run = RunFolder(config.run.folder)
    precision = resolve_precision(config.distributed, run, world)
    config = with_precision(config, precision)
    training, heldout = split_recordings(dataset, config.data, config.validation)
    stages, teacher = stages_of_run(config), open_teacher(config, dataset, world)
    fingerprints = dataset.identity() | ({"targets.export": teacher.fingerprint} if teacher else {})
    probe = make_probe(config, dataset, world)
    run.start(config, world, FREE_FIELDS, fingerprints, PLACES, facts={"precision": str(precision)})

    # ---- Model, optimizer and targets, resumed from the latest checkpoint ----
    torch.manual_seed(config.run.seed)  # the same initial weights for any world size
    model = make_model(config, teacher).to(world.device)
    quantizer = RandomProjectionQuantizer(config.quantizer, config.encoder.stride * config.encoder.num_mels)
    quantizer.to(world.device)
    adaptation = make_adaptation(config, quantizer)
    from bestrq.pretraining.cost import flops_per_row, peak_flops  # only for the MFU

    row_flops = [
        flops_per_row(model, data.row_frames, data.crop_frames(dataset)[0], world.device) for data, _ in stages
    ]
    compile_encoder(model.encoder, world.device)
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
    else:
        estimate_clusters(state, config, dataset, training, world)

    # ---- Loader. The rows of a step depend neither on world size nor on accumulation nor on workers ----
    loader, dev_batches = make_loaders(config, dataset, training, heldout, state, world)
    model.encoder.settings = stages[loader.stage][1]
    from bestrq.pretraining.alarms import Alarms  # not at the top: a reader of the loop need not read these
    from bestrq.training.background_writer import BackgroundWriter
    from bestrq.training.observers import Observers
    from bestrq.training.watchdog import Watchdog

    main_loss = next(iter(model.loss_names), "loss")
    new_targets_at = (config.quantizer.pca_steps, *config.quantizer.refine_steps)
    alarms = Alarms(code_counts.shape[1], config.optimizer.warmup_steps, new_targets_at)
    guard = StepGuard(config.guard)
    metrics = MetricsLog(run, state.step, world, config.tracking)
    peak = peak_flops(world, precision.name)
    throughput = Throughput(world, config.run.steps, parallel_model, peak, metrics.before)
    observers = Observers(config.profile, config.norms, parallel_model, run, metrics, world)
    stop = StopRequest(run.path, world)
    watchdog = Watchdog(config.guard, run.path, world)
    writer = BackgroundWriter(world)
    sums = IntervalSums((*COUNTERS, *model.loss_names), world.device)
    if world.is_main:
        seconds = config.data.rows * config.data.row_frames * dataset.features.hop_ms / 1000
        hours = dataset.total_frames / dataset.features.frames_per_second / 3600
        print(
            f"{start_line(model, '', precision, world, state.step)}, {seconds:.0f} s of rows per step, "
            f"{hours:.1f} h in {dataset.location}, run {config.run.folder}",
            flush=True,
        )

    batches = loader.steps(stop.noticed_while_waiting)
    while state.step < config.run.steps:
        # ---- Data: targets from the clean features, noise in place of the masked frames ----
        with throughput.waiting():
            micro_batches = next(batches, [])  # none after a request to stop in the absence of data
        seed_step(config.run.seed, state.step + 1, world.rank)
        micro_rows = [masked_rows(batch, state, config, world, training=True) for batch in micro_batches]
        num_targets = sum(rows.num_targets for rows in micro_rows)
        # All ranks stop before the same step. The loss is divided by the targets of all ranks, and gradients are summed
        # over ranks: see process.py.
        global_targets, stops = world.sum_on_host(num_targets, stop.noticed())
        if stops:
            break
        state.step += 1
        model.encoder.settings = stages[loader.stage][1]  # positions may be interpolated in later stages
        samples = [sample for batch in micro_batches for ids in batch.ids for sample in ids]
        watchdog.step(state.step, samples)
        observers.start(state.step)

        # ---- Forward and backward. Counters stay on the device until the log interval ends ----
        (learning_rate,) = set_learning_rates(optimizer, state.step, config.run.steps)
        loss_sum = torch.zeros((), device=world.device)
        for i, rows in enumerate(micro_rows):
            with gradient_sync(parallel_model, i == len(micro_rows) - 1):
                with autocast(world, config.distributed):
                    loss, num_correct, *losses = parallel_model(*rows.inputs)
                (loss / max(global_targets, 1)).backward()
            loss_sum += loss.detach()
            sums.add(loss=loss, correct=num_correct, targets=rows.num_targets, **frame_counts(rows))
            sums.add(**dict(zip(model.loss_names, losses, strict=True)))
            count_codes(code_counts, rows.targets)
            if adaptation:
                adaptation.observe(state.step, rows.stacks, rows.targets)

        # ---- Optimizer step, skipped on all ranks if a loss or the gradient is not finite ----
        observers.before_update(state.step)
        result = guard.apply(
            state.step, parallel_model, optimizer, loss_sum, config.optimizer.clip_norm, world, samples
        )
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
                first = micro_batches[0]
                alarms.report(
                    state.step, values | {"loss": values[main_loss]}, first.log_mel, first.segments, parallel_model
                )
        if state.step == 1 or is_checkpoint:
            from bestrq.pretraining.pictures import save_pictures  # matplotlib is slow to import

            counts, row = world.sum(code_counts), (micro_batches[0].log_mel[0], micro_rows[0].mask[0])
            save_pictures(run.pictures, metrics, state.step, *row, counts, dataset.features.hop_ms)

        # ---- Validation on the same crops, masks and noise each time; training is not affected ----
        if dev_batches and (is_last or state.step % config.validation.every_steps == 0):
            watchdog.long()
            with throughput.paused():
                dev_rows = (masked_rows(batch, state, config, world) for batch in dev_batches)
                rates = validate(parallel_model, dev_rows, config.distributed, world)
            metrics.write(state.step, rates, kind="dev")
            if world.is_main:
                print(console_line(state.step, config.run.steps, rates), flush=True)

        if probe and (is_last or state.step % config.probe.every_steps == 0):
            watchdog.long()
            with throughput.paused():
                probe.run(state.step, config.run.steps, parallel_model, metrics, alarms)

        # ---- Estimated projection or codes: from the next step on, counts of codes restart ----
        if adaptation and (change := adaptation.update(state.step, world, model.distilled)):
            code_counts.zero_()
            if world.is_main:
                print(f"step {state.step}: {change}", flush=True)

        # ---- Checkpoint ----
        if is_checkpoint and not is_last:
            watchdog.long()
            throughput.record(state.step, metrics)
            save(state, run, config, dataset, world, writer)

    # ---- End of the run, or a stop ----
    watchdog.long()
    batches.close()  # ends the workers, even hung ones
    if state.step:
        throughput.record(state.step, metrics)
        save(state, run, config, dataset, world, writer)
        counts = world.sum(code_counts)
        if world.is_main:
            save_codebook_usage(run.pictures, counts)
    writer.close()
    if state.step < config.run.steps:
        stop.leave_requeue_marker()
        if world.is_main:
            print(f"stopped after step {state.step} ({stop.reason}); the same command continues", flush=True)
    elif world.is_main:
        print(f"done: {run.export}", flush=True)
    observers.close()
    metrics.close()
    watchdog.close()
    run.close()
    world.close()


def main() -> None:
    from pipelines.preview import parse_or_preview  # --dry_run and --fit, which do not train

    if config := parse_or_preview(Config, __doc__):
        train(config)


if __name__ == "__main__":
    run_main(main, console_may_vanish=True)
