"""CTC fine-tuning of a Conformer encoder, pretrained or from scratch.

    python finetune_ctc.py --config configs/quickstart-ctc.yaml --finetune.init runs/quickstart/pretrain/export
    torchrun --nproc-per-node 8 finetune_ctc.py --config configs/base-120m-ctc.yaml --run.folder runs/base-120m-ctc
    sbatch -N 2 launch/finetune.sbatch finetune_ctc.py --config configs/base-120m-ctc.yaml --run.folder runs/base

The same command resumes an interrupted run, bit for bit on a CPU. A file named STOP in the run folder, SIGTERM or
Ctrl-C saves a checkpoint and exits after the current step. RUN_FOLDER/export holds the model with the best dev error
rate.
"""

from dataclasses import dataclass

import torch

from bestrq.long_form.decoders import GreedyCTC
from bestrq.recognition.ctc import CTCModel, pad_labels
from bestrq.recognition.hidden_masks import draw_hidden_masks
from bestrq.recognition.spec_augment import spec_augment
from bestrq.training.background_writer import BackgroundWriter
from bestrq.training.checkpoint import latest_checkpoint
from bestrq.training.meters import IntervalSums, MetricsLog, Throughput, console_line
from bestrq.training.observers import Observers
from bestrq.training.optimizer import StepGuard, build_optimizer, seed_step, set_learning_rates
from bestrq.training.precision import resolve_precision, with_precision
from bestrq.training.process import autocast, gradient_sync, parallelise, start_world
from bestrq.training.run_folder import RunFolder
from bestrq.training.stop import StopRequest
from bestrq.training.watchdog import Watchdog
from common.config import run_main
from common.segments import to_device
from pipelines.curriculum import CurriculumLoader, labelled_crops, stages_of
from pipelines.finetuning import (
    Best,
    FinetuneConfig,
    FinetuneRun,
    describe,
    export,
    heldout_inference,
    heldout_recordings,
    make_averages,
    resume,
    run_tokenizer,
    save,
    start_run,
)
from pipelines.kernels import compile_encoder
from pipelines.parameter_groups import frozen_blocks, parameter_groups
from pipelines.pretrained import initialise, read_init
from pipelines.validation import validate

# Counters of a log interval.
COUNTERS = ("loss", "labels", "impossible", "frames", "row_frames", "quarantined")


@dataclass
class Config(FinetuneConfig):
    """CTC fine-tuning."""


def train(config: Config) -> None:
    # ---- Run folder, data and tokenizer: configuration errors end the run here, before any training ----
    world = start_world(config.distributed)
    dataset = config.data.open()
    frames_per_second = dataset.features.frames_per_second
    folder = RunFolder(config.run.folder)
    precision = resolve_precision(config.distributed, folder, world)
    config = with_precision(config, precision)
    run = FinetuneRun(folder, config, dataset, world)
    latest = latest_checkpoint(folder.checkpoints, world)
    init = read_init(config, dataset) if config.finetune.init and latest is None else None
    stages = stages_of(config)
    crops = [labelled_crops(dataset, config, stage.data) for stage in stages]
    texts = [text for table in crops for text in table.texts]
    heldout, inference = heldout_recordings(dataset, config), heldout_inference(config, world)
    start_run(run, precision)
    tokenizer = run_tokenizer(folder, texts, config.finetune, world)
    labels_of = {text: tokenizer.encode(text) for text in texts}  # encoded now, so that errors cost no training

    # ---- Model and optimizer, from the pretrained encoder or resumed from the latest checkpoint ----
    torch.manual_seed(config.run.seed)  # the same initial weights for any world size
    model = CTCModel(config.encoder, tokenizer.vocab_size).to(world.device)
    if init is not None:
        initialise(model, init, config, world)
    freezes = frozen_blocks(config, 1) is not None
    compile_encoder(model.encoder, world.device)
    parallel_model = parallelise(model, model.encoder.blocks, world, config.distributed, find_unused_parameters=freezes)
    optimizer = build_optimizer(parameter_groups(model.named_parameters(), config))
    averages = make_averages(run, parallel_model)
    step, data_state, best = 0, None, Best()
    if latest is not None:
        step, data_state, best = resume(latest, parallel_model, optimizer, averages, world)

    loader = CurriculumLoader(dataset, crops, config, world, step, data_state)
    data_state = loader.state
    guard = StepGuard(config.guard)
    metrics = MetricsLog(folder, step, world, config.tracking)
    throughput = Throughput(world, config.run.steps, parallel_model, before=metrics.before)
    observers = Observers(config.profile, config.norms, parallel_model, folder, metrics, world)
    stop = StopRequest(folder.path, world)
    watchdog = Watchdog(config.guard, folder.path, world)
    writer = BackgroundWriter(world)
    sums = IntervalSums(COUNTERS, world.device)
    if world.is_main:
        print(describe(run, precision, model, crops[0], step), flush=True)

    batches = loader.steps(stop.noticed_while_waiting)
    while step < config.run.steps:
        # ---- Data ----
        with throughput.waiting():
            micro_batches = next(batches, [])  # none after a request to stop in the absence of data
        seed_step(config.run.seed, step + 1, world.rank)
        micro_labels = [pad_labels([labels_of[t] for texts in batch.text for t in texts]) for batch in micro_batches]
        num_labels = sum(int(lengths.sum()) for _, lengths in micro_labels)
        # All ranks stop before the same step. The loss is divided by the labels of all ranks, and gradients are summed
        # over ranks: see process.py.
        global_labels, stops = world.sum_on_host(num_labels, stop.noticed())
        if stops:
            break
        step += 1
        model.encoder.settings = stages[loader.stage].encoder  # positions may be interpolated in later stages
        samples = [sample for batch in micro_batches for ids in batch.ids for sample in ids]
        watchdog.step(step, samples)
        observers.start(step)

        # ---- Forward and backward. Counters stay on the device until the log interval ends ----
        rates = set_learning_rates(optimizer, step, config.run.steps)
        loss_sum = torch.zeros((), device=world.device)
        for i, (batch, (labels, label_lengths)) in enumerate(zip(micro_batches, micro_labels, strict=True)):
            log_mel = to_device(batch.log_mel, world.device)
            if step > config.spec_augment.start_step:
                log_mel = spec_augment(log_mel, batch.segments, config.spec_augment)
            masked = draw_hidden_masks(batch.segments, config.encoder, config.hidden_masks, world.device)
            with gradient_sync(parallel_model, i == len(micro_batches) - 1):
                with autocast(world, config.distributed):
                    output = parallel_model(
                        log_mel, batch.segments, labels, label_lengths,
                        frozen_blocks=frozen_blocks(config, step), masked=masked,
                    )  # fmt: skip
                (output.loss_sum / max(global_labels, 1)).backward()
            loss_sum += output.loss_sum.detach()
            sums.add(loss=output.loss_sum, impossible=output.num_impossible, labels=int(label_lengths.sum()))
            sums.add(
                frames=int(batch.segments.length.sum()), row_frames=batch.log_mel.shape[0] * batch.log_mel.shape[1]
            )

        # ---- Optimizer step, skipped on all ranks if a loss or the gradient is not finite ----
        observers.before_update(step)
        result = guard.apply(step, parallel_model, optimizer, loss_sum, config.optimizer.clip_norm, world, samples)
        if result.applied:
            averages.update(parallel_model)
        audio_frames = sum(int(batch.segments.length.sum()) for batch in micro_batches)
        throughput.count(audio_frames / frames_per_second)
        data_state = micro_batches[-1].state

        # ---- Logging ----
        is_last = step == config.run.steps
        if step % config.run.log_every == 0 or is_last or result.spike:
            sums.add(quarantined=len(loader.quarantined))
            values = {"learning_rate": rates[0], "encoder_learning_rate": rates[-1]}
            values |= {"grad_norm": result.grad_norm, "spike": result.spike}
            values |= interval_means(sums.totals(world)) | throughput.interval(step)
            metrics.write(step, values)
            if world.is_main:
                print(console_line(step, config.run.steps, values), flush=True)

        # ---- Validation, export of the best model, and checkpoint ----
        is_validation = step % config.validation.every_steps == 0 or is_last
        if is_validation:
            watchdog.long()
            decoder = GreedyCTC(model.log_probs)
            for kind in averages.validated(parallel_model, step):
                scores = validate(model, decoder, heldout, tokenizer.decode, inference, frames_per_second, world)
                dev_rates = {"dev_wer": scores.wer, "dev_cer": scores.cer}
                metrics.write(step, dev_rates, kind=kind)
                if dev_rates[f"dev_{config.validation.best_by}"] < best.rate:
                    best = Best(dev_rates[f"dev_{config.validation.best_by}"], step)
                    export(run, step, parallel_model, tokenizer, dev_rates, "ctc", writer)
        if is_validation or step % config.checkpoint.every_steps == 0:
            watchdog.long()
            throughput.record(step, metrics)
            save(run, step, parallel_model, optimizer, data_state, best, averages, writer)
        if is_validation:  # printed once export and checkpoint are on disk
            line = f"step {step}/{config.run.steps}  dev WER {scores.wer:.2%}  CER {scores.cer:.2%}"
            example = f"    reference:  {scores.reference}\n    hypothesis: {scores.hypothesis[:200]}"
            writer.submit(print, f"{line}\n{example}", flush=True)

    # ---- End of the run, or a stop ----
    watchdog.long()
    batches.close()  # ends the workers, even hung ones
    if step < config.run.steps:
        throughput.record(step, metrics)
        save(run, step, parallel_model, optimizer, data_state, best, averages, writer)
    writer.close()
    if step < config.run.steps:
        stop.leave_requeue_marker()
        if world.is_main:
            print(f"stopped after step {step} ({stop.reason}); the same command continues", flush=True)
    elif world.is_main:
        rate = f"{config.validation.best_by} {best.rate:.2%}"
        print(f"done: best dev {rate} at step {best.step}: {folder.export}", flush=True)
    observers.close()
    metrics.close()
    watchdog.close()
    folder.close()
    world.close()


def interval_means(totals: dict[str, float]) -> dict[str, float]:
    """Means over a log interval and all ranks; the loss is in nats per label."""
    return {
        "quarantined": int(totals["quarantined"]),
        "loss": totals["loss"] / max(totals["labels"], 1),
        "impossible_segments": totals["impossible"],
        "row_fill": totals["frames"] / max(totals["row_frames"], 1),
    }


def main() -> None:
    from pipelines.preview import parse_or_preview  # --dry_run and --fit, which do not train

    if config := parse_or_preview(Config, __doc__):
        train(config)


if __name__ == "__main__":
    run_main(main, console_may_vanish=True)
